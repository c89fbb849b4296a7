"""The loops behind ``assignment.py`` and ``cost_model.py``, which say what they are for.

Legend of shape suffixes: R ranks, N nodes, E experts of the layer, U those with tokens ("used"), M some of them, F fetches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled, part

# The ways to divide work; and the rule that goes by cost.
HOLDERS, HOME, OWN, COPIES, SHED, CHEAPEST = range(6)
# How often loads are levelled over replicas, and how often tokens are shed: each round halves what is left, or more.
LEVEL_ROUNDS, SHED_ROUNDS = 2, 4
WAYS = (HOLDERS, HOME, OWN, COPIES, *[SHED] * SHED_ROUNDS)
# Experts live where they are for a reason that a step's cost doesn't show, so a copy elsewhere must save this part of it.
WORTHWHILE = 16
# A product of this size fits into 64 bits, with room for a divisor's half. And no plan costs as much.
MOST = 1 << 62


class Step(NamedTuple):
    """What ``divide_work`` is given, for the experts with tokens; and their pairs over all ranks. Prices as in ``Costs``."""

    experts_U: IntArray
    counts_RU: IntArray
    total_U: IntArray
    holds_RU: BoolArray
    holds_RE: BoolArray
    quota_R: IntArray
    home_U: IntArray
    node_R: IntArray
    nodes: int
    prices: tuple[int, int, int, int, int, int]


@compiled("int64[::1](int64[::1])")
def _falling(value_M: IntArray) -> IntArray:
    """The places of values from the highest down; in order among equals."""
    return np.argsort(-value_M, kind="mergesort")


@compiled("void(int64[:, ::1], int64, int64, int64[::1])")
def add_compute(computed_RU: IntArray, pair_compute: int, expert_compute: int, cost_R: IntArray) -> None:
    """What each rank's experts take, added to ``cost_R``."""
    for rank in range(len(computed_RU)):
        pairs = experts = 0
        for computed in computed_RU[rank]:
            pairs += computed
            experts += computed > 0
        cost_R[rank] += pairs * pair_compute + experts * expert_compute


@compiled("void(int64[::1], int64[::1], int64, int64, int64[::1])")
def add_fetches(rank_F: IntArray, source_F: IntArray, host_fetch: int, peer_fetch: int, cost_R: IntArray) -> None:
    """What each rank's fetches take, added to ``cost_R``: a copy between ranks keeps both busy."""
    for fetch in range(len(rank_F)):
        rank, source = rank_F[fetch], source_F[fetch]
        if source < 0:
            cost_R[rank] += host_fetch
        else:
            cost_R[rank] += peer_fetch
            cost_R[source] += peer_fetch


@compiled("int64(int64[:, ::1], int64[:, ::1], int64[::1], int64[::1])")
def travelling(counts_RU: IntArray, computed_RU: IntArray, sent_R: IntArray, received_R: IntArray) -> int:
    """Pairs that leave each rank and come to it, own tokens staying as far as they can; the most that any rank moves."""
    ranks, experts = counts_RU.shape
    most = 0
    for rank in range(ranks):
        sent = received = 0
        for expert in range(experts):
            more = counts_RU[rank, expert] - computed_RU[rank, expert]
            sent += max(more, 0)
            received += max(-more, 0)
        sent_R[rank], received_R[rank] = sent, received
        most = max(most, sent, received)
    return most


@compiled("UniTuple(int64, 2)(int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], UniTuple(int64, 6))")
def layer_times(
    counts_RU: IntArray,
    computed_RU: IntArray,
    rank_F: IntArray,
    source_F: IntArray,
    prices: tuple[int, int, int, int, int, int],
) -> tuple[int, int]:
    """A step's nanoseconds, and those of the mean rank's fetches."""
    host_fetch, peer_fetch, pair_transfer, pair_compute, expert_compute, exchange = prices
    ranks = len(counts_RU)
    busy_R, sent_R, received_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    add_fetches(rank_F, source_F, host_fetch, peer_fetch, busy_R)
    fetching = busy_R.sum()
    add_compute(computed_RU, pair_compute, expert_compute, busy_R)
    moved = travelling(counts_RU, computed_RU, sent_R, received_R)
    return busy_R.max() + 2 * (moved * pair_transfer + (exchange if moved else 0)), fetching // ranks


