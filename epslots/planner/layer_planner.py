"""Plans one layer's step for all ranks: the work of each, and its fetches, evictions and migrations.

Every rank has a planner for each layer. All planners get the same integers and come to the same plans, so none is
sent. ``MoELayer`` calls ``plan``, and ``prefetch`` for the next layer; the simulator calls ``decide``. A rank alone plans the
same way, with nothing to weigh: it computes its own tokens.

Pure. Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens, F fetches.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from epslots.arrays import NO_EXPERTS, BoolArray, IntArray
from epslots.compiled import compiled
from epslots.planner.assignment import Assign, assign
from epslots.planner.cache_policy import Scores
from epslots.planner.cost_model import Costs, travelling_pairs
from epslots.planner.cpu_offload import CpuShare, displaces_better
from epslots.planner.evictions import plan_evictions
from epslots.planner.layer_state import LayerState
from epslots.planner.migration import MigrationBudget, choose_migrations
from epslots.planner.plan import NO_MIGRATIONS, Assignment, LayerPlan, Migrations, PeerCopies, RankPlan
from epslots.planner.prefetch_policy import PrefetchBudget, Prefetches, PrefetchPolicy
from epslots.planner.remote_costs import RemoteCosts
from epslots.planner.token_splits import token_splits


@dataclass
class FetchBudgets:
    """Bytes that each rank may still fetch in this step. One object for all layers of a model, renewed by ``ModelPlanner``.

    Attributes:
        prefetch: for the next layer; None = no bound.
        migration: for the placement; None = nothing is to migrate.
    """

    prefetch: PrefetchBudget | None = None
    migration: MigrationBudget | None = None


class LayerPlanner:
    """Plans the steps of one layer, and enters their outcome into the layer's state.

    Args:
        rank: this rank.
        state: the layer's residents on all ranks; kept, and changed in place.
        costs: the same on all ranks; None = a rank alone, which weighs nothing.
        rule: assigns the work; another rule than ``assign`` only to compare it.
        expert_bytes: of one of the layer's experts.
        budgets: shared by all layers.
        cpu_share: decides which missing experts are computed on the ranks' CPUs; None = none.

    Attributes:
        prefetch_policy: of the layer's prefetches.
    """

    def __init__(
        self,
        rank: int,
        state: LayerState,
        costs: Costs | None,
        rule: Assign = assign,
        *,
        expert_bytes: int = 1,
        budgets: FetchBudgets | None = None,
        cpu_share: CpuShare | None = None,
    ) -> None:
        self.rank = rank
        self.state = state
        self._costs = costs
        self.expert_bytes = expert_bytes
        self.cpu_share = cpu_share
        self.alone = state.ranks == 1
        self._rule = rule
        self._budgets = FetchBudgets() if budgets is None else budgets
        self._remote = RemoteCosts(*state.holds_RE.shape)
        self.prefetch_policy = PrefetchPolicy()
        self._steps = self._steps_with_fetches = 0
        self._none_RE, self._zero_E = np.zeros(state.holds_RE.shape, bool), np.zeros(len(state.home_E), np.int64)

    @property
    def costs(self) -> Costs:
        """The costs that a group's planners weigh by."""
        assert self._costs is not None, "a rank alone weighs nothing"
        return self._costs

    def plan(self, counts_RE: IntArray, scores: Scores) -> RankPlan:
        """Plan a step for all ranks, as ``decide`` does, and return this rank's part.

        Args:
            counts_RE: int64, pairs of each rank's tokens for each expert.
            scores: of the layer's experts.
        """
        if self.alone and self.cpu_share is None and self._budgets.migration is None:
            return self._plan_own_fetches(np.ascontiguousarray(counts_RE, np.int64), scores)
        plan, rank = self.decide(counts_RE, scores), self.rank
        work = plan.assignment
        if self.alone:
            computed_E, splits, moved, sent, received = np.ascontiguousarray(counts_RE[0], np.int64), None, 0, 0, 0
        else:
            computed_E = np.zeros(counts_RE.shape[1], np.int64)
            computed_E[work.experts_U] = work.computed_RU[rank]
            moved, sent_R, received_R = travelling_pairs(work.counts_RU, work.computed_RU)
            sent, received = int(sent_R[rank]), int(received_R[rank])
            splits = token_splits(work.counts_RU, work.computed_RU, rank, self.state.node_R) if moved else None
        cpu_experts, slots_E = plan.cpu_experts, computed_E
        if len(cpu_experts):
            cpu_experts = cpu_experts[plan.cpu_ranks == rank]
            slots_E = computed_E.copy()
            slots_E[cpu_experts] = 0
        migrated, displaced, migration_copies = -1, -1, None
        if len(plan.migrations.ranks):
            migrated, displaced, migration_copies = self._own_migration(plan.migrations)
        return RankPlan(
            assignment=work if moved else None,
            score_E=plan.score_E,
            computed_E=computed_E,
            cpu_experts=cpu_experts,
            slots_E=slots_E,
            evicted_E=plan.evicted_RE[rank],
            moved=moved,
            splits=splits,
            sent=sent,
            received=received,
            copies=None if self.alone else self._copies(work.fetch_ranks, work.fetch_experts, work.fetch_sources),
            migrated=migrated,
            displaced=displaced,
            migration_copies=migration_copies,
        )

    def _plan_own_fetches(self, counts_1E: IntArray, scores: Scores) -> RankPlan:
        """``plan`` of a rank alone that fetches all its misses: there is no work to assign."""
        self._steps += 1
        state, needed_1E = self.state, np.empty(counts_1E.shape, bool)
        misses = _enter_needed(counts_1E, state.holds_RE, needed_1E)
        if not misses:
            return self._of_own_pairs(counts_1E[0], self._zero_E, self._none_RE[0])
        score_E = scores()
        change = plan_evictions(state.holds_RE, needed_1E, state.quota_R, score_E)
        state.replace(change.after_RE)
        if self._budgets.prefetch is not None:
            self._budgets.prefetch.spend(np.zeros(misses, np.int64), self.expert_bytes)
        return self._of_own_pairs(counts_1E[0], score_E, change.evicted_RE[0])

    @staticmethod
    def _of_own_pairs(counts_E: IntArray, score_E: IntArray, evicted_E: BoolArray) -> RankPlan:
        """The plan of a rank that computes its own pairs from slots, without an exchange."""
        return RankPlan(None, score_E, counts_E, NO_EXPERTS, counts_E, evicted_E, 0, None, 0, 0, None, -1, -1, None)

    def decide(self, counts_RE: IntArray, scores: Scores) -> LayerPlan:
        """Plan a step for all ranks, enter the residents after it, and spend the budgets.

        Args:
            counts_RE: int64, pairs of each rank's tokens for each expert.
            scores: of the layer's experts.
        """
        self._steps += 1
        state = self.state
        idle_slots = not self.alone and state.has_idle_slots
        work = self._assign(counts_RE, idle_slots=idle_slots)
        cpu_ranks = cpu_experts = NO_EXPERTS
        score_E, evicted_RE = self._zero_E, self._none_RE
        if len(work.fetch_ranks):
            score_E = scores()
            if self.cpu_share is not None:
                work, cpu_ranks, cpu_experts = self._offload(work, score_E, self.cpu_share)
            if len(work.fetch_ranks):
                evicted_RE = self._evict(work, score_E, cpu_ranks, cpu_experts)
            if self._budgets.prefetch is not None:
                self._budgets.prefetch.spend(work.fetch_ranks, self.expert_bytes)
        if idle_slots:
            self._remote.add(work, state, self.costs)
        if not self.alone:
            state.add_to_digest(work.fetch_ranks, work.fetch_experts, work.computed_RU, cpu_ranks, cpu_experts)
        migrations = NO_MIGRATIONS
        if self._budgets.migration is not None:
            migrations = self._migrate(work, scores, self._budgets.migration)
        return LayerPlan(work, cpu_ranks, cpu_experts, evicted_RE, migrations, score_E)

    def refresh(self, slot_of_E: IntArray) -> None:
        """Enter this rank's residents from its slots. Faults and captured steps change slots without a plan.

        Only for a rank alone. Ranks of a group compare their tables in the step header instead.

        Args:
            slot_of_E: the slot of each expert, -1 = absent.
        """
        if _enter_residents(slot_of_E, self.state.holds_RE):
            self.state.holds_changed()

    def judge_predictions(self, used_E: BoolArray) -> None:
        """Compare the predictions of a step with the experts that it uses on any rank."""
        self.prefetch_policy.judge(used_E)

    @property
    def own_prefetches(self) -> IntArray:
        """This rank's prefetches since the layer's last step, in the order of its link: experts, int64 [any number]."""
        return self.prefetch_policy.prefetches_of(self.rank)

    def take_back(self, unbegun_R: IntArray, used_E: BoolArray) -> IntArray:
        """Take back the prefetches that no link has begun and the step doesn't need: they would hold up its fetches.

        Those that the placement wants stay: they count as migrated.

        Args:
            unbegun_R: how many of each rank's ``own_prefetches``, counted from the last, its link hasn't begun.
            used_E: the experts that the step uses on any rank.

        Returns:
            This rank's: experts, int64 [any number].
        """
        ranks, experts = self.prefetch_policy.take_back(unbegun_R, used_E)
        unwanted_F = ~self.state.wanted_RE[ranks, experts]
        ranks, experts = ranks[unwanted_F], experts[unwanted_F]
        if not len(ranks):
            return NO_EXPERTS
        self.state.holds_RE[ranks, experts] = False
        self.state.holds_changed()
        self.state.add_to_digest(ranks, experts)
        if self._budgets.prefetch is not None:
            self._budgets.prefetch.refund(ranks, self.expert_bytes)
        return experts[ranks == self.rank]

    @property
    def wants_prediction(self) -> bool:
        """Whether a prediction of the layer's next step is of use; the same on all ranks."""
        return self.prefetch_policy.due(self._steps + 1) and not self.state.holds_all

    def prefetch(self, usage_RE: IntArray, scores: Scores, busy_R: BoolArray) -> Prefetches | None:
        """Choose the fetches before the layer's next step, and enter them: their experts are residents from now on.

        Args:
            usage_RE: how likely each rank's tokens will use each expert, in 256ths.
            scores: of the layer's experts.
            busy_R: whether each rank's link has something to do.
        """
        state, budgets = self.state, self._budgets
        found = self.prefetch_policy.plan(
            usage_RE,
            np.ascontiguousarray(state.holds_RE),
            state.quota_R,
            state.home_E,
            scores,
            busy_R,
            budgets.prefetch,
            self.expert_bytes,
            None if self.alone else state.spare_RE,
        )
        if found is not None:
            state.replace(found.after_RE)
            state.add_to_digest(found.ranks, found.experts, found.evicted_RE)
            if budgets.migration is not None:  # migrations would share the link with them
                budgets.migration.charge(found.ranks, self.expert_bytes)
        return found

    def _assign(self, counts_RE: IntArray, *, idle_slots: bool) -> Assignment:
        """The work of each rank, and the fetches that it takes. Copies are bought only for idle slots."""
        state = self.state
        if self.alone:  # nothing to weigh
            (used_U,) = counts_RE[0].nonzero()
            counts_1U = counts_RE[:, used_U].astype(np.int64, copy=False)
            missing_F = used_U[~state.holds_RE[0, used_U]]
            ranks_F = np.zeros(len(missing_F), np.int64)
            return Assignment(used_U, counts_1U, counts_1U, ranks_F, missing_F, ranks_F - 1, 0)
        return self._rule(
            counts_RE,
            state.holds_RE,
            state.quota_R,
            state.home_E,
            self.costs,
            self._remote.ns_RE if idle_slots else None,
            spare_RE=state.spare_RE if idle_slots else None,
            node_R=state.node_R,
        )

    def _offload(self, work: Assignment, score_E: IntArray, share: CpuShare) -> tuple[Assignment, IntArray, IntArray]:
        """The work with the fetches that are left, and the ranks and experts that CPUs compute instead."""
        self._steps_with_fetches += 1
        step = self._steps if self.alone else self._steps_with_fetches
        host_F = np.flatnonzero(work.fetch_sources < 0)
        ranks, experts = work.fetch_ranks[host_F], work.fetch_experts[host_F]
        pairs = work.computed_RU[ranks, np.searchsorted(work.experts_U, experts)]
        holds_RE, needed_RE = np.ascontiguousarray(self.state.holds_RE), self._needed(work)
        displaces = displaces_better(holds_RE, needed_RE, self.state.quota_R, score_E, ranks, experts)
        on_cpu_F = np.zeros(len(work.fetch_ranks), bool)
        on_cpu_F[host_F] = share.choose(step, ranks, experts, pairs, displaces)
        fetched_F = ~on_cpu_F
        left = msgspec.structs.replace(
            work,
            fetch_ranks=work.fetch_ranks[fetched_F],
            fetch_experts=work.fetch_experts[fetched_F],
            fetch_sources=work.fetch_sources[fetched_F],
        )
        return left, work.fetch_ranks[on_cpu_F], work.fetch_experts[on_cpu_F]

    def _evict(self, work: Assignment, score_E: IntArray, cpu_ranks: IntArray, cpu_experts: IntArray) -> BoolArray:
        """Enter the residents after the step; returns those that are evicted."""
        state, needed_RE = self.state, self._needed(work)
        needed_RE[cpu_ranks, cpu_experts] = False
        holds_RE, spare_RE = np.ascontiguousarray(state.holds_RE), None if self.alone else state.spare_RE
        change = plan_evictions(holds_RE, needed_RE, state.quota_R, score_E, spare_RE)
        state.replace(change.after_RE)
        return change.evicted_RE

    def _needed(self, work: Assignment) -> BoolArray:
        """The experts that each rank computes, bool [R, E]."""
        needed_RE = np.zeros(self.state.holds_RE.shape, bool)
        _mark_computed(work.experts_U, work.computed_RU, needed_RE)
        return needed_RE

    def _migrate(self, work: Assignment, scores: Scores, budget: MigrationBudget) -> Migrations:
        """The step's migrations, within what its demand leaves of the budget."""
        state = self.state
        if len(work.fetch_ranks):
            budget.charge(work.fetch_ranks, self.expert_bytes)
        if state.pending_migrations:
            state.update_pending()  # demand may have fetched some
        able_R = budget.left_R >= self.expert_bytes
        if not state.pending_migrations or not able_R.any():
            return NO_MIGRATIONS
        from_peers = not self.alone and self.costs.peer_fetch < self.costs.host_fetch
        migrations = choose_migrations(state, scores(), able_R, from_peers=from_peers)
        if len(migrations):
            budget.spend(migrations.ranks, self.expert_bytes)
            if self._budgets.prefetch is not None:
                self._budgets.prefetch.spend(migrations.ranks, self.expert_bytes)
            state.migrate(migrations)
        return migrations

    def _own_migration(self, migrations: Migrations) -> tuple[int, int, PeerCopies | None]:
        """This rank's fetch for the placement, its eviction for that, and its part of the copies between ranks."""
        copies = self._copies(migrations.ranks, migrations.experts, migrations.sources)
        mine = np.flatnonzero(migrations.ranks == self.rank)
        if not len(mine):
            return -1, -1, copies
        return int(migrations.experts[mine[0]]), int(migrations.evicted[mine[0]]), copies

    def _copies(self, ranks: IntArray, experts: IntArray, sources: IntArray) -> PeerCopies | None:
        """This rank's part of fetches of which some come from peers."""
        if not np.count_nonzero(sources >= 0):
            return None
        mine = (ranks == self.rank) & (sources >= 0)
        sent = sources == self.rank
        return PeerCopies(
            sources=dict(zip(experts[mine].tolist(), sources[mine].tolist(), strict=True)),
            sends=tuple(zip(ranks[sent].tolist(), experts[sent].tolist(), strict=True)),
        )


