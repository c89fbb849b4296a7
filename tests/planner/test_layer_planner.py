"""A layer over several steps: remote costs add up, spare copies are evicted first, the past is in the digest."""

from __future__ import annotations

import numpy as np
import pytest

from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import HALVING_STEPS, CpuShare
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.migration import MigrationBudget
from epslots.planner.prefetch_policy import PrefetchBudget
from tests.support.plan_strategies import COSTS, holds


def test_remote_costs_add_up_until_a_copy_is_bought():
    """Rank 0 has an empty slot and sends a pair a step to rank 1, which holds the expert."""
    counts, score = np.array([[1, 0], [0, 0]]), np.zeros(2, np.int64)
    layers = [
        LayerPlanner(rank, LayerState(holds(2, 2, (1, 0), (1, 1)), np.array([1, 2]), np.array([1, 1])), COSTS)
        for rank in range(2)
    ]
    for _ in range(20_000):
        plans = [layer.plan(counts, lambda: score) for layer in layers]
        if plans[0].copies is not None:
            break
    assert plans[0].copies is not None and plans[0].copies.sources == {0: 1}
    assert plans[1].copies is not None and plans[1].copies.sends == ((0, 0),)
    assert layers[0].state.holds_RE[0].tolist() == [True, False]
    assert layers[0].plan(counts, lambda: score).moved == 0, "from now on the token stays"


def test_a_spare_copy_is_evicted_before_an_only_one():
    """Rank 0 holds expert 0, alone and never used, and a copy of expert 1, often used, whose home is rank 1."""
    score = np.array([0, 9, 5])
    layer = LayerPlanner(0, LayerState(holds(2, 3, (0, 0), (0, 1), (1, 1)), np.array([2, 1]), np.array([0, 1, 0])), COSTS)
    plan = layer.plan(np.array([[0, 0, 4], [0, 0, 0]]), lambda: score)
    assert plan.evicted_E.tolist() == [False, True, False]
    assert layer.state.holds_RE.tolist() == [[True, False, True], [False, True, False]]


def test_the_digest_tells_tables_homes_and_pasts_apart():
    def layer() -> LayerPlanner:
        return LayerPlanner(0, LayerState(holds(2, 3, (0, 0)), np.array([2, 1]), np.array([0, 1, 0])), COSTS)

    first, second = layer(), layer()
    assert first.state.digest == second.state.digest
    second.state.follow(np.array([1, 1, 0]), second.state.wanted_RE)
    assert first.state.digest != second.state.digest
    second = layer()
    second.plan(np.array([[1, 0, 0], [0, 0, 0]]), lambda: np.zeros(3, np.int64))
    assert first.state.digest != second.state.digest
    first.plan(np.array([[1, 0, 0], [0, 0, 0]]), lambda: np.zeros(3, np.int64))
    assert first.state.digest == second.state.digest
    second.state.holds_RE[1, 1] = True
    second.state.holds_changed()
    assert first.state.digest != second.state.digest


def test_prefetches_that_no_link_has_begun_are_taken_back():
    """Of each rank's as many as it tells, from the last, less those that the step uses; on all ranks alike."""
    home_E = np.array([0, 0, 0, 1, 1, 1])
    budgets = [FetchBudgets(prefetch=PrefetchBudget(2, 30)) for _ in range(2)]
    layers = [
        LayerPlanner(
            rank, LayerState(holds(2, 6), np.array([6, 6]), home_E.copy()), COSTS, expert_bytes=10, budgets=budgets[rank]
        )
        for rank in range(2)
    ]
    usage_RE = np.array([[250, 240, 230, 250, 240, 230], [0] * 6])
    for layer in layers:
        assert layer.prefetch(usage_RE, lambda: home_E, np.array([False, False])) is not None
    assert [layer.own_prefetches.tolist() for layer in layers] == [[0, 1, 2], [3, 4, 5]]
    assert [budget.prefetch.experts(10).tolist() for budget in budgets if budget.prefetch is not None] == [[0, 0]] * 2
    before, used_E = layers[0].state.digest, np.array([True, True, False, False, False, True])
    taken = [layer.take_back(np.array([2, 3]), used_E).tolist() for layer in layers]
    assert taken == [[2], [3, 4]]
    for layer, budget in zip(layers, budgets, strict=True):
        assert layer.state.holds_RE.tolist() == holds(2, 6, (0, 0), (0, 1), (1, 5)).tolist()
        assert budget.prefetch is not None and budget.prefetch.experts(10).tolist() == [1, 2]
        assert not len(layer.own_prefetches), "they are judged once"
        assert layer.take_back(np.array([3, 3]), ~used_E).tolist() == []
    assert layers[0].state.digest == layers[1].state.digest != before


