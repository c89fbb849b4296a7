"""Who computes what: the plan of one layer's step for all ranks.

Pure: integer arrays in, integer arrays out. Every rank knows every rank's counts and residents, so each works out the whole
plan and all come to the same one; nobody coordinates. A miss is served by whatever the cost model (``costs.py``) finds
cheapest: tokens go to a rank that holds the expert, or a rank fetches it, from a peer or from its host.

    held by one rank      that rank computes
    held by several       split so that ranks are level, own tokens first
    held by none          fetched at home, or elsewhere where home has more than its share of fetches
    many own tokens       a rank fetches a copy when that costs less than sending them; or less than it has cost so far, if it
                          has a slot to spare (the rule of ski rental: rent until you could have bought)
    one hot expert        a swamped rank sheds tokens to another that fetches a copy (least-loaded expert parallelism,
                          arXiv 2601.17111)

The last two are taken only if they lower the modelled cost of the whole layer, as is an exchange at all; and nothing is taken
that costs more than the simplest plan: tokens go home, home fetches.

Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens ("used"), M some of them, F fetches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from epslots.costs import Costs, compute_cost, layer_cost, sources
from epslots.eviction import IntArray
from epslots.residency import BoolArray, spare_copies

# How often loads are levelled over replicas, and how often tokens are shed: each round halves what is left, or more.
LEVEL_ROUNDS = 2
SHED_ROUNDS = 4
# Experts live where they are for a reason that a step's cost doesn't show, so a copy elsewhere must save this part of it.
WORTHWHILE = 16


class Assign(Protocol):
    """A rule such as ``assign``."""

    def __call__(
        self,
        counts_RE: IntArray,
        holds_RE: BoolArray,
        quota_R: IntArray,
        home_E: IntArray,
        costs: Costs,
        tolls_RE: IntArray | None = None,
        *,
        wanted_RE: BoolArray | None = None,
        node_R: IntArray | None = None,
    ) -> Assignment: ...


@dataclass(frozen=True)
class Assignment:
    """Who computes what, and who fetches what for it.

    Attributes:
        experts_U: int64, the experts with tokens, in order of their ids.
        computed_RU: int64, pairs of each of them that each rank computes. Columns add up to the pairs there are.
        fetch_ranks, fetch_experts, fetch_sources: int64 [F], parallel, by rank and expert: the target, the expert's id, and
            the rank it is copied from, -1 = the target's host.
        cost_ns: what the cost model expects.
    """

    experts_U: IntArray
    computed_RU: IntArray
    fetch_ranks: IntArray
    fetch_experts: IntArray
    fetch_sources: IntArray
    cost_ns: int


def assign(
    counts_RE: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    costs: Costs,
    tolls_RE: IntArray | None = None,
    *,
    wanted_RE: BoolArray | None = None,
    node_R: IntArray | None = None,
) -> Assignment:
    """Plan one layer's step.

    Args:
        counts_RE: (token, k) pairs of each rank's own tokens for each expert.
        holds_RE: who holds what before the step.
        quota_R: slots of the layer on each rank.
        home_E: the home rank of each expert. Any will do; a good one saves fetches.
        costs: what things cost, the same on all ranks.
        tolls_RE: nanoseconds that each rank would have saved lately by copies of what it sent tokens to others for; nothing,
            if not given.
        wanted_RE: the copies that the placement wants; none, if not given.
        node_R: the node of each rank, if there are several.
    """
    experts_U, step = _used_part(counts_RE, holds_RE, quota_R, home_E, costs, node_R)
    best = _price(step, _to_holders(step, quota_R - holds_RE.sum(1)))
    home_RU = _to_home(step)
    if not np.array_equal(home_RU, best.computed_RU) and _least_cost(step, home_RU) < best.cost_ns:
        simplest = _price(step, home_RU)
        best = simplest if simplest.cost_ns < best.cost_ns else best
    if _least_cost(step, step.counts_RU) < best.cost_ns:
        best = _better(best, _price(step, step.counts_RU))
    best = _with_copies(step, best, None if tolls_RE is None else tolls_RE[:, experts_U], home_E, wanted_RE)
    for _ in range(SHED_ROUNDS):
        lighter_RU = _shed(step, best.computed_RU)
        if lighter_RU is None:
            break
        lighter = _better(best, _price(step, lighter_RU))
        if lighter is best:
            break
        best = lighter
    return best.of(experts_U)


@dataclass(frozen=True)
class _Step:
    """The arguments of ``assign``, for the experts with tokens; and their pairs over all ranks."""

    experts_U: IntArray
    counts_RU: IntArray
    total_U: IntArray
    holds_RU: BoolArray
    all_holds_RE: BoolArray
    quota_R: IntArray
    home_U: IntArray
    costs: Costs
    node_R: IntArray | None


@dataclass(frozen=True)
class _Priced:
    computed_RU: IntArray
    rank_F: IntArray
    column_F: IntArray
    source_F: IntArray
    cost_ns: int

    def of(self, experts_U: IntArray) -> Assignment:
        return Assignment(experts_U, self.computed_RU, self.rank_F, experts_U[self.column_F], self.source_F, self.cost_ns)


def _used_part(
    counts_RE: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    costs: Costs,
    node_R: IntArray | None,
) -> tuple[IntArray, _Step]:
    total_E = counts_RE.sum(0, dtype=np.int64)
    experts_U = np.flatnonzero(total_E)
    counts_RU = counts_RE[:, experts_U].astype(np.int64)
    return experts_U, _Step(
        experts_U, counts_RU, total_E[experts_U], holds_RE[:, experts_U], holds_RE, quota_R, home_E[experts_U], costs, node_R
    )


def _price(step: _Step, computed_RU: IntArray) -> _Priced:
    """The fetches that a division of work takes, where each comes from, and what it costs."""
    rank_F, column_F = np.nonzero((computed_RU > 0) & ~step.holds_RU)
    source_F = np.full(len(rank_F), -1)
    if len(rank_F) and step.costs.peer_fetch < step.costs.host_fetch:
        copied = np.flatnonzero(step.holds_RU[:, column_F].any(0))
        if len(copied):
            source_F[copied] = sources(step.holds_RU, computed_RU, step.quota_R, rank_F[copied], column_F[copied], step.node_R)
    cost_ns = layer_cost(step.costs, step.counts_RU, computed_RU, rank_F, source_F)
    return _Priced(computed_RU, rank_F, column_F, source_F, cost_ns)


def _to_home(step: _Step) -> IntArray:
    computed_RU = np.zeros_like(step.counts_RU)
    computed_RU[step.home_U, np.arange(len(step.home_U))] = step.total_U
    return computed_RU


def _to_holders(step: _Step, free_R: IntArray) -> IntArray:
    """Tokens go where their expert is; an expert that is nowhere is fetched by one rank."""
    total_U = step.total_U
    copies_U = np.count_nonzero(step.holds_RU, axis=0)
    computed_RU = step.holds_RU * total_U
    several = np.flatnonzero(copies_U > 1)
    if len(several):
        computed_RU[:, several] = 0
        load_R = compute_cost(step.costs, computed_RU)
        shared = step.counts_RU[:, several], step.holds_RU[:, several]
        computed_RU[:, several] = _split(*shared, load_R, step.costs, step.node_R)
    nowhere = np.flatnonzero(copies_U == 0)
    if len(nowhere):
        load_R = compute_cost(step.costs, computed_RU)
        seats_R = step.quota_R - (computed_RU > 0).sum(1)
        ranks = place_misses(total_U[nowhere], step.home_U[nowhere], free_R, seats_R, load_R, step.costs.host_fetch)
        computed_RU[ranks, nowhere] = total_U[nowhere]
    return computed_RU


def _split(counts_RM: IntArray, holds_RM: BoolArray, load_R: IntArray, costs: Costs, node_R: IntArray | None) -> IntArray:
    """Divide the pairs of experts with several holders among these, int64 [R, M], so that ranks are level.

    Own tokens stay, the others go to holders in proportion to what these lack to the mean, on their own node if they can; then
    ranks above the mean hand on, to whichever node.
    """
    pair = costs.pair_compute
    mean = (int(load_R.sum()) + int(counts_RM.sum()) * pair) // len(load_R) + 1
    computed_RM = counts_RM * holds_RM
    handed_M = counts_RM.sum(0) - computed_RM.sum(0)
    for attempt in range(1 + LEVEL_ROUNDS):
        mine_R = computed_RM.sum(1)
        lacks_R = np.maximum(mean - load_R - mine_R * pair, 0)
        weights_RM = holds_RM * lacks_R[:, None]
        if attempt:
            over_R = np.clip((load_R + mine_R * pair - mean) // pair, 0, mine_R)
            if int(over_R.max()) * pair <= costs.expert_compute:
                break  # level enough: a split adds an expert to a rank
            back_RM = computed_RM * over_R[:, None] // np.maximum(mine_R, 1)[:, None]
            back_RM = np.where(weights_RM.any(0), back_RM, 0)  # what nobody could take stays
            handed_M = back_RM.sum(0)
            if not handed_M.any():
                break
            computed_RM -= back_RM
        elif node_R is not None:
            handed_RM = counts_RM * ~holds_RM
            computed_RM += _divide_by_node(handed_RM, np.where(weights_RM.any(0), weights_RM, holds_RM), node_R)
            continue
        computed_RM += _divide(handed_M, np.where(weights_RM.any(0), weights_RM, holds_RM))
    return computed_RM


def _divide_by_node(handed_RM: IntArray, weights_RM: NDArray[np.integer], node_R: IntArray) -> IntArray:
    """``_divide`` the pairs that each rank hands on, first among the ranks of its node, where any of these has a weight."""
    here_NR = np.arange(int(node_R.max()) + 1)[:, None] == node_R
    handed_NM = here_NR.astype(np.int64) @ handed_RM
    weights_NRM = weights_RM * here_NR[:, :, None]
    weights_NRM = np.where(weights_NRM.any(1, keepdims=True), weights_NRM, weights_RM)
    divided: IntArray = _divide(handed_NM.ravel(), weights_NRM.swapaxes(0, 1).reshape(len(node_R), -1))
    return divided.reshape(len(node_R), *handed_NM.shape).sum(1)


def _divide(total_M: IntArray, weights_RM: NDArray[np.integer]) -> IntArray:
    """Whole numbers in proportion to ``weights_RM`` that add up to ``total_M`` in every column."""
    bounds_RM = weights_RM.cumsum(0)
    excess = int(total_M.max(initial=0)).bit_length() + int(bounds_RM[-1].max(initial=0)).bit_length() - 62
    if excess > 0:  # the products below must fit into 64 bits
        weights_RM = np.where(weights_RM > 0, np.maximum(weights_RM >> excess, 1), 0)
        bounds_RM = weights_RM.cumsum(0)
    whole_M = np.maximum(bounds_RM[-1], 1)
    bounds_RM = (total_M * bounds_RM + whole_M // 2) // whole_M
    bounds_RM[1:] -= bounds_RM[:-1].copy()
    return bounds_RM


def place_misses(
    total_M: IntArray, home_M: IntArray, free_R: IntArray, seats_R: IntArray, load_R: IntArray, fetch_ns: int
) -> IntArray:
    """The rank that fetches each expert which nobody holds, int64 [M].

    No rank fetches more than its share, because the slowest is waited for. Empty slots are filled before anything is given up,
    and slots in use before a rank runs in waves; among these home comes first, then the least loaded.

    Args:
        total_M: the experts' pairs; those with most choose first.
        home_M: their homes.
        free_R: empty slots.
        seats_R: slots that the step leaves unused.
        load_R: nanoseconds of compute so far.
        fetch_ns: what a fetch takes: a rank that is further above the mean load fetches only if all others are taken.
    """
    ranks, misses = len(free_R), len(total_M)
    share = -(-misses // ranks)
    calm_R = load_R <= int(load_R.sum()) // ranks + fetch_ns
    place_M = np.full(misses, -1)
    waiting = np.argsort(-total_M, kind="stable")
    taken_R = np.zeros(ranks, np.int64)
    by_load = np.argsort(load_R, kind="stable")
    limits = (np.where(calm_R, np.minimum(free_R, share), 0), np.where(calm_R, np.minimum(seats_R, share), 0))
    for limit_R in (*limits, np.full(ranks, share)):
        left_R = np.maximum(limit_R - taken_R, 0)
        if not left_R.any():
            continue
        at_home = _number_in_group(home_M[waiting], ranks) < left_R[home_M[waiting]]
        place_M[waiting[at_home]] = home_M[waiting[at_home]]
        taken_R += np.bincount(home_M[waiting[at_home]], minlength=ranks)
        waiting = waiting[~at_home]
        if not len(waiting):
            break
        left_R = np.maximum(limit_R - taken_R, 0)[by_load]
        # A seat for each fetch that a rank may still take: every rank's first before any rank's second.
        seats = np.repeat(by_load, left_R)
        number = np.arange(len(seats)) - np.repeat(left_R.cumsum() - left_R, left_R)
        dealt = seats[np.argsort(number, kind="stable")][: len(waiting)]
        place_M[waiting[: len(dealt)]] = dealt
        taken_R += np.bincount(dealt, minlength=ranks)
        waiting = waiting[len(dealt) :]
        if not len(waiting):
            break
    return place_M


def _number_in_group(group_M: IntArray, groups: int) -> IntArray:
    """Each entry's number among those of its group, from 0, in the order given."""
    order = np.argsort(group_M, kind="stable")
    size = np.bincount(group_M, minlength=groups)
    number = np.empty(len(group_M), np.int64)
    number[order] = np.arange(len(group_M)) - (size.cumsum() - size)[group_M[order]]
    return number


