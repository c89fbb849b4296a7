"""The candidate divisions of a layer's work that ``assignment_kernels.divide_work`` compares, as compiled loops.

A candidate is ``computed_RU``, the pairs of each expert that each rank computes. ``to_holders`` and ``all_at_home`` start from
nothing; ``with_copies`` and ``shed`` change the best candidate so far. ``assignment.py`` says what each is for.

Legend of shape suffixes: R ranks, N nodes, E experts of the layer, U those with tokens ("used"), M some of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled, inlined
from epslots.planner.cost_model import add_compute

# How often loads are levelled over replicas: each round halves the rest, or more.
LEVEL_ROUNDS = 2
# A product of at most this size fits into 64 bits, with room for half a divisor.
LARGEST_PRODUCT = 1 << 62


class Prices(NamedTuple):
    """The first fields of ``Costs``."""

    host_fetch: int
    peer_fetch: int
    pair_transfer: int
    pair_compute: int
    expert_compute: int
    exchange: int


class Step(NamedTuple):
    """The arguments of ``divide_work``, for the experts with tokens (U); ``total_U``: their pairs over all ranks."""

    experts_U: IntArray
    counts_RU: IntArray
    total_U: IntArray
    holds_RU: BoolArray
    holds_RE: BoolArray
    quota_R: IntArray
    home_U: IntArray
    node_R: IntArray
    nodes: int
    prices: Prices


@compiled("int64[::1](int64[::1])")
def _descending_order(value_M: IntArray) -> IntArray:
    """Indices that sort values from the highest down, stably."""
    return np.argsort(-value_M, kind="mergesort")


@inlined
def to_holders(step: Step) -> IntArray:
    """The candidate in which tokens go to ranks that hold their expert; an absent expert is fetched by one rank."""
    holds_RU, quota_R = step.holds_RU, step.quota_R
    ranks, experts = holds_RU.shape
    computed_RU = np.zeros((ranks, experts), np.int64)
    copies_U, holder_U = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    for rank in range(ranks):
        for expert in range(experts):
            if holds_RU[rank, expert]:
                copies_U[expert] += 1
                holder_U[expert] = rank
    for expert in range(experts):
        if copies_U[expert] == 1:
            computed_RU[holder_U[expert], expert] = step.total_U[expert]
    replicated, absent = np.flatnonzero(copies_U > 1), np.flatnonzero(copies_U == 0)
    if len(replicated):
        _level_replicas(step, replicated, computed_RU)
    if len(absent):
        load_R, empty_R, free_slots_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
        add_compute(computed_RU, step.prices.pair_compute, step.prices.expert_compute, load_R)
        for rank in range(ranks):
            empty_R[rank] = quota_R[rank] - np.count_nonzero(step.holds_RE[rank])
            free_slots_R[rank] = quota_R[rank] - np.count_nonzero(computed_RU[rank])
        total_M, home_M = step.total_U[absent], step.home_U[absent]
        rank_M = place_misses(total_M, home_M, empty_R, free_slots_R, load_R, step.prices.host_fetch)
        for miss, column in enumerate(absent):
            computed_RU[rank_M[miss], column] = total_M[miss]
    return computed_RU


@inlined
def _level_replicas(step: Step, replicated: IntArray, computed_RU: IntArray) -> None:
    """Divide the pairs of replicated experts among their holders, so that ranks are equally loaded.

    A holder's own tokens stay. The others go to holders in proportion to what these lack to the mean load, on their own node
    if possible; then ranks above the mean hand pairs on, to any node.
    """
    counts_RU, holds_RU = step.counts_RU, step.holds_RU
    ranks, experts = counts_RU.shape
    pair = step.prices.pair_compute
    load_R, pairs_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    below_R, above_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    add_compute(computed_RU, pair, step.prices.expert_compute, load_R)
    node_R, handed_NU, weights_RU = (
        step.node_R,
        np.zeros((step.nodes, experts), np.int64),
        np.zeros((ranks, experts), np.int64),
    )
    mean = _keep_own_pairs(step, replicated, load_R, computed_RU, handed_NU)
    for attempt in range(1 + LEVEL_ROUNDS):
        below_U, most = np.zeros(experts, np.bool_), 0  # whether any holder is below the mean; the most pairs above it
        for rank in range(ranks):
            pairs_R[rank] = 0
            for expert in replicated:
                pairs_R[rank] += computed_RU[rank, expert]
            above = load_R[rank] + pairs_R[rank] * pair - mean
            below_R[rank], above_R[rank] = max(-above, 0), min(max(above // pair, 0), pairs_R[rank])
            most = max(most, above_R[rank])
            for expert in replicated:
                below_U[expert] |= above < 0 and holds_RU[rank, expert]
        if attempt:
            if most * pair <= step.prices.expert_compute:
                break  # equal enough: a split adds an expert to a rank
            node_R, handed_NU = np.zeros(ranks, np.int64), np.zeros((1, experts), np.int64)
        for rank in range(ranks):
            for expert in replicated:
                if holds_RU[rank, expert]:
                    weights_RU[rank, expert] = below_R[rank] if below_U[expert] else 1
                    if attempt and above_R[rank] and below_U[expert]:
                        handed = computed_RU[rank, expert] * above_R[rank] // pairs_R[rank]
                        computed_RU[rank, expert] -= handed
                        handed_NU[0, expert] += handed
        _hand_out(handed_NU, node_R, weights_RU, computed_RU)


@inlined
def _keep_own_pairs(step: Step, replicated: IntArray, load_R: IntArray, computed_RU: IntArray, handed_NU: IntArray) -> int:
    """Give holders the pairs of their own tokens, and enter the others' pairs by node; returns the mean load of all."""
    counts_RU, holds_RU, node_R, pair = step.counts_RU, step.holds_RU, step.node_R, step.prices.pair_compute
    ranks, total = len(load_R), 0
    for rank in range(ranks):
        total += load_R[rank]
        for expert in replicated:
            total += counts_RU[rank, expert] * pair
            if holds_RU[rank, expert]:
                computed_RU[rank, expert] = counts_RU[rank, expert]
            else:
                handed_NU[node_R[rank], expert] += counts_RU[rank, expert]
    return total // ranks + 1


