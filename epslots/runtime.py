"""All objects behind one loaded model on one rank, and its public questions: ``stats`` and ``verify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from epslots.arrays import IntArray
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.host_store import HostStore
from epslots.cache.slot_pool import SlotPool
from epslots.config import EngineConfig
from epslots.errors import ConfigError, CorruptExpertError
from epslots.layout import LayerSpec
from epslots.models.cache_slots import largest_pool
from epslots.models.memory_plan import MemoryPlan
from epslots.moe.moe_layer import MoELayer
from epslots.moe.prefetcher import PrefetchConfig, UsagePredictor
from epslots.progress import ProgressDisplay
from epslots.telemetry import Stats, Telemetry

_ATTRIBUTE = "epslots_runtime"


@dataclass(frozen=True)
class Runtime:
    """The objects behind one model.

    Attributes:
        checkpoint: a digest of the weight files' content.
        layers: the MoE layers in order.
        loaders: the expert loader of each pool.
        runners: the ``MoELayer`` of each layer.
        predictor: predicts the next layer's experts; None where nothing is predicted.
        computes_on_host: whether the host's CPU may compute missing experts.
        engine: settings of an engine that serves the model.
        rank_settings: settings that all ranks of a group must have alike (``LoadConfig.compared``).
    """

    checkpoint: str
    layers: tuple[LayerSpec, ...]
    plan: MemoryPlan
    store: HostStore
    loaders: tuple[ExpertLoader, ...]
    runners: tuple[MoELayer, ...]
    telemetry: Telemetry
    prefetch_config: PrefetchConfig = field(default_factory=PrefetchConfig)
    predictor: UsagePredictor | None = None
    computes_on_host: bool = False
    engine: EngineConfig = field(default_factory=EngineConfig)
    rank_settings: Mapping[str, str] = field(default_factory=dict)

    def place_of(self, index: int) -> tuple[SlotPool, int]:
        """The pool of a layer, and the layer's number within it."""
        for loader in self.loaders:
            if index in loader.store_layers:
                return loader.pool, loader.store_layers.index(index)
        raise IndexError(f"layer {index}: there are {len(self.layers)}")

    def complete_layers(self) -> dict[int, IntArray]:
        """All experts of each layer that has a slot for every one, and so never misses; by layer."""
        never_miss = [i for i, runner in enumerate(self.runners) if runner.cache.holds_all]
        return {i: np.arange(self.layers[i].num_experts) for i in never_miss}

    def divide(self, quotas: Sequence[int]) -> None:
        """Give each layer another number of slots, of the same sum in every pool. A pool that changes is emptied."""
        for loader in self.loaders:
            of_pool = [quotas[index] for index in loader.store_layers]
            if list(loader.pool.quotas) != of_pool:
                loader.wait_all()
                loader.pool.divide(of_pool)
                for index in loader.store_layers:
                    self.runners[index].use_slot_range()

    @property
    def ceding_loader(self) -> ExpertLoader:
        """The loader of the pool whose layers cede slots to the KV cache, with ``kv_tokens="auto"``."""
        layers = largest_pool(self.layers)
        return next(loader for loader in self.loaders if loader.store_layers == layers)

    def cede_level(self, evicted: Sequence[int]) -> None:
        """Let each layer of that pool cede a slot; plans have entered it. No other thread makes a step meanwhile.

        Args:
            evicted: each layer's expert that is evicted before; -1 = it has an empty slot.

        Raises:
            StoreError: a fetch that was in flight has failed.
        """
        loader = self.ceding_loader
        loader.cede_level(evicted)
        for index in loader.store_layers:
            self.runners[index].use_slot_range()

    def take_back_level(self, *, complete: bool) -> None:
        """Let each layer of that pool use the slot again that it ceded last. No other thread makes a step meanwhile.

        Args:
            complete: fill layers that have a slot for every expert now: a rank alone makes no plans for them.

        Raises:
            StoreError: a record that completes a layer can't be read. The slots stay ceded.
        """
        loader = self.ceding_loader
        try:
            loader.take_back_level(complete=complete)
        finally:
            for index in loader.store_layers:
                self.runners[index].use_slot_range()

    def fill(self, experts: Mapping[int, IntArray], display: ProgressDisplay) -> None:
        """Load these experts of each layer into its first slots, which are empty."""
        size = {i: self.layers[i].layout.nbytes for i in experts}
        with display("loading experts into slots", sum(len(e) * size[i] for i, e in experts.items())) as advance:
            for loader in self.loaders:
                for position, index in enumerate(loader.store_layers):
                    if index in experts:
                        loader.fill(position, experts[index])
                        advance(len(experts[index]) * size[index])

    def check_integrity(self) -> None:
        """Assert that every pool's tables, slots and records agree, byte for byte.

        Raises:
            AssertionError: naming what disagrees. It is a bug of ours.
        """
        for loader in self.loaders:
            loader.pool.check_integrity()
            loader.check_content()


def attach(model: nn.Module, runtime: Runtime) -> None:
    """Make ``runtime`` the one that ``runtime_of`` finds."""
    setattr(model, _ATTRIBUTE, runtime)


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime behind a model that ``epslots.load`` returned.

    Raises:
        ConfigError: the model came from somewhere else.
    """
    runtime = getattr(model, _ATTRIBUTE, None)
    if not isinstance(runtime, Runtime):
        raise ConfigError(f"this {type(model).__name__} was not loaded by epslots.load")
    return runtime


def plan_of(model: nn.Module) -> MemoryPlan | None:
    """The memory plan of a model; None for models that ``epslots.load`` didn't return."""
    runtime = getattr(model, _ATTRIBUTE, None)
    return runtime.plan if isinstance(runtime, Runtime) else None


def predictor_of(model: nn.Module) -> UsagePredictor | None:
    """The predictor of a model's layers; None without one, and for models that ``epslots.load`` didn't return."""
    runtime = getattr(model, _ATTRIBUTE, None)
    return runtime.predictor if isinstance(runtime, Runtime) else None


def stats(model: nn.Module) -> Stats:
    """Counters of every MoE layer since loading: tokens per expert, hits, misses, passes, bytes, stalls, evictions.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
    """
    return runtime_of(model).telemetry.snapshot()


def verify(model: nn.Module, progress: bool | None = None) -> list[CorruptExpertError]:
    """Hold every record of the model's host store against its digest.

    Returns:
        One error for each corrupt expert; empty when all is well.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
    """
    store = runtime_of(model).store
    with ProgressDisplay(progress)("verifying the host store", store.nbytes) as advance:
        return store.verify(advance)
