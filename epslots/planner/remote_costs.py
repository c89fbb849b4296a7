"""Costs of experts that other ranks compute for a rank. A copy pays when they exceed a fetch.

This is the rule of ski rental: rent until the rent has cost as much as the skis. ``assignment.py`` compares the figures.

Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import HALVING_STEPS
from epslots.planner.layer_state import LayerState
from epslots.planner.plan import Assignment


class RemoteCosts:
    """Accumulated remote costs of one layer, the same on all ranks. Half is forgotten every ``HALVING_STEPS`` steps.

    Attributes:
        ns_RE: int64, nanoseconds that each rank would have saved lately with a copy of each expert.
    """

    def __init__(self, ranks: int, experts: int) -> None:
        self.ns_RE = np.zeros((ranks, experts), np.int64)
        self._steps = 0

    def add(self, found: Assignment, state: LayerState, costs: Costs) -> None:
        """Add a step's costs, and clear those of the experts that it fetches.

        Args:
            state: as it is after the step.
        """
        self._steps += 1
        if self._steps % HALVING_STEPS == 0:
            self.ns_RE >>= 1
        holds_RE = np.ascontiguousarray(state.holds_RE)
        prices = costs.pair_transfer, costs.expert_compute, costs.exchange
        _add(found.experts_U, found.counts_RU, found.computed_RU, holds_RE, state.quota_R, prices, self.ns_RE)
        self.ns_RE[found.fetch_ranks, found.fetch_experts] = 0


@compiled(
    "void(int64[::1], int64[:, ::1], int64[:, ::1], b1[:, ::1], int64[::1], UniTuple(int64, 3), int64[:, ::1])",
)
def _add(
    experts_U: IntArray,
    counts_RU: IntArray,
    computed_RU: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    prices: tuple[int, int, int],
    remote_ns_RE: IntArray,
) -> None:
    pair_transfer, expert_compute, exchange = prices
    ranks, experts = holds_RE.shape
    # An exchange costs its latency until no rank needs any. That is in reach where each holds half of the experts.
    away, may_stop = 0, True
    for rank in range(ranks):
        may_stop &= 2 * quota_R[rank] >= experts
        for column, expert in enumerate(experts_U):
            if not holds_RE[rank, expert]:
                away += max(counts_RU[rank, column] - computed_RU[rank, column], 0)
    each = 2 * pair_transfer + (2 * exchange // away if may_stop and away else 0)
    for rank in range(ranks):
        for column, expert in enumerate(experts_U):
            pairs = counts_RU[rank, column] - computed_RU[rank, column]
            if pairs > 0 and not holds_RE[rank, expert]:
                remote_ns_RE[rank, expert] += max(pairs * each - expert_compute, 0)