@part
def _fetches(step: Step, computed_RU: IntArray) -> IntArray:
    """The fetches that a division of work takes, by rank and column, and the rank whose slot each can be copied from.

    The source's slot must keep its expert throughout the step, and the target's must not have to wait for a wave: so both
    have slots enough for what they compute, and the source needs the expert itself or gives nothing up. Of those that can it
    is the next one going round from the target, on the target's own node if there is one: copies of one expert to several
    ranks spread over its holders.
    """
    holds_RU, node_R = step.holds_RU, step.node_R
    ranks, experts = holds_RU.shape
    one_wave_R, misses_R, fetch = np.zeros(ranks, np.bool_), np.zeros(ranks, np.int64), 0
    missed_U, held_U = np.zeros(experts, np.bool_), np.zeros(experts, np.bool_)
    for rank in range(ranks):
        needed = misses = 0
        for expert in range(experts):
            needs = computed_RU[rank, expert] > 0
            needed += needs
            misses += needs and not holds_RU[rank, expert]
            missed_U[expert] |= needs and not holds_RU[rank, expert]
            held_U[expert] |= holds_RU[rank, expert]
        one_wave_R[rank], misses_R[rank] = needed <= step.quota_R[rank], misses
        fetch += misses
    fetches_3F, from_peers = np.zeros((3, fetch), np.int64), step.prices[1] < step.prices[0]
    source_RU, near_N = np.full((ranks, experts) if fetch else (0, 0), -1), np.zeros(step.nodes, np.int64)
    for column in np.flatnonzero(missed_U & held_U) if from_peers else np.zeros(0, np.int64):
        any_node, near_N[:] = -1, -1  # going round backwards, the last rank that was passed and can give: on any node, on each
        for turn in range(2 * ranks - 1, -1, -1):
            rank = turn - ranks if turn >= ranks else turn
            near, stays = near_N[node_R[rank]], computed_RU[rank, column] > 0 or misses_R[rank] == 0
            source_RU[rank, column] = (near if near >= 0 else any_node) if one_wave_R[rank] else -1
            if holds_RU[rank, column] and one_wave_R[rank] and stays:
                any_node = near_N[node_R[rank]] = rank
    fetch = 0
    for rank in range(ranks):
        for expert in range(experts if misses_R[rank] else 0):
            if computed_RU[rank, expert] > 0 and not holds_RU[rank, expert]:
                fetches_3F[0, fetch], fetches_3F[1, fetch], fetches_3F[2, fetch] = rank, expert, source_RU[rank, expert]
                fetch += 1
    return fetches_3F


@part
def _to_holders(step: Step) -> IntArray:
    """Tokens go where their expert is; an expert that is nowhere is fetched by one rank."""
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
    several, nowhere = np.flatnonzero(copies_U > 1), np.flatnonzero(copies_U == 0)
    if len(several):
        _split(step, several, computed_RU)
    if len(nowhere):
        load_R, free_R, free_slots_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
        add_compute(computed_RU, step.prices[3], step.prices[4], load_R)
        for rank in range(ranks):
            free_R[rank] = quota_R[rank] - np.count_nonzero(step.holds_RE[rank])
            free_slots_R[rank] = quota_R[rank] - np.count_nonzero(computed_RU[rank])
        total_M, home_M = step.total_U[nowhere], step.home_U[nowhere]
        place_M = place_misses(total_M, home_M, free_R, free_slots_R, load_R, step.prices[0])
        for miss, column in enumerate(nowhere):
            computed_RU[place_M[miss], column] = total_M[miss]
    return computed_RU


