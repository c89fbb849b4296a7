"""On the way to a placement: moves and shifts arrive, stay within the budget, and never lose what a step needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.arrays import BoolArray, IntArray
from epslots.errors import ConfigError, StaleEpoch
from epslots.placement.model_planner import ModelPlanner, next_shift
from epslots.placement.placement import carry_over, default_placement
from epslots.planner.cost_model import Costs
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.migration import MigrationBudget, choose_migrations
from epslots.planner.plan import NO_MIGRATIONS, Migrations
from epslots.planner.prefetch_policy import PrefetchBudget
from tests.support.plan_strategies import random_placement, random_quotas

HOST = Costs(1000, 10**6, 1, 1, 1, 1, 1)
PEERS = Costs(1000, 10, 1, 1, 1, 1, 1)
BYTES = 100


@dataclass
class World:
    """Ranks that share a model, seen from all of them."""

    models: list[ModelPlanner]
    generator: np.random.Generator

    @classmethod
    def random(cls, seed: int) -> World:
        generator = np.random.default_rng(seed)
        layers, ranks = int(generator.integers(1, 4)), int(generator.integers(1, 5))
        experts_L = generator.integers(2, 9, layers)
        quota_LR = generator.integers(1, experts_L[:, None] + 1, (layers, ranks))
        first = default_placement(experts_L.tolist(), quota_LR)
        costs = PEERS if generator.random() < 0.5 else HOST
        node_R = np.arange(ranks) // 2 if generator.random() < 0.5 and ranks > 2 else None
        models = []
        for rank in range(ranks):
            shared, budgets = [], FetchBudgets()
            for layer, experts in enumerate(experts_L.tolist()):
                holds = np.zeros((ranks, experts), bool)
                homes = first.home_LE[layer, :experts]
                shared.append(
                    LayerPlanner(
                        rank,
                        LayerState(holds, quota_LR[layer].copy(), homes, node_R),
                        costs,
                        expert_bytes=BYTES,
                        budgets=budgets,
                    )
                )
            models.append(ModelPlanner(shared, first, [range(layers)], budgets))
        return cls(models, generator)

    def step(self, tokens: int) -> int:
        """A step of all ranks; returns the most bytes that any rank moved in it."""
        score = {i: self.generator.permutation(layer.state.holds_RE.shape[1]) for i, layer in enumerate(self.models[0].layers)}
        shifts = [model.begin_step(lambda layer: score[layer]) for model in self.models]
        assert all(each == shifts[0] for each in shifts)
        now_LR = np.stack([layer.state.quota_R for layer in self.models[0].layers])
        carry_over(self.models[0].placement, range(len(self.models)), now_LR).check()  # the group may break at any time
        bytes_R = np.zeros(len(self.models), np.int64)
        for shift in shifts[0]:
            bytes_R[shift.rank] += BYTES
        for number, planner in enumerate(self.models[0].layers):
            layer = planner.state
            ranks, experts = layer.holds_RE.shape
            counts = self.generator.multinomial(tokens, np.full(experts, 1 / experts), size=ranks)
            before = layer.holds_RE.copy()
            plans = [model.layers[number].decide(counts, partial(score.get, number)) for model in self.models]
            for plan in plans[1:]:
                assert np.array_equal(plan.migrations.experts, plans[0].migrations.experts)
                assert np.array_equal(plan.migrations.sources, plans[0].migrations.sources)
            work, moves = plans[0].assignment, plans[0].migrations
            assert len(set(moves.ranks.tolist())) == len(moves), "one of each rank"
            assert layer.wanted_RE[moves.ranks, moves.experts].all(), "only what is wanted"
            gone = moves.evicted >= 0
            assert not layer.wanted_RE[moves.ranks[gone], moves.evicted[gone]].any(), "a wanted copy is evicted"
            assert (layer.holds_RE.sum(1) <= layer.quota_R).all()
            computed_RE = np.zeros((ranks, experts), bool)
            computed_RE[:, work.experts_U] = work.computed_RU > 0
            fetched_RE = np.zeros((ranks, experts), bool)
            fetched_RE[work.fetch_ranks, work.fetch_experts] = True
            assert ((before | fetched_RE) >= computed_RE).all(), "what is computed is held or fetched"
            for rank, expert, source in zip(moves.ranks, moves.experts, moves.sources, strict=True):
                assert source < 0 or (layer.holds_RE[source, expert] and source != rank), "the source keeps its copy"
            bytes_R[moves.ranks] += BYTES
        assert len({model.digest for model in self.models}) == 1
        return int(bytes_R.max())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([BYTES, 2 * BYTES, 5 * BYTES]))
def test_a_placement_is_reached_within_the_budget(seed: int, bytes_per_step: int):
    """Under demand in every step, also of more experts than a rank has slots."""
    world = World.random(seed)
    for _ in range(3):
        world.step(4)
    target = random_placement(world.generator, world.models[0].placement)
    for model in world.models:
        model.check(target)
        model.follow(target, bytes_per_step)
    layers, ranks = target.quota_LR.shape
    steps = 0
    wanted = sum(np.count_nonzero(layer.state.wanted_RE & ~layer.state.holds_RE) for layer in world.models[0].layers)
    assert world.models[0].pending_migrations >= wanted
    pending = world.models[0].pending_migrations
    while world.models[0].budgets.migration is not None:
        assert world.step(30) <= bytes_per_step
        steps += 1
        assert steps <= 16 * (pending + 1), f"{world.models[0].pending_migrations} are left"  # an eighth is kept; two hops
    for index, layer in enumerate(world.models[0].layers):
        assert layer.state.quota_R.tolist() == target.quota_LR[index].tolist()
        assert layer.state.pending_migrations == 0
    # Without demand what was moved in stays.
    again = replace(target, version=target.version + 1)
    for model in world.models:
        model.follow(again, 10**6)
    steps = 0
    while world.models[0].budgets.migration is not None:
        world.step(0)
        steps += 1
        assert steps < 50 * layers * ranks
    for _ in range(10):
        world.step(0)
    for layer in world.models[0].layers:
        assert (layer.state.holds_RE >= layer.state.wanted_RE).all()


def test_less_than_an_expert_a_step_is_a_move_every_few_steps():
    state, budgets = LayerState(np.zeros((1, 4), bool), np.array([4]), np.zeros(4, np.int64)), FetchBudgets()
    layer = LayerPlanner(0, state, HOST, expert_bytes=BYTES, budgets=budgets)
    first = default_placement([4], np.array([[4]]))
    model = ModelPlanner([layer], first, [[0]], budgets)
    model.follow(replace(first, version=1, wanted_LRE=np.ones((1, 1, 4), bool)), BYTES // 3 + 1)
    moved = []
    for _ in range(12):
        model.begin_step(lambda _: np.zeros(4, np.int64))
        moved.append(len(layer.decide(np.zeros((1, 4), np.int64), lambda: np.zeros(4, np.int64)).migrations))
    assert moved == [0, 0, 1] * 4
    model.begin_step(lambda _: np.zeros(4, np.int64))
    assert budgets.migration is None and model.pending_migrations == 0


def test_moves_stand_behind_the_demand_of_the_step():
    """A fetch takes the whole budget of the step, and the move waits for the next one."""
    state, budget = LayerState(np.zeros((1, 4), bool), np.array([4]), np.zeros(4, np.int64)), MigrationBudget(1, BYTES, BYTES)
    layer = LayerPlanner(0, state, HOST, expert_bytes=BYTES, budgets=FetchBudgets(migration=budget))
    state.follow(np.zeros(4, np.int64), np.array([[True, False, False, False]]))
    score = np.zeros(4, np.int64)
    budget.renew()
    assert not len(layer.decide(np.array([[0, 3, 0, 0]]), lambda: score).migrations) and state.pending_migrations == 1
    budget.renew()
    assert len(layer.decide(np.array([[0, 3, 0, 0]]), lambda: score).migrations) == 1 and state.pending_migrations == 0


def test_prefetches_and_migrations_share_one_budget():
    zeros = np.zeros(4, np.int64)
    for ahead in (False, True):
        state, migration = LayerState(np.zeros((1, 4), bool), np.array([4]), zeros), MigrationBudget(1, BYTES, BYTES)
        budgets = FetchBudgets(PrefetchBudget(1, 2 * BYTES), migration)
        layer = LayerPlanner(0, state, HOST, expert_bytes=BYTES, budgets=budgets)
        state.follow(zeros, np.array([[True, False, False, False]]))
        migration.renew()
        if ahead:
            found = layer.prefetch(np.array([[0, 0, 255, 0]]), lambda: zeros, np.array([False]))
            assert found is not None and found.experts.tolist() == [2]
        moves = layer.decide(np.zeros((1, 4), np.int64), lambda: zeros).migrations
        assert len(moves) == (not ahead)
        assert budgets.prefetch.experts(BYTES).tolist() == [1], "an expert of two has been fetched, one way or the other"


def test_ranks_that_miss_in_every_step_get_there_all_the_same():
    """Demand takes all that is granted, but for an eighth."""
    budgets = FetchBudgets()
    states = [LayerState(np.zeros((1, 9), bool), np.array([2]), np.zeros(9, np.int64)) for _ in range(3)]
    layers = [LayerPlanner(0, state, HOST, expert_bytes=BYTES, budgets=budgets) for state in states]
    first = default_placement([9] * 3, np.array([[2]] * 3))
    model = ModelPlanner(layers, first, [[0, 1, 2]], budgets)
    wanted = np.zeros((3, 1, 9), bool)
    wanted[:, 0, 8] = True
    model.follow(replace(first, version=1, wanted_LRE=wanted), BYTES // 2)
    steps = 0
    while model.pending_migrations:
        model.begin_step(lambda _: np.zeros(9, np.int64))
        for number, layer in enumerate(layers):
            counts = np.zeros((1, 9), np.int64)
            counts[0, (steps * 2 + number) % 8] = 1
            layer.decide(counts, lambda: np.arange(9))
        steps += 1
        assert steps < 3 * 8 * 2 + 10
    assert steps > 3 * 8, "and demand stands first"


def test_which_copy_gives_way():
    """Rank 0 is full: a spare copy goes first, then what moves elsewhere now, then the lowest score; never what is wanted."""

    def evicted(holds: list[list[int]], wanted: list[list[int]], home: list[int], able: list[bool]) -> list[int]:
        holds_RE, wanted_RE = np.zeros((2, 5), bool), np.zeros((2, 5), bool)
        for rank in range(2):
            holds_RE[rank, holds[rank]] = wanted_RE[rank, wanted[rank]] = True
        state = LayerState(holds_RE, np.array([2, 2]), np.array(home))
        state.follow(np.array(home), wanted_RE)
        moves = choose_migrations(state, np.array([9, 1, 5, 3, 7]), np.array(able), from_peers=True)
        return moves.evicted.tolist() if len(moves) else []

    assert evicted([[1, 2], [2, 3]], [[4], []], [1, 1, 1, 1, 0], [True, False]) == [2], "spare, though it scores more"
    assert evicted([[1, 2], [3]], [[4], [2]], [0, 0, 1, 1, 0], [True, True]) == [2, -1], "2 moves to rank 1 in the same moment"
    assert evicted([[1, 2], [3]], [[4], []], [0, 0, 0, 1, 0], [True, True]) == [1], "the lowest score"
    assert evicted([[1, 2], [3]], [[1, 2, 4], []], [0, 0, 0, 1, 0], [True, True]) == [], "all is wanted"


def test_where_a_move_comes_from():
    holds_RE = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], bool)
    wanted_RE = holds_RE.copy()
    wanted_RE[3] = True, False
    able, home_E, score_E = np.ones(4, bool), np.array([3, 3]), np.zeros(2, int)

    def moves(able: BoolArray, *, from_peers: bool = True, node_R: IntArray | None = None) -> Migrations:
        state = LayerState(holds_RE, np.ones(4, int), home_E, node_R)
        state.follow(home_E, wanted_RE)
        return choose_migrations(state, score_E, able, from_peers=from_peers)

    assert moves(able).sources.tolist() == [0], "the next one, going round"
    assert moves(able, node_R=np.array([0, 0, 1, 1])).sources.tolist() == [2], "of the same node"
    assert moves(able, from_peers=False).sources.tolist() == [-1]
    assert moves(~able) is NO_MIGRATIONS


@settings(max_examples=60)
@given(st.integers(0, 10**9))
def test_shifts_bring_every_boundary_nearer_and_arrive(seed: int):
    generator = np.random.default_rng(seed)
    layers = int(generator.integers(2, 8))
    experts_L = generator.integers(2, 9, layers)
    quota_L = generator.integers(1, experts_L + 1)
    target_L = random_quotas(generator, quota_L[:, None], experts_L)[:, 0]
    pools = [list(range(layers))]
    while (pair := next_shift(quota_L, target_L, experts_L, pools)) is not None:
        giver, taker = pair
        assert abs(giver - taker) == 1
        full_L = quota_L == experts_L
        least_L = np.minimum(quota_L, target_L) - full_L
        before = np.abs((quota_L - target_L).cumsum()).sum()
        quota_L[giver] -= 1
        quota_L[taker] += 1
        assert np.abs((quota_L - target_L).cumsum()).sum() == before - 1
        assert (quota_L >= least_L).all(), "only a full layer loses anything on the way"
        assert (quota_L >= 1).all() and (quota_L <= experts_L).all()
    assert quota_L.tolist() == target_L.tolist()


def test_placements_that_do_not_fit_are_refused_by_name():
    states = [LayerState(np.zeros((2, 4), bool), np.array([2, 3]), np.zeros(4, int)) for _ in range(2)]
    layers = [LayerPlanner(0, state, HOST) for state in states]
    first = default_placement([4, 4], np.array([[2, 3], [2, 3]]))
    model = ModelPlanner(layers, first, [[0, 1]], FetchBudgets())
    newer = replace(first, version=1)
    model.check(newer)
    with pytest.raises(StaleEpoch, match="placement 0 is not newer than 0"):
        model.check(first)
    with pytest.raises(ConfigError, match="gives rank 1 5 slots, and it has 6"):
        model.check(replace(newer, quota_LR=np.array([[2, 3], [2, 2]])))
    with pytest.raises(ConfigError, match="for 3 ranks, and there are 2"):
        model.check(replace(default_placement([4, 4], np.full((2, 3), 2)), version=1))
    with pytest.raises(ConfigError, match="for another model"):
        model.check(replace(default_placement([4, 5], np.full((2, 2), 2)), version=1))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**9))
def test_a_placement_for_ceded_slots_is_reached_where_it_fits(seed: int):
    """Ranks cede slots and use them again at any time; all plan alike, and copies without a slot aren't waited for."""
    world = World.random(seed)
    layers, ranks = world.models[0].layers, len(world.models[0].layers[0].state.holds_RE)
    room_LR = np.stack([layer.state.quota_R for layer in layers])
    for model in world.models:
        model.levels_R, model._ceding = np.zeros(ranks, np.int64), tuple(range(len(layers)))
    target = random_placement(world.generator, world.models[0].placement)
    wanted_LRE = target.wanted_LRE & (target.wanted_LRE.cumsum(2) <= room_LR[:, :, None])
    for model in world.models:
        model.follow(
            replace(target, wanted_LRE=wanted_LRE, quota_LR=room_LR),
            5 * BYTES,
            lambda layer: np.arange(layers[layer].state.holds_RE.shape[1]),
        )
    for step in range(120):
        rank = int(world.generator.integers(ranks))
        change = int(world.generator.choice((-1, 1))) if step < 20 else -1
        levels = int(world.models[0].levels_R[rank]) + change  # type: ignore[index]
        if step < 80 and 0 <= levels < room_LR[:, rank].min():
            score = {i: world.generator.permutation(layer.state.holds_RE.shape[1]) for i, layer in enumerate(layers)}
            evicted = [model.change_level(rank, change, lambda layer, score=score: score[layer]) for model in world.models]
            assert all(each == evicted[0] for each in evicted)
        world.step(4)
        now_LR = np.stack([layer.state.quota_R for layer in layers])
        assert (now_LR == room_LR - world.models[0].levels_R).all()
        assert all((layer.state.wanted_RE.sum(1) <= layer.state.quota_R).all() for layer in layers)
    assert not world.models[0].levels_R.any()  # type: ignore[union-attr]
    assert {model.pending_migrations for model in world.models} == {0}
    for index, layer in enumerate(layers):
        experts = layer.state.holds_RE.shape[1]
        assert (layer.state.wanted_RE == wanted_LRE[index, :, :experts]).all(), "all copies are wanted again"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9))
