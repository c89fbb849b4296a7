"""``epslots.load``: a checkpoint in, a transformers model out whose experts run from slots.

In order: find and check the files; plan memory and refuse what can't fit; load the dense part; open the node's host store,
building it if need be; allocate the slots; hand each experts module its runner; fill the slots if every expert has one.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import transformers
import xxhash
from torch import nn
from transformers import PreTrainedModel

from epslots.cache.copy_engine import make_copy_engine
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.node_store import check_room, open_node_store, resolve_store_kind
from epslots.cache.pinning import pin_store
from epslots.cache.slot_pool import SlotPool
from epslots.compiled import prepare, prepare_in_background
from epslots.devices import memory_limit, resolve_device
from epslots.errors import ConfigError, UnsupportedModelError
from epslots.group.join import announce_failure, ranks_here, start_rank
from epslots.host_limits import total_memory
from epslots.layout import LayerSpec, RecordLayout
from epslots.models.batch_invariance import is_batch_invariant, make_batch_invariant
from epslots.models.checkpoint import Checkpoint, CheckpointSource
from epslots.models.expert_reader import ExpertReader, pack_layers
from epslots.models.experts import RUNNER, experts_modules
from epslots.models.measure_shape import shape_of_model
from epslots.models.memory_plan import MemoryPlan, Workload, plan_memory
from epslots.models.memory_report import check_fits
from epslots.models.model_shape import ModelShape
from epslots.models.opening import load_dense, open_model
from epslots.moe.cpu_experts import CpuExperts
from epslots.moe.expert_cache import ExpertCache
from epslots.moe.expert_compute import ExpertCompute
from epslots.moe.grouped_gemm import BatchInvariantGemm, GroupedGemm
from epslots.moe.moe_layer import MoELayer
from epslots.placement.placement import Placement
from epslots.placement.placement_file import read_placement
from epslots.planner.cache_policy import DEFAULT_POLICY, Policy, policy_name, resolve_policy
from epslots.planner.cost_model import Costs
from epslots.planner.use_history import UseHistory
from epslots.prefetch.setup import attach_prefetchers, planned_bytes
from epslots.private_files import default_cache_dir
from epslots.progress import ProgressDisplay
from epslots.runtime import Runtime, attach, runtime_of
from epslots.telemetry import Telemetry
from epslots.transport.rendezvous import find_transport
from epslots.transport.transport import Transport
from epslots.units import PrefetchSetting, SlotsSetting, format_bytes, parse_prefetch, parse_slots

logger = logging.getLogger(__name__)

# Part of every store's key: raise it when the records of an unchanged checkpoint would come out differently.
RECORDS_VERSION = 2
DEFAULT_KV_TOKENS = 4096
# Seconds that ranks wait for each other while they load: one may build the store that another has.
LOAD_DEADLINE_S = 3600.0
# Whether the host's CPU computes missing experts where that costs less than fetching them; "auto" = for a GPU.
HOST_COMPUTE_SETTINGS = ("auto", "on", "off")


def load(
    path_or_id: str | os.PathLike[str],
    *,
    slots: int | str | SlotsSetting = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    policy: str | Policy = DEFAULT_POLICY,
    host_store: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    kv_tokens: int = DEFAULT_KV_TOKENS,
    progress: bool | None = None,
    group: dist.ProcessGroup | Transport | None = None,
    costs: Costs | None = None,
    placement: Placement | str | os.PathLike[str] | None = None,
    deadline_s: float | None = None,
    link: str | None = None,
    prefetch: str | bool | PrefetchSetting = "auto",
    predictor: str | os.PathLike[str] | None = None,
    execute_predicted: bool = False,
    host_compute: str = "auto",
    batch_invariant: bool = False,
    subfolder: str = "",
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    attn_implementation: str | None = None,
    **unknown: object,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts checkpoint with a bounded number of expert slots.

    With several ranks, each calls this; they become one model, whose experts are spread over all ranks' slots. Dense weights
    are on every rank, batches are each rank's own, and every forward pass is a step that all ranks make together
    (``sync_ranks`` and ``generate(synced_gpus=True)`` see to that).

    Args:
        path_or_id: a checkpoint folder with safetensors, or a hub id.
        slots: an int (per MoE layer), ``"25%"`` (of each layer's experts), ``"12GiB"`` (bytes of the whole pool) or
            ``"auto"`` (what is left beside dense weights, KV cache, workspace, predictor and reserve).
        device: where the model computes; the current GPU if there is one, else the CPU.
        dtype: what to compute in; ``"auto"`` is the checkpoint's own, as in transformers (but bfloat16 for a quantised one).
        policy: eviction policy by name (``eviction.POLICIES``), or a function of a ``UseHistory``.
        host_store: ``"file"`` (a mapped file in ``cache_dir``, kept for the next start) or ``"memory"`` (shared memory of the
            node, gone with its last user); by default memory on a GPU where it fits, because it can be pinned, else file.
        cache_dir: folder of the host store; by default the user's cache folder.
        kv_tokens: tokens of KV cache that the memory plan leaves room for.
        progress: show progress bars; by default when standard error is a terminal.
        group: the ranks to compute with; by default all of torch.distributed's default group, which is formed when the process
            was started by ``torchrun`` and hasn't done so, and none otherwise. Ranks may have different numbers of slots.
        costs: what things cost, by which ranks divide their work; measured if not given. The same on all ranks.
        placement: where experts live from the start: a file (``epslots placement plan``) or a ``Placement``, for as many ranks
            and slots as there are; the same on all ranks. By default homes are dealt by slots.
        link: an emulated link between host and device, such as ``"8GB/s,20us"``, to see on a CPU how fetches overlap with
            computing. By default the device's own; on a CPU, fetches take place at once.
        prefetch: fetch what the next layer is expected to need while this one computes: ``"auto"`` (where a link carries it
            meanwhile), ``"off"``, or the bytes a rank may fetch in a step before nothing more is fetched ahead (``"64MiB"``).
        predictor: what tells of the next layer: a file by ``epslots predict fit``; by default the one that lies beside the
            checkpoint, if there is one, else the next layer's router.
        execute_predicted: execute the experts that are predicted instead of those that the model's router chooses, in all
            layers but the first. **The outputs are no longer the model's own.**
        host_compute: let the host's CPU compute a missing expert, from the host store, where that costs less than fetching it:
            ``"auto"`` (for a GPU), ``"on"`` or ``"off"``. ``costs`` that are given must say what it costs.
        batch_invariant: compute every token in the same bits whatever is computed beside it: the batch, the slots, the ranks
            and their number. Slower. Experts and dense layers hold it in every forward pass; attention in an ``Engine``.
        deadline_s: how long a rank waits for the others in one operation before it gives them up as lost. It has to cover what
            a rank does between two forward passes. By default 60 (or as ``group`` has it, if that is a transport of ours);
            loading has an hour.
        subfolder: folder of the checkpoint that holds config.json and the weights.
        variant: of the weight files: ``"fp16"`` reads ``model.fp16.safetensors`` or ``model.safetensors.index.fp16.json``.
        revision: branch, tag or commit of a hub id.
        token: of the hub, for a hub id.
        attn_implementation: as in transformers, such as ``"sdpa"``.
        unknown: there are no others: what ``from_pretrained`` would take besides is refused, never ignored.

    Returns:
        The transformers model, in evaluation mode: ``generate``, ``forward`` and all else as usual.

    Raises:
        ConfigError: a setting is not one of those allowed.
        CheckpointError: files are missing, damaged, or of a refused kind.
        UnsupportedModelError: the model's experts can't be run from slots.
        DoesNotFitError: the memory plan exceeds the device; no weight was read.
        StoreError: the host store can't be built or trusted.
        GroupError: ranks don't match, or one is lost.
    """
    if host_compute == "on" and costs is not None and not costs.computes_on_host:
        raise ConfigError("host_compute='on', but costs don't say what it costs: give host_expert and host_pair, or no costs")
    if unknown.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code: epslots never runs code from a checkpoint")
    if unknown:
        allowed = ", ".join(name for name in inspect.signature(load).parameters if name != "unknown")
        raise ConfigError(
            f"{', '.join(sorted(unknown))}: epslots sets this itself, or has no such setting; allowed: {allowed}"
        )
    for name, switch in (("execute_predicted", execute_predicted), ("batch_invariant", batch_invariant)):
        if not isinstance(switch, bool):
            raise ConfigError(f"{name}={switch!r}: allowed: True, False")
    if not isinstance(attn_implementation, str | None):
        raise ConfigError(f"attn_implementation={attn_implementation!r}: allowed: a name, such as 'sdpa'")
    source = CheckpointSource(path_or_id, subfolder, variant, revision, token)
    target = resolve_device(device)
    transport = find_transport(group, target)
    # Of several ranks the first speaks for all.
    display = ProgressDisplay(False if progress is None and transport is not None and transport.rank else progress)
    if deadline_s is not None and not deadline_s > 0:
        raise ConfigError(f"deadline_s={deadline_s!r}: allowed: seconds, more than 0")
    start = read_placement(placement) if isinstance(placement, str | os.PathLike) else placement
    if start is not None:
        start.check()

    def load_here(neighbours: int) -> PreTrainedModel:
        return load_alone(
            source,
            slots=slots,
            device=target,
            dtype=dtype,
            policy=policy,
            host_store=host_store,
            cache_dir=cache_dir,
            kv_tokens=kv_tokens,
            neighbours=neighbours,
            display=display,
            link=link,
            prefetch=prefetch,
            predictor=predictor,
            execute_predicted=execute_predicted,
            host_compute=host_compute,
            batch_invariant=batch_invariant,
            attn_implementation=attn_implementation,
        )

    if transport is None:
        model = load_here(neighbours=1)
        start_rank(model, None, settings={}, costs=costs, display=display, placement=start)
        return model
    deadline_s = transport.deadline_s if deadline_s is None else deadline_s
    transport.deadline_s = max(LOAD_DEADLINE_S, deadline_s)
    try:
        neighbours = ranks_here(transport)
        try:
            model = load_here(neighbours)
        except Exception as error:
            announce_failure(transport, error)
            raise
        shared = shared_settings(model, policy)
        start_rank(model, transport, settings=shared, costs=costs, display=display, placement=start)
    except BaseException as error:
        transport.abort(f"rank {transport.rank} could not load: {type(error).__name__}: {error}")
        raise
    transport.deadline_s = deadline_s
    return model


