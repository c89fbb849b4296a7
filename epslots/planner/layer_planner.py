"""What every rank knows of one layer: who holds what, where experts live, what things cost. From it follows a step's plan.

All ranks keep the same copy by applying the same plans; a digest of it travels in the step header (``lockstep.py``).

Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.assignment import Assign, Assignment, assign, own_only
from epslots.planner.cost_model import Costs, travelling_pairs
from epslots.planner.cpu_offload import HALVING_STEPS, CpuShare, displaces_better
from epslots.planner.evictions import plan_evictions, spare_replicas
from epslots.planner.migration import NO_MIGRATIONS, MigrationBudget, Migrations, choose_migrations
from epslots.planner.prefetch_policy import PrefetchBudget, Prefetches, PrefetchPolicy
from epslots.planner.token_splits import TokenSplits, token_splits

_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class PeerCopies:
    """One rank's part of the copies from slot to slot in a layer's step. All ranks take part, some with nothing.

    Attributes:
        sources: the source rank of each expert that comes from a peer.
        sends: (target rank, expert) of each copy that this rank gives. Both ends list a pair's copies by expert.
    """

    sources: Mapping[int, int]
    sends: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class GroupPlan:
    """The plan of one layer's step, for all ranks.

    Attributes:
        experts_U: int64, the experts with tokens on any rank.
        counts_RU: int64, pairs of each rank's tokens.
        computed_RU: int64, pairs that each rank computes.
        fetch_ranks, fetch_experts, fetch_sources: as in ``Assignment``.
        evicted_RE: residents that give way to them.
        moves: what the placement has fetched besides, when the layer has computed.
        hosted_ranks, hosted_experts: what is computed by a rank's host instead of being fetched there.
    """

    experts_U: IntArray
    counts_RU: IntArray
    computed_RU: IntArray
    fetch_ranks: IntArray
    fetch_experts: IntArray
    fetch_sources: IntArray
    evicted_RE: BoolArray
    moves: Migrations
    hosted_ranks: IntArray
    hosted_experts: IntArray


@dataclass(frozen=True)
class RankMigration:
    """One rank's part of a step's moves.

    Attributes:
        expert: what it gets; -1 = nothing.
        evicted: what gives way to it; -1 = nothing.
        copies: its part of the copies between ranks; None if no rank copies anything.
    """

    expert: int
    evicted: int
    copies: PeerCopies | None


@dataclass(frozen=True)
class StepPlan:
    """One rank's view of the plan of one layer's step.

    Attributes:
        experts_U: int64, the experts with tokens on any rank.
        computed_U: int64, pairs of them that this rank computes.
        counts_RU: int64, pairs of each rank's tokens.
        splits: what this rank sends and receives.
        moved: pairs that the busiest rank sends or receives; 0 = nothing travels anywhere.
        sent, received: pairs that leave this rank, and that come to it.
        evicted_E: this rank's residents that give way.
        copies: this rank's part of the copies between ranks; None if no rank copies anything.
        move: this rank's part of the moves; None if it has none.
        hosted: experts that this rank's host computes.
    """

    experts_U: IntArray
    computed_U: IntArray
    counts_RU: IntArray
    splits: TokenSplits
    moved: int
    sent: int
    received: int
    evicted_E: BoolArray
    copies: PeerCopies | None
    move: RankMigration | None
    hosted: IntArray


class LayerPlanner:
    """One layer as all ranks see it.

    Args:
        rank: this rank.
        holds_RE: who holds what at the start; kept, and changed in place by ``plan``.
        quota_R: slots of the layer on each rank; kept, and changed in place by ``resize``.
        home_E: homes.
        costs: the same on all ranks.
        rule: how work is assigned; another one only to compare it.
        expert_bytes: of one of the layer's experts.
        node_R: the node of each rank, if there are several.

    Attributes:
        wanted_RE: the copies that the placement wants.
        pending_migrations: how many of them have yet to be moved in.
        prefetch_policy: decides what is fetched ahead.
        record_bytes: what crosses the link for an expert, if it isn't ``expert_bytes``.
        budget: what each rank may fetch in a step before nothing more is fetched ahead; one for all layers. No bound if None.
        room: what each rank may still fetch in this step for the placement's sake; one for all layers. Nothing if None.
        complete: whether every rank holds every expert of every layer, for good: then each computes its own tokens, and
            nobody has anything to say.
    """

    def __init__(
        self,
        rank: int,
        holds_RE: BoolArray,
        quota_R: IntArray,
        home_E: IntArray,
        costs: Costs,
        rule: Assign = assign,
        *,
        expert_bytes: int = 1,
        node_R: IntArray | None = None,
    ) -> None:
        self.rank = rank
        self.holds_RE = holds_RE
        self.quota_R = quota_R
        self._home_E = home_E
        self.costs = costs
        self.rule = rule
        self.expert_bytes = self.record_bytes = expert_bytes
        self.node_R = node_R
        self.wanted_RE = np.zeros(holds_RE.shape, bool)
        self._todo_RE = self.wanted_RE
        self.pending_migrations = 0
        self.cpu_share: CpuShare | None = None
        self.prefetch_policy = PrefetchPolicy()
        self.budget: PrefetchBudget | None = None
        self.room: MigrationBudget | None = None
        self._remote_ns_RE = np.zeros(holds_RE.shape, np.int64)
        self._steps = 0
        self._hosting_steps = 0
        self._holds_digest: int | None = None
        self._past = xxhash.xxh3_64_intdigest(home_E.tobytes())
        self._kept_spare_RE: BoolArray | None = None
        self._kept_idle: bool | None = None
        self.complete = False

    @property
    def home_E(self) -> IntArray:
        """The home rank of each expert."""
        return self._home_E

    def adopt(self, home_E: IntArray, wanted_RE: BoolArray) -> None:
        """Follow another placement from the next step on. Each wanted copy that isn't there is moved in once."""
        self._home_E, self.wanted_RE = home_E, wanted_RE
        self._todo_RE = wanted_RE & ~self.holds_RE
        self.pending_migrations = int(np.count_nonzero(self._todo_RE))
        self._kept_spare_RE = self._kept_idle = None
        self._remember(home_E, wanted_RE)

    def resize(self, rank: int, change: int, score_E: IntArray) -> int:
        """Give a rank one slot more or less (``change`` is 1 or -1); returns the expert that gives way there, -1 = none."""
        self.quota_R[rank] += change
        evicted = -1
        if int(np.count_nonzero(self.holds_RE[rank])) > self.quota_R[rank]:
            spare_RE = self._spare_RE
            # The copies that nobody misses first, those that are wanted last; the lowest score among equals.
            kind_E = np.where(spare_RE[rank], 0, np.where(self.wanted_RE[rank], 2, 1))
            order = np.lexsort((score_E, kind_E))
            evicted = int(order[self.holds_RE[rank, order]][0])
            self.holds_RE[rank, evicted] = False
        self.forget_digest()
        self._remember(np.array([rank, change, evicted]))
        return evicted

    def plan(self, counts_RE: IntArray, score_E: IntArray) -> StepPlan:
        """``decide``, as this rank sees it."""
        plan = self.decide(counts_RE, score_E)
        own = token_splits(plan.counts_RU, plan.computed_RU, self.rank, self.node_R)
        moved, sent_R, received_R = travelling_pairs(plan.counts_RU, plan.computed_RU)
        return StepPlan(
            experts_U=plan.experts_U,
            computed_U=plan.computed_RU[self.rank],
            counts_RU=plan.counts_RU,
            splits=own,
            moved=moved,
            sent=int(sent_R[self.rank]),
            received=int(received_R[self.rank]),
            evicted_E=plan.evicted_RE[self.rank],
            copies=self._copies(plan.fetch_ranks, plan.fetch_experts, plan.fetch_sources),
            move=self._own_move(plan.moves) if len(plan.moves) else None,
            hosted=plan.hosted_experts[plan.hosted_ranks == self.rank],
        )

    def decide(self, counts_RE: IntArray, score_E: IntArray) -> GroupPlan:
        """Plan a step for all ranks and enter its outcome: who holds what when it is done.

        What it fetches and moves is taken off the ``room``, if there is one, and off the ``budget``.

        Args:
            counts_RE: pairs of each rank's tokens for each expert.
            score_E: the eviction policy's scores.
        """
        remote_ns_RE = self._remote_ns_RE if self._has_idle_slots() else None
        spare_RE = self._spare_RE if remote_ns_RE is not None else None
        found = (own_only if self.complete else self.rule)(
            counts_RE,
            self.holds_RE,
            self.quota_R,
            self.home_E,
            self.costs,
            remote_ns_RE,
            spare_RE=spare_RE,
            node_R=self.node_R,
        )
        hosted_ranks = hosted_experts = _NOTHING
        if self.cpu_share is not None and len(found.fetch_ranks):
            found, hosted_ranks, hosted_experts = self._host(found, score_E, self.cpu_share)
        evicted_RE = self._settle(found, score_E, hosted_ranks, hosted_experts)
        if remote_ns_RE is not None:
            self._charge(found)
        if self.budget is not None:
            self.budget.spend(found.fetch_ranks, self.record_bytes)
        self._remember(found.fetch_ranks, found.fetch_experts, found.computed_RU, hosted_ranks, hosted_experts)
        moves = NO_MIGRATIONS if self.room is None else self._move(found, score_E, self.room)
        return GroupPlan(
            experts_U=found.experts_U,
            counts_RU=found.counts_RU,
            computed_RU=found.computed_RU,
            fetch_ranks=found.fetch_ranks,
            fetch_experts=found.fetch_experts,
            fetch_sources=found.fetch_sources,
            evicted_RE=evicted_RE,
            moves=moves,
            hosted_ranks=hosted_ranks,
            hosted_experts=hosted_experts,
        )

    def _host(self, found: Assignment, score_E: IntArray, share: CpuShare) -> tuple[Assignment, IntArray, IntArray]:
        """Which of the fetches from the host are computed there instead: what is left, and their ranks and experts."""
        self._hosting_steps += 1
        fetches = np.flatnonzero(found.fetch_sources < 0)
        ranks, experts = found.fetch_ranks[fetches], found.fetch_experts[fetches]
        pairs = found.computed_RU[ranks, np.searchsorted(found.experts_U, experts)]
        holds_RE, needed_RE = np.ascontiguousarray(self.holds_RE), self._needed(found)
        displaces = displaces_better(holds_RE, needed_RE, self.quota_R, score_E, ranks, experts)
        hosted_F = np.zeros(len(found.fetch_ranks), bool)
        hosted_F[fetches] = share.choose(self._hosting_steps, ranks, experts, pairs, displaces)
        fetched_F = ~hosted_F
        left = replace(
            found,
            fetch_ranks=found.fetch_ranks[fetched_F],
            fetch_experts=found.fetch_experts[fetched_F],
            fetch_sources=found.fetch_sources[fetched_F],
        )
        return left, found.fetch_ranks[hosted_F], found.fetch_experts[hosted_F]

    def prefetch(self, usage_RE: IntArray, score_E: IntArray, busy_R: BoolArray) -> Prefetches | None:
        """Choose what is fetched ahead of the layer's next step, and enter it: it counts as held from now on.

        Args:
            usage_RE: how likely each rank's tokens will use each expert, in 256ths.
            score_E: the eviction policy's scores.
            busy_R: whether each rank's link has something to do.
        """
        holds_RE = np.ascontiguousarray(self.holds_RE)
        found = self.prefetch_policy.plan(
            usage_RE, holds_RE, self.quota_R, self.home_E, score_E, busy_R, self.budget, self.record_bytes, self._spare_RE
        )
        if found is not None:
            self.holds_RE[:] = found.after_RE
            self.forget_digest()
            self._remember(found.ranks, found.experts, found.evicted_RE)
            if self.room is not None:  # moves would share the link with them
                self.room.charge(found.ranks, self.expert_bytes)
        return found

    def _move(self, found: Assignment, score_E: IntArray, room: MigrationBudget) -> Migrations:
        """The step's moves, within what its demand leaves of the room."""
        if len(found.fetch_ranks):
            room.charge(found.fetch_ranks, self.expert_bytes)
        if self.pending_migrations:
            self._see_what_is_left()  # demand may have brought it
        able_R = room.left_R >= self.expert_bytes
        if not self.pending_migrations or not able_R.any():
            return NO_MIGRATIONS
        able_R &= np.count_nonzero(found.computed_RU, axis=1) <= self.quota_R  # one wave: its slots are settled
        moves = choose_migrations(
            self._todo_RE,
            self.holds_RE,
            self.wanted_RE,
            self._spare_RE,
            self.quota_R,
            score_E,
            able_R,
            from_peers=self.costs.peer_fetch < self.costs.host_fetch,
            node_R=self.node_R,
        )
        if len(moves):
            room.spend(moves.ranks, self.expert_bytes)
            if self.budget is not None:
                self.budget.spend(moves.ranks, self.record_bytes)
            full = moves.evicted >= 0
            self.holds_RE[moves.ranks[full], moves.evicted[full]] = False
            self.holds_RE[moves.ranks, moves.experts] = True
            self.forget_digest()
            self._remember(moves.ranks, moves.experts, moves.evicted, moves.sources)
            self._see_what_is_left()
        return moves

    def _see_what_is_left(self) -> None:
        self._todo_RE = self._todo_RE & ~self.holds_RE
        self.pending_migrations = int(np.count_nonzero(self._todo_RE))

    def _own_move(self, moves: Migrations) -> RankMigration | None:
        copies = self._copies(moves.ranks, moves.experts, moves.sources)
        mine = np.flatnonzero(moves.ranks == self.rank)
        if not len(mine):
            return None if copies is None else RankMigration(-1, -1, copies)
        return RankMigration(int(moves.experts[mine[0]]), int(moves.evicted[mine[0]]), copies)

    def _charge(self, found: Assignment) -> None:
        """Enter what each rank would have saved in this step with copies of the experts that others computed for it."""
        self._steps += 1
        if self._steps % HALVING_STEPS == 0:
            self._remote_ns_RE >>= 1
        holds_RE, costs = np.ascontiguousarray(self.holds_RE), self.costs
        prices = costs.pair_transfer, costs.expert_compute, costs.exchange
        _charge(found.experts_U, found.counts_RU, found.computed_RU, holds_RE, self.quota_R, prices, self._remote_ns_RE)
        self._remote_ns_RE[found.fetch_ranks, found.fetch_experts] = 0

    def _copies(self, ranks: IntArray, experts: IntArray, sources: IntArray) -> PeerCopies | None:
        """This rank's part of fetches of which some come from peers."""
        if not len(sources) or not (sources >= 0).any():
            return None
        mine = (ranks == self.rank) & (sources >= 0)
        given = sources == self.rank
        return PeerCopies(
            sources=dict(zip(experts[mine].tolist(), sources[mine].tolist(), strict=True)),
            sends=tuple(zip(ranks[given].tolist(), experts[given].tolist(), strict=True)),
        )

    def _settle(self, found: Assignment, score_E: IntArray, hosted_ranks: IntArray, hosted_experts: IntArray) -> BoolArray:
        """Enter the residents after the step; returns what gives way."""
        if not len(found.fetch_ranks):
            return np.zeros(self.holds_RE.shape, bool)
        needed_RE = self._needed(found)
        needed_RE[hosted_ranks, hosted_experts] = False
        change = plan_evictions(np.ascontiguousarray(self.holds_RE), needed_RE, self.quota_R, score_E, self._spare_RE)
        self.holds_RE[:] = change.after_RE
        self.forget_digest()
        return change.evicted_RE

    def _needed(self, found: Assignment) -> BoolArray:
        """What each rank computes."""
        needed_RE = np.zeros(self.holds_RE.shape, bool)
        _enter(found.experts_U, found.computed_RU, needed_RE)
        return needed_RE

    @property
    def digest(self) -> int:
        """63 bits that differ between ranks that hold different tables, or came to them by different plans or placements."""
        if self._holds_digest is None:
            self._holds_digest = xxhash.xxh3_64_intdigest(self.holds_RE.tobytes())
        return (self._holds_digest ^ self._past) >> 1

    def _remember(self, *arrays: IntArray | BoolArray) -> None:
        self._past = xxhash.xxh3_64_intdigest(b"".join(array.tobytes() for array in arrays), seed=self._past)

    def forget_digest(self) -> None:
        """To be called after ``holds_RE`` was changed."""
        self._holds_digest = self._kept_spare_RE = self._kept_idle = None

    @property
    def _spare_RE(self) -> BoolArray:
        """PeerCopies that nobody would miss."""
        if self._kept_spare_RE is None:
            self._kept_spare_RE = spare_replicas(self.holds_RE, self.home_E, self.wanted_RE)
        return self._kept_spare_RE

    def _has_idle_slots(self) -> bool:
        """Whether any rank has a slot that is empty, or holds a copy that nobody would miss."""
        if self._kept_idle is None:
            held, spare = np.count_nonzero(self.holds_RE), np.count_nonzero(self._spare_RE)
            self._kept_idle = bool(self.quota_R.sum() > held - spare)
        return self._kept_idle