def _better(best: _Priced, rival: _Priced) -> _Priced:
    return rival if rival.cost_ns < best.cost_ns - best.cost_ns // WORTHWHILE else best


def _least_cost(step: _Step, computed_RU: IntArray) -> int:
    """What a division of work costs at least, from its fetches alone: far less work than ``_price``, and mostly enough."""
    missing_RU = (computed_RU > 0) & ~step.holds_RU
    nowhere_U = ~step.holds_RU.any(0)
    fetches_R, hosted_R = missing_RU.sum(1), (missing_RU & nowhere_U).sum(1)
    fetch_ns = min(step.costs.host_fetch, step.costs.peer_fetch)
    fetching_R = hosted_R * step.costs.host_fetch + (fetches_R - hosted_R) * fetch_ns
    return int(fetching_R.max(initial=0)) + int(fetching_R.sum()) // len(fetching_R)


def _with_copies(
    step: _Step, base: _Priced, tolls_RU: IntArray | None, home_E: IntArray, wanted_RE: BoolArray | None
) -> _Priced:
    """Ranks fetch copies of what they send tokens for: where these tokens are worth it, or those so far and a slot is idle."""
    fetch_ns = min(step.costs.host_fetch, step.costs.peer_fetch)
    # A copy saves the way to and fro, and has one more rank read the expert's weights.
    gain_RU = np.maximum(step.counts_RU * (2 * step.costs.pair_transfer) - step.costs.expert_compute, 0)
    most = gain_RU if tolls_RU is None else gain_RU + tolls_RU
    if int(most.max(initial=0)) <= fetch_ns:
        return base
    away_RU = (step.counts_RU > 0) & ~step.holds_RU & (base.computed_RU == 0)
    worth_RU = np.where(away_RU, most - fetch_ns, 0)
    if int(worth_RU.max(initial=0)) <= 0:
        return base
    seats_R = step.quota_R - np.count_nonzero(base.computed_RU, axis=1)
    kept_RE = step.all_holds_RE & ~spare_copies(step.all_holds_RE, home_E, wanted_RE)
    idle_R = seats_R - kept_RE.sum(1) + (kept_RE[:, step.experts_U] & (base.computed_RU > 0)).sum(1)
    number_RU = np.empty_like(worth_RU)
    np.put_along_axis(number_RU, np.argsort(-worth_RU, axis=1, kind="stable"), np.arange(worth_RU.shape[1])[None], axis=1)
    copied_RU = (worth_RU > 0) & (number_RU < np.where(gain_RU > fetch_ns, seats_R[:, None], idle_R[:, None]))
    own_RU = np.where(copied_RU, step.counts_RU, 0)
    rival = _price(step, own_RU + _divide(step.total_U - own_RU.sum(0), base.computed_RU))
    paid_ns = 0 if tolls_RU is None else int(tolls_RU[copied_RU].sum())
    return rival if rival.cost_ns - paid_ns < base.cost_ns - base.cost_ns // WORTHWHILE else base


