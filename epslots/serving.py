"""Which misses are computed by the host's CPU instead of being fetched.

A miss that nobody else can serve is fetched by the rank that computes it, or computed where its weights are: by the CPU, from
the host store, for the price of moving a few rows (``host_compute.py``). Then nothing enters a slot and nothing gives way. It
is worth it

    while it costs less than the fetch, and
    while the eviction policy would rather keep what the expert would displace; or
    until the expert has cost as much there as a fetch would (the rule of ski rental): the fetch itself, and later that of
    what gives way, as ``costs.layer_cost`` has it. Half of this is forgotten every ``TOLL_STEPS`` steps

Where the CPU works beside the link and the device, a step takes as long as the busier of the two, and they share its misses.

Pure: integers that all ranks know in, the same decision on all ranks out.

Legend of shape suffixes: R ranks, E experts of the layer, F fetches from the host, of any rank.
"""

from __future__ import annotations

import numpy as np

from epslots.costs import Costs
from epslots.eviction import IntArray
from epslots.residency import BoolArray

# So many steps halve a toll: what was wanted long ago is no reason to fetch it now.
TOLL_STEPS = 64


def served_on_host(
    costs: Costs, rank_F: IntArray, pairs_F: IntArray, toll_F: IntArray, displaces_F: BoolArray, *, beside: bool
) -> BoolArray:
    """Which of the ranks' planned fetches from the host are computed there instead, bool [F].

    Args:
        costs: what things cost; nothing is computed on the host unless they say what that costs.
        rank_F: the rank that each fetch is for.
        pairs_F: pairs that the rank computes of each expert.
        toll_F: nanoseconds that each expert's being computed on that rank's host has cost lately.
        displaces_F: whether the eviction policy would rather keep what the expert would displace.
        beside: whether the CPU computes while the link carries; else one waits for the other.
    """
    if not costs.computes_on_host or not len(rank_F):
        return np.zeros(len(rank_F), bool)
    time_F = costs.host_expert + pairs_F * costs.host_pair
    rent_F = _rent(costs, pairs_F)
    buy = costs.host_fetch
    if not beside:
        worth_F: BoolArray = (rent_F < buy) & (displaces_F | (toll_F + rent_F < 2 * buy))
        return worth_F
    # The cheapest first, as long as the link would still be the busier one: each host's share of its rank's misses.
    may_F = displaces_F | (toll_F < 2 * buy)
    order = np.lexsort((time_F, ~may_F, rank_F))
    ranks, may = rank_F[order], may_F[order]
    first = np.searchsorted(ranks, ranks)
    number = np.arange(len(order)) - first
    misses = np.searchsorted(ranks, ranks, side="right") - first
    spent = time_F[order].cumsum()
    busy = spent - (spent - time_F[order])[first]
    result = np.zeros(len(rank_F), bool)
    result[order] = may & (busy < (misses - number) * buy)
    return result


def displaces_better(
    holds_RE: BoolArray, needed_RE: BoolArray, quota_R: IntArray, score_E: IntArray, rank_F: IntArray, expert_F: IntArray
) -> BoolArray:
    """Whether the eviction policy would rather keep what each fetch displaces than what it brings, bool [F].

    What a step needs is never displaced. A rank with an empty slot displaces nothing; nor is anything weighed where a rank
    needs more experts than it has slots.

    Args:
        holds_RE: who holds what before the step.
        needed_RE: the experts that each rank computes.
        quota_R: slots of the layer on each rank.
        score_E: the policy's scores.
        rank_F, expert_F: the fetches.
    """
    ranks = np.unique(rank_F)
    idle_RE = holds_RE[ranks] & ~needed_RE[ranks]
    full_R = np.count_nonzero(holds_RE[ranks], axis=1) >= quota_R[ranks]
    least_R = np.where(idle_RE, score_E, np.iinfo(np.int64).max).min(1)
    weighed_R = full_R & idle_RE.any(1)
    position_F = np.searchsorted(ranks, rank_F)
    better: BoolArray = weighed_R[position_F] & (least_R[position_F] > score_E[expert_F])
    return better


class HostShare:
    """What a layer's ranks compute on their hosts, and what that has cost them; the same on all ranks.

    Args:
        ranks, experts: R and E.
        costs: the same on all ranks.
        beside: as ``served_on_host`` has it; the same on all ranks.
    """

    def __init__(self, ranks: int, experts: int, costs: Costs, *, beside: bool) -> None:
        self.costs = costs
        self.beside = beside
        self._tolls_RE = np.zeros((ranks, experts), np.int64)
        self._halvings = 0

    def choose(
        self,
        step: int,
        rank_F: IntArray,
        expert_F: IntArray,
        pairs_F: IntArray,
        displaces_F: BoolArray,
    ) -> BoolArray:
        """``served_on_host`` for a step's fetches, whose outcome is entered.

        Args:
            step: a number that only grows: of the layer's steps alone, of those with fetches from a host in a group.
        """
        halvings = step // TOLL_STEPS
        self._tolls_RE >>= min(halvings - self._halvings, 62)
        self._halvings = halvings
        toll_F = self._tolls_RE[rank_F, expert_F]
        hosted_F = served_on_host(self.costs, rank_F, pairs_F, toll_F, displaces_F, beside=self.beside)
        # A fetch settles the account.
        self._tolls_RE[rank_F, expert_F] = np.where(hosted_F, toll_F + _rent(self.costs, pairs_F), 0)
        return hosted_F

    @property
    def tolls_RE(self) -> IntArray:
        """Nanoseconds that each rank's host has cost lately by each expert, int64. A group that forms begins with none."""
        return self._tolls_RE


def _rent(costs: Costs, pairs_F: IntArray) -> IntArray:
    """What computing on the host costs more than computing from a slot, in nanoseconds."""
    more: IntArray = (costs.host_expert - costs.expert_compute) + pairs_F * (costs.host_pair - costs.pair_compute)
    return np.maximum(more, 0)
