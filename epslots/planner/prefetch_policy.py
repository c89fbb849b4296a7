"""Fetching ahead: which experts of the next layer are fetched before its router has spoken, and whether that pays.

While a layer runs, a predictor tells how likely each expert of the next one will be used (``predictor.py``). Ranks tell each
other with the layer's counts, so all choose the same prefetches, and nobody has to be told of them. A prefetch is a fetch from
the host by the expert's home, of an expert that no rank holds.

Pure: integer arrays in, integer arrays out. Usage is in 256ths of certainty: 256 = some token of this rank will choose it.

Legend of shape suffixes: R ranks, E experts of the layer, F prefetches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.evictions import plan_evictions

CERTAIN = 256
# How likely an expert must be used to be fetched, or kept from giving way to one that is: over a link that is idle as the
# layer begins, where what isn't used then costs nothing; and over one that has something to do.
WORTH_A_TRY, LIKELY = 31, 64
# No more than this part of a layer's slots changes ahead of a step: what was used last is the other guess.
CHANGING_SHARE = 2
# Prefetching stops where less than half of what was promised comes true, and begins anew where two thirds would.
STOP_BELOW = 2, 1
START_ABOVE = 3, 2
# Judged on predictions that promised so many uses lately; while nothing is fetched, on those of one step of so many.
LEAST_JUDGED = 12 * CERTAIN
MEMORY = 48 * CERTAIN
PROBE_EVERY = 32


@dataclass(frozen=True)
class Prefetches:
    """What is fetched ahead, and what gives way to it.

    Attributes:
        ranks, experts: int64 [F], the target and what it gets; each rank's in the order of fetching, the likeliest first.
        evicted_RE: residents that give way.
        after_RE: residents when all have landed.
    """

    ranks: IntArray
    experts: IntArray
    evicted_RE: BoolArray
    after_RE: BoolArray

    def __len__(self) -> int:
        return len(self.ranks)


def used_by_any(usage_RE: IntArray) -> IntArray:
    """How likely each expert is used by any rank's tokens, int64 [E], if ranks choose independently."""
    used_E = np.empty(usage_RE.shape[1], np.int64)
    _used_by_any(np.ascontiguousarray(usage_RE, np.int64), used_E)
    return used_E