def test_copies_come_back_with_their_slots(seed: int):
    """They are migrated, without a new placement, once the cache has given the slots back."""
    world = World.random(seed)
    (model, *_), layers = world.models, world.models[0].layers
    room_LR = np.stack([layer.state.quota_R for layer in layers])
    rank = int(room_LR.min(0).argmax())
    target = random_placement(world.generator, model.placement)
    wanted_LRE = target.wanted_LRE & (target.wanted_LRE.cumsum(2) <= room_LR[:, :, None])
    target, score_E = replace(target, wanted_LRE=wanted_LRE, quota_LR=room_LR), np.arange(wanted_LRE.shape[2])

    def scores(layer: int) -> np.ndarray:
        return score_E[: layers[layer].state.holds_RE.shape[1]]

    def settle() -> int:
        """Migrate all that is wanted; returns the copies that ranks hold of it."""
        while model.budgets.migration is not None:
            world.step(0)
        wanted = [layer.state.wanted_RE for layer in layers]
        assert all(layer.state.holds_RE[those].all() for layer, those in zip(layers, wanted, strict=True))
        return sum(int(those.sum()) for those in wanted)

    for each in world.models:
        each.levels_R, each._ceding = np.zeros(len(world.models), np.int64), tuple(range(len(layers)))
        each.follow(target, 5 * BYTES, scores)
    held, levels = settle(), int(room_LR[:, rank].min()) - 1
    for change in (1, -1):
        for _ in range(levels):
            for each in world.models:
                each.change_level(rank, change, scores)
        now = settle()
        assert now == held if change < 0 else now <= held
    assert held == int(wanted_LRE.sum())


