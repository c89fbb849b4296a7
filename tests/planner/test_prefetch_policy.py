"""Prefetches: of likely and absent experts, at home, within all bounds, never in the place of likelier ones; their end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.planner.prefetch_policy import (
    CERTAIN,
    CHANGING_SHARE,
    LIKELY,
    PROBE_EVERY,
    WORTH_A_TRY,
    PrefetchBudget,
    PrefetchPolicy,
    choose_prefetches,
    used_by_any,
)
from tests.support.plan_strategies import Situation, situations


@given(st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), min_size=1, max_size=9))
def test_used_by_any_is_the_chance_of_independent_ranks(usage: list[list[int]]):
    usage_RE = np.array(usage)
    expected_E = CERTAIN * (1 - np.prod(1 - usage_RE / CERTAIN, axis=0))
    found_E = used_by_any(usage_RE)
    assert (np.abs(found_E - expected_E) <= len(usage)).all()  # each product is rounded down
    assert (found_E >= usage_RE.max(0)).all()


@st.composite
def predicted(draw: st.DrawFn) -> tuple[Situation, np.ndarray, np.ndarray, np.ndarray]:
    situation = draw(situations())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    usage_E = (random.random(len(situation.home_E)) ** draw(st.sampled_from([1, 4])) * CERTAIN).astype(np.int64)
    busy_R, left_R = random.random(len(situation.quota_R)) < 0.5, random.integers(0, 6, len(situation.quota_R))
    return situation, usage_E, busy_R, left_R


@given(predicted())
def test_the_likely_come_and_the_likely_stay(predicted: tuple[Situation, np.ndarray, np.ndarray, np.ndarray]):
    situation, usage_E, busy_R, left_R = predicted
    holds_RE, quota_R, home_E = situation.holds_RE, situation.quota_R, situation.home_E
    found = choose_prefetches(usage_E, holds_RE, quota_R, home_E, lambda: situation.score_E, busy_R, left_R)
    least_R, most_R = np.where(busy_R, LIKELY, WORTH_A_TRY), np.minimum(np.maximum(quota_R // CHANGING_SHARE, 1), left_R)
    likely_RE = usage_E >= least_R[:, None]
    absent_E = (usage_E >= least_R[home_E]) & ~holds_RE.any(0)
    room_R = np.minimum(most_R, quota_R - (holds_RE & likely_RE).sum(1))
    expected_R = np.minimum(np.bincount(home_E[absent_E], minlength=len(quota_R)), room_R)
    if found is None:
        assert not expected_R.any()
        return
    assert np.bincount(found.ranks, minlength=len(quota_R)).tolist() == expected_R.tolist()
    assert absent_E[found.experts].all() and (home_E[found.experts] == found.ranks).all()
    for rank in range(len(quota_R)):
        mine = found.experts[found.ranks == rank]
        left_out = np.setdiff1d(np.flatnonzero(absent_E & (home_E == rank)), mine)
        assert (np.diff(usage_E[mine]) <= 0).all()
        assert not len(left_out) or not len(mine) or usage_E[left_out].max() <= usage_E[mine].min()
        expected_E = holds_RE[rank] & ~found.evicted_RE[rank]
        expected_E[mine] = True
        assert (found.after_RE[rank] == expected_E).all()
    assert (found.after_RE.sum(1) <= quota_R).all()
    assert not (found.evicted_RE & (~holds_RE | likely_RE)).any()
    # Only where no empty slot is left is an expert evicted: the one with the lowest score.
    assert (found.evicted_RE.sum(1) == np.maximum(holds_RE.sum(1) + expected_R - quota_R, 0)).all()
    for rank in np.flatnonzero(found.evicted_RE.any(1)):
        stays = holds_RE[rank] & ~found.evicted_RE[rank] & ~likely_RE[rank]
        gone = found.evicted_RE[rank]
        assert not stays.any() or situation.score_E[gone].max() <= situation.score_E[stays].min()


def plan(
    prefetch_policy: PrefetchPolicy,
    wanted: list[int],
    budget: PrefetchBudget | None = None,
    *,
    quota: int = 8,
    busy: bool = False,
    told=255,
):
    """One rank with empty slots."""
    usage_RE = np.zeros((1, 16), np.int64)
    usage_RE[0, wanted] = told
    holds_RE, home_E = np.zeros((1, 16), bool), np.zeros(16, np.int64)
    return prefetch_policy.plan(usage_RE, holds_RE, np.array([quota]), home_E, lambda: home_E, np.array([busy]), budget, 10)


def used(*experts: int) -> np.ndarray:
    return np.isin(np.arange(16), experts)


@pytest.mark.parametrize("busy", [False, True])
def test_half_of_the_slots_at_most(busy: bool):
    for quota, expected in ((8, [1, 2, 3, 4]), (3, [1]), (1, [1])):
        found = plan(PrefetchPolicy(), [1, 2, 3, 4, 5], quota=quota, busy=busy)
        assert found is not None and found.experts.tolist() == expected


def test_a_busy_link_carries_likely_experts_an_idle_one_more():
    assert plan(PrefetchPolicy(), [1, 2], told=LIKELY - 1, busy=True) is None
    assert plan(PrefetchPolicy(), [1, 2], told=LIKELY, busy=True) is not None
    assert plan(PrefetchPolicy(), [1, 2], told=WORTH_A_TRY) is not None
    assert plan(PrefetchPolicy(), [1, 2], told=WORTH_A_TRY - 1) is None


def test_within_the_budget_which_demand_uses_up_first():
    budget = PrefetchBudget(1, 35)
    budget.renew()
    budget.spend(np.array([0, 0]), 10)
    found = plan(PrefetchPolicy(), [1, 2], budget)
    assert found is not None and found.experts.tolist() == [1]
    assert plan(PrefetchPolicy(), [1, 2], budget) is None
    budget.renew()
    assert plan(PrefetchPolicy(), [1, 2], budget) is not None


def test_useless_predictions_end_prefetching_useful_ones_resume():
    prefetch_policy = PrefetchPolicy()
    steps = 0
    while prefetch_policy.active:
        assert plan(prefetch_policy, [1, 2]) is not None
        prefetch_policy.judge(used(5))
        steps += 1
    assert steps <= 8, "a dozen promises that weren't kept are enough"
    assert sum(prefetch_policy.due(step) for step in range(10 * PROBE_EVERY)) == 10
    assert plan(prefetch_policy, [1, 2]) is None, "it only looks"
    for _ in range(64):
        plan(prefetch_policy, [1, 2])
        prefetch_policy.judge(used(1, 2))
    assert prefetch_policy.active and plan(prefetch_policy, [1, 2]) is not None


@pytest.mark.parametrize(("told", "right", "active"), [(255, 1, False), (255, 2, True), (120, 1, True), (120, 0, False)])
def test_half_of_what_was_promised_is_enough(told: int, right: int, active: bool):
    """Of four that were told of with certainty one isn't enough; of four at even odds it is."""
    prefetch_policy = PrefetchPolicy()
    for _ in range(64):
        plan(prefetch_policy, [1, 2, 3, 4], told=told)
        prefetch_policy.judge(used(*range(1, 1 + right)))
    assert prefetch_policy.active == prefetch_policy.due(1) == active


def test_what_is_held_is_no_prediction_that_could_fail():
    prefetch_policy = PrefetchPolicy()
    holds_RE, home_E = np.ones((1, 16), bool), np.zeros(16, np.int64)
    idle = np.zeros(1, bool)
    for _ in range(64):
        found = prefetch_policy.plan(np.full((1, 16), 255), holds_RE, np.array([16]), home_E, lambda: home_E, idle, None, 10)
        assert found is None
        prefetch_policy.judge(used())
    assert prefetch_policy.active
