"""Which misses are computed on the CPU, from the host store, instead of being fetched into a slot.

A miss computed on the CPU (``moe/cpu_experts.py``) moves a few rows instead of the weights, and evicts nothing. It is chosen
while it costs less than the fetch, and either the eviction policy would keep the expert that the fetch would displace, or the
expert's CPU computations haven't yet cost two fetches: its own, and the later one of the displaced expert (the ski-rental
rule). Half of that cost is forgotten every ``HALVING_STEPS`` steps. Where CPU and link run concurrently, a step takes as long
as the busier of the two, and they share its misses. ``CpuShare`` keeps the costs; planners call its ``choose``.

Pure; all ranks decide alike. Legend of shape suffixes: R ranks, E experts of the layer, F fetches from the host, of any rank.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.cost_model import Costs

# Accumulated costs halve after so many steps: old uses are no reason to fetch an expert now.
HALVING_STEPS = 64

# A score above all scores: of a rank that evicts nothing.
_NO_EVICTION = 2**63 - 1


def computed_on_cpu(
    costs: Costs, rank_F: IntArray, pairs_F: IntArray, accumulated_ns_F: IntArray, displaces_F: BoolArray, *, concurrent: bool
) -> BoolArray:
    """Which of the ranks' planned fetches from the host are computed on the CPU instead, bool [F].

    Args:
        costs: none is computed on the CPU unless these say what that costs.
        rank_F: the target rank of each fetch.
        pairs_F: pairs that the rank computes of each expert.
        accumulated_ns_F: nanoseconds that each expert has lately cost on that rank's CPU, beyond computing from a slot.
        displaces_F: whether the eviction policy would keep the expert that the fetch would displace (``displaces_better``).
        concurrent: whether CPU and link run at the same time; else one waits for the other.
    """
    on_cpu_F = np.zeros(len(rank_F), bool)
    if costs.computes_on_host and len(rank_F):
        prices = costs.host_fetch, costs.host_expert, costs.host_pair
        added_ns_F = _added_cost(costs, pairs_F)
        _choose(rank_F, pairs_F, accumulated_ns_F, displaces_F, added_ns_F, prices, concurrent, on_cpu_F)
    return on_cpu_F


@compiled(
    "void(int64[::1], int64[::1], int64[::1], b1[::1], int64[::1], UniTuple(int64, 3), b1, b1[::1])",
)
def _choose(
    rank_F: IntArray,
    pairs_F: IntArray,
    accumulated_ns_F: IntArray,
    displaces_F: BoolArray,
    added_ns_F: IntArray,
    prices: tuple[int, int, int],
    concurrent: bool,
    on_cpu_F: BoolArray,
) -> None:
    fetch_ns, host_expert, host_pair = prices
    fetches, ranks = len(rank_F), 0
    for fetch in range(fetches):
        ranks = max(ranks, rank_F[fetch] + 1)
        allowed = displaces_F[fetch] or accumulated_ns_F[fetch] + added_ns_F[fetch] < 2 * fetch_ns
        on_cpu_F[fetch] = not concurrent and added_ns_F[fetch] < fetch_ns and allowed
    if not concurrent:
        return
    # The cheapest misses go to the CPU, as long as the rank's link would still be the busier one.
    busy_R, left_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for rank in rank_F:
        left_R[rank] += 1
    for fetch in np.argsort(pairs_F, kind="mergesort"):
        rank = rank_F[fetch]
        if displaces_F[fetch] or accumulated_ns_F[fetch] < 2 * fetch_ns:
            busy_R[rank] += host_expert + pairs_F[fetch] * host_pair
            on_cpu_F[fetch] = busy_R[rank] < left_R[rank] * fetch_ns
            left_R[rank] -= 1


def displaces_better(
    holds_RE: BoolArray, needed_RE: BoolArray, quota_R: IntArray, score_E: IntArray, rank_F: IntArray, expert_F: IntArray
) -> BoolArray:
    """Whether each fetch displaces an expert with a higher score than its own, bool [F].

    Needed experts are never displaced. False for a rank with an empty slot, or with no resident that the step doesn't need.

    Args:
        holds_RE: the residents before the step.
        needed_RE: the experts that each rank computes.
        quota_R: slots of the layer on each rank.
        score_E: the eviction policy's scores.
        rank_F, expert_F: the fetches.
    """
    better_F = np.empty(len(rank_F), bool)
    _displaces_better(holds_RE, needed_RE, quota_R, score_E, rank_F, expert_F, better_F)
    return better_F


@compiled("void(b1[:, ::1], b1[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], b1[::1])")
def _displaces_better(
    holds_RE: BoolArray,
    needed_RE: BoolArray,
    quota_R: IntArray,
    score_E: IntArray,
    rank_F: IntArray,
    expert_F: IntArray,
    better_F: BoolArray,
) -> None:
    ranks, experts = holds_RE.shape
    # Of each rank: the lowest score of the residents that the step doesn't need.
    lowest_R, known_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.bool_)
    for fetch, rank in enumerate(rank_F):
        if not known_R[rank]:
            held, lowest = 0, _NO_EVICTION
            for expert in range(experts):
                held += holds_RE[rank, expert]
                if holds_RE[rank, expert] and not needed_RE[rank, expert]:
                    lowest = min(lowest, score_E[expert])
            lowest_R[rank], known_R[rank] = lowest if held >= quota_R[rank] else _NO_EVICTION, True
        better_F[fetch] = _NO_EVICTION > lowest_R[rank] > score_E[expert_F[fetch]]


class CpuShare:
    """Chooses a layer's misses for the CPUs, and keeps what that has cost; the same on all ranks.

    Args:
        ranks, experts: R and E.
        costs: the same on all ranks.
        concurrent: whether CPU and link run at the same time; the same on all ranks.

    Attributes:
        cpu_ns_RE: nanoseconds that each expert has lately cost on each rank's CPU, int64 [R, E]; all 0 in a new group.
    """

    def __init__(self, ranks: int, experts: int, costs: Costs, *, concurrent: bool) -> None:
        self.costs = costs
        self.concurrent = concurrent
        self.cpu_ns_RE = np.zeros((ranks, experts), np.int64)
        self._halvings = 0

    def choose(
        self,
        step: int,
        rank_F: IntArray,
        expert_F: IntArray,
        pairs_F: IntArray,
        displaces_F: BoolArray,
    ) -> BoolArray:
        """Which of a step's fetches are computed on the CPU (``computed_on_cpu``), bool [F]; enters their cost.

        Args:
            step: a counter that never falls: the layer's steps on a lone rank, in a group its steps with fetches.
            rank_F, expert_F, pairs_F: target rank, expert and pairs of each fetch.
            displaces_F: whether each displaces an expert with a higher score.
        """
        halvings = step // HALVING_STEPS
        self.cpu_ns_RE >>= min(halvings - self._halvings, 62)
        self._halvings = halvings
        accumulated_ns_F = self.cpu_ns_RE[rank_F, expert_F]
        on_cpu_F = computed_on_cpu(self.costs, rank_F, pairs_F, accumulated_ns_F, displaces_F, concurrent=self.concurrent)
        # A fetch resets the account.
        added_ns_F = _added_cost(self.costs, pairs_F)
        self.cpu_ns_RE[rank_F, expert_F] = np.where(on_cpu_F, accumulated_ns_F + added_ns_F, 0)
        return on_cpu_F


def _added_cost(costs: Costs, pairs_F: IntArray) -> IntArray:
    """Nanoseconds by which the CPU's computation costs more than one from a slot, int64 [F]."""
    added: IntArray = (costs.host_expert - costs.expert_compute) + pairs_F * (costs.host_pair - costs.pair_compute)
    return np.maximum(added, 0)