def test_a_wanted_copy_that_demand_brings_needs_no_budget():
    state, budget = LayerState(holds(1, 2), np.array([2]), np.array([0, 0])), MigrationBudget(1, granted=1, largest=10)
    layer = LayerPlanner(0, state, COSTS, expert_bytes=10, budgets=FetchBudgets(migration=budget))
    state.follow(np.array([0, 0]), np.array([[True, False]]))
    assert state.pending_migrations == 1
    layer.plan(np.array([[3, 0]]), lambda: np.zeros(2, np.int64))
    assert not (budget.left_R >= 10).any() and state.pending_migrations == 0


@pytest.mark.parametrize(("ranks", "halved"), [(1, True), (2, False)])
def test_steps_of_hits_halve_cpu_costs_of_a_lone_rank_alone(ranks: int, halved: bool):
    """A group counts its steps with fetches: the account of an expert is worth as much after any number of hits."""
    costs = Costs(10**6, 10**6, 1, 1, 1, 1, 1, host_expert=10**5, host_pair=1)
    share = CpuShare(ranks, 2, costs, concurrent=False)
    state = LayerState(holds(ranks, 2, *((rank, 1) for rank in range(ranks))), np.ones(ranks, np.int64), np.zeros(2, np.int64))
    layer, score = LayerPlanner(0, state, costs, cpu_share=share), np.array([0, 9])

    def step(expert: int) -> int:
        counts = np.zeros((ranks, 2), np.int64)
        counts[0, expert] = 1
        layer.plan(counts, lambda: score)
        return int(share.cpu_ns_RE[0, 0])

    once = step(0)
    for _ in range(HALVING_STEPS):
        step(1)
    assert once > 0 and step(0) == once + (once // 2 if halved else once)


def test_a_lone_rank_plans_as_decide_does():
    """It takes a shorter way, to the same residents, evictions, scores and bytes left for prefetches."""
    generator = np.random.default_rng(3)
    for _ in range(200):
        quota = int(generator.integers(1, 7))
        held_1E = np.zeros((1, 8), bool)
        held_1E[0, generator.permutation(8)[: generator.integers(0, quota + 1)]] = True
        budgets = [FetchBudgets(PrefetchBudget(1, 100)) for _ in range(2)]
        short, long = (
            LayerPlanner(
                0, LayerState(held_1E.copy(), np.array([quota]), np.zeros(8, np.int64)), COSTS, expert_bytes=9, budgets=b
            )
            for b in budgets
        )
        for _ in range(4):
            counts_1E, score_E = generator.integers(0, 3, (1, 8)), generator.permutation(8)
            plan, wanted = short.plan(counts_1E, lambda: score_E), long.decide(counts_1E, lambda: score_E)  # noqa: B023
            assert plan.slots_E.tolist() == plan.computed_E.tolist() == counts_1E[0].tolist()
            assert plan.evicted_E.tolist() == wanted.evicted_RE[0].tolist()
            assert plan.score_E.tolist() == wanted.score_E.tolist()
            assert short.state.holds_RE.tolist() == long.state.holds_RE.tolist()
            left, left_then = (b.prefetch.experts(1).tolist() for b in budgets if b.prefetch is not None)
            assert left == left_then
