"""``DeviceExperts``: a layer's experts while the device rules its slots; ``PrefetchAhead``: its fetches for the next layer.

    begin        which experts are missing; prefetches that turn out to be wrong are dropped     current stream
                 predict the next layer, and choose its prefetches                               beside it
    fetch        copy the missing experts; before, this layer's own prefetches have arrived      current stream
                 copy the next layer's, until it begins and drops what it doesn't need           beside it
    execute      compute from the slots                                                          current stream

A demanded copy is never behind one for the next layer, and computing waits for no prefetch that it doesn't need.
"""

from __future__ import annotations

import torch

from epslots.cuda_graph.device_slots import DeviceSlots
from epslots.cuda_graph.side_stream import SideStream
from epslots.moe.expert_compute import ExpertCompute
from epslots.moe.prefetcher import Prefetcher
from epslots.moe.token_dispatcher import Dispatch
from epslots.planner.plan import RankPlan


class PrefetchAhead:
    """From one layer the prefetches of the next.

    Args:
        prefetcher: predicts the next layer.
        slots: those of the next layer's pool.
        layer: the next layer's number in the pool.
        beside: where predictions and copies are queued.
    """

    def __init__(self, prefetcher: Prefetcher, slots: DeviceSlots, layer: int, beside: SideStream) -> None:
        self._prefetcher, self._slots, self._layer, self._beside = prefetcher, slots, layer, beside
        self._none = torch.zeros_like(slots.misses)
        self._copied: torch.cuda.Event | None = None

    def choose(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, misses: torch.Tensor | None) -> None:
        """Predict and choose, beside what is queued on the current stream from now on; promised to any layer's decision.

        Args:
            hidden_TH: what the running layer is given.
            ids_N: the expert of each of its pairs.
            misses: int64 [1], how many experts it misses; None = it never does.
        """
        with self._beside.after_here():
            usage_E = self._prefetcher.usage(hidden_TH, ids_N.view(hidden_TH.shape[0], -1))
            if usage_E is not None:
                self._slots.choose(self._layer, usage_E, self._none if misses is None else misses)
        self._beside.promise(hidden_TH)

    def copy(self) -> None:
        """Begin to copy, behind what is queued on the current stream so far."""
        with self._beside.after_here():
            self._slots.copy_ahead(self._layer)
        self._copied = self._beside.mark()

    def wait_for_copies(self) -> None:
        """Later work on the current stream comes after ``copy``, if that was called in this step."""
        self._beside.wait_for(self._copied)
        self._copied = None


class DeviceExperts:
    """Computes one layer while the device rules its slots; to the layer, no expert is missing.

    Args:
        inner: computes from the slots.
        slots: decides about them; None for a layer with a slot for every expert.
        layer: the layer's number in the pool.
        real: int64 [1] on the device, the pairs of a step that count: others repeat them.
        beside: where prefetches are chosen and copied.
        before: the layer before, if that prefetches for this one.
        ahead: prefetches for the layer after.

    Attributes:
        calls: steps that went through Python. A captured step is repeated without.
    """

    def __init__(
        self,
        inner: ExpertCompute,
        slots: DeviceSlots | None,
        layer: int,
        real: torch.Tensor,
        beside: SideStream,
        *,
        before: PrefetchAhead | None = None,
        ahead: PrefetchAhead | None = None,
    ) -> None:
        self._inner = inner
        self._slots = slots
        self._layer = layer
        self._real = real
        self._beside = beside
        self._before, self._ahead = before, ahead
        self.calls = 0

    @property
    def prefetches(self) -> bool:
        """Whether the layer prefetches for the next."""
        return self._ahead is not None

    def begin_unplanned(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor
    ) -> None:
        """Find the missing experts, and choose the next layer's prefetches. Pairs that repeat others aren't counted."""
        self.calls += 1
        self._inner.pairs.add_counts(ids_N, tokens_X, uses, self._real)
        self._beside.wait_for_promised()
        if self._slots is not None:
            self._slots.decide(self._layer, ids_N)
        if self._ahead is not None:
            self._ahead.choose(hidden_TH, ids_N, None if self._slots is None else self._slots.misses)

    def fetch(self, plan: RankPlan, *, agreed: bool) -> None:
        """Begin the copies that ``begin_unplanned`` has chosen; the host's plan has none."""
        if self._before is not None:
            self._before.wait_for_copies()
        if self._slots is not None:
            self._slots.copy(self._layer)
        if self._ahead is not None:
            self._ahead.copy()

    def execute(self, routed: Dispatch, plan: RankPlan) -> torch.Tensor:
        """As ``ExpertCompute.execute``: all experts are in slots when it computes."""
        return self._inner.execute(routed, plan)
