"""A simulated group of ranks: the planners of real ranks, and a clock that adds up modelled times.

Pure. The decisions are exact: for the same choices of the router, real ranks that neither prefetch nor compute on their CPUs
have the same hits, misses, fetches, migrations and evictions. The times are a model (``timing.py``): in each layer of a step
all wait for the slowest rank, which fetches, then computes; migrations run behind that and delay the next fetches if they
aren't done.

Legend of shape suffixes: L layers, R ranks, N nodes, E experts of the largest layer, U experts with tokens, F fetches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.placement.model_planner import ModelPlanner
from epslots.placement.placement import Placement, default_placement, first_residents
from epslots.planner.assignment import assign, own_only
from epslots.planner.cache_policy import Policy
from epslots.planner.cost_model import compute_cost, fetch_cost, moved_pairs
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.plan import Assignment, LayerPlan
from epslots.planner.reuse_distance import count_distances, stack_distances
from epslots.planner.use_history import UseHistory, note_use
from epslots.simulation.timing import Timing


@dataclass
class StepTally:
    """Counts of a group's step, or of several. int64 [L, R] unless said otherwise.

    Attributes:
        hits, misses: uses of experts by the rank that computes them.
        host_fetches, peer_fetches: experts fetched on demand.
        host_migrations, peer_migrations: experts migrated, from the host and from peers.
        evictions: experts evicted for any of them, or for a slot's change of layer.
        computed: pairs that each rank computed.
        far_fetches: experts, migrations included, that came from another node.
        time_L: nanoseconds of each layer, int64 [L].
        levels_L: mean pairs of the ranks / most pairs, summed over steps, float [L].
        steps_L: steps in which the layer had tokens, int64 [L].
        step_ns: of each step.
    """

    hits: IntArray
    misses: IntArray
    host_fetches: IntArray
    peer_fetches: IntArray
    host_migrations: IntArray
    peer_migrations: IntArray
    evictions: IntArray
    computed: IntArray
    far_fetches: IntArray
    time_L: IntArray
    levels_L: FloatArray
    steps_L: IntArray
    step_ns: list[int]

    @classmethod
    def empty(cls, layers: int, ranks: int) -> StepTally:
        def zeros() -> IntArray:
            return np.zeros((layers, ranks), np.int64)

        return cls(
            *(zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros()),
            time_L=np.zeros(layers, np.int64),
            levels_L=np.zeros(layers),
            steps_L=np.zeros(layers, np.int64),
            step_ns=[],
        )


class RankWork(NamedTuple):
    """The experts' work that each rank did in a window, int64 [L, R].

    Attributes:
        pairs: that it computed.
        uses: of experts, by steps.
        ns: nanoseconds that it computed.
    """

    pairs: IntArray
    uses: IntArray
    ns: IntArray

    @classmethod
    def none(cls, layers: int, ranks: int) -> RankWork:
        return cls(*(np.zeros((layers, ranks), np.int64) for _ in range(3)))


class SimulatedGroup:
    """The ranks of one expert-parallel group.

    Args:
        placement: the placement at the start, and each rank's slots. Slots hold the experts that ranks would fill them with.
        policy: the eviction policy.
        expert_bytes: of any layer's expert.
        node_R: the node of each rank, if there are several.
        holds_LRE: other residents at the start.
        speed_R: float64, how fast each rank computes; 1 = usual, the speed that plans assume. None = all are usual.

    Attributes:
        model: the planners that real ranks have.
        tally: the counts since it was last taken.
    """

    def __init__(
        self,
        placement: Placement,
        timing: Timing,
        policy: Policy,
        *,
        expert_bytes: int = 1,
        node_R: IntArray | None = None,
        holds_LRE: BoolArray | None = None,
        speed_R: FloatArray | None = None,
    ) -> None:
        layers, ranks, experts = placement.wanted_LRE.shape
        self._speed_R = np.ones(ranks) if speed_R is None else speed_R
        self._experts = placement.num_experts_L.tolist()
        self._timing, self._policy, self._node_R = timing, policy, node_R
        holds_LRE = first_residents(placement) if holds_LRE is None else holds_LRE
        dealt = default_placement(self._experts, placement.quota_LR)
        states = [
            LayerState(
                holds_LRE[layer, :, :own].copy(),
                placement.quota_LR[layer].copy(),
                dealt.home_LE[layer, :own].copy(),
                node_R,
            )
            for layer, own in enumerate(self._experts)
        ]
        budgets = FetchBudgets()
        rule = own_only if all(state.holds_RE.all() for state in states) else assign
        planners = [LayerPlanner(0, state, timing.costs, rule, expert_bytes=expert_bytes, budgets=budgets) for state in states]
        # As the ranks of a runtime do: they form with homes dealt by slots, and follow a placement from there.
        self.model = ModelPlanner(planners, dealt, [range(layers)], budgets)
        if placement.version > 0:
            self.model.follow(placement, expert_bytes)
        self._history = UseHistory.empty(layers, experts)
        self._steps_L = [0] * layers
        self._behind_R = np.zeros(ranks, np.int64)
        self.tally = StepTally.empty(layers, ranks)
        self._tokens_LE, self._uses_LE = (np.zeros((layers, experts), np.int64) for _ in range(2))
        self._reuse_LD = np.zeros((layers, experts + 1), np.int64)
        self._work = RankWork.none(layers, ranks)

    def take(self) -> StepTally:
        """The counts since the last call."""
        tally, self.tally = self.tally, StepTally.empty(*self.tally.hits.shape)
        return tally

    def take_window(self) -> tuple[IntArray, IntArray, IntArray]:
        """Pairs and steps by expert, and stack distances, since the last call, as real ranks' telemetry counts them."""
        window = self._tokens_LE.copy(), self._uses_LE.copy(), self._reuse_LD.copy()
        for counted in (self._tokens_LE, self._uses_LE, self._reuse_LD):
            counted[:] = 0
        return window

    def take_work(self) -> RankWork:
        """The ranks' work since the last call."""
        work, self._work = self._work, RankWork.none(*self._work.pairs.shape)
        return work

    def step(self, counts_LRE: IntArray | Sequence[IntArray], tokens_R: IntArray) -> int:
        """Run one step of all ranks; returns its nanoseconds.

        Args:
            counts_LRE: (token, k) pairs of each rank's own tokens, [R, at least the layer's experts] for each layer.
            tokens_R: tokens of each rank.
        """
        timing, tally = self._timing, self.tally
        for shift in self.model.begin_step(self._score):
            tally.evictions[shift.giver, shift.rank] += int(shift.evicted >= 0)
        together = len(self._behind_R) > 1
        far = timing.far_exchange if self._node_R is not None else 0
        header = timing.costs.gather + far if together else 0
        step_ns = header
        for layer, experts in enumerate(self._experts):
            counts_RE = counts_LRE[layer][:, :experts]
            used_E: BoolArray = counts_RE.sum(0) > 0
            layer_ns = int(self._at_speed(timing.layer + tokens_R * timing.token).max()) + header
            moving_R = np.zeros_like(self._behind_R)
            if used_E.any():
                if self.model.complete:  # ranks exchange nothing, so no rank knows of its uses
                    self._tokens_LE[layer, :experts] += counts_RE.sum(0)
                    layer_ns -= header
                else:
                    self._note_uses(layer, counts_RE, used_E)
                plan = self._plan(layer, counts_RE)
                layer_ns += self._layer_time(layer, plan.assignment, tokens_R, far)
                if len(plan.migrations):
                    moving_R = self._fetch_time(plan.migrations.ranks, plan.migrations.sources)
            self._behind_R = np.maximum(self._behind_R - layer_ns, 0) + moving_R
            tally.time_L[layer] += layer_ns
            step_ns += layer_ns
        tally.step_ns.append(step_ns)
        return step_ns

    def _score(self, layer: int) -> IntArray:
        return self._policy(self._history.layer(layer, self._experts[layer]))

    def _note_uses(self, layer: int, counts_RE: IntArray, used_E: BoolArray) -> None:
        self._steps_L[layer] += 1
        history, experts = self._history.layer(layer, len(used_E)), len(used_E)
        count_distances(self._reuse_LD[layer], stack_distances(history.last_use, used_E, self._score(layer)))
        note_use(history, used_E, self._steps_L[layer], int(self.model.layers[layer].state.quota_R.sum()))
        self._tokens_LE[layer, :experts] += counts_RE.sum(0)
        self._uses_LE[layer, :experts] += used_E

    def _plan(self, layer: int, counts_RE: IntArray) -> LayerPlan:
        """Plan a layer's step, and count what it does."""
        planner, tally, ranks = self.model.layers[layer], self.tally, len(counts_RE)
        before_RE = planner.state.holds_RE.copy()
        plan = planner.decide(counts_RE, partial(self._score, layer))
        work, migrations = plan.assignment, plan.migrations
        misses_R = np.bincount(work.fetch_ranks, minlength=ranks)
        free_R = planner.state.quota_R - before_RE.sum(1)
        from_peer = work.fetch_sources >= 0
        tally.hits[layer] += (work.computed_RU > 0).sum(1) - misses_R
        tally.misses[layer] += misses_R
        tally.host_fetches[layer] += np.bincount(work.fetch_ranks[~from_peer], minlength=ranks)
        tally.peer_fetches[layer] += np.bincount(work.fetch_ranks[from_peer], minlength=ranks)
        tally.host_migrations[layer] += np.bincount(migrations.ranks[migrations.sources < 0], minlength=ranks)
        tally.peer_migrations[layer] += np.bincount(migrations.ranks[migrations.sources >= 0], minlength=ranks)
        # Fetches take the empty slots first; in a step of several passes even fetched experts are evicted.
        tally.evictions[layer] += np.maximum(misses_R - free_R, 0)
        tally.evictions[layer] += np.bincount(migrations.ranks[migrations.evicted >= 0], minlength=ranks)
        pairs_R = work.computed_RU.sum(1)
        tally.computed[layer] += pairs_R
        tally.levels_L[layer] += float(pairs_R.mean() / pairs_R.max())
        tally.steps_L[layer] += 1
        if self._node_R is not None:
            for target, source in ((work.fetch_ranks, work.fetch_sources), (migrations.ranks, migrations.sources)):
                tally.far_fetches[layer] += np.bincount(target[self._is_far(target, source)], minlength=ranks)
        return plan

    def _at_speed(self, ns_R: IntArray) -> IntArray:
        """Nanoseconds of each rank, of what would take a usual one so many."""
        return np.rint(ns_R / self._speed_R).astype(np.int64)

    def _layer_time(self, layer: int, work: Assignment, tokens_R: IntArray, far: int) -> int:
        """``cost_model.layer_time``, with other nodes and with migrations that are still in flight."""
        costs, ranks = self._timing.costs, len(work.counts_RU)
        busy_R = self._at_speed(compute_cost(costs, work.computed_RU))
        for sums_LR, done_R in zip(self._work, (work.computed_RU.sum(1), (work.computed_RU > 0).sum(1), busy_R), strict=True):
            sums_LR[layer] += done_R
        if len(work.fetch_ranks):
            fetching_R = self._fetch_time(work.fetch_ranks, work.fetch_sources)
            busy_R = busy_R + fetching_R + np.where(fetching_R > 0, self._behind_R, 0)
        moved_R = moved_pairs(work.counts_RU, work.computed_RU)
        most = int(moved_R.max())
        if not most:
            return int(busy_R.max())
        far_pairs = 0 if self._node_R is None else far_pairs_of_a_rank(work.counts_RU, work.computed_RU, self._node_R)
        sent = most * costs.pair_transfer + far_pairs * self._timing.far_pair
        # Ranks choose the cheaper way to exchange (``costs.gathers``).
        top_k = -(-int(work.counts_RU.sum()) // max(1, int(tokens_R.sum())))
        rows = (ranks - 1) * int(tokens_R.max()) * (1 + top_k)
        gathered = 2 * (costs.gather + far) + rows * max(costs.pair_transfer, self._timing.far_pair if far else 0)
        return int(busy_R.max()) + min(2 * (costs.exchange + far + sent), gathered)

    def _fetch_time(self, rank_F: IntArray, source_F: IntArray) -> IntArray:
        """Nanoseconds that each rank is busy with these fetches, int64 [R]."""
        ranks = len(self._behind_R)
        if self._node_R is None:
            return fetch_cost(self._timing.costs, ranks, rank_F, source_F)
        far = self._is_far(rank_F, source_F)
        far_R = np.bincount(rank_F[far], minlength=ranks) + np.bincount(source_F[far], minlength=ranks)
        return fetch_cost(self._timing.costs, ranks, rank_F[~far], source_F[~far]) + far_R * self._timing.far_fetch

    def _is_far(self, rank_F: IntArray, source_F: IntArray) -> BoolArray:
        assert self._node_R is not None
        far: BoolArray = (source_F >= 0) & (self._node_R[rank_F] != self._node_R[source_F])
        return far


def far_pairs_of_a_rank(counts_RU: IntArray, computed_RU: IntArray, node_R: IntArray) -> int:
    """The larger of the pairs that a rank of the busiest node sends to other nodes and receives from them.

    Tokens stay on their node as far as they can (``token_splits.py``); what crosses is spread over the node's ranks.
    """
    here_NR = (np.arange(int(node_R.max()) + 1)[:, None] == node_R).astype(np.int64)
    counts_NU, computed_NU = here_NR @ counts_RU, here_NR @ computed_RU
    crossing_N = np.maximum(counts_NU.sum(1), computed_NU.sum(1)) - np.minimum(counts_NU, computed_NU).sum(1)
    return int((-(-crossing_N // np.maximum(1, here_NR.sum(1)))).max())
