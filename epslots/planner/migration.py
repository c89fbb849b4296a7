"""Migrations: the placement's copies that are fetched at the end of a layer's step, and their budget.

``LayerPlanner`` calls ``choose_migrations``; ``ModelPlanner`` renews the ``MigrationBudget``. Migrations follow the step's
demand: they get the bytes that it leaves, and start when the layer has computed, so that even experts that it needed may be
evicted. All ranks choose the same migrations.

Pure. Legend of shape suffixes: R ranks, E experts of the layer, M migrations, at most one of each rank.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.planner.layer_state import LayerState
from epslots.planner.nearest_source import nearest_sources
from epslots.planner.plan import NO_MIGRATIONS, Migrations

# The largest key: sorts an impossible choice behind all possible ones.
_IMPOSSIBLE = np.iinfo(np.int64).max
# One part in so many of the granted bytes is kept for migrations, however much demand takes.
KEPT_SHARE = 8


class MigrationBudget:
    """Bytes that each rank may still fetch in this step for the placement; the same on all ranks.

    Demand comes first: its fetches are subtracted. But an eighth of the granted bytes is kept, or ranks that miss in
    every step would never reach the placement.

    Args:
        granted: bytes of each rank and step. Less than an expert's size allows a migration every few steps.
        largest: bytes of the largest expert.

    Attributes:
        left_R: int64 [R], the bytes left.
    """

    def __init__(self, ranks: int, granted: int, largest: int) -> None:
        self._granted, self._most, self._largest = granted, max(granted, largest), largest
        self.left_R = np.zeros(ranks, np.int64)
        self._kept_R = np.zeros(ranks, np.int64)  # in eighths of bytes

    def renew(self) -> None:
        """Grant the bytes of the next step."""
        self._kept_R = np.minimum(self._kept_R + self._granted, self._largest * KEPT_SHARE)
        self.left_R = np.minimum(np.maximum(self.left_R, 0) + self._granted, self._most)

    def charge(self, ranks: IntArray, expert_bytes: int) -> None:
        """Subtract demand fetches of one expert each, int64 [fetches] target ranks."""
        fetched_R = np.bincount(ranks, minlength=len(self.left_R)) * expert_bytes
        self.left_R = np.where(fetched_R > 0, np.maximum(self.left_R - fetched_R, self._kept_R // KEPT_SHARE), self.left_R)

    def spend(self, ranks: IntArray, expert_bytes: int) -> None:
        """Subtract migrations of one expert each, int64 [M] target ranks; each has the bytes left."""
        self.left_R[ranks] -= expert_bytes
        self._kept_R = np.minimum(self._kept_R, self.left_R * KEPT_SHARE)


def choose_migrations(state: LayerState, score_E: IntArray, able_R: BoolArray, *, from_peers: bool) -> Migrations:
    """At most one migration for each rank in ``able_R``, of the state's pending ones.

    Experts that no rank holds come first, then those with the highest scores. They go to an empty slot; else in place of a
    spare copy, else of an expert that migrates to another rank in this step, else of the one with the lowest score. Wanted
    copies are never evicted.

    Args:
        state: the layer when it has computed.
        score_E: int64, the eviction policy's scores.
        able_R: ranks that have time and bytes for a migration.
        from_peers: copy from another rank's slot where one keeps the expert; from the same node if possible.
    """
    holds_RE = state.holds_RE
    missing_RE = state.pending_RE & ~holds_RE & able_R[:, None]
    absent_E = ~holds_RE.any(0)
    # Each expert's place in the order of urgency; ties by expert id.
    order = np.lexsort((-score_E, ~absent_E))
    urgency_E = np.empty(len(order), np.int64)
    urgency_E[order] = np.arange(len(order))
    ranks = np.flatnonzero(missing_RE.any(1))
    if not len(ranks):
        return NO_MIGRATIONS
    experts = np.where(missing_RE[ranks], urgency_E, _IMPOSSIBLE).argmin(1)
    full_M = holds_RE[ranks].sum(1) >= state.quota_R[ranks]
    evictable_ME = holds_RE[ranks] & ~state.wanted_RE[ranks]
    migrating_E = np.bincount(experts, minlength=len(score_E)) > 0
    by_score = np.argsort(score_E, kind="stable")
    rank_by_score_E = np.empty(len(by_score), np.int64)
    rank_by_score_E[by_score] = np.arange(len(by_score))
    class_ME = np.where(state.spare_RE[ranks], 0, np.where(migrating_E, 1, 2))
    victim_ME = np.where(evictable_ME, class_ME * len(score_E) + rank_by_score_E, _IMPOSSIBLE)
    evicted = np.where(full_M, victim_ME.argmin(1), -1)
    possible_M = ~full_M | evictable_ME.any(1)
    ranks, experts, evicted = ranks[possible_M], experts[possible_M], evicted[possible_M]
    if not from_peers:
        return Migrations(ranks, experts, evicted, np.full(len(ranks), -1))
    keeps_RE, evicts = holds_RE.copy(), evicted >= 0
    keeps_RE[ranks[evicts], evicted[evicts]] = False
    return Migrations(ranks, experts, evicted, nearest_sources(keeps_RE, ranks, experts, state.node_R))