@compiled("void(int64[:, ::1], int64[::1])")
def _used_by_any(usage_RE: IntArray, used_E: IntArray) -> None:
    ranks, experts = usage_RE.shape
    unused_R = np.empty(ranks, np.int64)
    for expert in range(experts):
        for rank in range(ranks):
            unused_R[rank] = CERTAIN - usage_RE[rank, expert]
        left = ranks
        while left > 1:  # in pairs, and then in pairs of these: fewer roundings than one by one
            for pair in range(left // 2):
                unused_R[pair] = unused_R[2 * pair] * unused_R[2 * pair + 1] // CERTAIN
            if left % 2:
                unused_R[left // 2] = unused_R[left - 1]
            left = (left + 1) // 2
        used_E[expert] = CERTAIN - unused_R[0]


def choose_prefetches(
    usage_E: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    score_E: IntArray,
    most_R: IntArray,
    least_R: IntArray,
    spare_RE: BoolArray | None = None,
) -> Prefetches | None:
    """The prefetches of a layer before its next step; None if there are none.

    What gives way is chosen as for a miss (``residency.settle``), from among what isn't likely to be used itself.

    Args:
        usage_E: 0 to 256, how likely each expert is used in the layer's next step.
        holds_RE, quota_R, home_E, score_E, spare_RE: the layer's residents, slots, homes, scores, and copies that go first.
        most_R: prefetches that each rank may make.
        least_R: how likely an expert must be used for a rank to fetch or to keep it.
    """
    ranks, experts = np.empty((2, len(usage_E)), np.int64)
    kept_RE = np.empty_like(holds_RE)
    found = _choose(usage_E, holds_RE, quota_R, home_E, most_R, least_R, kept_RE, ranks, experts)
    if not found:
        return None
    change = plan_evictions(holds_RE, kept_RE, quota_R, score_E, spare_RE)
    return Prefetches(ranks[:found], experts[:found], change.evicted_RE, change.after_RE)


@compiled(
    "int64(int64[::1], b1[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], b1[:, ::1], int64[::1], int64[::1])",
)
def _choose(
    usage_E: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    most_R: IntArray,
    least_R: IntArray,
    kept_RE: BoolArray,
    rank_F: IntArray,
    expert_F: IntArray,
) -> int:
    """Enter each rank's prefetches, and what it keeps with them; returns how many there are."""
    ranks, experts = holds_RE.shape
    held_E = np.zeros(experts, np.bool_)
    room_R = np.empty(ranks, np.int64)
    for rank in range(ranks):
        kept = 0
        for expert in range(experts):
            held_E[expert] |= holds_RE[rank, expert]
            keeps = holds_RE[rank, expert] and usage_E[expert] >= least_R[rank]
            kept_RE[rank, expert] = keeps
            kept += keeps
        room_R[rank] = min(most_R[rank], quota_R[rank] - kept)
    # Each home takes its likeliest.
    first_R = np.zeros(ranks + 1, np.int64)
    falling_E = np.argsort(-usage_E, kind="mergesort")  # stable
    for place in range(experts):
        expert = falling_E[place]
        home = home_E[expert]
        if usage_E[expert] >= least_R[home] and not held_E[expert] and first_R[home + 1] < room_R[home]:
            kept_RE[home, expert] = True
            first_R[home + 1] += 1
    for rank in range(ranks):
        first_R[rank + 1] += first_R[rank]
    found = int(first_R[ranks])
    for place in range(experts):
        expert = falling_E[place]
        home = home_E[expert]
        if kept_RE[home, expert] and not held_E[expert]:
            rank_F[first_R[home]], expert_F[first_R[home]] = home, expert
            first_R[home] += 1
    return found


class PrefetchBudget:
    """Bytes that each rank may fetch in a step before nothing more is fetched ahead; demand uses it up first.

    Args:
        granted: bytes of each rank and step.
    """

    def __init__(self, ranks: int, granted: int) -> None:
        self._granted = granted
        self._left_R = np.full(ranks, granted)

    def renew(self) -> None:
        """A step begins."""
        self._left_R[:] = self._granted

    def spend(self, ranks: IntArray, expert_bytes: int) -> None:
        """An expert is fetched for each of these ranks, for whatever reason."""
        self._left_R -= np.bincount(ranks, minlength=len(self._left_R)) * expert_bytes

    def experts(self, expert_bytes: int) -> IntArray:
        """How many experts each rank may still fetch, int64 [R]."""
        return np.maximum(self._left_R, 0) // expert_bytes


@compiled("int64(int64[::1], b1[:, ::1], int64[::1])")
def _expect(usage_E: IntArray, holds_RE: BoolArray, expected_E: IntArray) -> int:
    """Enter what is likely enough to be fetched and held by nobody; returns how many experts these are."""
    ranks, experts = holds_RE.shape
    found = 0
    for expert in range(experts):
        wanted = usage_E[expert] >= WORTH_A_TRY
        for rank in range(ranks):
            wanted &= not holds_RE[rank, expert]
        expected_E[expert] = usage_E[expert] if wanted else 0
        found += wanted
    return found


@compiled("UniTuple(int64, 2)(int64[::1], b1[::1])")
def _promised_and_kept(expected_E: IntArray, used_E: BoolArray) -> tuple[int, int]:
    """What was expected in all, and how much of it those make up that were used, each of them for certain."""
    promised = kept = 0
    for expert in range(len(expected_E)):
        promised += expected_E[expert]
        kept += CERTAIN if expected_E[expert] > 0 and used_E[expert] else 0
    return promised, kept


class PrefetchPolicy:
    """One layer's prefetches, and whether they pay, from what has become of the last ones; the same on all ranks.

    It is judged by predictions alone: what isn't fetched, because prefetching has stopped or for want of room, counts too.

    Attributes:
        active: whether to prefetch.
    """

    def __init__(self) -> None:
        self.active = True
        self._promised = self._kept = 0
        self._expected_E: IntArray | None = None

    def due(self, step: int) -> bool:
        """Whether a prediction is wanted for the layer's step of this number."""
        return self.active or step % PROBE_EVERY == 0

    def plan(
        self,
        usage_RE: IntArray,
        holds_RE: BoolArray,
        quota_R: IntArray,
        home_E: IntArray,
        score_E: IntArray,
        busy_R: BoolArray,
        budget: PrefetchBudget | None,
        expert_bytes: int,
        spare_RE: BoolArray | None = None,
    ) -> Prefetches | None:
        """The prefetches before the layer's next step. Arguments as ``choose_prefetches``; they are taken off the budget.

        Args:
            busy_R: whether each rank's link had something to do as the layer began.
        """
        usage_E = used_by_any(usage_RE)
        self._expected_E = np.empty_like(usage_E)
        if not _expect(usage_E, holds_RE, self._expected_E) or not self.active:
            return None
        least_R = np.where(busy_R, LIKELY, WORTH_A_TRY)
        most_R = np.maximum(quota_R // CHANGING_SHARE, 1)
        if budget is not None:
            most_R = np.minimum(most_R, budget.experts(expert_bytes))
        found = choose_prefetches(usage_E, holds_RE, quota_R, home_E, score_E, most_R, least_R, spare_RE)
        if found is not None and budget is not None:
            budget.spend(found.ranks, expert_bytes)
        return found

    def judge(self, used_E: BoolArray) -> None:
        """What that step then used."""
        if self._expected_E is None:
            return
        promised, kept = _promised_and_kept(self._expected_E, used_E)
        self._promised += promised
        self._kept += kept
        self._expected_E = None
        if self._promised < LEAST_JUDGED:
            return
        parts, least = STOP_BELOW if self.active else START_ABOVE
        self.active = self._kept * parts >= self._promised * least
        if self._promised >= MEMORY:
            self._promised, self._kept = self._promised // 2, self._kept // 2