@part
def _split(step: Step, several: IntArray, computed_RU: IntArray) -> None:
    """Divide the pairs of experts with several holders among these, so that ranks are level.

    Own tokens stay, the others go to holders in proportion to what these lack to the mean, on their own node if they can; then
    ranks above the mean hand on, to whichever node.
    """
    counts_RU, holds_RU, node_R, pair = step.counts_RU, step.holds_RU, step.node_R, step.prices[3]
    ranks, experts = counts_RU.shape
    load_R, mine_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    lacks_R, over_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    add_compute(computed_RU, pair, step.prices[4], load_R)
    handed_NU, weights_RU, mean = np.zeros((step.nodes, experts), np.int64), np.zeros((ranks, experts), np.int64), 0
    for rank in range(ranks):
        mean += load_R[rank]
        for expert in several:
            mean += counts_RU[rank, expert] * pair
            if holds_RU[rank, expert]:
                computed_RU[rank, expert] = counts_RU[rank, expert]
            else:
                handed_NU[node_R[rank], expert] += counts_RU[rank, expert]
    mean = mean // ranks + 1
    for attempt in range(1 + LEVEL_ROUNDS):
        lacked_U, most = np.zeros(experts, np.bool_), 0  # whether any holder has less than the mean
        for rank in range(ranks):
            mine_R[rank] = 0
            for expert in several:
                mine_R[rank] += computed_RU[rank, expert]
            over = load_R[rank] + mine_R[rank] * pair - mean
            lacks_R[rank], over_R[rank] = max(-over, 0), min(max(over // pair, 0), mine_R[rank])
            most = max(most, over_R[rank])
            for expert in several:
                lacked_U[expert] |= over < 0 and holds_RU[rank, expert]
        if attempt:
            if most * pair <= step.prices[4]:
                break  # level enough: a split adds an expert to a rank
            node_R, handed_NU = np.zeros(ranks, np.int64), np.zeros((1, experts), np.int64)
        for rank in range(ranks):
            for expert in several:
                if not holds_RU[rank, expert]:
                    continue
                if attempt and over_R[rank] and lacked_U[expert]:  # what nobody could take stays
                    back = computed_RU[rank, expert] * over_R[rank] // mine_R[rank]
                    computed_RU[rank, expert] -= back
                    handed_NU[0, expert] += back
                weights_RU[rank, expert] = lacks_R[rank] if lacked_U[expert] else 1
        _hand_out(handed_NU, node_R, weights_RU, computed_RU)


@part
def _hand_out(handed_NU: IntArray, node_R: IntArray, weights_RU: IntArray, computed_RU: IntArray) -> None:
    """Add the pairs that the ranks of each node hand on to what ranks compute: whole numbers in proportion to the weights, on
    the same node if any rank has a weight there.
    """
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
            whole = 0
            for rank in range(ranks):
                if near and node_R[rank] != node:
                    weight_R[rank] = 0
                whole += weight_R[rank]
            while whole > MOST // handed:
                whole = 0
                for rank in range(ranks):
                    weight_R[rank] = (weight_R[rank] + 1) >> 1
                    whole += weight_R[rank]
            bound = given = 0
            for rank in range(ranks):
                if weight_R[rank]:
                    bound += weight_R[rank]
                    upto = (handed * bound + whole // 2) // whole
                    computed_RU[rank, expert] += upto - given
                    given = upto


@compiled("int64[::1](int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64)")
def place_misses(
    total_M: IntArray, home_M: IntArray, free_R: IntArray, free_slots_R: IntArray, load_R: IntArray, fetch_ns: int
) -> IntArray:
    """As ``assignment.place_misses`` says."""
    ranks, misses = len(free_R), len(total_M)
    share, calm = -(-misses // ranks), load_R.sum() // ranks + fetch_ns
    waiting, by_load, place_M = _falling(total_M), _falling(-load_R), np.full(misses, -1)
    taken_R, limit_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for turn in range(3):
        for rank in range(ranks):
            if turn == 2:
                limit_R[rank] = share
            elif load_R[rank] <= calm:
                limit_R[rank] = min(free_R[rank] if turn == 0 else free_slots_R[rank], share)
        for miss in waiting:
            home = home_M[miss]
            if place_M[miss] < 0 and taken_R[home] < limit_R[home]:
                place_M[miss] = home
                taken_R[home] += 1
        dealt_R = np.zeros(ranks, np.int64)  # every rank takes one before any takes a second
        for miss in waiting:
            if place_M[miss] >= 0:
                continue
            least = -1
            for rank in by_load:
                if taken_R[rank] < limit_R[rank] and (least < 0 or dealt_R[rank] < dealt_R[least]):
                    least = rank
            if least < 0:
                break
            place_M[miss] = least
            taken_R[least] += 1
            dealt_R[least] += 1
    return place_M


@part
def _with_copies(step: Step, computed_RU: IntArray, remote_ns_RE: IntArray, spare_RE: BoolArray) -> tuple[IntArray, int]:
    """Ranks fetch copies of what they send tokens for: where these tokens are worth it, or those so far and a slot is idle.

    The tolls that have been paid for them come with it; the same array if nothing is worth it.
    """
    counts_RU = step.counts_RU
    host_fetch, peer_fetch, pair_transfer, _, expert_compute, _ = step.prices
    ranks, experts = counts_RU.shape
    fetch_ns = min(host_fetch, peer_fetch)
    worth_RU, worthy = np.zeros((ranks, experts), np.int64), False
    for rank in range(ranks):
        for column, expert in enumerate(step.experts_U):
            pairs = counts_RU[rank, column]
            if pairs and not step.holds_RU[rank, column] and computed_RU[rank, column] == 0:
                # A copy saves the way to and fro; but one more rank reads the expert's weights.
                gain = max(2 * pairs * pair_transfer - expert_compute, 0)
                worth_RU[rank, column] = max(gain + remote_ns_RE[rank, expert] - fetch_ns, 0)
                worthy |= worth_RU[rank, column] > 0
    if not worthy:
        return computed_RU, 0
    rival_RU, handed_1U, paid = np.zeros((ranks, experts), np.int64), np.zeros((1, experts), np.int64), 0
    for column, total in enumerate(step.total_U):
        handed_1U[0, column] = total
    for rank in range(ranks):
        seats = step.quota_R[rank] - np.count_nonzero(computed_RU[rank])
        idle = seats  # without giving up what somebody would miss
        for expert in range(spare_RE.shape[1]):
            idle -= step.holds_RE[rank, expert] and not spare_RE[rank, expert]
        for column, expert in enumerate(step.experts_U):
            idle += computed_RU[rank, column] > 0 and step.holds_RE[rank, expert] and not spare_RE[rank, expert]
        if seats <= 0:
            continue
        for number, column in enumerate(_falling(worth_RU[rank])):
            pairs = counts_RU[rank, column]
            if worth_RU[rank, column] == 0 or number >= seats:
                break
            at_once = 2 * pairs * pair_transfer - expert_compute > fetch_ns
            if number < (seats if at_once else idle):
                rival_RU[rank, column] = pairs
                handed_1U[0, column] -= pairs
                paid += remote_ns_RE[rank, step.experts_U[column]]
    _hand_out(handed_1U, np.zeros(ranks, np.int64), computed_RU, rival_RU)
    return rival_RU, paid


@part
def _shed(step: Step, computed_RU: IntArray) -> IntArray:
    """Ranks above the mean load shed tokens of their hottest expert to those that lack most; the same array if none does.

    Shed tokens lie on one line, spare room on another, both from the largest down; where a donor's stretch overlaps a
    taker's, so many tokens go. So all moves of a round are found at once.
    """
    host_fetch, peer_fetch, _, pair_compute, expert_compute, _ = step.prices
    ranks, experts = computed_RU.shape
    price = min(host_fetch, peer_fetch) + expert_compute
    load_R, free_slots_R, hottest_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    pairs_R, room_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    add_compute(computed_RU, pair_compute, expert_compute, load_R)
    for rank in range(ranks):
        free_slots_R[rank] = step.quota_R[rank]
        for expert in range(experts):
            pairs = computed_RU[rank, expert]
            if pairs:
                free_slots_R[rank] -= 1
                load_R[rank] += 0 if step.holds_RU[rank, expert] else host_fetch
            if pairs > pairs_R[rank]:
                pairs_R[rank], hottest_R[rank] = pairs, expert
    mean = load_R.sum() // ranks
    for rank in range(ranks):
        pairs_R[rank] = min(pairs_R[rank], max(load_R[rank] - mean, 0) // pair_compute)
        if free_slots_R[rank] > 0:
            room_R[rank] = max(mean - load_R[rank] - price, 0) // pair_compute
    if load_R.max() - mean <= price or pairs_R.max() * pair_compute <= price:
        return computed_RU  # no expert is hot enough to be worth a copy
    shed_RU, found, given, takers = computed_RU.copy(), False, 0, _falling(room_R)
    for donor in _falling(pairs_R):
        taken = 0
        for taker in takers:
            moved = min(given + pairs_R[donor], taken + room_R[taker]) - max(given, taken)
            if moved * pair_compute > price:
                shed_RU[donor, hottest_R[donor]] -= moved
                shed_RU[taker, hottest_R[donor]] += moved
                found = True
            taken += room_R[taker]
        given += pairs_R[donor]
    return shed_RU if found else computed_RU


@compiled(
    "Tuple((int64[::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64))"
    "(int64[:, ::1], b1[:, ::1], int64[::1], int64[::1], int64[::1], UniTuple(int64, 6), int64[:, ::1], b1[:, ::1], int64)"
)
def divide_work(
    counts_RE: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    node_R: IntArray,
    prices: tuple[int, int, int, int, int, int],
    remote_ns_RE: IntArray,
    spare_RE: BoolArray,
    rule: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray, int]:
    """``assignment.assign`` by a rule: used experts, all ranks' pairs of them, and the plan."""
    (ranks, experts), total_E = counts_RE.shape, np.zeros(counts_RE.shape[1], np.int64)
    for rank in range(ranks):
        for number in range(experts):
            total_E[number] += counts_RE[rank, number]
    experts_U = np.flatnonzero(total_E)
    used = len(experts_U)
    total_U, home_U = total_E[experts_U], home_E[experts_U]
    counts_RU, holds_RU = np.zeros((ranks, used), np.int64), np.zeros((ranks, used), np.bool_)
    for rank in range(ranks):
        for column, expert in enumerate(experts_U):
            counts_RU[rank, column], holds_RU[rank, column] = counts_RE[rank, expert], holds_RE[rank, expert]
    step = Step(experts_U, counts_RU, total_U, holds_RU, holds_RE, quota_R, home_U, node_R, node_R.max() + 1, prices)
    best_RU, fetches_3F, best_ns = counts_RU, np.zeros((3, 0), np.int64), MOST
    for way in WAYS:
        if rule not in (CHEAPEST, way):
            continue
        rival_RU, paid = counts_RU, 0
        if way == HOLDERS:
            rival_RU = _to_holders(step)
        elif way == HOME:
            rival_RU = np.zeros((ranks, used), np.int64)
            for column, home in enumerate(home_U):
                rival_RU[home, column] = total_U[column]
        elif way == COPIES:
            rival_RU, paid = _with_copies(step, best_RU, remote_ns_RE, spare_RE)
        elif way == SHED:
            rival_RU = _shed(step, best_RU)
        if way >= COPIES and rival_RU is best_RU:
            continue
        rival_3F = _fetches(step, rival_RU)
        time, fetching = layer_times(counts_RU, rival_RU, rival_3F[0], rival_3F[2], prices)
        margin = 0 if way in (HOLDERS, HOME) else best_ns // WORTHWHILE
        if time + fetching - paid < best_ns - margin:
            best_RU, fetches_3F, best_ns = rival_RU, rival_3F, time + fetching
        elif way == SHED:
            break
    return experts_U, counts_RU, best_RU, fetches_3F, best_ns
