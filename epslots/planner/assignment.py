"""The division of one layer's work among all ranks, by the cost model (``cost_model.py``).

    held by one rank      that rank computes
    held by several       split so that ranks are equally loaded, own tokens first
    held by none          fetched at home, or elsewhere where home has more than its share of fetches
    many own tokens       a rank fetches a copy when that costs less than sending them, or less than sending has cost so far
    one hot expert        a swamped rank sheds tokens to another that fetches a copy

Pure: integer arrays in, integer arrays out. Every rank knows all ranks' counts and residents, so all come to the same plan
without a coordinator. Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens ("used"), M some of them,
F fetches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from msgspec.structs import astuple

from epslots.arrays import BoolArray, IntArray
from epslots.planner.assignment_kernels import CHEAPEST, HOLDERS, OWN, divide_work
from epslots.planner.cost_model import Costs
from epslots.planner.evictions import spare_copies
from epslots.planner.plan import Assignment


@dataclass(frozen=True)
class Assign:
    """A rule that divides a layer's work among its ranks. The loops are in ``assignment_kernels.py``.

    A copy that only earlier steps pay for needs an idle slot (ski rental: rent until you could have bought). Shedding a hot
    expert's tokens is least-loaded expert parallelism (arXiv 2601.17111). These two, and any exchange, are taken only if they
    lower the modelled cost of the whole layer. No plan costs more than the simplest one: tokens go home, home fetches.

    Args:
        way: one of the ways of ``assignment_kernels.py``.
    """

    way: int

    def __call__(
        self,
        counts_RE: IntArray,
        holds_RE: BoolArray,
        quota_R: IntArray,
        home_E: IntArray,
        costs: Costs,
        remote_ns_RE: IntArray | None = None,
        *,
        spare_RE: BoolArray | None = None,
        node_R: IntArray | None = None,
    ) -> Assignment:
        """Plan one layer's step.

        Args:
            counts_RE: (token, k) pairs of each rank's own tokens for each expert.
            holds_RE: the experts that each rank holds before the step.
            quota_R: slots of the layer on each rank.
            home_E: the home rank of each expert. Any will do; a good one saves fetches.
            costs: of operations, the same on all ranks.
            remote_ns_RE: nanoseconds that each rank would have saved lately with a copy of each expert (``remote_costs.py``);
                only ``assign`` uses them. By default no copy is bought for idle slots.
            spare_RE: the copies that may be evicted for others (``spare_copies``), where the placement wants some; by
                default all that are neither at home nor the last.
            node_R: the node of each rank, if there are several.
        """
        counts_RE, holds_RE = np.ascontiguousarray(counts_RE, np.int64), np.ascontiguousarray(holds_RE)
        if remote_ns_RE is None:
            remote_ns_RE, spare_RE = np.zeros(holds_RE.shape, np.int64), holds_RE  # then nothing is put into idle slots
        else:
            spare_RE = spare_copies(holds_RE, home_E) if spare_RE is None else spare_RE
        node_R = np.zeros(len(quota_R), np.int64) if node_R is None else node_R
        experts_U, counts_RU, computed_RU, (rank_F, column_F, source_F), cost_ns = divide_work(
            counts_RE, holds_RE, quota_R, home_E, node_R, astuple(costs)[:6], remote_ns_RE, spare_RE, self.way
        )
        return Assignment(experts_U, counts_RU, computed_RU, rank_F, experts_U[column_F], source_F, cost_ns)


assign = Assign(CHEAPEST)
"""The cheapest plan."""
# Others, to compare it with.
holder_only = Assign(HOLDERS)
"""Tokens always travel to a rank that holds the expert, and only experts on no rank are fetched."""
own_only = Assign(OWN)
"""No exchange: every rank computes its own tokens and fetches what they need."""
