"""``epslots.load``: a checkpoint in, a transformers model out whose experts run from slots.

``load_alone``, in order: open the checkpoint and plan the load (``load_plan.py``); load the dense weights; open the node's
host store, or build it; allocate the slots and attach a runner to each experts module; attach predictors; fill the layers that
have a slot for every expert. ``load`` then makes the ranks one model.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from epslots.cache.cuda_engine import make_copy_engine
from epslots.cache.disk_link import DiskLink
from epslots.cache.disk_store import DiskStore
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.host_store import HostStore
from epslots.cache.node_store import OpenFile, open_node_store
from epslots.cache.pinning import pin_cells, pin_store
from epslots.cache.slot_pool import SlotPool
from epslots.compiled import prepare, prepare_in_background
from epslots.config import LOAD_DEADLINE_S, LoadConfig, LoadSettings, load_config, refuse_unknown, with_keywords
from epslots.device_copy import prepare_uploads
from epslots.devices import make_current, memory_limit, resolve_device
from epslots.errors import ConfigError
from epslots.group.join import announce_failure, ranks_here, start_rank
from epslots.layout import LayerSpec, RecordLayout
from epslots.load_plan import plan_load
from epslots.models.batch_invariance import is_batch_invariant, make_batch_invariant
from epslots.models.checkpoint import CheckpointSource
from epslots.models.dense_linear import read_in_place
from epslots.models.dense_norm import norm_in_place
from epslots.models.dense_rotation import rotate_in_place
from epslots.models.expert_reader import ExpertReader
from epslots.models.experts import experts_modules
from epslots.models.experts_interface import RUNNER
from epslots.models.host_memory import HostMemoryPlan
from epslots.models.memory_plan import MemoryPlan, moe_workspace_bytes
from epslots.models.opening import load_dense
from epslots.moe.cpu_experts import CpuExperts
from epslots.moe.expert_cache import ExpertCache
from epslots.moe.expert_compute import ExpertCompute
from epslots.moe.grouped_gemm import BatchInvariantGemm, GroupedGemm
from epslots.moe.moe_layer import MoELayer
from epslots.moe.product_choice import make_gemm
from epslots.moe.token_room import TokenRoom
from epslots.placement.placement import Placement
from epslots.placement.placement_file import read_placement
from epslots.planner.cache_policy import Policy, policy_name, resolve_policy
from epslots.planner.cost_model import Costs
from epslots.planner.use_history import UseHistory
from epslots.prefetch.setup import attach_prefetchers
from epslots.progress import ProgressDisplay
from epslots.runtime import Runtime, attach, runtime_of
from epslots.telemetry import Telemetry
from epslots.transport.rendezvous import find_transport
from epslots.transport.transport import Transport
from epslots.units import format_bytes, parse_prefetch

logger = logging.getLogger(__name__)


@with_keywords(LoadSettings, LoadConfig)
def load(
    path_or_id: str | os.PathLike[str],
    *,
    progress: bool | None = None,
    group: dist.ProcessGroup | Transport | None = None,
    costs: Costs | None = None,
    placement: Placement | str | os.PathLike[str] | None = None,
    deadline_s: float | None = None,
    subfolder: str = "",
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **settings: Unpack[LoadSettings],
) -> PreTrainedModel:
    """Load a Mixture-of-Experts checkpoint with a bounded number of expert slots.

    With several ranks, each calls this; they become one model, whose experts are spread over all ranks' slots. Dense weights
    are on every rank, batches are each rank's own, and every forward pass is a step that all ranks make together
    (``sync_ranks`` and ``generate(synced_gpus=True)`` see to that).

    In fp32 the outputs equal transformers' (logits within 1e-4 of their scale). In bf16 results are summed over k in fp32, so
    last bits may differ. A GPU becomes the thread's current one. Threads may share a model on one rank, and take turns layer
    by layer; in a group, one thread per rank may call it.

    Args:
        path_or_id: a checkpoint folder with safetensors, or a hub id.
        settings: fields of ``epslots.config.LoadConfig``. Unknown keywords are refused, never ignored.
        progress: show progress bars; by default when standard error is a terminal.
        group: the ranks to compute with. Default: torch.distributed's default group, which is formed here if ``torchrun``
            started the process; without it, this rank is alone. Ranks may have different numbers of slots.
        costs: time that each operation costs, by which ranks divide their work; measured by default. The same on all ranks.
        placement: the experts' first placement: a file of ``epslots placement plan``, or a ``Placement``, for as many ranks
            and slots as there are; the same on all ranks. By default homes are dealt by slots.
        deadline_s: seconds that a rank waits for the others in one operation before it gives them up as lost. It has to cover
            the time between two forward passes. Default: 60, or that of ``group`` if that is one of our transports;
            loading has an hour.
        subfolder: folder of the checkpoint that holds config.json and the weights.
        variant: of the weight files: ``"fp16"`` reads ``model.fp16.safetensors`` or ``model.safetensors.index.fp16.json``.
        revision: branch, tag or commit of a hub id.
        token: of the hub, for a hub id.

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
    given: dict[str, Any] = dict(settings)
    if given.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code: epslots never runs code from a checkpoint")
    refuse_unknown(given, tuple(inspect.signature(load).parameters))
    if deadline_s is not None and not deadline_s > 0:
        raise ConfigError(f"deadline_s={deadline_s!r}: allowed: seconds, more than 0")
    source = CheckpointSource(path_or_id, subfolder, variant, revision, token)
    first = read_placement(placement) if isinstance(placement, str | os.PathLike) else placement
    if first is not None:
        first.check()
    transport = find_transport(group, resolve_device(given.get("device")))
    # Of several ranks the first shows progress.
    display = ProgressDisplay(False if progress is None and transport is not None and transport.rank else progress)

    def load_here(neighbours: int, ranks: int) -> PreTrainedModel:
        config = load_config(**given)  # here, so that the other ranks are told if a setting is refused
        config.check_costs(costs)
        return load_alone(source, config, neighbours=neighbours, ranks=ranks, display=display)

    if transport is not None:
        return _load_together(transport, load_here, costs, first, display, deadline_s)
    model = load_here(1, 1)
    start_rank(model, None, settings={}, costs=costs, display=display, placement=first)
    return model


