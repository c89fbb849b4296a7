"""Stack distances, against a list that is moved by hand, and against the caches that they speak of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.planner.cache_policy import POLICIES
from epslots.planner.reuse_distance import count_distances, miss_ratio_curve, misses_by_slots, percentile, stack_distances
from epslots.simulation.cache_replay import replay, reuse_histogram


def histogram_of(ids_TK: np.ndarray, experts: int) -> np.ndarray:
    histogram_D, last_use_E = np.zeros(experts + 1, np.int64), np.zeros(experts, np.int64)
    for step, ids in enumerate(ids_TK, start=1):
        used_E = np.zeros(experts, bool)
        used_E[ids] = True
        count_distances(histogram_D, stack_distances(last_use_E, used_E))
        last_use_E[used_E] = step
    return histogram_D


@given(st.lists(st.sets(st.integers(0, 8), max_size=5), max_size=30))
def test_a_distance_is_the_place_in_the_stack(steps: list[set[int]]):
    stack: list[int] = []  # the latest use first
    last_use_E = np.zeros(9, np.int64)
    for step, used in enumerate(steps, start=1):
        expected = [stack.index(expert) if expert in stack else 9 for expert in sorted(used)]
        used_E = np.isin(np.arange(9), list(used))
        assert stack_distances(last_use_E, used_E).tolist() == expected
        last_use_E[used_E] = step
        for expert in sorted(used):
            stack = [expert] + [other for other in stack if other != expert]


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_what_an_lru_cache_misses(seed: int):
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(12, 0.4)) + 0.01
    ids = np.stack([generator.choice(12, 3, replace=False, p=weights / weights.sum()) for _ in range(200)]).astype(np.int16)
    misses = misses_by_slots(histogram_of(ids, 12))
    quota_CL = np.arange(3, 13)[:, None]  # fewer than a step uses run in passes, which LRU knows nothing of
    replayed = replay(ids[:, None], np.array([12]), quota_CL, POLICIES["lru"])
    assert replayed.misses_CL[:, 0].tolist() == misses[3:].tolist()


@pytest.mark.parametrize("policy", ["lfu", "lrfu"])
@pytest.mark.parametrize("seed", range(4))
def test_the_curve_by_scores_is_close_to_the_policys_misses(policy: str, seed: int):
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(24, 0.4)) + 0.01
    ids = np.stack([generator.choice(24, 3, replace=False, p=weights / weights.sum()) for _ in range(1500)])[:, None]
    quota_CL = np.arange(1, 25)[:, None]
    misses_C = replay(ids, np.array([24]), quota_CL, POLICIES[policy]).misses_CL[:, 0]
    histogram_D, by_recency_D = (reuse_histogram(ids, np.array([24]), POLICIES[name])[0] for name in (policy, "lru"))
    error_C, error_by_recency_C = (np.abs(misses_by_slots(h)[1:] - misses_C) / ids.size for h in (histogram_D, by_recency_D))
    assert error_C[3:].max() <= 0.03, "up to what a step uses it runs in passes"
    assert error_C.mean() < 0.5 * error_by_recency_C.mean()
    assert histogram_D[24] == misses_C[-1] == 24, "first uses miss, with any slots"


def test_what_the_last_step_used_stands_above_all():
    last_use_E, used_E = np.array([8, 3, 9, 0, 9]), np.array([True, True, True, True, False])
    score_E = np.array([50, 70, 10, 0, 20])
    assert stack_distances(last_use_E, used_E, score_E).tolist() == [3, 2, 1, 5]
    assert stack_distances(last_use_E, used_E).tolist() == [2, 3, 1, 5]


def test_a_cycle_hits_nothing_until_all_of_it_fits():
    curve = miss_ratio_curve(histogram_of(np.arange(400)[:, None] % 5, 8))
    assert curve[:5].tolist() == [1.0] * 5
    assert curve[5:].tolist() == [5 / 400] * 4


def test_rows_of_layers_with_fewer_experts():
    histogram_LD = np.zeros((2, 9), np.int64)
    count_distances(histogram_LD[1], np.array([4, 4, 0]))  # four experts: 4 = never used before
    count_distances(histogram_LD[1], np.array([], np.int64))
    assert histogram_LD.tolist() == [[0] * 9, [1, 0, 0, 0, 2, 0, 0, 0, 0]]


def test_percentiles():
    histogram_D = np.array([50, 30, 0, 15, 5])
    assert [percentile(histogram_D, share) for share in (0.0, 0.5, 0.51, 0.8, 0.9, 0.951, 1.0)] == [0, 0, 1, 1, 3, 4, 4]
    assert percentile(np.zeros(5, np.int64), 0.5) == 0
    assert miss_ratio_curve(np.zeros(5, np.int64)).tolist() == [0.0] * 5
