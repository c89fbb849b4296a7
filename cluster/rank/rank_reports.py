"""A rank's reports: its load order, load windows, counters, group state and failure."""

from __future__ import annotations

import traceback

import msgspec
import numpy as np
import psutil
from torch import nn

from cluster.messages.placement import GroupState, LoadReport
from cluster.messages.rank import Failed, GetReport, LayerPlacement, Loaded, RankReport
from epslots.arrays import BoolArray
from epslots.errors import EpslotsError
from epslots.generation.engine import Engine
from epslots.generation.request_checker import model_limits
from epslots.group.cost_probe import largest
from epslots.group.rank_group import group_of
from epslots.placement.placement import pack
from epslots.runtime import runtime_of, stats
from epslots.telemetry import WindowMeter
from epslots.transport.pair_connection import machine_of_this


def loaded_report(engine: Engine, seconds: dict[str, float]) -> Loaded:
    """The capacity of a rank that has loaded its model; ``seconds``: duration of each stage of loading."""
    batcher = engine.batcher
    return Loaded(
        limits=model_limits(engine.model, batcher.capacity),
        max_requests=batcher.max_requests,
        shares_prefixes=batcher.shares_prefixes,
        seconds=seconds,
        machine=machine_of_this(),
    )


class WindowCutter:
    """Cuts a rank's telemetry into windows, after the same steps as the other ranks of its group.

    Args:
        every: steps of a window; 0 = there are no windows.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model, self._every = model, every
        self._meter = WindowMeter(runtime_of(model).telemetry)
        self._seconds = 0.0
        self._dropped = 0

    def begin(self) -> None:
        """Begin the first window of a group that has just formed; drops the counts since the last window."""
        self._seconds = 0.0
        if self._every:
            self._meter.cut(0.0)

    def step(self, number: int, seconds: float, *, waits: bool) -> LoadReport | None:
        """Note a step; returns a load report if a window ends with it.

        Args:
            number: of the step in this epoch, from 1.
            seconds: the step's duration.
            waits: the last report has not been taken yet: this one is dropped, and counted.
        """
        self._seconds += seconds
        if not self._every or number % self._every:
            return None
        window, group = self._meter.cut(self._seconds), group_of(self._model)
        assert group is not None
        self._seconds = 0.0
        if waits:
            self._dropped += 1
            return None
        window = msgspec.structs.replace(
            window, placement=group.placement.version, pending_migrations=group.pending_migrations, dropped=self._dropped
        )
        self._dropped = 0
        transport = group.transport
        return LoadReport(transport.epoch, transport.rank, number // self._every, msgspec.msgpack.encode(window))


def group_state(model: nn.Module, number: int) -> GroupState | None:
    """The answer to a ``GetGroupState`` of this number; None if the rank has no group yet."""
    group, runtime = group_of(model), runtime_of(model)
    if group is None:
        return None
    pool_of = {layer: pool for pool, layers in enumerate(group.pools) for layer in layers}
    return GroupState(
        number=number,
        epoch=group.transport.epoch,
        nodes=group.nodes,
        placement=pack(group.placement),
        pending_migrations=group.pending_migrations,
        costs=largest(group.costs),
        expert_bytes=tuple(layer.layout.nbytes for layer in runtime.layers),
        pools=tuple(pool_of[layer] for layer in range(len(runtime.layers))),
    )


def rank_report(engine: Engine, asked: GetReport, epoch: int, steps: int) -> RankReport:
    """The answer to a ``GetReport``: the rank's counters, and the slots of all ranks.

    Args:
        engine: of the rank.
        asked: the answered message.
        epoch: of the group that the rank is in, or forms; -1 before the first.
        steps: made in that epoch.
    """
    model = engine.model
    group, runtime = group_of(model), runtime_of(model)
    process = psutil.Process()
    layers = () if group is None else zip(runtime.layers, group.shared.layers, group.placement.wanted_LRE, strict=True)
    return RankReport(
        number=asked.number,
        epoch=epoch,
        steps=steps,
        stats=stats(model),
        engine=engine.batcher.stats(),
        layers=tuple(
            LayerPlacement(
                layer=spec.name,
                slots=tuple(shared.state.quota_R.tolist()),
                home=tuple(shared.state.home_E.tolist()),
                holders=_ranks_of(shared.state.holds_RE),
                wanted=_ranks_of(wanted_RE[:, : spec.num_experts]),
            )
            for number, (spec, shared, wanted_RE) in enumerate(layers)
            if asked.layers is None or number in asked.layers
        ),
        placement=-1 if group is None else group.placement.version,
        pending_migrations=0 if group is None else group.pending_migrations,
        memory_bytes=process.memory_info().rss,
        descriptors=process.num_fds(),
        threads=process.num_threads(),
    )


def failure_of(error: BaseException, doing: str) -> Failed:
    """The last event of a rank that raised this."""
    return Failed(
        doing=doing,  # type: ignore[arg-type]
        kind=type(error).__name__,
        message=str(error),
        deliberate=isinstance(error, EpslotsError),
        traceback="".join(traceback.format_exception(error)),
    )


def _ranks_of(holds_RE: BoolArray) -> tuple[tuple[int, ...], ...]:
    """The ranks that hold each expert, by expert."""
    return tuple(tuple(np.flatnonzero(holds_R).tolist()) for holds_R in holds_RE.T)