@inlined
def _hand_out(handed_NU: IntArray, node_R: IntArray, weights_RU: IntArray, computed_RU: IntArray) -> None:
    """Add each node's handed pairs to ``computed_RU``, in proportion to weights, on its own ranks if possible."""
    ranks, experts = weights_RU.shape
    weight_R = np.zeros(ranks, np.int64)
    for node in range(len(handed_NU)):
        for expert in range(experts):
            handed = handed_NU[node, expert]
            if not handed:
                continue
            near = False
            for rank in range(ranks):
                weight_R[rank] = weights_RU[rank, expert]
                near |= weight_R[rank] > 0 and node_R[rank] == node
            total = 0
            for rank in range(ranks):
                if near and node_R[rank] != node:
                    weight_R[rank] = 0
                total += weight_R[rank]
            while total > LARGEST_PRODUCT // handed:
                total = 0
                for rank in range(ranks):
                    weight_R[rank] = (weight_R[rank] + 1) >> 1
                    total += weight_R[rank]
            so_far = given = 0
            for rank in range(ranks):
                if weight_R[rank]:
                    so_far += weight_R[rank]
                    bound = (handed * so_far + total // 2) // total
                    computed_RU[rank, expert] += bound - given
                    given = bound


@compiled("int64[::1](int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64)")
def place_misses(
    total_M: IntArray, home_M: IntArray, empty_R: IntArray, free_slots_R: IntArray, load_R: IntArray, fetch_ns: int
) -> IntArray:
    """The rank that fetches each expert that no rank holds, int64 [M].

    No rank fetches more than its share, because the slowest is waited for. Three rounds raise the fetches that a rank may
    take: to its empty slots, to the slots that the step leaves free, to its share of all misses. In each round homes take
    theirs first, then the least loaded ranks, one at a time.

    Args:
        total_M: the experts' pairs; those with most choose first.
        home_M: their homes.
        empty_R: empty slots.
        free_slots_R: slots that the step leaves unused.
        load_R: nanoseconds of compute so far.
        fetch_ns: of a fetch: a rank that is further above the mean load fetches only if all others are taken.
    """
    ranks, misses = len(empty_R), len(total_M)
    share, idle_enough = -(-misses // ranks), load_R.sum() // ranks + fetch_ns
    by_pairs, by_load, rank_M = _descending_order(total_M), _descending_order(-load_R), np.full(misses, -1)
    taken_R, limit_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for attempt in range(3):
        for rank in range(ranks):
            if attempt == 2:
                limit_R[rank] = share
            elif load_R[rank] <= idle_enough:
                limit_R[rank] = min(empty_R[rank] if attempt == 0 else free_slots_R[rank], share)
        for miss in by_pairs:
            home = home_M[miss]
            if rank_M[miss] < 0 and taken_R[home] < limit_R[home]:
                rank_M[miss] = home
                taken_R[home] += 1
        dealt_R = np.zeros(ranks, np.int64)  # every rank takes one before any takes a second
        for miss in by_pairs:
            if rank_M[miss] >= 0:
                continue
            taker = -1
            for rank in by_load:
                if taken_R[rank] < limit_R[rank] and (taker < 0 or dealt_R[rank] < dealt_R[taker]):
                    taker = rank
            if taker < 0:
                break
            rank_M[miss] = taker
            taken_R[taker] += 1
            dealt_R[taker] += 1
    return rank_M


@inlined
def with_copies(step: Step, computed_RU: IntArray, remote_ns_RE: IntArray, spare_RE: BoolArray) -> tuple[IntArray, int]:
    """The candidate in which ranks fetch copies of experts whose tokens they send away.

    With it comes the accumulated remote cost that this ends.

    A copy may evict other experts if this step alone pays for it. If only the accumulated remote cost pays for it, it needs an
    idle slot. Returns ``computed_RU`` itself if no copy pays.
    """
    counts_RU, holds_RE, experts_U, prices = step.counts_RU, step.holds_RE, step.experts_U, step.prices
    ranks = len(computed_RU)
    fetch_ns = min(prices.host_fetch, prices.peer_fetch)
    worth_RU, any_worth = _worth_of_copies(step, computed_RU, remote_ns_RE, fetch_ns)
    if not any_worth:
        return computed_RU, 0
    rival_RU, handed_1U, ended = np.zeros(computed_RU.shape, np.int64), np.zeros((1, len(step.total_U)), np.int64), 0
    for column, total in enumerate(step.total_U):
        handed_1U[0, column] = total
    for rank in range(ranks):
        free = step.quota_R[rank] - np.count_nonzero(computed_RU[rank])
        if free <= 0:
            continue
        idle = free  # without evicting anything but replicas
        for expert in range(spare_RE.shape[1]):
            idle -= holds_RE[rank, expert] and not spare_RE[rank, expert]
        for column, expert in enumerate(experts_U):
            idle += computed_RU[rank, column] > 0 and holds_RE[rank, expert] and not spare_RE[rank, expert]
        for number, column in enumerate(_descending_order(worth_RU[rank])):
            pairs = counts_RU[rank, column]
            if worth_RU[rank, column] == 0 or number >= free:
                break
            pays_now = 2 * pairs * prices.pair_transfer - prices.expert_compute > fetch_ns
            if number < (free if pays_now else idle):
                rival_RU[rank, column] = pairs
                handed_1U[0, column] -= pairs
                ended += remote_ns_RE[rank, experts_U[column]]
    _hand_out(handed_1U, np.zeros(ranks, np.int64), computed_RU, rival_RU)
    return rival_RU, ended


@inlined
def _worth_of_copies(step: Step, computed_RU: IntArray, remote_ns_RE: IntArray, fetch_ns: int) -> tuple[IntArray, bool]:
    """Nanoseconds that a copy would save each rank beyond its fetch, int64 [R, U]; and whether any is above 0."""
    counts_RU, holds_RU, experts_U, prices = step.counts_RU, step.holds_RU, step.experts_U, step.prices
    worth_RU, any_worth = np.zeros(computed_RU.shape, np.int64), False
    for rank in range(len(computed_RU)):
        for column, expert in enumerate(experts_U):
            pairs = counts_RU[rank, column]
            if pairs and not holds_RU[rank, column] and computed_RU[rank, column] == 0:
                # A copy saves the pairs' way there and back; but one more rank reads the expert's weights.
                gain = max(2 * pairs * prices.pair_transfer - prices.expert_compute, 0)
                worth_RU[rank, column] = max(gain + remote_ns_RE[rank, expert] - fetch_ns, 0)
                any_worth |= worth_RU[rank, column] > 0
    return worth_RU, any_worth


@inlined
def shed(step: Step, computed_RU: IntArray) -> IntArray:
    """The candidate in which overloaded ranks shed tokens of their hottest expert to others.

    Donors' pairs lie on one line, takers' capacities on another, both from the largest down. The overlap of a donor's stretch
    with a taker's is the number of pairs that go, so that all transfers of a round are found at once. Returns ``computed_RU``
    itself if none pays.
    """
    prices, (ranks, experts) = step.prices, computed_RU.shape
    pair_compute = prices.pair_compute
    price = min(prices.host_fetch, prices.peer_fetch) + prices.expert_compute
    load_R, free_slots_R, hottest_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    pairs_R, capacity_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    add_compute(computed_RU, pair_compute, prices.expert_compute, load_R)
    for rank in range(ranks):
        free_slots_R[rank] = step.quota_R[rank]
        for expert in range(experts):
            pairs = computed_RU[rank, expert]
            if pairs:
                free_slots_R[rank] -= 1
                load_R[rank] += 0 if step.holds_RU[rank, expert] else prices.host_fetch
            if pairs > pairs_R[rank]:
                pairs_R[rank], hottest_R[rank] = pairs, expert
    mean = load_R.sum() // ranks
    for rank in range(ranks):
        pairs_R[rank] = min(pairs_R[rank], max(load_R[rank] - mean, 0) // pair_compute)
        if free_slots_R[rank] > 0:
            capacity_R[rank] = max(mean - load_R[rank] - price, 0) // pair_compute
    if load_R.max() - mean <= price or pairs_R.max() * pair_compute <= price:
        return computed_RU  # no expert is hot enough to be worth a copy
    shed_RU, found, given, takers = computed_RU.copy(), False, 0, _descending_order(capacity_R)
    for donor in _descending_order(pairs_R):
        taken = 0
        for taker in takers:
            moved = min(given + pairs_R[donor], taken + capacity_R[taker]) - max(given, taken)
            if moved * pair_compute > price:
                shed_RU[donor, hottest_R[donor]] -= moved
                shed_RU[taker, hottest_R[donor]] += moved
                found = True
            taken += capacity_R[taker]
        given += pairs_R[donor]
    return shed_RU if found else computed_RU


@inlined
def all_at_home(step: Step) -> IntArray:
    """The candidate in which every expert is computed at its home."""
    computed_RU = np.zeros(step.counts_RU.shape, np.int64)
    for column, home in enumerate(step.home_U):
        computed_RU[home, column] = step.total_U[column]
    return computed_RU
