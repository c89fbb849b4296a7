"""When to follow another placement: what is learned of the traffic window by window, and what is decided from it.

Pure. The cluster's controller and the simulator decide by the same code.

Legend of shape suffixes: L MoE layers, R ranks, E experts of the largest layer, D = E + 1 stack distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from epslots.arrays import IntArray
from epslots.placement.forecast import Forecast
from epslots.placement.placement import Placement
from epslots.placement.planner import ExpectedLoad, Proposal, RankShape, propose
from epslots.placement.slot_quotas import deal_quotas, improve_quotas

# Of a step's time that fetching for a placement may take.
SHARE = 0.1
# Windows after which placements are weighed again though the ranks aren't at the last one: or a change of traffic in the
# middle of a long move would have to wait.
OVERDUE = 2
# Stack distances of so many windows ago count a third.
_REUSE_WINDOWS = 16
# Who asks for any gain at all takes it as certain, and as lasting for so many windows.
_LONG = 10_000.0

Propose = Callable[[Placement, ExpectedLoad, RankShape, IntArray | None], Proposal]
"""``rebalance.propose``, or another one in tests."""


@dataclass(frozen=True)
class Weighed:
    """A placement held against the present one.

    Attributes:
        expected: of the traffic.
        proposal: what is best.
        gain_ns: what that is expected to gain, as far as the expectation is believed.
    """

    expected: ExpectedLoad
    proposal: Proposal
    gain_ns: float


class Replanner:
    """What was learned of a model's traffic; who serves it doesn't matter.

    Args:
        num_experts_L: experts of each layer.
        pools: the layers of each pool: slots change hands within one.
    """

    def __init__(
        self,
        num_experts_L: IntArray,
        pools: Sequence[Sequence[int]],
        *,
        planner: Propose = propose,
        forecast: Callable[[], Forecast] = Forecast,
    ) -> None:
        self.num_experts_L = num_experts_L
        self._pools = [np.array(pool) for pool in pools]
        self._propose = planner
        self._forecast = forecast()
        self._reuse_LD = np.zeros((len(num_experts_L), int(num_experts_L.max()) + 1), np.int64)

    def learn(self, tokens_LE: IntArray, uses_LE: IntArray, reuse_LD: IntArray, steps: int) -> None:
        """Take in a window of all ranks; see ``windows.Window`` for what is what."""
        self._forecast.add(tokens_LE, uses_LE, steps)
        self._reuse_LD += reuse_LD - self._reuse_LD // _REUSE_WINDOWS

    def weigh(self, current: Placement, fleet: RankShape, *, any_gain: bool = False) -> Weighed:
        """Find the placement to follow from now on, which is often the present one.

        Args:
            any_gain: be content with a gain that wouldn't pay for its moves soon enough.
        """
        expected = self._forecast.expected()
        horizon = replace(expected, trust=1.0, windows=_LONG) if any_gain else expected
        proposal = self._propose(current, horizon, fleet, self.quotas(current))
        believed = expected.trust * expected.windows / _LONG if any_gain else 1.0
        return Weighed(expected, proposal, proposal.gain_ns * believed)

    def quotas(self, current: Placement) -> IntArray | None:
        """Slots of each layer and rank by measured need, int64 [L, R]; None if they are to stay as they are."""
        if not self._reuse_LD.any():
            return None
        quota_LR = current.quota_LR.copy()
        for pool in self._pools:
            experts_L, now_LR = self.num_experts_L[pool], quota_LR[pool]
            histogram_LD = self._reuse_LD[pool, : int(experts_L.max()) + 1]
            least_L, most_L = np.full(len(pool), current.ranks), experts_L * current.ranks
            better_L = improve_quotas(now_LR.sum(1), histogram_LD, experts_L, least_L, most_L)
            quota_LR[pool] = deal_quotas(better_L, now_LR.sum(0), experts_L, now_LR)
        return None if (quota_LR == current.quota_LR).all() else quota_LR
