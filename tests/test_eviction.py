"""Eviction policies are pure functions of past uses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.eviction import POLICIES, USE, UseHistory, record_use, resolve_policy


def after(steps: list[set[int]], experts: int = 4) -> UseHistory:
    history = UseHistory.empty(1, experts).layer(0, experts)
    for number, used in enumerate(steps, start=1):
        record_use(history, np.array([e in used for e in range(experts)]), number)
    return history


def order(policy: str, steps: list[set[int]]) -> list[int]:
    """Experts as the policy would evict them."""
    return np.argsort(POLICIES[policy](after(steps)), kind="stable").tolist()


def test_lru_gives_up_the_longest_unused():
    assert order("lru", [{0, 1}, {2}, {0}, {3}]) == [1, 2, 0, 3]


def test_lfu_keeps_the_often_used_over_the_recently_used():
    assert order("lfu", [{0}, {0}, {0}, {1}, {2}]) == [3, 1, 2, 0]


def test_lfu_forgets():
    steps = [{0}] * 20 + [{1}] * 400
    assert order("lfu", steps)[-1] == 1
    assert after([{0}] + [set()] * 3000).frequent[0] < USE // 100


def test_lrfu_lets_a_burst_overtake_an_old_frequency_before_lfu_does():
    steps = [{0}] * 30 + [set()] * 40 + [{1}] * 10
    assert order("lfu", steps)[-1] == 0
    assert order("lrfu", steps)[-1] == 1


@given(st.lists(st.sets(st.integers(0, 3)), max_size=40))
def test_histories_are_integers_that_stay_bounded(steps):
    history = after(steps)
    assert (history.recent >= 0).all() and (history.recent <= USE << 4).all()
    assert (history.frequent >= 0).all() and (history.frequent <= USE << 8).all()
    for policy in POLICIES.values():
        scores = policy(history)
        assert scores.dtype == np.int64
        assert (scores >= 0).all()


def test_a_policy_is_a_name_or_a_function():
    assert resolve_policy("lru") is POLICIES["lru"]
    mine = POLICIES["lfu"]
    assert resolve_policy(mine) is mine
    with pytest.raises(ConfigError, match="policy='fifo': allowed: lru, lfu, lrfu"):
        resolve_policy("fifo")
