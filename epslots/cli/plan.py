"""``epslots plan``: the memory plan of one rank, and of other numbers of slots, without loading a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional

import msgspec
import typer

from epslots.cli.column_table import Columns, column_table
from epslots.cli.find_model import FoundModel, find_model
from epslots.cli.option_groups import takes_groups
from epslots.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    ExpertFormatOption,
    HostMemoryOption,
    KvTokensOption,
    SlotFormatOption,
    SlotsOption,
)
from epslots.cli.plan_groups import GroupPlanOptions, groups_as_json, print_groups
from epslots.config import (
    CACHE_SETTINGS,
    DEFAULT_BATCH_TOKENS,
    DEFAULT_KV_TOKENS,
    DEFAULT_REQUESTS,
    EngineConfig,
    load_config,
)
from epslots.errors import DoesNotFitError
from epslots.formats.usual_forms import USUAL_FORMS
from epslots.models.host_memory import HostMemoryPlan, plan_host_memory
from epslots.models.known_shapes import KNOWN_SHAPES
from epslots.models.memory_plan import MemoryPlan, PlannedDevice, plan_memory
from epslots.models.memory_report import advice, alternatives, largest_fit, plan_items
from epslots.models.model_shape import ModelShape
from epslots.models.quotas import describe_quotas
from epslots.streams import table_console
from epslots.units import format_bytes, format_count, parse_bytes, parse_kv_tokens, parse_slots

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_DOES_NOT_FIT = 1
_PLAIN_WIDTH = 140


@dataclass(frozen=True)
class WorkOptions:
    """The work of a rank."""

    PANEL: ClassVar[str] = "The work"

    ranks: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="Ranks; those of a group share the experts. Default: 1, or as many as --groups and roles need."
        ),
    ] = None
    kv_tokens: KvTokensOption = str(DEFAULT_KV_TOKENS)
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that a rank runs at a time.")] = DEFAULT_REQUESTS
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step of a rank.")] = DEFAULT_BATCH_TOKENS
    cache: Annotated[
        str, typer.Option(help=f"How requests are kept: {', '.join(CACHE_SETTINGS)} (the cache that serves the model best).")
    ] = "auto"
    capture: Annotated[
        bool, typer.Option("--capture/--no-capture", help="On a GPU, leave room for CUDA graphs of decoding.")
    ] = True

    @property
    def engine(self) -> EngineConfig:
        """The settings of the rank's engine."""
        return EngineConfig(
            kv_tokens=parse_kv_tokens(self.kv_tokens),
            max_requests=self.max_requests,
            max_batch_tokens=self.max_batch_tokens,
            cache=self.cache,
            capture=self.capture,
        )


