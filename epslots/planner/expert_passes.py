"""One rank's passes through one layer's step: which experts each computes and fetches, into which slots.

``evictions.py`` decides which experts are evicted; ``ExpertCache`` carries the passes out. A layer owns a *range* of
``quota`` neighbouring slots of a pool.

    slots for all       every fetch begins at once. Over a link that runs during compute, ready experts are computed first, and
                        fetched ones as they arrive, those with most tokens first; each pass must be worth its own cost
    fewer slots         misses rotate through some of the slots. Over such a link these have two halves: one is computed while
                        the other is filled

Pure. Legend of shape suffixes: E experts of the layer, Q slots of the layer, F fetches, S sections.
"""

from __future__ import annotations

import msgspec
import numpy as np

from epslots.arrays import NO_EXPERTS, BoolArray, IntArray
from epslots.compiled import compiled, inlined

# Fetched experts are computed in at most so many passes where all have slots: more would cost more than they hide.
MOST_ARRIVAL_PASSES = 4
# Computing so many pairs takes as long as reading an expert's weights once more.
PAIRS_PER_READ = 8


class ExpertPass(msgspec.Struct, frozen=True):
    """One grouped product over part of a layer's experts. ``fetch_*`` and ``evicted`` are parallel, in fetching order.

    Attributes:
        experts: int64 [n], the experts computed in this pass, hits first.
        slots: int64 [n], their slots.
        fetch_experts: int64 [m], the experts to fetch before this pass computes.
        fetch_slots: int64 [m], the slots that they go to.
        evicted: int64 [m], the expert that each displaces, -1 for an empty slot.
        after: passes that must have been computed before these fetches may begin: they need experts that are evicted here.
    """

    experts: IntArray
    slots: IntArray
    fetch_experts: IntArray
    fetch_slots: IntArray
    evicted: IntArray
    after: int = 0


NO_PASS = ExpertPass(NO_EXPERTS, NO_EXPERTS, NO_EXPERTS, NO_EXPERTS, NO_EXPERTS)

# Rows of the kernel's results. Schedule: of computed experts, in order, expert and slot; of fetched ones, in order,
# expert, slot and the expert displaced. Ends: of each pass, in the first two rows and in the last three; and ``after``.
_EXPERT, _SLOT, _FETCHED, _FETCH_SLOT, _DISPLACED = range(5)
_COMPUTE_END, _FETCH_END, _AFTER = range(3)


def plan_passes(
    counts_E: IntArray,
    slot_of_E: IntArray,
    expert_Q: IntArray,
    score_E: IntArray,
    evicted_E: BoolArray,
    late_E: BoolArray,
    *,
    start: int = 0,
    concurrent: bool = False,
    worth: int = 0,
) -> tuple[ExpertPass, ...]:
    """The passes of one rank's part of a layer's step, in order; none if no expert is needed.

    Every needed expert is computed in exactly one pass and isn't evicted before it. Only slots of the layer are used.
    ``after`` never falls from pass to pass.

    Args:
        counts_E: int64, pairs that this rank computes.
        slot_of_E: int64, the slot that holds each expert, -1 = absent.
        expert_Q: int64, the expert in each slot of the layer, -1 = empty; the inverse of ``slot_of_E``.
        score_E: int64, the eviction policy's scores.
        evicted_E: the experts evicted in this step, by ``plan_evictions``.
        late_E: experts whose records are waited for: residents whose fetch is in flight, and missing ones, unless they are
            there at once (copies from peers), which is allowed only if all needed experts have slots.
        start: the layer's first slot.
        concurrent: whether fetches run while experts are computed.
        worth: the fewest reads of an expert's weights for which a pass of its own pays.
    """
    schedule_5E = np.empty((5, len(counts_E)), np.int64)
    ends_3E = np.empty((3, len(counts_E)), np.int64)
    count = _plan(counts_E, slot_of_E, expert_Q, score_E, evicted_E, late_E, start, concurrent, worth, schedule_5E, ends_3E)
    passes: list[ExpertPass] = []
    compute_start = fetch_start = 0
    for compute_end, fetch_end, after in ends_3E[:, :count].T.tolist():
        computed, fetched = slice(compute_start, compute_end), slice(fetch_start, fetch_end)
        passes.append(
            ExpertPass(
                schedule_5E[_EXPERT, computed],
                schedule_5E[_SLOT, computed],
                schedule_5E[_FETCHED, fetched],
                schedule_5E[_FETCH_SLOT, fetched],
                schedule_5E[_DISPLACED, fetched],
                after,
            )
        )
        compute_start, fetch_start = compute_end, fetch_end
    return tuple(passes)


