"""``epslots simulate``: what a cluster's steps would take, from a routing trace and a machine's bandwidths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import typer

from epslots.cli.trace import slots_of_layers
from epslots.compiled import prepare
from epslots.errors import ConfigError
from epslots.given_files import read_given
from epslots.placement.placement import MOST_RANKS
from epslots.placement.placement_file import read_placement
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.progress import counting
from epslots.simulation.simulate import GROUP_SIZE, Outcome, RecordedTraffic, SimulatedCluster, simulate
from epslots.simulation.timing import DEFAULT_DEVICE, DEVICES, Timing, timing_of
from epslots.streams import table_console
from epslots.units import format_bytes, parse_bytes

_MOST_LANES = 2**22
_MOST_TIMING_BYTES = 1 << 20


def simulate_command(
    trace: Annotated[Path, typer.Argument(help="A routing trace (.npz), as `trace record` writes it.")],
    ranks: Annotated[int, typer.Option(min=1, max=MOST_RANKS)] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks are on.")] = 1,
    slots: Annotated[str, typer.Option("--slots", "-s", help="Slots of each layer on each rank: 16, or 25%.")] = "25%",
    batch: Annotated[str, typer.Option(help="Sequences of each rank at a time; several (1,8,64) give a curve.")] = "8",
    steps: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 200,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before these.")] = 50,
    policy: Annotated[str, typer.Option(help=f"Eviction policy: {', '.join(POLICIES)}.")] = DEFAULT_POLICY,
    group_size: Annotated[int, typer.Option(min=1, help="Most ranks of an expert-parallel group.")] = GROUP_SIZE,
    placement: Annotated[Optional[Path], typer.Option(help="A .placement to begin with, for the ranks of a group.")] = None,
    controller: Annotated[
        bool, typer.Option("--controller/--static", help="Decide on placements as traffic goes on.")
    ] = False,
    window_steps: Annotated[int, typer.Option(min=1, help="With --controller: steps of a window of telemetry.")] = 50,
    machine: Annotated[str, typer.Option(help=f"Bandwidths: {', '.join(DEVICES)}.")] = DEFAULT_DEVICE,
    timing: Annotated[
        Optional[Path], typer.Option(help="Measured times instead, as JSON (epslots.simulation.timing.Timing, nanoseconds).")
    ] = None,
    expert_bytes: Annotated[str, typer.Option(help="An expert's size; default: 3 x 2048 x 768 weights in bf16.")] = "9MiB",
    row_bytes: Annotated[str, typer.Option(help="A hidden state's size; default: 2048 in bf16.")] = "4KiB",
    layer_us: Annotated[float, typer.Option(min=0, max=1e6, help="Microseconds of a layer besides its experts.")] = 40.0,
    token_us: Annotated[float, typer.Option(min=0, max=1e6, help="The same for each token of a rank.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Step times, balance, hit rates and bytes of a cluster that needn't exist, from 1 rank to 1,024.

    The planner, the caches and the placements are those that ranks run; only time is a model. Each rank decodes a batch of the
    trace's sequences, a token of each in a step. Data sheets' bandwidths rank choices; to predict a machine, give --timing.
    """
    if policy not in POLICIES:
        raise ConfigError(f"--policy {policy!r}: allowed: {', '.join(POLICIES)}")
    if machine not in DEVICES:
        raise ConfigError(f"--machine {machine!r}: allowed: {', '.join(DEVICES)}")
    batches = [_positive("--batch", given) for given in batch.split(",")]
    if max(batches) * ranks > _MOST_LANES:
        raise ConfigError(f"--batch {max(batches)} on {ranks} ranks: allowed: {_MOST_LANES} sequences in all")
    size = parse_bytes(expert_bytes)
    times = timing_of(DEVICES[machine], size, parse_bytes(row_bytes), round(layer_us * 1e3), round(token_us * 1e3))

    from epslots.trace import Trace

    recorded = Trace.load(trace)
    quota_L = slots_of_layers(slots, recorded.num_experts)
    first = None if placement is None else read_placement(placement)
    if first is not None and (given := set(first.quota_LR.sum(0).tolist())) != {int(quota_L.sum())}:
        raise ConfigError(
            f"{placement} is for {sorted(given)} slots on a rank, all layers together; --slots {slots} is {quota_L.sum()}"
        )
    cluster = SimulatedCluster(
        ranks=ranks,
        nodes=nodes,
        quota_L=quota_L,
        timing=times if timing is None else _read_timing(timing),
        expert_bytes=size,
        policy=POLICIES[policy],
        group_size=group_size,
        placement=first,
        window_steps=window_steps if controller else 0,
    )
    prepare()
    traffic = RecordedTraffic(recorded.expert_ids, recorded.starts, recorded.num_experts)
    with counting("simulate", len(batches) * (steps + warm_up) * len(cluster.groups())) as advance:
        outcomes = [simulate(traffic, cluster, one, steps, warm_up, advance) for one in batches]
    if as_json:
        settings = {"trace": str(trace), "policy": policy, "expert_bytes": size, "timing": cluster.timing}
        typer.echo(json.dumps(msgspec.to_builtins({**settings, "curve": outcomes}), indent=1))
    else:
        _print(outcomes)


def _positive(name: str, given: str) -> int:
    if not given.strip().isdecimal() or not 0 < int(given) < 10**6:
        raise ConfigError(f"{name} {given!r}: allowed: numbers from 1, separated by commas")
    return int(given)


def _read(path: Path) -> bytes:
    try:
        return read_given(path, _MOST_TIMING_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error


def _read_timing(path: Path) -> Timing:
    try:
        return msgspec.json.decode(_read(path), type=Timing)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path} holds no timing: {error}") from error


def _print(outcomes: Sequence[Outcome]) -> None:
    from rich.table import Table

    console = table_console(150)
    first = outcomes[0]
    title = f"{first.ranks} ranks on {first.nodes} nodes in groups of {first.ranks // first.groups}: {first.steps} steps"
    table = Table(title=title, title_justify="left", caption_justify="left")
    headings = (
        "batch of a rank",
        "P50 ms",
        "P99 ms",
        "tokens/s",
        "balance",
        "hit rate",
        "from host",
        "from peers",
        "placements",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(*_cells(outcome))
    table.caption = "from host, from peers: bytes a rank fetches in a step, for placements included"
    console.print(table)


def _cells(outcome: Outcome) -> list[Any]:
    parts, share = outcome.bytes_by_source, outcome.ranks * outcome.steps
    return [
        str(outcome.batch),
        f"{outcome.step_ms.p50:.3f}",
        f"{outcome.step_ms.p99:.3f}",
        f"{outcome.tokens_per_s:,.0f}",
        f"{outcome.balance:.3f}",
        f"{outcome.hit_rate:.1%}",
        format_bytes((parts["host"] + parts["host_for_placements"]) // share),
        format_bytes((parts["peers"] + parts["peers_for_placements"]) // share),
        str(outcome.placements),
    ]