@takes_groups
def plan(
    work: WorkOptions,
    groups: GroupPlanOptions,
    model: Annotated[
        Optional[str],
        typer.Option(
            "--model",
            "-m",
            help=f"Checkpoint folder with safetensors, or a known model: {', '.join(KNOWN_SHAPES)}. "
            f"Default: the small model shipped here.",
        ),
    ] = None,
    slots: SlotsOption = "auto",
    memory: Annotated[
        Optional[str],
        typer.Option("--memory", help="Memory of one rank, such as 80GiB. Default: the free memory of this machine's device."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    host_memory: HostMemoryOption = None,
    slot_format: SlotFormatOption = "auto",
    expert_format: ExpertFormatOption = None,
    stored_format: Annotated[
        Optional[str],
        typer.Option("--stored-format", help=f"Of a known model, the format of its checkpoint: {', '.join(USUAL_FORMS)}."),
    ] = None,
    attn_implementation: AttentionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Plan one rank's memory, without loading a model.

        epslots plan --model deepseek-v3 --ranks 8 --slots 8 --memory 80GiB
        epslots plan --model ./Qwen3-30B-A3B --memory 24GiB --max-requests 64 --device cuda
        epslots plan --model gpt-oss-120b --stored-format mxfp4 --memory 24GiB

    Of a checkpoint, only configuration and headers are read. A known model is planned unquantised,
    or in slots that are packed as checkpoints of a --stored-format mostly are.
    Exit code 0 if it fits, 1 if it doesn't, 2 for settings that are not allowed.

    With --groups, or with roles, the same memory of each rank is planned, and what a role has room for:

        epslots plan --model qwen3-30b-a3b --prefill-ranks 2 --decode-ranks 6 --memory 80GiB --kv-tokens 65536

    Hand-overs' costs are shown within a node and between nodes, for --hand-over-tokens.

    --host-memory bounds the RAM of a node that has all the ranks: the plan then says how much is read from the disk.

    With --memory, --device may be one that this machine lacks. It decides more than the memory:
    whether a kernel there computes from packed slots,
    and for a GPU the next layer's experts are predicted.
    """
    setting, engine, division = parse_slots(slots), work.engine, groups.division(work.ranks)
    config = load_config(
        dtype=dtype,
        **msgspec.structs.asdict(engine),
        host_memory=host_memory,
        slot_format=slot_format,
        expert_format=expert_format,
        attn_implementation=attn_implementation,
    )
    if memory is None:
        memory_bytes, memory_note = _device_memory(device)
    else:
        memory_bytes, memory_note = parse_bytes(memory, "memory"), "--memory"
    kind = _device_kind(device, here=memory is None)
    found = find_model(model, kind, config, stored_format)
    if memory is None and kind == "cpu" and config.host_memory_bytes is not None:
        memory_bytes -= min(found.shape.expert_bytes, config.host_memory_bytes)
        memory_note += ", less --host-memory"
    try:
        result = plan_memory(
            found.shape,
            setting,
            PlannedDevice(kind=kind, memory_bytes=memory_bytes, memory_note=memory_note, fetches=config.host_memory is None),
            ranks=division.group_size,
            engine=engine,
            predictor_bytes=found.predictor_bytes,
        )
    except DoesNotFitError as error:
        typer.echo(f"doesn't fit: {error}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT) from error
    host = None if config.host_memory_bytes is None else plan_host_memory(result, config.host_memory_bytes, division.ranks)
    if as_json:
        typer.echo(json.dumps(_as_json(result, found, host) | groups_as_json(result, division, groups), indent=2))
    else:
        console = table_console(_PLAIN_WIDTH)
        _print_tables(console, result, found, host)
        if division.groups > 1:
            print_groups(console, result, division, groups)
    if result.free_bytes is None:
        return
    if not result.fits:
        typer.echo(f"doesn't fit: short of {format_bytes(-result.free_bytes)}. {advice(result)}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT)
    each = "the rank has" if division.ranks == 1 else f"each of {division.ranks} ranks has"
    free, store = format_bytes(result.free_bytes), format_bytes(result.host_store_bytes)
    typer.echo(f"fits: {each} {free} to spare, and a node keeps a host store of {store}.", err=True)


def _device_kind(device: str | None, *, here: bool) -> str:
    """``"cuda"`` or ``"cpu"``.

    Args:
        here: whether it is one of this machine.

    Raises:
        ConfigError: it is neither, or isn't here.
    """
    kind = (device or "").partition(":")[0]
    if not here and kind in ("cpu", "cuda"):
        return kind
    from epslots.devices import resolve_device

    return resolve_device(device).type


def _device_memory(device: str | None) -> tuple[int, str]:
    """The free bytes of this machine's device, and the limit that leaves no more."""
    from epslots.devices import memory_limit, resolve_device

    limit = memory_limit(resolve_device(device))
    return limit.free_bytes, str(limit)


_SHAPE_FIELDS = {"model": "name", "dtype": "dtype", "parameters": "parameters", "experts": "num_experts", "top_k": "top_k"}
_PLAN_FIELDS = (
    "ranks",
    *("slot_bytes", "kv_bytes", "workspace_bytes", "unpacking_bytes", "predictor_bytes"),
    *("captured_bytes", "communication_bytes", "reserve_bytes", "total_bytes"),
    *("memory_bytes", "free_bytes", "fits", "host_store_bytes"),
    *("resident_share", "slots_per_expert", "all_resident"),
)
_HOST_FIELDS = ("host_memory_bytes", "ram_bytes", "disk_bytes", "read_bytes_per_token")
_ENGINE_FIELDS = ("kv_tokens", "max_requests", "max_batch_tokens")
_ALTERNATIVE_FIELDS = ("slot_bytes", "total_bytes", "resident_share", "fits")


def _as_json(result: MemoryPlan, found: FoundModel, host: HostMemoryPlan | None) -> dict[str, Any]:
    """Everything in the tables, in bytes and as numbers."""
    largest = largest_fit(result)
    return {
        **{name: getattr(result.shape, field) for name, field in _SHAPE_FIELDS.items()},
        "moe_layers": len(result.shape.layers),
        "slots": str(result.setting),
        "slot_note": result.shape.slot_note,
        "quotas": list(result.quotas),
        "dense_bytes": result.shape.dense_bytes,
        **{name: getattr(result, name) for name in _PLAN_FIELDS},
        "memory_note": result.device.memory_note,
        **{name: getattr(result.engine, name) for name in _ENGINE_FIELDS},
        "most_kv_tokens": result.most_kv_tokens,
        "cache": result.shape.cache_kind,
        "token_bytes": result.shape.token_bytes,
        "request_bytes": result.shape.request_bytes,
        "checkpoint_bytes": found.checkpoint_bytes,
        **{name: None if host is None else getattr(host, name) for name in _HOST_FIELDS},
        "read_bytes_per_s": found.read_speed,
        "alternatives": [_alternative_as_json(other) for other in alternatives(result)],
        "largest_fit": None if largest is None else _alternative_as_json(largest),
    }


def _alternative_as_json(other: MemoryPlan) -> dict[str, Any]:
    return {"slots": str(other.setting), **{name: getattr(other, name) for name in _ALTERNATIVE_FIELDS}}


def _print_tables(console: Console, result: MemoryPlan, found: FoundModel, host: HostMemoryPlan | None) -> None:
    console.print(_plan_table(result, found, host))
    console.print()
    console.print(_alternatives_table(result))


def _plan_table(result: MemoryPlan, found: FoundModel, host: HostMemoryPlan | None) -> Table:
    from rich.table import Table

    shape = result.shape
    table = Table(
        title=f"{shape.name} in {shape.dtype}, slots={result.setting}: memory of one rank",
        title_justify="left",
        caption=f"{_describe_model(shape)}. {_describe_residency(result)}",
        caption_justify="left",
    )
    table.add_column("item")
    table.add_column("size", justify="right")
    table.add_column("of memory", justify="right")
    table.add_column("from")

    def row(name: str, size: int, note: str = "") -> None:
        share = f"{size / result.memory_bytes:.1%}" if result.memory_bytes else "-"
        table.add_row(name, format_bytes(size), share, note)

    for name, size, note in plan_items(result):
        row(name, size, note)
    table.add_section()
    row("needed", result.total_bytes)
    if result.memory_bytes is not None and result.free_bytes is not None:
        row("available", result.memory_bytes, result.device.memory_note)
        row("free" if result.fits else "short of", abs(result.free_bytes))
    table.add_section()
    packed = ", packed" if any(layer.packed is not None for layer in shape.layers) else ""
    where = "in RAM or a mapped file" if host is None else "in a file"
    note = f"all {shape.num_experts:,} experts{packed}, once for each node, {where}"
    table.add_row("host store", format_bytes(result.host_store_bytes), "", note)
    if host is not None:
        table.add_row("  in RAM", format_bytes(host.ram_bytes), "", "those that are fetched most, by --host-memory")
        table.add_row("  on disk", format_bytes(host.disk_bytes), "", _describe_reads(host, found.read_speed))
    if found.checkpoint_bytes is not None:
        table.add_row("checkpoint", format_bytes(found.checkpoint_bytes), "", "its weight files")
    return table


def _describe_reads(host: HostMemoryPlan, read_speed: float | None) -> str:
    """The disk's cost for a token, were all experts used equally often."""
    text = f"{format_bytes(host.read_bytes_per_token)} read for a token if experts are used evenly, less if not"
    if read_speed is None:
        return f"{text}; the disk's speed is measured once the store is built"
    seconds = host.read_bytes_per_token / read_speed
    return f"{text}: {1000 * seconds:.3g} ms at the {format_bytes(read_speed)}/s measured now"


def _describe_model(shape: ModelShape) -> str:
    least, most = (pick(layer.num_experts for layer in shape.layers) for pick in (min, max))
    experts = f"{most}" if least == most else f"{least} to {most}"
    return (
        f"{format_count(shape.parameters)} weights; {len(shape.layers)} MoE layers of {experts} experts, "
        f"{shape.top_k} for each token"
    )


def _describe_residency(result: MemoryPlan) -> str:
    """The share of the experts that finds a slot, on a rank and on all ranks together."""
    text = f"A rank's slots hold {result.resident_share:.1%} of the experts"
    if result.ranks == 1:
        return f"{text}."
    where = "every expert can be in a slot somewhere" if result.all_resident else "some experts are in no slot at a time"
    return f"{text}; {result.ranks} ranks have {result.slots_per_expert:.3g} slots for each expert: {where}."


def _alternatives_table(result: MemoryPlan) -> Table:
    others = {other.setting: other for other in alternatives(result)}
    largest = largest_fit(result)
    if largest is not None and largest.resident_share < 1:
        others[largest.setting] = largest

    def name(other: MemoryPlan) -> str:
        notes = ["all resident"] if other.resident_share == 1 else []
        notes += ["the most that fits"] if other is largest else []
        return f"{other.setting}" + (f" ({', '.join(notes)})" if notes else "")

    def free(other: MemoryPlan) -> str:
        return "-" if result.memory_bytes is None else format_bytes(result.memory_bytes - other.total_bytes)

    columns: Columns[MemoryPlan] = (
        ("slots", name),
        ("slots of a layer", lambda other: describe_quotas(other.quotas).removesuffix(" per layer")),
        ("pool", lambda other: format_bytes(other.slot_bytes)),
        ("needed", lambda other: format_bytes(other.total_bytes)),
        ("free", free),
        ("fits", lambda other: "yes" if other.fits else "no"),
    )
    by_size = sorted(others.values(), key=lambda other: other.slot_bytes)
    return column_table("other numbers of slots, all else as above", columns, by_size)
