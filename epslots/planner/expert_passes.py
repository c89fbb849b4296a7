"""One rank's way through one layer's step: what is computed when, and what is fetched into which slot.

Pure: integer arrays in, integer arrays out. Which experts give way is decided (``evictions.py``); here they get a position and
a turn. A layer owns a *window* of ``quota`` neighbouring slots; positions count from the window's start.

    slots for all       every fetch begins at once. Over a link that carries them meanwhile, what is there is computed first,
                        and what is fetched as it lands, the experts with most tokens first; as far as there is enough of
                        each to be worth a pass of its own
    fewer slots         misses pass through some of the slots in turn. Over such a link they have two halves: one is computed
                        while the other is filled
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled

# A wave of its own for each fetch would cost more than it hides when there are many.
MOST_LANDINGS = 4
# So many pairs of an expert take as long again as reading its weights.
PAIRS_A_READ = 8


@dataclass(frozen=True)
class ExpertPass:
    """One pass over part of a layer's experts. ``fetch_*`` arrays run in parallel, in the order of fetching.

    Attributes:
        experts: int64 [n], the experts computed in this wave, hits first.
        positions: int64 [n], where in the window each of them is.
        fetch_experts: int64 [m], the experts to fetch before this wave computes.
        fetch_positions: int64 [m], where each goes.
        evicted: int64 [m], the expert that each displaces, -1 for an empty slot.
        after: waves that must have been computed before these fetches may begin: they need what gives way.
    """

    experts: IntArray
    positions: IntArray
    fetch_experts: IntArray
    fetch_positions: IntArray
    evicted: IntArray
    after: int = 0


_NOTHING = np.zeros(0, np.int64)
NO_PASS = ExpertPass(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)
_NONE = np.zeros(0, bool)


def plan_passes(
    counts_E: IntArray,
    position_E: IntArray,
    expert_Q: IntArray,
    score_E: IntArray,
    evicted_E: BoolArray,
    *,
    concurrent: bool = False,
    in_flight_E: BoolArray | None = None,
    first_E: BoolArray | None = None,
    worth: int = 0,
) -> tuple[ExpertPass, ...]:
    """Plan one rank's part of a layer's step.

    Args:
        counts_E: int64 [experts], pairs that this rank computes.
        position_E: int64 [experts], the window position that holds each expert, -1 = absent.
        expert_Q: int64 [quota], the expert in each position, -1 = empty; the inverse of ``position_E``.
        score_E: int64 [experts], the eviction policy's scores.
        evicted_E: what gives way, as ``residency.settle`` decided for these arguments.
        concurrent: whether fetches take place while something is computed.
        in_flight_E: residents whose fetch is still under way.
        first_E: missing experts that are there at once (copies from peers). There must be slots for all then.
        worth: reads of an expert's weights that take as long as a pass costs besides; less isn't computed apart.

    Returns:
        Waves in order. Every needed expert is computed in exactly one of them, none is evicted before that, and only
        positions inside the window are used. ``after`` never falls. No waves when nothing is needed.
    """
    order = np.empty((5, len(counts_E)), np.int64)
    bounds = np.empty((3, len(counts_E)), np.int64)
    several = _plan(
        counts_E,
        position_E,
        expert_Q,
        score_E,
        evicted_E,
        _NONE if in_flight_E is None else in_flight_E,
        _NONE if first_E is None else first_E,
        concurrent,
        worth,
        order,
        bounds,
    )
    passes: list[ExpertPass] = []
    start = begun = 0
    for end, fetched, after in bounds[:, :several].T.tolist():
        computed, fetches = slice(start, end), slice(begun, fetched)
        passes.append(
            ExpertPass(order[0, computed], order[1, computed], order[2, fetches], order[3, fetches], order[4, fetches], after)
        )
        start, begun = end, fetched
    return tuple(passes)


@compiled("int64(int64[::1], int64[:, ::1], int64[::1], int64, int64, int64[:, ::1])")
def _divide(counts_E: IntArray, order: IntArray, end_P: IntArray, parts: int, worth: int, bounds: IntArray) -> int:
    """Join parts that aren't worth a pass of their own; enters where each wave ends, and returns how many there are."""
    passes = start = reads = 0
    for part in range(parts):
        for place in range(start, end_P[part]):
            reads += 1 + counts_E[order[0, place]] // PAIRS_A_READ
        start = end_P[part]
        if reads >= max(worth, 1):
            bounds[0, passes] = start
            passes += 1
            reads = 0
    if reads > 0:
        if passes == 0:
            passes = 1
        bounds[0, passes - 1] = start
    return passes


