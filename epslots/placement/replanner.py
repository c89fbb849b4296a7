"""A model's traffic, learned window by window, and the placement and slots that follow from it.

The cluster's controller and the simulator call ``learn`` for each window of load, and ``weigh`` for the placement to follow.

Pure.

Legend of shape suffixes: L MoE layers, R ranks, E experts of the largest layer, D = E + 1 stack distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from epslots.arrays import IntArray
from epslots.placement.forecast import Forecast
from epslots.placement.placement import Placement
from epslots.placement.planner import ExpectedLoad, Proposal, RankHardware, propose
from epslots.placement.pooled_forecast import GroupForecast
from epslots.placement.slot_quotas import deal_quotas, improve_quotas

# The share of a step's time that migrations may take.
SHARE = 0.1
# Windows after which placements are weighed again though migrations are pending: or a change of traffic in the middle of a
# long migration would have to wait.
OVERDUE = 2
# Stack distances of so many windows ago count a third.
_REUSE_WINDOWS = 16
# With ``any_gain``, a gain is taken as certain, and as lasting for so many windows.
_ANY_GAIN_WINDOWS = 10_000.0

Propose = Callable[[Placement, ExpectedLoad, RankHardware, IntArray | None], Proposal]
"""``planner.propose``, or another one in tests."""


class Replanner:
    """A forecast of a model's traffic, independent of its ranks, and the placements that follow from it.

    Args:
        num_experts_L: experts of each layer.
        pools: the layers of each pool; slots can move between layers of one pool.
        planner: finds a placement for an expected load.
        forecast: learns; None = a new one.
    """

    def __init__(
        self,
        num_experts_L: IntArray,
        pools: Sequence[Sequence[int]],
        *,
        planner: Propose = propose,
        forecast: Forecast | GroupForecast | None = None,
    ) -> None:
        self.num_experts_L = num_experts_L
        self._pools = [np.array(pool) for pool in pools]
        self._propose = planner
        self._forecast = Forecast() if forecast is None else forecast
        self._reuse_LD = np.zeros((len(num_experts_L), int(num_experts_L.max()) + 1), np.int64)

    def learn(self, tokens_LE: IntArray, uses_LE: IntArray, reuse_LD: IntArray, steps: int) -> None:
        """Learn from one window of all ranks.

        Args:
            tokens_LE: pairs of each expert.
            uses_LE: steps in which each expert was used.
            reuse_LD: a sample of the uses by stack distance.
            steps: of the window.
        """
        self._forecast.add(tokens_LE, uses_LE, steps)
        self._reuse_LD += reuse_LD - self._reuse_LD // _REUSE_WINDOWS

    def weigh(self, current: Placement, hardware: RankHardware, *, any_gain: bool = False) -> tuple[ExpectedLoad, Proposal]:
        """The expected load, and the placement to follow from now on, often the current one.

        Args:
            any_gain: accept a gain that wouldn't pay for its migrations soon enough. Then the proposal's ``gain_ns`` is that
                of the windows for which the forecast is believed.
        """
        expected = self._forecast.expected()
        horizon = replace(expected, trust=1.0, windows=_ANY_GAIN_WINDOWS) if any_gain else expected
        proposal = self._propose(current, horizon, hardware, self.quotas(current))
        if any_gain:
            believed = expected.trust * expected.windows / _ANY_GAIN_WINDOWS
            proposal = replace(proposal, gain_ns=int(proposal.gain_ns * believed))
        return expected, proposal

    def quotas(self, current: Placement) -> IntArray | None:
        """Slots of each layer on each rank by measured reuse, int64 [L, R]; None if they should stay."""
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