def shared_settings(model: PreTrainedModel, policy: str | Policy) -> dict[str, str]:
    """What ``load`` was told that must be equal on all ranks, for ``ranks.join``."""
    runtime = runtime_of(model)
    return {
        "policy": policy_name(policy),
        "device": model.device.type,
        "dtype": str(model.dtype),
        "predictions": runtime.foresight.settings,
        "host_compute": str(runtime.host_compute),
        "batch_invariant": str(is_batch_invariant(model)),
        "fetches": "meanwhile" if any(loader.link.concurrent for loader in runtime.movers) else "at once",
    }


def load_alone(
    source: CheckpointSource | str | os.PathLike[str],
    *,
    slots: int | str | SlotsSetting,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    policy: str | Policy,
    host_store: str | None,
    cache_dir: str | os.PathLike[str] | None,
    kv_tokens: int,
    neighbours: int,
    display: ProgressDisplay,
    link: str | None = None,
    prefetch: str | bool | PrefetchSetting = "auto",
    predictor: str | os.PathLike[str] | None = None,
    execute_predicted: bool = False,
    host_compute: str = "auto",
    batch_invariant: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """``load`` without a group, whatever torch.distributed's state: for a rank that joins one by itself (``ranks.join``).

    Args:
        source: the checkpoint.
        neighbours: ranks that share the node's RAM, this one included.
        display: shows the progress.
        others: as ``load`` has them.
    """
    setting, policy_function, target = parse_slots(slots), resolve_policy(policy), resolve_device(device)
    ahead = parse_prefetch(prefetch)
    if host_compute not in HOST_COMPUTE_SETTINGS:
        raise ConfigError(f"host_compute={host_compute!r}: allowed: {', '.join(HOST_COMPUTE_SETTINGS)}")
    on_host = host_compute == "on" or (host_compute == "auto" and target.type == "cuda" and not batch_invariant)
    if batch_invariant:
        _check_batch_invariant(target, execute_predicted=execute_predicted, on_host=on_host)
    store_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    opened = open_model(source, dtype)
    checkpoint, skeleton, layers = opened.checkpoint, opened.skeleton, opened.layers
    linked = target.type == "cuda" or link is not None
    if linked:  # fewer bytes cross it; a CPU would unpack for nothing
        layers = pack_layers(checkpoint, skeleton, layers)
    manifest = Manifest(_store_key(checkpoint, layers, opened.config), checkpoint.name, layers)
    store_bytes = StoreShape(manifest).nbytes
    kind = resolve_store_kind(host_store or _default_store_kind(target, store_bytes))
    limit = memory_limit(target)
    memory_bytes, memory_note = limit.free_bytes, str(limit)
    if target.type == "cpu":
        # Slots, and a store in memory, share one RAM, and so do the node's ranks.
        store_in_memory = store_bytes if kind == "memory" else 0
        memory_bytes = (memory_bytes - store_in_memory) // neighbours
        memory_note += f", less the host store's {format_bytes(store_in_memory)}" if store_in_memory else ""
        memory_note += f", shared by {neighbours} ranks" if neighbours > 1 else ""
    predictor_bytes = planned_bytes(
        skeleton,
        checkpoint.content,
        checkpoint.folder,
        device=target,
        dtype=opened.dtype,
        fetches=ahead.on and linked,
        predictor=predictor,
        execute_predicted=execute_predicted,
    )
    plan = plan_memory(
        _measure(skeleton, checkpoint.name, opened.dtype, layers),
        setting,
        memory_bytes=memory_bytes,
        workload=Workload(kv_tokens=kv_tokens),
        predictor_bytes=predictor_bytes,
        memory_note=memory_note,
    )
    check_fits(plan)
    check_room(manifest, kind=kind, cache_dir=store_dir)
    prepare_in_background()

    model = load_dense(opened, device=target, show_progress=display.shown, attn_implementation=attn_implementation)
    store = open_node_store(
        manifest,
        lambda: ExpertReader(checkpoint, model, layers),
        kind=kind,
        cache_dir=store_dir,
        start_progress=display,
    )
    if target.type == "cuda":
        pin_store(store, display, target)
    prepare(shown=display.shown)  # here, and not in the first step
    if batch_invariant:
        make_batch_invariant(model)
    runtime = _build_runtime(model, checkpoint.content, layers, plan, store, policy_function, target, link)
    foresight, told = attach_prefetchers(
        model, runtime.runners, checkpoint.folder, prefetch=ahead, predictor=predictor, execute_predicted=execute_predicted
    )
    attach(model, replace(runtime, foresight=foresight, predictor=told, host_compute=on_host))
    runtime.fill(runtime.complete_layers(), display)
    return model


def _check_batch_invariant(device: torch.device, *, execute_predicted: bool, on_host: bool) -> None:
    """Refuse settings that ``batch_invariant`` can't hold with."""
    if execute_predicted:
        raise ConfigError(
            "batch_invariant with execute_predicted: the predicted experts may depend on the batch; leave one out"
        )
    if on_host and device.type == "cuda":
        raise ConfigError("batch_invariant with host_compute='on': the host's sums differ from the GPU's; leave one out")


def _measure(skeleton: PreTrainedModel, name: str, dtype: torch.dtype, layers: tuple[LayerSpec, ...]) -> ModelShape:
    """The model's sizes; a model whose cache can't be measured without weights is served all the same, and that is said."""
    dtype_name = str(dtype).removeprefix("torch.")
    try:
        return shape_of_model(skeleton, name, dtype_name, layers)
    except UnsupportedModelError as error:
        logger.warning("The memory plan leaves no room for the KV cache: %s", error)
        return shape_of_model(skeleton, name, dtype_name, layers, run=False)


def _default_store_kind(device: torch.device, store_bytes: int) -> str:
    """Memory on a GPU, because it can be pinned, if half of the RAM that this process may use holds it; else a file.

    The limit and not the free part of it: all processes of a node must come to the same answer.
    """
    in_memory = device.type == "cuda" and hasattr(os, "memfd_create")
    return "memory" if in_memory and store_bytes <= total_memory() // 2 else "file"


def _store_key(checkpoint: Checkpoint, layers: tuple[LayerSpec, ...], config: Any) -> str:
    """Hex digest of everything that the records depend on."""
    parts = (
        RECORDS_VERSION,
        transformers.__version__,
        checkpoint.fingerprint,
        layers,
        str(getattr(config, "quantization_config", None)),
    )
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(parts))[:16]


