"""The way to a placement, a few copies at a time: which wanted copies are fetched at the end of a layer's step.

Pure: integer arrays in, integer arrays out; all ranks come to the same moves. They run behind the step's demand: within what
the step's byte budget has left, and once the layer has computed, so that even what it needed may give way.

Legend of shape suffixes: R ranks, E experts of the layer, M moves, at most one of each rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import BoolArray, IntArray

_NEVER = np.iinfo(np.int64).max
KEPT_SHARE = 8


@dataclass(frozen=True)
class Migrations:
    """What is fetched, by rank; all int64 [M].

    Attributes:
        ranks, experts: the target, and what it gets.
        evicted: what gives way there; -1 = an empty slot.
        sources: the rank that it is copied from; -1 = the target's host.
    """

    ranks: IntArray
    experts: IntArray
    evicted: IntArray
    sources: IntArray

    def __len__(self) -> int:
        return len(self.ranks)


class MigrationBudget:
    """Bytes that each rank may still fetch in this step for a placement's sake; the same on all ranks.

    Demand stands first: what it fetches is taken off. But an eighth of what is granted stays, or ranks that miss in every step
    would never get anywhere.

    Args:
        granted: bytes of each rank and step. Less than an expert's size makes a move every few steps.
        largest: bytes of the largest expert.

    Attributes:
        left_R: int64 [R].
    """

    def __init__(self, ranks: int, granted: int, largest: int) -> None:
        self._granted, self._most, self._largest = granted, max(granted, largest), largest
        self.left_R = np.zeros(ranks, np.int64)
        self._kept_R = np.zeros(ranks, np.int64)  # in eighths of bytes

    def renew(self) -> None:
        """A step begins."""
        self._kept_R = np.minimum(self._kept_R + self._granted, self._largest * KEPT_SHARE)
        self.left_R = np.minimum(np.maximum(self.left_R, 0) + self._granted, self._most)

    def charge(self, ranks: IntArray, expert_bytes: int) -> None:
        """Demand fetches an expert for each of these ranks."""
        fetched_R = np.bincount(ranks, minlength=len(self.left_R)) * expert_bytes
        self.left_R = np.where(fetched_R > 0, np.maximum(self.left_R - fetched_R, self._kept_R // KEPT_SHARE), self.left_R)

    def spend(self, ranks: IntArray, expert_bytes: int) -> None:
        """Each of these ranks, which has room, moves an expert."""
        self.left_R[ranks] -= expert_bytes
        self._kept_R = np.minimum(self._kept_R, self.left_R * KEPT_SHARE)


_NOTHING = np.zeros(0, np.int64)
NO_MIGRATIONS = Migrations(_NOTHING, _NOTHING, _NOTHING, _NOTHING)


def choose_migrations(
    todo_RE: BoolArray,
    holds_RE: BoolArray,
    wanted_RE: BoolArray,
    spare_RE: BoolArray,
    quota_R: IntArray,
    score_E: IntArray,
    able_R: BoolArray,
    *,
    from_peers: bool,
    node_R: IntArray | None = None,
) -> Migrations:
    """One move for each rank that is able and has something to do.

    What nobody holds comes first, then what is used most. An empty slot is taken before a copy that nobody would miss, that
    before an expert which moves elsewhere in the same moment, and that before the one with the lowest score. A wanted copy
    never gives way.

    Args:
        todo_RE: wanted copies that were not there yet; those held by now are passed over.
        holds_RE: who holds what when the layer has computed.
        wanted_RE: what the placement wants.
        spare_RE: copies that nobody would miss.
        quota_R: slots of each rank.
        score_E: the eviction policy's scores.
        able_R: ranks that have time and bytes for a move.
        from_peers: copy from another rank's slot where one keeps it.
        node_R: the node of each rank; copies come from the same one if they can.
    """
    missing_RE = todo_RE & ~holds_RE & able_R[:, None]
    nowhere_E = ~holds_RE.any(0)
    # The best candidate has the lowest turn; by the expert's id among equals.
    order = np.lexsort((-score_E, ~nowhere_E))
    turn_E = np.empty(len(order), np.int64)
    turn_E[order] = np.arange(len(order))
    ranks = np.flatnonzero(missing_RE.any(1))
    if not len(ranks):
        return NO_MIGRATIONS
    experts = np.where(missing_RE[ranks], turn_E, _NEVER).argmin(1)
    full_M = holds_RE[ranks].sum(1) >= quota_R[ranks]
    may_go_ME = holds_RE[ranks] & ~wanted_RE[ranks]
    moving_E = np.bincount(experts, minlength=len(score_E)) > 0
    by_score = np.argsort(score_E, kind="stable")
    place_E = np.empty(len(by_score), np.int64)
    place_E[by_score] = np.arange(len(by_score))
    class_ME = np.where(spare_RE[ranks], 0, np.where(moving_E, 1, 2))
    victim_ME = np.where(may_go_ME, class_ME * len(score_E) + place_E, _NEVER)
    evicted = np.where(full_M, victim_ME.argmin(1), -1)
    possible_M = ~full_M | may_go_ME.any(1)
    ranks, experts, evicted = ranks[possible_M], experts[possible_M], evicted[possible_M]
    sources = _sources(holds_RE, ranks, experts, evicted, node_R) if from_peers else np.full(len(ranks), -1)
    return Migrations(ranks, experts, evicted, sources)


def _sources(holds_RE: BoolArray, ranks: IntArray, experts: IntArray, evicted: IntArray, node_R: IntArray | None) -> IntArray:
    """For each move a rank that holds the expert and keeps it, the next one going round from the target; -1 = none."""
    keeps_RE = holds_RE.copy()
    going = evicted >= 0
    keeps_RE[ranks[going], evicted[going]] = False
    keeps_RM = keeps_RE[:, experts]
    size = len(holds_RE)
    distance_RM = (np.arange(size)[:, None] - ranks) % size
    if node_R is not None:
        distance_RM = distance_RM + size * (node_R[:, None] != node_R[ranks])
    nearest_M = np.where(keeps_RM, distance_RM, _NEVER).argmin(0)
    found: IntArray = np.where(keeps_RM[nearest_M, np.arange(len(ranks))], nearest_M, -1)
    return found
