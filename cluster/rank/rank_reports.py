"""What a rank says of itself: its counters, window by window or all at once, and what it knows of its group."""

from __future__ import annotations

import msgspec
import numpy as np
import psutil
from torch import nn

from cluster.messages.placement import Residency, WindowReport
from cluster.messages.rank import LayerPlace, RankReport
from epslots.arrays import BoolArray
from epslots.group.cost_probe import largest
from epslots.group.rank_group import group_of
from epslots.placement.placement import pack
from epslots.runtime import runtime_of, stats
from epslots.telemetry import WindowMeter


class WindowCutter:
    """Cuts a rank's telemetry into windows, after the same steps as all other ranks of its group.

    Args:
        every: steps of a window; 0 = none is ever cut.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model, self._every = model, every
        self._meter = WindowMeter(runtime_of(model).telemetry)
        self._seconds = 0.0
        self._dropped = 0

    def begin(self) -> None:
        """A group stands: its ranks' windows begin together. What was counted since the last one is forgotten."""
        self._seconds = 0.0
        if self._every:
            self._meter.cut(0.0)

    def step(self, number: int, seconds: float, *, waits: bool) -> WindowReport | None:
        """A step has been made; the window that ends with it, if one does.

        Args:
            number: of the step, in this epoch of the group.
            seconds: that it took.
            waits: the last window has not been handed over yet: this one is dropped, and counted.
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
        return WindowReport(group.transport.epoch, number // self._every, msgspec.msgpack.encode(window))


def survey(model: nn.Module, number: int) -> Residency | None:
    """How things stand in the rank's group; None if it has none yet."""
    group, runtime = group_of(model), runtime_of(model)
    if group is None:
        return None
    pool_of = {layer: pool for pool, loader in enumerate(runtime.movers) for layer in loader.store_layers}
    return Residency(
        number=number,
        group=group.transport.epoch,
        nodes=group.nodes,
        placement=pack(group.placement),
        pending_migrations=group.pending_migrations,
        costs=largest(group.costs),
        expert_bytes=tuple(layer.layout.nbytes for layer in runtime.layers),
        pools=tuple(pool_of[layer] for layer in range(len(runtime.layers))),
    )


def report(model: nn.Module, number: int, epoch: int, steps: int) -> RankReport:
    """The rank's counters, and who holds what.

    Args:
        epoch: of the group that the rank is in, or forms.
        steps: made in it.
    """
    group, runtime = group_of(model), runtime_of(model)
    process = psutil.Process()
    layers = () if group is None else zip(runtime.layers, group.shared.layers, group.placement.wanted_LRE, strict=True)
    return RankReport(
        number=number,
        epoch=epoch,
        steps=steps,
        stats=stats(model),
        layers=tuple(
            LayerPlace(
                layer=spec.name,
                slots=tuple(shared.state.quota_R.tolist()),
                home=tuple(shared.state.home_E.tolist()),
                holders=_ranks_of(shared.state.holds_RE),
                wanted=_ranks_of(wanted_RE[:, : spec.num_experts]),
            )
            for spec, shared, wanted_RE in layers
        ),
        placement=-1 if group is None else group.placement.version,
        pending_migrations=0 if group is None else group.pending_migrations,
        memory_bytes=process.memory_info().rss,
        descriptors=process.num_fds(),
        threads=process.num_threads(),
    )


def _ranks_of(holds_RE: BoolArray) -> tuple[tuple[int, ...], ...]:
    """The ranks of each expert, by expert."""
    return tuple(tuple(np.flatnonzero(holds_R).tolist()) for holds_R in holds_RE.T)
