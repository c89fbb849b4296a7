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

from epslots.eviction import IntArray
from epslots.residency import BoolArray, settle

CERTAIN = 256
# How likely an expert must be used to be fetched, or kept from giving way to one that is.
LIKELY = 96
# No more than this part of a layer's slots changes ahead of a step: what was used last is the other guess at what comes.
CHANGING_SHARE = 4
# Prefetching stops where less than a third of it is used, and begins anew where two fifths would be.
STOP_BELOW = 3, 1
START_ABOVE = 5, 2
# Judged on the last few dozen of prefetches; while there are none, on what is predicted in one step of so many.
LEAST_JUDGED = 16
MEMORY = 64
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
    unused = CERTAIN - usage_RE.astype(np.int64)
    while len(unused) > 1:
        odd = unused[len(unused) & ~1 :]
        unused = np.concatenate([unused[: len(unused) & ~1 : 2] * unused[1::2] // CERTAIN, odd])
    return CERTAIN - unused[0]


def choose_prefetches(
    usage_E: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    home_E: IntArray,
    score_E: IntArray,
    most_R: IntArray,
    spare_RE: BoolArray | None = None,
) -> Prefetches | None:
    """The prefetches of a layer before its next step; None if there are none.

    What gives way is chosen as for a miss (``residency.settle``), from among what isn't likely to be used itself.

    Args:
        usage_E: 0 to 256, how likely each expert is used in the layer's next step.
        holds_RE, quota_R, home_E, score_E, spare_RE: the layer's residents, slots, homes, scores, and copies that go first.
        most_R: prefetches that each rank may make.
    """
    likely_E = usage_E >= LIKELY
    wanted = np.flatnonzero(likely_E & ~holds_RE.any(0))
    if not len(wanted):
        return None
    kept_RE = holds_RE & likely_E
    most_R = np.minimum(most_R, quota_R - np.count_nonzero(kept_RE, axis=1))
    wanted = wanted[np.argsort(-usage_E[wanted], kind="stable")]
    # Each home takes its likeliest.
    by_home = np.argsort(home_E[wanted], kind="stable")
    ranks, experts = home_E[wanted][by_home], wanted[by_home]
    size_R = np.bincount(ranks, minlength=len(quota_R))
    number = np.arange(len(ranks)) - (size_R.cumsum() - size_R)[ranks]
    taken = number < most_R[ranks]
    if not taken.any():
        return None
    ranks, experts = ranks[taken], experts[taken]
    kept_RE[ranks, experts] = True
    change = settle(holds_RE, kept_RE, quota_R, score_E, spare_RE)
    return Prefetches(ranks, experts, change.evicted_RE, change.after_RE)


class Budget:
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


class Lookout:
    """One layer's prefetches, and whether they pay, from what has become of the last ones; the same on all ranks.

    It is judged by predictions alone: what isn't fetched, because prefetching has stopped or for want of room, counts too.

    Attributes:
        active: whether to prefetch.
    """

    def __init__(self) -> None:
        self.active = True
        self._asked = self._used = 0
        self._expected_E: BoolArray | None = None

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
        budget: Budget | None,
        expert_bytes: int,
        spare_RE: BoolArray | None = None,
    ) -> Prefetches | None:
        """The prefetches before the layer's next step. Arguments as ``choose_prefetches``; they are taken off the budget."""
        usage_E = used_by_any(usage_RE)
        self._expected_E = (usage_E >= LIKELY) & ~holds_RE.any(0)
        if not self.active or not self._expected_E.any():
            return None
        most_R = np.maximum(quota_R // CHANGING_SHARE, 1)
        if budget is not None:
            most_R = np.minimum(most_R, budget.experts(expert_bytes))
        found = choose_prefetches(usage_E, holds_RE, quota_R, home_E, score_E, most_R, spare_RE)
        if found is not None and budget is not None:
            budget.spend(found.ranks, expert_bytes)
        return found

    def judge(self, used_E: BoolArray) -> None:
        """What that step then used."""
        if self._expected_E is None:
            return
        self._asked += int(np.count_nonzero(self._expected_E))
        self._used += int(np.count_nonzero(self._expected_E & used_E))
        self._expected_E = None
        if self._asked < LEAST_JUDGED:
            return
        parts, least = STOP_BELOW if self.active else START_ABOVE
        self.active = self._used * parts >= self._asked * least
        if self._asked >= MEMORY:
            self._asked, self._used = self._asked // 2, self._used // 2