def test_the_dearest_copies_stay_wanted():
    """Of those that no longer fit; the others are the cache's to keep or not."""
    state = LayerState(np.zeros((2, 5), bool), np.array([2, 3]), np.zeros(5, np.int64))
    state.follow(np.zeros(5, np.int64), np.array([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool))
    state.fit_wanted(np.array([5, 9, 7, 8, 5]))
    assert state.wanted_RE.tolist() == [[False, True, False, True, False], [True, True, True, False, False]]
    assert state.pending_migrations == 5
    state.replace(state.wanted_RE)
    state.quota_R[0] = 3
    state.update_pending()
    state.fit_wanted(np.array([9, 1, 7, 1, 5]))
    assert state.wanted_RE[0].tolist() == [True, True, False, True, False], "the dearest of the others"
    assert state.pending_RE.sum() == state.pending_RE[0, 0] == state.pending_migrations == 1


def test_the_copy_that_was_evicted_comes_back():
    """Of equal scores, too: no other copy is wanted in its place."""
    state = LayerState(np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool), np.array([3, 4]), np.ones(4, np.int64))
    state.follow(np.ones(4, np.int64), np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool))
    scores = np.zeros(4, np.int64)
    evicted = state.resize(0, -1, scores)
    state.fit_wanted(scores)
    assert not state.wanted_RE[0, evicted] and state.pending_migrations == 0
    state.resize(0, 1, scores)
    state.fit_wanted(scores)
    assert state.pending_RE[0].tolist() == [expert == evicted for expert in range(4)]
