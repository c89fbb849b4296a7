"""Which division of a layer's work costs least: the compiled loop behind ``assignment.py``. Read ``divide_work`` first.

It builds candidates, one for each way in ``WAYS`` (``assignment_candidates.py``), finds the fetches that each needs, and keeps
the cheapest.

Legend of shape suffixes: R ranks, N nodes, E experts of the layer, U those with tokens ("used"), F fetches.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled, inlined
from epslots.planner.assignment_candidates import Prices, Step, all_at_home, shed, to_holders, with_copies
from epslots.planner.cost_model import layer_times
from epslots.planner.nearest_source import enter_nearest

# The ways to divide work; and the rule that takes the cheapest of them.
HOLDERS, HOME, OWN, COPIES, SHED, CHEAPEST = range(6)
# Tokens are shed so often: each round halves the rest, or more.
SHED_ROUNDS = 4
WAYS = (HOLDERS, HOME, OWN, COPIES, *[SHED] * SHED_ROUNDS)
# Placements have reasons that one step's cost doesn't show, so a copy elsewhere must save this part (1/16) of the cost.
WORTHWHILE = 16
# More than any plan costs.
NO_PLAN_NS = 1 << 62


@inlined
def _fetches(step: Step, computed_RU: IntArray) -> IntArray:
    """The fetches of a division of work, [3, F]: rank, column, and the rank to copy from, -1 = the host."""
    holds_RU = step.holds_RU
    ranks, experts = holds_RU.shape
    one_pass_R, misses_R, fetches = np.zeros(ranks, np.bool_), np.zeros(ranks, np.int64), 0
    missed_U, held_U = np.zeros(experts, np.bool_), np.zeros(experts, np.bool_)
    for rank in range(ranks):
        needed = misses = 0
        for expert in range(experts):
            needs = computed_RU[rank, expert] > 0
            needed += needs
            misses += needs and not holds_RU[rank, expert]
            missed_U[expert] |= needs and not holds_RU[rank, expert]
            held_U[expert] |= holds_RU[rank, expert]
        one_pass_R[rank], misses_R[rank] = needed <= step.quota_R[rank], misses
        fetches += misses
    fetches_3F, source_RU = np.zeros((3, fetches), np.int64), np.full((ranks, experts) if fetches else (0, 0), -1)
    if step.prices.peer_fetch < step.prices.host_fetch:
        _find_sources(step, computed_RU, np.flatnonzero(missed_U & held_U), one_pass_R, misses_R, source_RU)
    fetch = 0
    for rank in range(ranks):
        for expert in range(experts if misses_R[rank] else 0):
            if computed_RU[rank, expert] > 0 and not holds_RU[rank, expert]:
                fetches_3F[0, fetch], fetches_3F[1, fetch], fetches_3F[2, fetch] = rank, expert, source_RU[rank, expert]
                fetch += 1
    return fetches_3F


@inlined
def _find_sources(
    step: Step, computed_RU: IntArray, columns: IntArray, one_pass_R: BoolArray, misses_R: IntArray, source_RU: IntArray
) -> None:
    """Enter the rank whose slot each rank could copy each of these experts from; -1 = none.

    The source's slot must keep its expert throughout the step, and the target must not have to wait for a pass. So both have
    slots for all they compute, and the source needs the expert itself or evicts nothing.
    """
    holds_RU, ranks = step.holds_RU, len(step.quota_R)
    nearest_N, possible_R, source_R = np.zeros(step.nodes, np.int64), np.zeros(ranks, np.bool_), np.zeros(ranks, np.int64)
    for column in columns:
        for rank in range(ranks):
            stays = computed_RU[rank, column] > 0 or misses_R[rank] == 0
            possible_R[rank] = holds_RU[rank, column] and one_pass_R[rank] and stays
        enter_nearest(possible_R, step.node_R, nearest_N, source_R)
        for rank in range(ranks):
            source_RU[rank, column] = source_R[rank] if one_pass_R[rank] else -1


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
    """A layer's division of work by a rule: used experts, their pairs, computed pairs, fetches, nanoseconds."""
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
    named = Prices(prices[0], prices[1], prices[2], prices[3], prices[4], prices[5])
    step = Step(experts_U, counts_RU, total_U, holds_RU, holds_RE, quota_R, home_U, node_R, node_R.max() + 1, named)
    best_RU, fetches_3F, best_ns = counts_RU, np.zeros((3, 0), np.int64), NO_PLAN_NS
    for way in WAYS:
        if rule not in (CHEAPEST, way):
            continue
        rival_RU, ended = counts_RU, 0  # OWN
        if way == HOLDERS:
            rival_RU = to_holders(step)
        elif way == HOME:
            rival_RU = all_at_home(step)
        elif way == COPIES:
            rival_RU, ended = with_copies(step, best_RU, remote_ns_RE, spare_RE)
        elif way == SHED:
            rival_RU = shed(step, best_RU)
        if way >= COPIES and rival_RU is best_RU:
            continue
        rival_3F = _fetches(step, rival_RU)
        time, fetching = layer_times(counts_RU, rival_RU, rival_3F[0], rival_3F[2], prices)
        margin = 0 if way in (HOLDERS, HOME) else best_ns // WORTHWHILE
        if time + fetching - ended < best_ns - margin:
            best_RU, fetches_3F, best_ns = rival_RU, rival_3F, time + fetching
        elif way == SHED:
            break
    return experts_U, counts_RU, best_RU, fetches_3F, best_ns
