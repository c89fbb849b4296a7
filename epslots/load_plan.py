"""A load before it begins: the opened checkpoint, its host store, and the memory plan. No weight is read here.

``plan_load`` opens the checkpoint and checks it by its headers, decides, and refuses a load that can't succeed; ``loading.py``
carries the plan out.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
import transformers
import xxhash

from epslots.cache.host_store import Manifest, StoreShape
from epslots.cache.node_store import check_room, resolve_store_kind
from epslots.config import EngineConfig, LoadConfig
from epslots.devices import memory_limit
from epslots.errors import StoreError, UnsupportedModelError
from epslots.generation.planned_cache import with_cache
from epslots.host_limits import tightest_memory_limit, total_memory
from epslots.models.batch_invariance import record_unknown_functions
from epslots.models.checkpoint import CheckpointSource
from epslots.models.experts import experts_modules
from epslots.models.host_memory import HostMemoryPlan, plan_host_memory
from epslots.models.measure_shape import shape_of_model
from epslots.models.memory_plan import MemoryPlan, PlannedDevice, plan_memory
from epslots.models.memory_report import check_fits
from epslots.models.model_shape import ModelShape
from epslots.models.opening import OpenModel, open_model
from epslots.models.slot_format import choose_slot_format
from epslots.moe.product_choice import Product, planned_products
from epslots.planner.cache_policy import own_name
from epslots.prefetch.setup import planned_bytes
from epslots.private_files import default_cache_dir
from epslots.units import format_bytes, parse_prefetch, parse_slots

logger = logging.getLogger(__name__)

# Part of every store's key: raise it when the records of an unchanged checkpoint would come out differently.
RECORDS_VERSION = 4


@dataclass(frozen=True)
class LoadPlan:
    """Everything that is decided before a weight is read.

    Attributes:
        opened: the checkpoint and its model; its layers have the layouts of slots and records, packed or not.
        manifest: contents of the host store.
        store_kind: "file" or "memory".
        store_dir: folder of the store's files.
        memory: the device's memory.
        host_memory: the node's RAM, where it holds a part of the store; None = no such bound.
    """

    opened: OpenModel
    manifest: Manifest
    store_kind: str
    store_dir: Path
    memory: MemoryPlan
    host_memory: HostMemoryPlan | None


def plan_load(source: CheckpointSource, config: LoadConfig, device: torch.device, *, neighbours: int, ranks: int) -> LoadPlan:
    """Open a checkpoint, and plan how one rank loads it.

    Args:
        device: device of the model, resolved.
        neighbours: ranks that share the node's RAM, this one included.
        ranks: ranks of the group, this one included.

    Raises:
        ConfigError: a setting is not one of those allowed.
        CheckpointError: files are missing, damaged, or of a refused kind.
        UnsupportedModelError: the model's experts can't be run from slots.
        DoesNotFitError: the memory plan exceeds the device.
        StoreError: there is no room or no permission for the host store.
    """
    opened = open_model(source, config.dtype, config.attn_implementation)
    slots = choose_slot_format(config, opened.checkpoint, opened.skeleton, opened.layers, device.type)
    opened = replace(opened, layers=slots.layers)
    manifest = store_manifest(opened, config.expert_format)
    store_bytes = StoreShape(manifest).nbytes
    kind = "file" if config.host_memory is not None else default_store_kind(device, store_bytes)
    store_kind = resolve_store_kind(config.host_store or kind)
    store_dir = default_cache_dir() if config.cache_dir is None else Path(config.cache_dir)
    check_room(manifest, kind=store_kind, cache_dir=store_dir)
    ram_bytes = store_bytes if store_kind == "memory" else min(store_bytes, config.host_memory_bytes or 0)
    free = _free_memory(device, ram_bytes, neighbours)
    shape = measure(opened, engine=config.engine, batch_invariant=config.batch_invariant, slot_note=slots.note)
    memory = _plan_memory(opened, shape, config, device, ranks, free, gpu_fetches=store_kind == "memory")
    check_fits(memory)
    return LoadPlan(opened, manifest, store_kind, store_dir, memory, _plan_ram(memory, config, neighbours))


def _plan_ram(memory: MemoryPlan, config: LoadConfig, neighbours: int) -> HostMemoryPlan | None:
    """The plan of the node's RAM, where ``host_memory`` bounds it.

    Raises:
        ConfigError: the share of a rank doesn't hold the experts of one token in one layer.
        StoreError: this rank's share isn't free.
    """
    if config.host_memory_bytes is None:
        return None
    plan, limit = plan_host_memory(memory, config.host_memory_bytes, neighbours), tightest_memory_limit()
    if limit.free_bytes < plan.cell_bytes:
        raise StoreError(
            f"host_memory={config.host_memory!r}: this rank's share takes {format_bytes(plan.cell_bytes)}, but only {limit}; "
            f"give less"
        )
    return plan


def store_manifest(opened: OpenModel, expert_format: str | None) -> Manifest:
    """The contents of the model's host store.

    Args:
        opened: its layers have the layouts of slots and records.
        expert_format: the setting of ``LoadConfig``.
    """
    return Manifest(_store_key(opened, expert_format), opened.checkpoint.name, opened.layers)


def _store_key(opened: OpenModel, expert_format: str | None) -> str:
    """Hex digest of everything that the records depend on."""
    parts = (
        RECORDS_VERSION,
        transformers.__version__,
        opened.checkpoint.fingerprint,
        opened.layers,
        str(getattr(opened.config, "quantization_config", None)),
        expert_format,
    )
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(parts))[:16]


def default_store_kind(device: torch.device, store_bytes: int) -> str:
    """Memory for a GPU, because it can be pinned, if half of the RAM limit holds it; else a file.

    The process's limit decides and not its free part: all processes of a node must come to the same answer.
    """
    in_memory = device.type == "cuda" and hasattr(os, "memfd_create")
    return "memory" if in_memory and store_bytes <= total_memory() // 2 else "file"


def _free_memory(device: torch.device, shared_bytes: int, neighbours: int) -> tuple[int, str]:
    """The bytes that a rank may plan with, and a note on their limit.

    Args:
        shared_bytes: of a host store in memory, which shares a CPU's RAM with the slots of all the node's ranks.
    """
    limit = memory_limit(device)
    if device.type != "cpu":
        return limit.free_bytes, str(limit)
    note = str(limit)
    note += f", less the host store's {format_bytes(shared_bytes)}" if shared_bytes else ""
    note += f", shared by {neighbours} ranks" if neighbours > 1 else ""
    return max(0, limit.free_bytes - shared_bytes) // neighbours, note


def _plan_memory(
    opened: OpenModel,
    shape: ModelShape,
    config: LoadConfig,
    device: torch.device,
    ranks: int,
    free: tuple[int, str],
    *,
    gpu_fetches: bool,
) -> MemoryPlan:
    """The plan of this rank's device memory, before a weight is read.

    Args:
        free: from ``_free_memory``.
        gpu_fetches: whether a GPU can fetch experts by itself, from a store in memory.
    """
    checkpoint, prefetch = opened.checkpoint, parse_prefetch(config.prefetch)
    predictor_bytes = planned_bytes(
        opened.skeleton,
        checkpoint.content,
        checkpoint.folder,
        device=device,
        dtype=opened.dtype,
        fetches=prefetch.on and config.has_link(device.type),
        predictor=config.predictor,
        execute_predicted=config.execute_predicted,
    )
    modules = experts_modules(opened.skeleton).values()
    products = planned_products(modules, opened.layers, device, batch_invariant=config.batch_invariant)
    return plan_memory(
        shape,
        parse_slots(config.slots),
        PlannedDevice(
            kind=device.type,
            memory_bytes=free[0],
            memory_note=free[1],
            captures=Product.BY_SLOT not in products and not config.execute_predicted,
            fetches=gpu_fetches and (isinstance(config.policy, str) or own_name(config.policy) is not None),
        ),
        ranks=ranks,
        engine=config.engine,
        predictor_bytes=predictor_bytes,
    )


def measure(opened: OpenModel, *, engine: EngineConfig, batch_invariant: bool, slot_note: str = "") -> ModelShape:
    """The model's sizes. A model whose cache can't be measured without weights is loaded all the same, with a warning.

    Args:
        opened: its skeleton is of no further use.
        engine, batch_invariant: settings of ``LoadConfig``, which decide about the engine's cache.
        slot_note: how quantised experts are kept in slots (``slot_format.py``).

    Raises:
        UnsupportedModelError: the model can't be served from that cache.
    """
    name, dtype, skeleton = opened.checkpoint.name, str(opened.dtype).removeprefix("torch."), opened.skeleton
    try:
        shape = shape_of_model(skeleton, name, dtype, opened.layers)
    except UnsupportedModelError as error:
        logger.warning("The memory plan leaves no room for the KV cache: %s", error)
        shape = shape_of_model(skeleton, name, dtype, opened.layers, run=False)
    if batch_invariant:
        record_unknown_functions(skeleton)
    return with_cache(msgspec.structs.replace(shape, slot_note=slot_note), skeleton, engine)
