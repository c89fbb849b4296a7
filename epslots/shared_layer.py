"""What every rank knows of one layer: who holds what, where experts live, what things cost. From it follows a step's plan.

All ranks keep the same copy by applying the same plans; a digest of it travels in the step header (``lockstep.py``).

Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from epslots.assignment import Assign, Assignment, assign
from epslots.costs import Costs, moved_pairs
from epslots.eviction import IntArray
from epslots.residency import BoolArray, settle, spare_copies
from epslots.routes import Route, route

# So many steps halve a toll: what was wanted long ago is no reason to fetch it now.
TOLL_STEPS = 64


@dataclass(frozen=True)
class Copies:
    """One rank's part of the copies from slot to slot in a layer's step. All ranks take part, some with nothing.

    Attributes:
        sources: the source rank of each expert that comes from a peer.
        sends: (target rank, expert) of each copy that this rank gives. Both ends list a pair's copies by expert.
    """

    sources: Mapping[int, int]
    sends: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class StepPlan:
    """One rank's view of the plan of one layer's step.

    Attributes:
        experts_U: int64, the experts with tokens on any rank.
        computed_U: int64, pairs of them that this rank computes.
        counts_RU: int64, pairs of each rank's tokens.
        route: what this rank sends and receives.
        moved: pairs that the busiest rank sends or receives; 0 = nothing travels anywhere.
        sent, received: pairs that leave this rank, and that come to it.
        evicted_E: this rank's residents that give way.
        copies: this rank's part of the copies between ranks; None if no rank copies anything.
    """

    experts_U: IntArray
    computed_U: IntArray
    counts_RU: IntArray
    route: Route
    moved: int
    sent: int
    received: int
    evicted_E: BoolArray
    copies: Copies | None


class SharedLayer:
    """One layer as all ranks see it.

    Args:
        rank: this rank.
        holds_RE: who holds what at the start; kept, and changed in place by ``plan``.
        quota_R: slots of the layer on each rank.
        home_E: homes; may be set anew between steps, on all ranks alike.
        costs: the same on all ranks.
        rule: how work is assigned; another one only to compare it.
    """

    def __init__(
        self, rank: int, holds_RE: BoolArray, quota_R: IntArray, home_E: IntArray, costs: Costs, rule: Assign = assign
    ) -> None:
        self.rank = rank
        self.holds_RE = holds_RE
        self.quota_R = quota_R
        self._home_E = home_E
        self.costs = costs
        self.rule = rule
        self._tolls_RE = np.zeros(holds_RE.shape, np.int64)
        self._steps = 0
        # An exchange costs its latency until no rank needs any. That is in reach where each holds half of the experts.
        self._exchange_may_go = bool((2 * quota_R >= holds_RE.shape[1]).all())
        self._holds_digest: int | None = None
        self._past = xxhash.xxh3_64_intdigest(home_E.tobytes())
        self._idle_slots: bool | None = None

    def plan(self, counts_RE: IntArray, score_E: IntArray) -> StepPlan:
        """Plan a step and enter its outcome: who holds what when it is done.

        Args:
            counts_RE: pairs of each rank's tokens for each expert.
            score_E: the eviction policy's scores.
        """
        tolls_RE = self._tolls_RE if self._has_idle_slots() else None
        found = self.rule(counts_RE, self.holds_RE, self.quota_R, self.home_E, self.costs, tolls_RE)
        evicted_E = self._settle(found, score_E)
        counts_RU = counts_RE[:, found.experts_U]
        if tolls_RE is not None:
            self._charge(found, counts_RU)
        self._remember(found.fetch_ranks, found.fetch_experts, found.computed_RU.sum(1))
        own = route(counts_RU, found.computed_RU, self.rank)
        return StepPlan(
            experts_U=found.experts_U,
            computed_U=found.computed_RU[self.rank],
            counts_RU=counts_RU,
            route=own,
            moved=int(moved_pairs(counts_RU, found.computed_RU).max(initial=0)),
            sent=int(own.send_DO.sum() - own.send_DO[self.rank].sum()),
            received=int(own.receive_SC.sum() - own.receive_SC[self.rank].sum()),
            evicted_E=evicted_E,
            copies=self._copies(found),
        )

    def _charge(self, found: Assignment, counts_RU: IntArray) -> None:
        """Enter what each rank paid in this step for the experts that others computed for it."""
        self._steps += 1
        if self._steps % TOLL_STEPS == 0:
            self._tolls_RE >>= 1
        away_RU = counts_RU - np.minimum(counts_RU, found.computed_RU)
        ranks, columns = np.nonzero(away_RU)
        if len(ranks):
            away = away_RU[ranks, columns]
            latency = 2 * self.costs.exchange // int(away.sum()) if self._exchange_may_go else 0
            self._tolls_RE[ranks, found.experts_U[columns]] += away * (2 * self.costs.pair_transfer + latency)
        self._tolls_RE[found.fetch_ranks, found.fetch_experts] = 0

    def _copies(self, found: Assignment) -> Copies | None:
        if not (found.fetch_sources >= 0).any():
            return None
        mine = (found.fetch_ranks == self.rank) & (found.fetch_sources >= 0)
        given = found.fetch_sources == self.rank
        return Copies(
            sources=dict(zip(found.fetch_experts[mine].tolist(), found.fetch_sources[mine].tolist(), strict=True)),
            sends=tuple(zip(found.fetch_ranks[given].tolist(), found.fetch_experts[given].tolist(), strict=True)),
        )

    def _settle(self, found: Assignment, score_E: IntArray) -> BoolArray:
        """Enter the residents after the step; returns what gives way on this rank."""
        ranks = np.unique(found.fetch_ranks)
        if not len(ranks):
            return np.zeros(len(score_E), bool)
        spare_RE = spare_copies(self.holds_RE, self.home_E)
        holds = self.holds_RE[ranks]
        needed = np.zeros_like(holds)
        needed[:, found.experts_U] = found.computed_RU[ranks] > 0
        change = settle(holds, needed, self.quota_R[ranks], score_E, spare_RE[ranks])
        self.holds_RE[ranks] = change.after_RE
        self.forget_digest()
        evicted_E: BoolArray = change.evicted_RE[ranks == self.rank].any(0)
        return evicted_E

    @property
    def home_E(self) -> IntArray:
        """The home rank of each expert."""
        return self._home_E

    @home_E.setter
    def home_E(self, home_E: IntArray) -> None:
        self._home_E = home_E
        self._remember(home_E)

    @property
    def digest(self) -> int:
        """63 bits that differ between ranks that hold different tables, or came to them by different plans or homes."""
        if self._holds_digest is None:
            self._holds_digest = xxhash.xxh3_64_intdigest(self.holds_RE.tobytes())
        return (self._holds_digest ^ self._past) >> 1

    def _remember(self, *arrays: IntArray) -> None:
        self._past = xxhash.xxh3_64_intdigest(b"".join(array.tobytes() for array in arrays), seed=self._past)

    def forget_digest(self) -> None:
        """To be called after ``holds_RE`` was changed."""
        self._holds_digest = self._idle_slots = None

    def _has_idle_slots(self) -> bool:
        """Whether any rank has a slot that is empty, or holds a copy that nobody would miss."""
        if self._idle_slots is None:
            self._idle_slots = int(self.quota_R.sum()) > int(np.count_nonzero(self.holds_RE.any(0)))
        return self._idle_slots