def _load_together(
    transport: Transport,
    load_here: Callable[[int, int], PreTrainedModel],
    costs: Costs | None,
    placement: Placement | None,
    display: ProgressDisplay,
    deadline_s: float | None,
) -> PreTrainedModel:
    """This rank's model, made one with those of the other ranks. All ranks call it together.

    Args:
        load_here: loads this rank's model, given the numbers of ranks on this node and in all.
        deadline_s: seconds that one operation may take after loading; None = the transport's.
    """
    deadline_s = transport.deadline_s if deadline_s is None else deadline_s
    transport.deadline_s = max(LOAD_DEADLINE_S, deadline_s)
    try:
        neighbours = ranks_here(transport)
        try:
            model = load_here(neighbours, transport.size)
        except Exception as error:
            announce_failure(transport, error)
            raise
        settings = runtime_of(model).rank_settings
        start_rank(model, transport, settings=settings, costs=costs, display=display, placement=placement)
    except BaseException as error:
        transport.abort(f"rank {transport.rank} could not load: {type(error).__name__}: {error}")
        raise
    transport.deadline_s = deadline_s
    return model


def load_alone(
    source: CheckpointSource, config: LoadConfig, *, neighbours: int, ranks: int, display: ProgressDisplay
) -> PreTrainedModel:
    """One rank's model, before it belongs to a group; ``load`` and the ranks of a cluster call it.

    Args:
        neighbours: ranks that share the node's RAM, this one included.
        ranks: ranks of the group that it will belong to, this one included.

    Raises:
        ConfigError: a setting is not one of those allowed.
        CheckpointError: files are missing, damaged, or of a refused kind.
        UnsupportedModelError: the model's experts can't be run from slots.
        DoesNotFitError: the memory plan exceeds the device; no weight was read.
        StoreError: the host store can't be built or trusted.
    """
    device = resolve_device(config.device)
    config.check_device(device.type)
    make_current(device)
    prepare_uploads(device)
    plan = plan_load(source, config, device, neighbours=neighbours, ranks=ranks)
    opened, checkpoint = plan.opened, plan.opened.checkpoint

    if getattr(opened.config, "quantization_config", None) is None:
        prepare_in_background()
    else:  # compiled loops unpack its weights
        prepare(shown=display.shown)
    model = load_dense(opened, device=device, show_progress=display.shown)
    store = open_node_store(
        plan.manifest,
        lambda: ExpertReader(checkpoint, model, opened.layers, quantise=config.expert_format),
        kind=plan.store_kind,
        cache_dir=plan.store_dir,
        start_progress=display,
        open_as=HostStore if plan.host_memory is None else _part_in_ram(plan.host_memory),
    )
    if device.type == "cuda":
        pin_cells(store, device) if isinstance(store, DiskStore) else pin_store(store, display, device)
    prepare(shown=display.shown)  # here, and not in the first step

    if config.batch_invariant:
        make_batch_invariant(model)
    if device.type == "cpu":
        read_in_place(model, batch_invariant=config.batch_invariant)
        norm_in_place(model)
        rotate_in_place(model)
    policy = resolve_policy(config.policy)
    runtime = _build_runtime(model, checkpoint.content, opened.layers, plan.memory, store, policy, device, config.link)
    runtime = _apply_config(model, runtime, config, checkpoint.folder)
    attach(model, runtime)
    if device.type == "cuda":
        _divide_long_steps(runtime, device)
    runtime.fill(runtime.complete_layers(), display)
    return model