@compiled(
    "int64(int64[::1], int64[::1], int64[::1], int64[::1], b1[::1], b1[::1], int64, b1, int64, int64[:, ::1], int64[:, ::1])"
)
def _plan(
    counts_E: IntArray,
    slot_of_E: IntArray,
    expert_Q: IntArray,
    score_E: IntArray,
    evicted_E: BoolArray,
    late_E: BoolArray,
    start: int,
    concurrent: bool,
    worth: int,
    schedule_5E: IntArray,
    ends_3E: IntArray,
) -> int:
    """Fill the schedule and the passes' ends; returns the number of passes."""
    experts, quota = len(counts_E), len(expert_Q)
    needed = 0
    for expert in range(experts):
        needed += counts_E[expert] > 0
    fits = needed <= quota
    # Where all have slots, misses with most tokens go first: their compute hides most of the later fetches.
    missing_F = _rising((counts_E > 0) & (slot_of_E < 0), -counts_E if fits else score_E)
    section_end_S = np.zeros(experts + 2, np.int64)
    _order(counts_E, slot_of_E, missing_F, late_E, schedule_5E, section_end_S)
    rotation_Q = np.empty(quota, np.int64)
    rotating, free = _rotation(counts_E, slot_of_E, expert_Q, _rising(evicted_E, score_E), start, rotation_Q)
    if not concurrent:
        # One pass over all that can be there at once.
        section_end_S[0] = section_end_S[1] = needed if fits else min(needed, section_end_S[1] + free)
        size = max(rotating, 1)
    elif fits:
        size = max(1, -(-(needed - section_end_S[1]) // MOST_ARRIVAL_PASSES))
    else:
        size = max(1, rotating // 2)
    sections = 2
    while section_end_S[sections - 1] < needed:
        section_end_S[sections] = min(section_end_S[sections - 1] + size, needed)
        sections += 1
    passes = _divide(counts_E, schedule_5E, section_end_S, sections, worth if fits else 0, ends_3E)
    _place(slot_of_E, expert_Q, start, rotation_Q[:rotating], passes, schedule_5E, ends_3E)
    return passes


@inlined
def _rising(chosen_E: BoolArray, key_E: IntArray) -> IntArray:
    """The chosen experts by rising key, ties by id."""
    chosen = np.nonzero(chosen_E)[0]
    return chosen[np.argsort(key_E[chosen], kind="mergesort")]  # stable


@inlined
def _order(
    counts_E: IntArray,
    slot_of_E: IntArray,
    missing_F: IntArray,
    late_E: BoolArray,
    schedule_5E: IntArray,
    section_end_S: IntArray,
) -> None:
    """Enter needed experts in the order of computing.

    Ready hits come first, then misses that are there at once, hits in flight, other misses. The first section ends after the
    first two groups, the second after the third.
    """
    computed = fetched = 0
    for group in range(4):
        missing, late = group % 2 == 1, group > 1
        for place in range(len(missing_F) if missing else len(counts_E)):
            expert = missing_F[place] if missing else place
            if counts_E[expert] <= 0 or (slot_of_E[expert] < 0) != missing or late_E[expert] != late:
                continue
            schedule_5E[_EXPERT, computed], schedule_5E[_SLOT, computed] = expert, slot_of_E[expert]
            computed += 1
            if missing:
                schedule_5E[_FETCHED, fetched] = expert
                fetched += 1
        if group == 1:
            section_end_S[0] = computed
        if group == 2:
            section_end_S[1] = computed


@inlined
def _rotation(
    counts_E: IntArray,
    slot_of_E: IntArray,
    expert_Q: IntArray,
    evicted: IntArray,
    start: int,
    rotation_Q: IntArray,
) -> tuple[int, int]:
    """Enter the slots that misses go to in turn; returns how many, and how many hold nothing that is needed.

    Empty slots come first, then those of ``evicted``, int64 [any number] by rising score; of these, needed ones come last.
    """
    rotating = free = 0
    for place in range(len(expert_Q)):
        if expert_Q[place] < 0:
            rotation_Q[rotating] = start + place
            rotating += 1
    for needed in range(2):
        for expert in evicted:
            if (counts_E[expert] > 0) == (needed == 1):
                rotation_Q[rotating] = slot_of_E[expert]
                rotating += 1
        if needed == 0:
            free = rotating
    return rotating, free


@inlined
def _divide(
    counts_E: IntArray, schedule_5E: IntArray, section_end_S: IntArray, sections: int, worth: int, ends_3E: IntArray
) -> int:
    """Join sections that aren't worth a pass of their own; enters each pass's end, and returns the number of passes."""
    passes = start = reads = 0
    for section in range(sections):
        for place in range(start, section_end_S[section]):
            reads += 1 + counts_E[schedule_5E[_EXPERT, place]] // PAIRS_PER_READ
        start = section_end_S[section]
        if reads >= max(worth, 1):
            ends_3E[_COMPUTE_END, passes] = start
            passes += 1
            reads = 0
    if reads > 0:
        if passes == 0:
            passes = 1
        ends_3E[_COMPUTE_END, passes - 1] = start
    return passes


@inlined
def _place(
    slot_of_E: IntArray,
    expert_Q: IntArray,
    start: int,
    rotation: IntArray,
    passes: int,
    schedule_5E: IntArray,
    ends_3E: IntArray,
) -> None:
    """Enter each fetch's slot, the expert it displaces, and the passes to compute before it."""
    occupant_Q = expert_Q.copy()
    ready_Q = np.zeros(len(expert_Q), np.int64)  # passes after which the slot may be overwritten
    begin = fetched = after = 0
    for number in range(passes):
        end = ends_3E[_COMPUTE_END, number]
        for place in range(begin, end):
            expert = schedule_5E[_EXPERT, place]
            if slot_of_E[expert] < 0:
                slot = rotation[fetched % len(rotation)]
                schedule_5E[_SLOT, place] = schedule_5E[_FETCH_SLOT, fetched] = slot
                schedule_5E[_DISPLACED, fetched] = occupant_Q[slot - start]
                occupant_Q[slot - start] = expert
                after = max(after, ready_Q[slot - start])
                fetched += 1
        for place in range(begin, end):
            ready_Q[schedule_5E[_SLOT, place] - start] = number + 1
        ends_3E[_FETCH_END, number], ends_3E[_AFTER, number] = fetched, after
        begin = end
