"""Which misses are computed by the host's CPU instead of being fetched.

A miss that nobody else can serve is fetched by the rank that computes it, or computed where its weights are: by the CPU, from
the host store, for the price of moving a few rows (``cpu_experts.py``). Then nothing enters a slot and nothing gives way. It
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

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.cost_model import Costs

# So many steps halve a toll: what was wanted long ago is no reason to fetch it now.
TOLL_STEPS = 64

NEVER = 2**63 - 1


def computed_on_cpu(
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
    hosted_F = np.zeros(len(rank_F), bool)
    if costs.computes_on_host and len(rank_F):
        prices = costs.host_fetch, costs.host_expert, costs.host_pair
        _serve(rank_F, pairs_F, toll_F, displaces_F, _rent(costs, pairs_F), prices, beside, hosted_F)
    return hosted_F


@compiled(
    "void(int64[::1], int64[::1], int64[::1], b1[::1], int64[::1], UniTuple(int64, 3), b1, b1[::1])",
)
def _serve(
    rank_F: IntArray,
    pairs_F: IntArray,
    toll_F: IntArray,
    displaces_F: BoolArray,
    rent_F: IntArray,
    prices: tuple[int, int, int],
    beside: bool,
    hosted_F: BoolArray,
) -> None:
    buy, host_expert, host_pair = prices
    fetches, ranks = len(rank_F), 0
    for fetch in range(fetches):
        ranks = max(ranks, rank_F[fetch] + 1)
        fair = displaces_F[fetch] or toll_F[fetch] + rent_F[fetch] < 2 * buy
        hosted_F[fetch] = not beside and rent_F[fetch] < buy and fair
    if not beside:
        return
    # The cheapest first, as long as the link would still be the busier one: each host's share of its rank's misses.
    busy_R, left_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for rank in rank_F:
        left_R[rank] += 1
    for fetch in np.argsort(pairs_F, kind="mergesort"):
        rank = rank_F[fetch]
        if displaces_F[fetch] or toll_F[fetch] < 2 * buy:
            busy_R[rank] += host_expert + pairs_F[fetch] * host_pair
            hosted_F[fetch] = busy_R[rank] < left_R[rank] * buy
            left_R[rank] -= 1


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
    better_F = np.empty(len(rank_F), bool)
    _displace(holds_RE, needed_RE, quota_R, score_E, rank_F, expert_F, better_F)
    return better_F


@compiled("void(b1[:, ::1], b1[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], b1[::1])")
def _displace(
    holds_RE: BoolArray,
    needed_RE: BoolArray,
    quota_R: IntArray,
    score_E: IntArray,
    rank_F: IntArray,
    expert_F: IntArray,
    better_F: BoolArray,
) -> None:
    ranks, experts = holds_RE.shape
    least_R, known_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.bool_)  # of the residents that the step doesn't need
    for fetch, rank in enumerate(rank_F):
        if not known_R[rank]:
            held, least = 0, NEVER
            for expert in range(experts):
                held += holds_RE[rank, expert]
                if holds_RE[rank, expert] and not needed_RE[rank, expert]:
                    least = min(least, score_E[expert])
            least_R[rank], known_R[rank] = least if held >= quota_R[rank] else NEVER, True
        better_F[fetch] = NEVER > least_R[rank] > score_E[expert_F[fetch]]


class CpuShare:
    """What a layer's ranks compute on their hosts, and what that has cost them; the same on all ranks.

    Args:
        ranks, experts: R and E.
        costs: the same on all ranks.
        beside: as ``computed_on_cpu`` has it; the same on all ranks.
    """

    def __init__(self, ranks: int, experts: int, costs: Costs, *, beside: bool) -> None:
        self.costs = costs
        self.beside = beside
        self._remote_ns_RE = np.zeros((ranks, experts), np.int64)
        self._halvings = 0

    def choose(
        self,
        step: int,
        rank_F: IntArray,
        expert_F: IntArray,
        pairs_F: IntArray,
        displaces_F: BoolArray,
    ) -> BoolArray:
        """``computed_on_cpu`` for a step's fetches, whose outcome is entered.

        Args:
            step: a number that only grows: of the layer's steps alone, of those with fetches from a host in a group.
        """
        halvings = step // TOLL_STEPS
        self._remote_ns_RE >>= min(halvings - self._halvings, 62)
        self._halvings = halvings
        toll_F = self._remote_ns_RE[rank_F, expert_F]
        hosted_F = computed_on_cpu(self.costs, rank_F, pairs_F, toll_F, displaces_F, beside=self.beside)
        # A fetch settles the account.
        self._remote_ns_RE[rank_F, expert_F] = np.where(hosted_F, toll_F + _rent(self.costs, pairs_F), 0)
        return hosted_F

    @property
    def remote_ns_RE(self) -> IntArray:
        """Nanoseconds that each rank's host has cost lately by each expert, int64. A group that forms begins with none."""
        return self._remote_ns_RE


def _rent(costs: Costs, pairs_F: IntArray) -> IntArray:
    """What computing on the host costs more than computing from a slot, in nanoseconds."""
    more: IntArray = (costs.host_expert - costs.expert_compute) + pairs_F * (costs.host_pair - costs.pair_compute)
    return np.maximum(more, 0)