@compiled("void(int64[::1], int64[:, ::1], b1[:, ::1])")
def _mark_computed(experts_U: IntArray, computed_RU: IntArray, needed_RE: BoolArray) -> None:
    for rank in range(len(needed_RE)):
        for column, expert in enumerate(experts_U):
            needed_RE[rank, expert] = computed_RU[rank, column] > 0


@compiled("b1(int64[::1], b1[:, ::1])")
def _enter_residents(slot_of_E: IntArray, holds_1E: BoolArray) -> bool:
    """Enter which experts have slots; returns whether that changes anything."""
    changed = False
    for expert in range(len(slot_of_E)):
        resident = slot_of_E[expert] >= 0
        changed |= resident != holds_1E[0, expert]
        holds_1E[0, expert] = resident
    return changed


@compiled("int64(int64[:, ::1], b1[:, ::1], b1[:, ::1])")
def _enter_needed(counts_1E: IntArray, holds_1E: BoolArray, needed_1E: BoolArray) -> int:
    """Enter which experts have pairs; returns how many of them are missing."""
    misses = 0
    for expert in range(counts_1E.shape[1]):
        needed_1E[0, expert] = counts_1E[0, expert] > 0
        misses += needed_1E[0, expert] and not holds_1E[0, expert]
    return misses