def _build_runtime(
    model: PreTrainedModel,
    content: str,
    layers: tuple[LayerSpec, ...],
    plan: MemoryPlan,
    store: HostStore,
    policy: Policy,
    device: torch.device,
    link_setting: str | None,
) -> Runtime:
    """Slots for every layer, one pool for each layout, and a runner on every experts module."""
    telemetry = Telemetry(layers, plan.quotas, device)
    gemm = BatchInvariantGemm if is_batch_invariant(model) else GroupedGemm
    modules: list[nn.Module] = list(experts_modules(model).values())
    members: dict[RecordLayout, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        members[layer.layout].append(index)
    largest = 0 if store.pinned else max(layer.record.nbytes for layer in layers)
    link = make_copy_engine(link_setting, device, staging_bytes=largest)
    movers, runners = [], {}
    for indices in members.values():
        pool = SlotPool([layers[i] for i in indices], [plan.quotas[i] for i in indices], device)
        loader = ExpertLoader(pool, store, link, tuple(indices), telemetry)
        history = UseHistory.empty(len(indices), max(layers[i].num_experts for i in indices))
        movers.append(loader)
        for position, index in enumerate(indices):
            experts = layers[index].num_experts
            kernel = gemm(modules[index], pool.weights(position))
            compute = ExpertCompute(
                index,
                ExpertCache(index, position, experts, loader, telemetry),
                kernel,
                telemetry,
                cpu=CpuExperts(modules[index], store, index, device, gemm=gemm),
                identity=bool(getattr(modules[index], "zero_expert_num", 0)),
            )
            past = history.layer(position, experts)
            runners[index] = MoELayer(index, compute, policy=policy, history=past, telemetry=telemetry)
            setattr(modules[index], RUNNER, runners[index])
    runtime = Runtime(content, layers, plan, store, tuple(movers), tuple(runners[i] for i in range(len(layers))), telemetry)
    attach(model, runtime)
    return runtime