@compiled(
    "int64(int64[::1], int64[::1], int64[::1], int64[::1], b1[::1], b1[::1], b1[::1], b1, int64, int64[:, ::1], int64[:, ::1])"
)
def _plan(
    counts_E: IntArray,
    position_E: IntArray,
    expert_Q: IntArray,
    score_E: IntArray,
    evicted_E: BoolArray,
    in_flight_E: BoolArray,
    first_E: BoolArray,
    concurrent: bool,
    worth: int,
    order: IntArray,
    bounds: IntArray,
) -> int:
    """Enter the experts in the order in which they are computed, and how they are divided; returns the number of waves.

    Args:
        in_flight_E, first_E: of no length if there are none.
        order: int64 [5, experts] to write. Of what is computed, in order: expert, position. Of what is fetched: expert,
            position, the expert that it displaces.
        bounds: int64 [3, experts] to write, of each wave: where what it computes ends, where what it fetches ends, ``after``.
    """
    experts, quota = len(counts_E), len(expert_Q)
    needed = misses = 0
    for expert in range(experts):
        if counts_E[expert] > 0:
            needed += 1
            misses += position_E[expert] < 0
    fits = needed <= quota
    rising_E = np.argsort(score_E, kind="mergesort")  # stable
    # Of misses those with most tokens go first, where all have slots: they hide most of the others' way.
    miss_E = np.argsort(-counts_E, kind="mergesort") if fits else rising_E

    end_P = np.zeros(experts + 2, np.int64)  # where each part ends that may be computed apart
    number = fetches = 0
    for part in range(4):  # hits, misses that are there at once, what is late, other misses
        for place in range(experts):
            expert = miss_E[place] if part % 2 else place
            if counts_E[expert] <= 0 or (position_E[expert] < 0) != (part % 2 == 1):
                continue
            flag_E = first_E if part % 2 else in_flight_E
            flagged = len(flag_E) > 0 and flag_E[expert]
            if flagged != (part == 1 or part == 2):
                continue
            order[0, number], order[1, number] = expert, position_E[expert]
            number += 1
            if part % 2:
                order[2, fetches] = expert
                fetches += 1
        if part == 1:
            end_P[0] = number
        if part == 2:
            end_P[1] = number

    # Misses go through these positions in turn: empty ones first, then by their occupants' rising score; what the first waves
    # compute goes last.
    turn_P = np.empty(quota, np.int64)
    turns = 0
    for position in range(quota):
        if expert_Q[position] < 0:
            turn_P[turns] = position
            turns += 1
    free = 0  # positions that nothing needs to be computed in before
    for wanted in range(2):
        for place in range(experts):
            expert = rising_E[place]
            if evicted_E[expert] and (counts_E[expert] > 0) == (wanted == 1):
                turn_P[turns] = position_E[expert]
                turns += 1
        if wanted == 0:
            free = turns
    parts = 2
    step = max(turns, 1)
    if not concurrent:
        end_P[0] = end_P[1] = number if fits else min(number, end_P[1] + free)
    elif fits:
        step = max(1, -(-(number - end_P[1]) // MOST_LANDINGS))
    else:
        step = max(1, turns // 2)
    while end_P[parts - 1] < number:
        end_P[parts] = min(end_P[parts - 1] + step, number)
        parts += 1
    passes = _divide(counts_E, order, end_P, parts, worth if fits else 0, bounds)

    # Where what is fetched goes, what it displaces, and how many waves must have been computed before.
    occupant_Q = expert_Q.copy()
    ready_Q = np.zeros(quota, np.int64)
    start = fetched = after = 0
    for wave in range(passes):
        for place in range(start, bounds[0, wave]):
            expert = order[0, place]
            if position_E[expert] < 0:
                position = turn_P[fetched % turns]
                order[1, place] = order[3, fetched] = position
                order[4, fetched] = occupant_Q[position]
                occupant_Q[position] = expert
                after = max(after, ready_Q[position])
                fetched += 1
        for place in range(start, bounds[0, wave]):
            ready_Q[order[1, place]] = wave + 1
        bounds[1, wave], bounds[2, wave] = fetched, after
        start = bounds[0, wave]
    return passes