def _part_in_ram(plan: HostMemoryPlan) -> OpenFile:
    """Opens a store of which RAM holds a part. The rest costs time at every miss, so the log says how much."""
    logger.info(
        "host_memory: RAM holds %s of the experts, the disk %s more; up to %s are read for a token",
        *map(format_bytes, (plan.ram_bytes, plan.disk_bytes, plan.read_bytes_per_token)),
    )
    return partial(DiskStore, cells=plan.cells)


def _divide_long_steps(runtime: Runtime, device: torch.device) -> None:
    """Let a layer compute a longer prompt than planned in parts, where the GPU has no memory for the whole."""
    shape = runtime.plan.shape
    planned, token_bytes = shape.step_tokens(runtime.engine), moe_workspace_bytes(shape, 1, ranks=1)
    for runner in runtime.runners:
        runner.divide_by(TokenRoom(planned, token_bytes, lambda: memory_limit(device).free_bytes))


def _apply_config(model: PreTrainedModel, runtime: Runtime, config: LoadConfig, folder: Path) -> Runtime:
    """The runtime with prefetchers and CPU experts as the configuration wants them on this device."""
    prefetch_config, predictor = attach_prefetchers(
        model,
        runtime.runners,
        folder,
        prefetch=parse_prefetch(config.prefetch),
        predictor=config.predictor,
        execute_predicted=config.execute_predicted,
    )
    computes_on_host = config.computes_on_host(model.device.type)
    effects = {
        "policy": policy_name(config.policy),
        "device": model.device.type,
        "dtype": str(model.dtype),
        "predictions": prefetch_config.settings,
        "host_compute": str(computes_on_host),
        "slot_format": "packed" if any(layer.packed is not None for layer in runtime.layers) else "unpacked",
        "attention": str(model.config._attn_implementation),
        "fetches": "meanwhile" if any(loader.link.concurrent for loader in runtime.loaders) else "at once",
    }
    return replace(
        runtime,
        prefetch_config=prefetch_config,
        predictor=predictor,
        computes_on_host=computes_on_host,
        engine=config.engine,
        rank_settings=config.compared(effects),
    )


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
    batch_invariant = is_batch_invariant(model)
    on_host = BatchInvariantGemm if batch_invariant else GroupedGemm
    modules: list[nn.Module] = list(experts_modules(model).values())
    members: dict[RecordLayout, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        members[layer.layout].append(index)
    pinned = store.cells_pinned if isinstance(store, DiskStore) else store.pinned
    largest = 0 if pinned or device.type != "cuda" else max(layer.layout.nbytes for layer in layers)
    link = make_copy_engine(link_setting, device, staging_bytes=largest)
    if isinstance(store, DiskStore):
        link = DiskLink(link, store)
        store.report_reads(lambda layer, nbytes: telemetry.count(layer, disk_bytes=nbytes))
    loaders, runners, cells = [], {}, plan.cache_slots
    for indices in members.values():
        own_slots = cells.own_slots if cells is not None and cells.layers == tuple(indices) else 0
        pool = SlotPool([layers[i] for i in indices], [plan.quotas[i] for i in indices], device, own_slots=own_slots)
        loader = ExpertLoader(pool, store, link, tuple(indices), telemetry)
        if isinstance(store, DiskStore):
            store.watch(pool.layout, pool.slot_of)
        history = UseHistory.empty(len(indices), max(layers[i].num_experts for i in indices))
        loaders.append(loader)
        for position, index in enumerate(indices):
            experts = layers[index].num_experts
            kernel = make_gemm(modules[index], pool.weights(position), batch_invariant=batch_invariant)
            compute = ExpertCompute(
                index,
                ExpertCache(index, position, experts, loader, telemetry),
                kernel,
                telemetry,
                cpu=CpuExperts(modules[index], store, index, device, gemm=on_host),
                identity=bool(getattr(modules[index], "zero_expert_num", 0)),
            )
            past = history.layer(position, experts)
            runners[index] = MoELayer(index, compute, policy=policy, history=past, telemetry=telemetry)
            setattr(modules[index], RUNNER, runners[index])
    runtime = Runtime(content, layers, plan, store, tuple(loaders), tuple(runners[i] for i in range(len(layers))), telemetry)
    attach(model, runtime)
    return runtime