def _shed(step: _Step, computed_RU: IntArray) -> IntArray | None:
    """Ranks above the mean load shed tokens of their hottest expert to those that lack most; None where nothing is to gain.

    Shed tokens lie on one line, spare room on another, both from the largest down; where a donor's stretch overlaps a
    taker's, so many tokens go. So all moves of a round are found at once.
    """
    costs = step.costs
    load_R = compute_cost(costs, computed_RU)
    fetching_RU = (computed_RU > 0) & ~step.holds_RU
    load_R = load_R + fetching_RU.sum(1) * costs.host_fetch
    price = min(costs.host_fetch, costs.peer_fetch) + costs.expert_compute
    mean = int(load_R.sum()) // len(load_R)
    if int(load_R.max(initial=0)) - mean <= price:
        return None
    hottest_R = computed_RU.argmax(1)
    pairs_R = np.minimum(computed_RU.max(1), np.maximum(load_R - mean, 0) // costs.pair_compute)
    if int(pairs_R.max()) * costs.pair_compute <= price:
        return None  # no expert is hot enough to be worth a copy
    seats_R = step.quota_R - np.count_nonzero(computed_RU, axis=1)
    room_R = np.where(seats_R > 0, np.maximum(mean - load_R - price, 0) // costs.pair_compute, 0)
    donors = np.argsort(-pairs_R, kind="stable")
    takers = np.argsort(-room_R, kind="stable")
    given = pairs_R[donors].cumsum()
    taken = room_R[takers].cumsum()
    moved_DT = np.minimum(given[:, None], taken) - np.maximum((given - pairs_R[donors])[:, None], taken - room_R[takers])
    donor, taker = np.nonzero(moved_DT * costs.pair_compute > price)
    if not len(donor):
        return None
    moved = moved_DT[donor, taker]
    shed_RU = computed_RU.copy()
    np.subtract.at(shed_RU, (donors[donor], hottest_R[donors[donor]]), moved)
    np.add.at(shed_RU, (takers[taker], hottest_R[donors[donor]]), moved)
    return shed_RU


def _always(divide: Callable[[_Step], IntArray]) -> Assign:
    """A rule that divides work in one way, whatever it costs."""

    def rule(
        counts_RE: IntArray,
        holds_RE: BoolArray,
        quota_R: IntArray,
        home_E: IntArray,
        costs: Costs,
        tolls_RE: IntArray | None = None,
        *,
        wanted_RE: BoolArray | None = None,
        node_R: IntArray | None = None,
    ) -> Assignment:
        experts_U, step = _used_part(counts_RE, holds_RE, quota_R, home_E, costs, node_R)
        return _price(step, divide(step)).of(experts_U)

    return rule


# What the plan is compared with; arguments as ``assign``.
home_only = _always(_to_home)
"""The simplest plan: tokens go home, home fetches."""
holder_only = _always(lambda step: _to_holders(step, step.quota_R - step.all_holds_RE.sum(1)))
"""Tokens always travel to a rank that holds the expert, and only what nobody holds is fetched."""
own_only = _always(lambda step: step.counts_RU)
"""No exchange: every rank computes its own tokens and fetches what they need."""
