"""Prefetches: which experts of the next layer are fetched before its router has run, and whether that pays.

While a layer runs, a predictor (``prefetch/predictor.py``) says how likely each expert of the next layer is used. Ranks
exchange this with the layer's counts, so that all choose the same prefetches without messages. A prefetch is a fetch from the
host, by the expert's home, of an expert that no rank holds. ``LayerPlanner`` and ``Prefetcher`` call ``PrefetchPolicy``, which
calls ``choose_prefetches``.

Pure. Usage is in 256ths of certainty: 256 = a token of this rank will choose the expert.

Legend of shape suffixes: R ranks, E experts of the layer, F prefetches.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from epslots.arrays import NO_EXPERTS, BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.cache_policy import Scores
from epslots.planner.evictions import plan_evictions

CERTAIN = 256
# The usage from which an expert is prefetched, or kept from eviction by a prefetch: over a link that is idle as the layer
# begins, where an unused prefetch costs little; and over a busy link, where it holds up fetches on demand. Prefetches of
# which one in four was used made steps 4 to 15 % longer than none did (a simulated A100, bf16); two in five, shorter.
WORTH_A_TRY, LIKELY = 31, 86
# Prefetches change at most half of a layer's slots: the residents are a prediction, too.
CHANGING_SHARE = 2
# Prefetching stops where less than 1/2 of the predicted uses happen, and starts again where more than 2/3 do; as (parts,
# fewest of them).
STOP_BELOW = 2, 1
START_ABOVE = 3, 2
# Predictions are judged after so many predicted uses; older ones count half from so many on. While prefetching is off, one
# step in PROBE_EVERY is predicted.
LEAST_JUDGED = 12 * CERTAIN
HALVE_AT = 48 * CERTAIN
PROBE_EVERY = 32


class Prefetches(msgspec.Struct, frozen=True):
    """The prefetches of a layer, and the residents evicted for them.

    Attributes:
        ranks, experts: int64 [F], target rank and expert; each rank's in the order of fetching, the likeliest first.
        evicted_RE: the evicted residents.
        after_RE: the residents when all prefetches have arrived.
    """

    ranks: IntArray
    experts: IntArray
    evicted_RE: BoolArray
    after_RE: BoolArray

    def __len__(self) -> int:
        return len(self.ranks)


def used_by_any(usage_RE: IntArray) -> IntArray:
    """How likely each expert is used by any rank's tokens, in 256ths, int64 [E]; ranks choose independently.

    Args:
        usage_RE: how likely each rank's tokens use each expert, in 256ths.
    """
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
        while left > 1:  # in pairs, then in pairs of these: fewer roundings than one by one
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
    scores: Scores,
    busy_R: BoolArray,
    left_R: IntArray | None = None,
    spare_RE: BoolArray | None = None,
) -> Prefetches | None:
    """The prefetches of a layer before its next step; None if there are none.

    Residents are evicted as for misses (``plan_evictions``), except those that are likely to be used.

    Args:
        usage_E: 0 to 256, how likely each expert is used in the layer's next step.
        holds_RE: the residents.
        quota_R: slots of each rank.
        home_E: the home rank of each expert.
        scores: of the layer's experts.
        busy_R: whether each rank's link is busy.
        left_R: prefetches that each rank's budget allows; None = no bound.
        spare_RE: copies that are evicted before any other.
    """
    ranks, experts = np.empty((2, len(usage_E)), np.int64)
    kept_RE = np.empty_like(holds_RE)
    found = _choose(usage_E, holds_RE, quota_R, home_E, busy_R, quota_R if left_R is None else left_R, kept_RE, ranks, experts)
    if not found:
        return None
    change = plan_evictions(holds_RE, kept_RE, quota_R, scores(), spare_RE)
    return Prefetches(ranks[:found], experts[:found], change.evicted_RE, change.after_RE)


@compiled(
    "int64(int64[::1], b1[:, ::1], int64[::1], int64[::1], b1[::1], int64[::1], b1[:, ::1], int64[::1], int64[::1])",
)
def _choose(
    usage_E: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    busy_R: BoolArray,
    left_R: IntArray,
    kept_RE: BoolArray,
    rank_F: IntArray,
    expert_F: IntArray,
) -> int:
    """Enter each rank's prefetches, and the experts that it keeps, prefetched ones included; returns how many prefetches."""
    ranks, experts = holds_RE.shape
    held_E = np.zeros(experts, np.bool_)
    most_found_R, least_R = np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    for rank in range(ranks):
        kept = 0
        least_R[rank] = LIKELY if busy_R[rank] else WORTH_A_TRY
        for expert in range(experts):
            held_E[expert] |= holds_RE[rank, expert]
            keeps = holds_RE[rank, expert] and usage_E[expert] >= least_R[rank]
            kept_RE[rank, expert] = keeps
            kept += keeps
        most_found_R[rank] = min(max(quota_R[rank] // CHANGING_SHARE, 1), left_R[rank], quota_R[rank] - kept)
    # Each home takes its likeliest experts; first_R[rank]: the place of the rank's first prefetch.
    first_R = np.zeros(ranks + 1, np.int64)
    falling_E = np.argsort(-usage_E, kind="mergesort")  # stable
    for place in range(experts):
        expert = falling_E[place]
        home = home_E[expert]
        if usage_E[expert] >= least_R[home] and not held_E[expert] and first_R[home + 1] < most_found_R[home]:
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
    """Bytes of a step up to which each rank may prefetch; its other fetches count, too.

    Args:
        granted: bytes of each rank and step.
    """

    def __init__(self, ranks: int, granted: int) -> None:
        self._granted = granted
        self._left_R = np.full(ranks, granted)

    def renew(self) -> None:
        """Grant the bytes of the next step."""
        self._left_R[:] = self._granted

    def spend(self, ranks: IntArray, expert_bytes: int) -> None:
        """Subtract fetches of one expert each, of any kind, int64 [fetches] target ranks."""
        self._left_R -= np.bincount(ranks, minlength=len(self._left_R)) * expert_bytes

    def refund(self, ranks: IntArray, expert_bytes: int) -> None:
        """Add fetches that were taken back, int64 [fetches] target ranks."""
        self.spend(ranks, -expert_bytes)
        np.minimum(self._left_R, self._granted, out=self._left_R)  # they may be those of the step before

    def experts(self, expert_bytes: int) -> IntArray:
        """Experts that each rank may still prefetch, int64 [R]."""
        return np.maximum(self._left_R, 0) // expert_bytes


@compiled("int64(int64[::1], b1[:, ::1], int64[::1])")
def _enter_expected(usage_E: IntArray, holds_RE: BoolArray, expected_E: IntArray) -> int:
    """Enter the usage of absent experts that are worth a prefetch, 0 for others; returns their number."""
    ranks, experts = holds_RE.shape
    found = 0
    for expert in range(experts):
        candidate = usage_E[expert] >= WORTH_A_TRY
        for rank in range(ranks):
            candidate &= not holds_RE[rank, expert]
        expected_E[expert] = usage_E[expert] if candidate else 0
        found += candidate
    return found


@compiled("UniTuple(int64, 2)(int64[::1], b1[::1])")
def _predicted_and_used(expected_E: IntArray, used_E: BoolArray) -> tuple[int, int]:
    """The sum of the predicted usage; and the used ones of the predicted experts, each as CERTAIN."""
    predicted = used = 0
    for expert in range(len(expected_E)):
        predicted += expected_E[expert]
        used += CERTAIN if expected_E[expert] > 0 and used_E[expert] else 0
    return predicted, used


class PrefetchVerdict(NamedTuple):
    """Whether a layer is prefetched; its predicted usage, and the used ones of the predicted experts, in 256ths."""

    active: bool
    predicted: int
    used: int


class PrefetchPolicy:
    """One layer's prefetches, and whether they pay, judged by earlier predictions; the same on all ranks.

    Predictions count whether or not they led to fetches. A layer of which less than half comes true isn't prefetched, and is
    predicted again in one step of ``PROBE_EVERY``, to see whether that changed.

    Attributes:
        active: whether to prefetch.
    """

    def __init__(self) -> None:
        self.active = True
        self._predicted = self._used = 0
        self._expected_E: IntArray | None = None
        self._rank_F = self._expert_F = NO_EXPERTS  # since the layer's last step, in the order of the links

    @property
    def verdict(self) -> PrefetchVerdict:
        """The outcome of earlier predictions."""
        return PrefetchVerdict(self.active, self._predicted, self._used)

    def set_verdict(self, verdict: PrefetchVerdict) -> None:
        """Go on from the device's verdict. A prediction that waits for its step is forgotten."""
        self.active, self._predicted, self._used = verdict
        self._expected_E = None

    def due(self, step: int) -> bool:
        """Whether to predict the layer's step of this number."""
        return self.active or step % PROBE_EVERY == 0

    def plan(
        self,
        usage_RE: IntArray,
        holds_RE: BoolArray,
        quota_R: IntArray,
        home_E: IntArray,
        scores: Scores,
        busy_R: BoolArray,
        budget: PrefetchBudget | None,
        expert_bytes: int,
        spare_RE: BoolArray | None = None,
    ) -> Prefetches | None:
        """The prefetches before the layer's next step, None if there are none; subtracted from the budget.

        Args:
            usage_RE: 0 to 256, how likely each rank's tokens use each expert.
            holds_RE, quota_R, home_E, scores, spare_RE: of the layer, see ``choose_prefetches``.
            busy_R: whether each rank's link was busy as the layer began.
            budget: bytes that ranks may prefetch; None = no bound.
            expert_bytes: bytes of one expert's fetch.
        """
        usage_E = used_by_any(usage_RE)
        self._expected_E = np.empty_like(usage_E)
        if not _enter_expected(usage_E, holds_RE, self._expected_E):
            self._expected_E = None
            return None
        if not self.active:
            return None
        left_R = None if budget is None else budget.experts(expert_bytes)
        found = choose_prefetches(usage_E, holds_RE, quota_R, home_E, scores, busy_R, left_R, spare_RE)
        if found is None:
            return None
        if budget is not None:
            budget.spend(found.ranks, expert_bytes)
        if len(self._rank_F):  # a step in parts is predicted several times; the newest prefetches go first on a link
            stay_F = holds_RE[self._rank_F, self._expert_F] & found.after_RE[self._rank_F, self._expert_F]
            self._rank_F = np.concatenate([found.ranks, self._rank_F[stay_F]])
            self._expert_F = np.concatenate([found.experts, self._expert_F[stay_F]])
        else:
            self._rank_F, self._expert_F = found.ranks, found.experts
        return found

    def prefetches_of(self, rank: int) -> IntArray:
        """A rank's prefetches since the layer's last step, in the order of its link: experts, int64 [any number]."""
        return self._expert_F[self._rank_F == rank] if len(self._expert_F) else NO_EXPERTS

    def take_back(self, unbegun_R: IntArray, used_E: BoolArray) -> tuple[IntArray, IntArray]:
        """Choose the prefetches that are taken back as their step begins, and forget the others.

        Args:
            unbegun_R: how many of each rank's ``prefetches_of``, counted from the last, its link hasn't begun.
            used_E: the experts that the step uses on any rank.

        Returns:
            Their ranks and experts, int64 [any number].
        """
        rank_F, expert_F = self._rank_F, self._expert_F
        self._rank_F = self._expert_F = NO_EXPERTS
        if not np.count_nonzero(unbegun_R):
            return NO_EXPERTS, NO_EXPERTS
        taken_F = np.zeros(len(rank_F), bool)
        for rank in np.flatnonzero(unbegun_R).tolist():
            taken_F[np.flatnonzero(rank_F == rank)[-unbegun_R[rank] :]] = True
        taken_F &= ~used_E[expert_F]
        return rank_F[taken_F], expert_F[taken_F]

    def judge(self, used_E: BoolArray) -> None:
        """Compare the last prediction with the experts that its step used, bool [E]; may switch prefetching on or off."""
        if self._expected_E is None:
            return
        predicted, used = _predicted_and_used(self._expected_E, used_E)
        self._predicted += predicted
        self._used += used
        self._expected_E = None
        if self._predicted < LEAST_JUDGED:
            return
        parts, least = STOP_BELOW if self.active else START_ABOVE
        self.active = self._used * parts >= self._predicted * least
        if self._predicted >= HALVE_AT:
            self._predicted, self._used = self._predicted // 2, self._used // 2
