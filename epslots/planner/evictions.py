"""Which experts stay in a layer's slots in a step: one rule, applied to all ranks at once.

``LayerPlanner`` calls ``plan_evictions`` for every step, ``prefetch_policy.py`` for prefetches; ``expert_passes.py`` finds the
order. Every rank applies the rule to every rank's slots, so that all know the residents without messages.

Pure. Legend of shape suffixes: R ranks, E experts of the layer.
"""

from __future__ import annotations

import msgspec
import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled, inlined

# At least one in so many slots rotates, or anchored experts could leave a pass for every single miss.
ROTATING_SHARE = 4


class Evictions(msgspec.Struct, frozen=True):
    """How a layer's residents change in one step.

    Attributes:
        evicted_RE: the evicted residents. With fewer slots than needed experts they may be needed ones: those are computed
            before their eviction.
        after_RE: the residents after the step.
    """

    evicted_RE: BoolArray
    after_RE: BoolArray


def plan_evictions(
    holds_RE: BoolArray, needed_RE: BoolArray, quota_R: IntArray, score_E: IntArray, spare_RE: BoolArray | None = None
) -> Evictions:
    """The residents after a step in which each rank computes the experts it needs.

    With a slot for every needed expert, misses take empty slots first, then those of spare copies, then those of experts
    that aren't needed by rising score, ties by expert id; the positions of experts never matter.

    With fewer slots, the layer runs in passes, and a computed expert's slot may serve the next one. The residents among the
    ``quota`` highest scores are *anchored*, or a single long prompt would empty the cache of decoding's experts. Misses rotate
    through the other slots in order of rising score, and the last of them stay.

    Args:
        holds_RE: the residents before the step.
        needed_RE: the experts that each rank computes in this step.
        quota_R: slots of each rank, from 1 to E. No rank holds more.
        score_E: the eviction policy's scores; higher is kept longer.
        spare_RE: copies that are evicted before any other, such as ``spare_copies``.
    """
    change = Evictions(np.empty_like(holds_RE), np.empty_like(holds_RE))
    spare_RE, any_spare = (holds_RE, False) if spare_RE is None else (spare_RE, True)
    _plan_evictions(holds_RE, needed_RE, quota_R, score_E, spare_RE, any_spare, change.evicted_RE, change.after_RE)
    return change


@compiled(
    "void(b1[:, ::1], b1[:, ::1], int64[::1], int64[::1], b1[:, ::1], b1, b1[:, ::1], b1[:, ::1])",
)
def _plan_evictions(
    holds_RE: BoolArray,
    needed_RE: BoolArray,
    quota_R: IntArray,
    score_E: IntArray,
    spare_RE: BoolArray,
    any_spare: bool,
    evicted_RE: BoolArray,
    after_RE: BoolArray,
) -> None:
    ranks, experts = holds_RE.shape
    rising_E = np.argsort(score_E, kind="mergesort")  # stable
    for rank in range(ranks):
        holds_E, needed_E, quota = holds_RE[rank], needed_RE[rank], quota_R[rank]
        held = needed = misses = 0
        for expert in range(experts):
            held += holds_E[expert]
            needed += needed_E[expert]
            misses += needed_E[expert] and not holds_E[expert]
        fits = needed <= quota
        filled = misses if fits else _rotating_slots(holds_E, needed_E, rising_E, quota, misses)  # slots that fetches go to
        excess = held + filled - quota
        for expert in range(experts):
            evicted_RE[rank, expert] = False
            after_RE[rank, expert] = holds_E[expert]
        for only_spare in (True, False) if any_spare else (False, False):
            for place in range(experts):
                expert = rising_E[place]
                if excess <= 0:
                    break
                if not after_RE[rank, expert] or (needed_E[expert] and fits):
                    continue
                if only_spare and not spare_RE[rank, expert]:
                    continue
                evicted_RE[rank, expert] = True
                after_RE[rank, expert] = False
                excess -= 1
        for place in range(experts - 1, -1, -1):
            expert = rising_E[place]
            if filled <= 0:
                break
            if needed_E[expert] and not holds_E[expert]:
                after_RE[rank, expert] = True
                filled -= 1


@inlined
def _rotating_slots(holds_E: BoolArray, needed_E: BoolArray, rising_E: IntArray, quota: int, misses: int) -> int:
    """The slots that misses rotate through if needed experts outnumber slots."""
    anchored = highest = 0
    for place in range(len(rising_E) - 1, -1, -1):
        expert = rising_E[place]
        if holds_E[expert] or needed_E[expert]:
            highest += 1
            anchored += holds_E[expert] and highest <= quota
    return min(misses, max(quota - anchored, max(1, quota // ROTATING_SHARE)))


def spare_copies(holds_RE: BoolArray, home_E: IntArray, wanted_RE: BoolArray | None = None) -> BoolArray:
    """The spare copies, bool [R, E]: all but one of each expert, wanted copies excluded.

    The copy at home isn't spare; of an expert without a copy at home, that of the lowest rank isn't.

    Args:
        wanted_RE: the copies that the placement asks for; none, if not given.
    """
    holds_RE, spare_RE = np.ascontiguousarray(holds_RE), np.empty(holds_RE.shape, bool)
    any_wanted, wanted_RE = wanted_RE is not None, holds_RE if wanted_RE is None else np.ascontiguousarray(wanted_RE)
    _spare_copies(holds_RE, home_E, wanted_RE, any_wanted, spare_RE)
    return spare_RE


@compiled("void(b1[:, ::1], int64[::1], b1[:, ::1], b1, b1[:, ::1])")
def _spare_copies(holds_RE: BoolArray, home_E: IntArray, wanted_RE: BoolArray, any_wanted: bool, spare_RE: BoolArray) -> None:
    ranks, experts = holds_RE.shape
    keeper_E = np.full(experts, ranks)  # the rank whose copy isn't spare; ``ranks``: none yet
    for expert in range(experts):
        if holds_RE[home_E[expert], expert]:
            keeper_E[expert] = home_E[expert]
    for rank in range(ranks):
        for expert in range(experts):
            if holds_RE[rank, expert]:
                keeper_E[expert] = keeper_E[expert] if keeper_E[expert] < ranks else rank
            spare_RE[rank, expert] = holds_RE[rank, expert] and keeper_E[expert] != rank
            if any_wanted and wanted_RE[rank, expert]:
                spare_RE[rank, expert] = False