@compiled("void(int64[::1], int64[:, ::1], b1[:, ::1])")
def _enter(experts_U: IntArray, computed_RU: IntArray, needed_RE: BoolArray) -> None:
    for rank in range(len(needed_RE)):
        for column, expert in enumerate(experts_U):
            needed_RE[rank, expert] = computed_RU[rank, column] > 0


@compiled(
    "void(int64[::1], int64[:, ::1], int64[:, ::1], b1[:, ::1], int64[::1], UniTuple(int64, 3), int64[:, ::1])",
)
def _charge(
    experts_U: IntArray,
    counts_RU: IntArray,
    computed_RU: IntArray,
    holds_RE: BoolArray,
    quota_R: IntArray,
    prices: tuple[int, int, int],
    remote_ns_RE: IntArray,
) -> None:
    pair_transfer, expert_compute, exchange = prices
    ranks, experts = holds_RE.shape
    # An exchange costs its latency until no rank needs any. That is in reach where each holds half of the experts.
    away, may_go = 0, True
    for rank in range(ranks):
        may_go &= 2 * quota_R[rank] >= experts
        for column, expert in enumerate(experts_U):
            if not holds_RE[rank, expert]:
                away += max(counts_RU[rank, column] - computed_RU[rank, column], 0)
    each = 2 * pair_transfer + (2 * exchange // away if may_go and away else 0)
    for rank in range(ranks):
        for column, expert in enumerate(experts_U):
            pairs = counts_RU[rank, column] - computed_RU[rank, column]
            if pairs > 0 and not holds_RE[rank, expert]:
                remote_ns_RE[rank, expert] += max(pairs * each - expert_compute, 0)
