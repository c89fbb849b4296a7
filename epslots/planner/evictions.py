"""What stays in the slots: the rule by which a layer's residents change in a step, for all ranks at once.

Pure: integer arrays in, integer arrays out. Every rank applies the rule to every rank's slots, so that all know at any time
who holds what without ever telling each other. It says which experts are resident after the step; ``expert_passes.py`` gets
there.

Legend of shape suffixes: R ranks, E experts of the layer, Q slots of its window on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled

# At least one in so many slots rotates, so that anchoring can't stretch a layer into a wave per expert.
ROTATING_SHARE = 4


@dataclass(frozen=True)
class Evictions:
    """How a layer's residents change in one step.

    Attributes:
        evicted_RE: the residents that give way. With fewer slots than needed experts they may be needed ones: those are
            computed first.
        after_RE: the residents when the step is done.
    """

    evicted_RE: BoolArray
    after_RE: BoolArray


def plan_evictions(
    holds_RE: BoolArray, needed_RE: BoolArray, quota_R: IntArray, score_E: IntArray, spare_RE: BoolArray | None = None
) -> Evictions:
    """The residents after a step in which each rank computes the experts it needs.

    With a slot for every needed expert, what isn't needed gives way: empty slots first, then spare copies, then the lowest
    score, ties by expert id; never by where an expert happens to lie. With fewer, the layer runs in waves, and once an
    expert is computed its slot may serve the next. Then the residents among the ``quota`` highest scores are *anchored*, or a
    single long prompt would empty the cache of what decoding lives on; the misses pass through the other, *rotating* slots in
    order of rising score, and the last of them stay.

    Args:
        holds_RE: who holds what.
        needed_RE: what each rank computes in this step.
        quota_R: slots of each rank, from 1 to E. No rank holds more.
        score_E: the eviction policy's scores; higher is kept longer.
        spare_RE: copies that give way before any other, such as replicas.
    """
    change = Evictions(np.empty_like(holds_RE), np.empty_like(holds_RE))
    spare_RE, any_spare = (holds_RE, False) if spare_RE is None else (spare_RE, True)
    _settle(holds_RE, needed_RE, quota_R, score_E, spare_RE, any_spare, change.evicted_RE, change.after_RE)
    return change


@compiled(
    "void(b1[:, ::1], b1[:, ::1], int64[::1], int64[::1], b1[:, ::1], b1, b1[:, ::1], b1[:, ::1])",
)
def _settle(
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
        filled = needed = misses = 0
        for expert in range(experts):
            filled += holds_E[expert]
            needed += needed_E[expert]
            misses += needed_E[expert] and not holds_E[expert]
        several = needed > quota
        taken = misses  # slots that fetches go to
        if several:
            anchored = highest = 0
            for place in range(experts - 1, -1, -1):
                expert = rising_E[place]
                if holds_E[expert] or needed_E[expert]:
                    highest += 1
                    anchored += holds_E[expert] and highest <= quota
            taken = min(misses, max(quota - anchored, max(1, quota // ROTATING_SHARE)))
        going = filled + taken - quota
        for expert in range(experts):
            evicted_RE[rank, expert] = False
            after_RE[rank, expert] = holds_E[expert]
        for spares in (True, False) if any_spare else (False, False):
            for place in range(experts):
                expert = rising_E[place]
                if going <= 0:
                    break
                if not after_RE[rank, expert] or (needed_E[expert] and not several):
                    continue
                if spares and not spare_RE[rank, expert]:
                    continue
                evicted_RE[rank, expert] = True
                after_RE[rank, expert] = False
                going -= 1
        for place in range(experts - 1, -1, -1):
            expert = rising_E[place]
            if taken <= 0:
                break
            if needed_E[expert] and not holds_E[expert]:
                after_RE[rank, expert] = True
                taken -= 1


def spare_replicas(holds_RE: BoolArray, home_E: IntArray, wanted_RE: BoolArray | None = None) -> BoolArray:
    """The copies that nobody misses: of each expert all but the one at home, or the first if there is none at home; and but
    those that the placement wants, if given.
    """
    holds_RE, spare_RE = np.ascontiguousarray(holds_RE), np.empty(holds_RE.shape, bool)
    any_wanted, wanted_RE = wanted_RE is not None, holds_RE if wanted_RE is None else np.ascontiguousarray(wanted_RE)
    _spare_copies(holds_RE, home_E, wanted_RE, any_wanted, spare_RE)
    return spare_RE


@compiled("void(b1[:, ::1], int64[::1], b1[:, ::1], b1, b1[:, ::1])")
def _spare_copies(holds_RE: BoolArray, home_E: IntArray, wanted_RE: BoolArray, any_wanted: bool, spare_RE: BoolArray) -> None:
    ranks, experts = holds_RE.shape
    keeper_E = np.full(experts, ranks)  # none yet
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
