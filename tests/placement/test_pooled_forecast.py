"""One forecast of several groups: what one learns serves all, scaled to each; an idle one keeps none waiting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.placement.forecast import Forecast
from epslots.placement.pooled_forecast import PooledForecast

SHARES = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])


def window(random: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray, int]:
    tokens = random.multinomial(pairs, SHARES)
    return tokens, np.minimum(tokens, 20), 20


def test_one_groups_forecast_is_its_own():
    random, alone, pooled = np.random.default_rng(1), Forecast(), PooledForecast()
    for _ in range(5):
        one = window(random, 400)
        alone.add(*one)
        pooled.of(7).add(*one)
        found, wanted = pooled.of(7).expected(), alone.expected()
        assert (found.tokens_LE == wanted.tokens_LE).all() and (found.uses_LE == wanted.uses_LE).all()
        assert (found.steps, found.trust, found.windows) == (wanted.steps, wanted.trust, wanted.windows)


def test_windows_of_all_groups_say_more_than_one_groups():
    """The same number of windows: the pooled ones are of four times the traffic."""
    errors = {1: 0.0, 4: 0.0}
    for seed in range(20):
        for groups in errors:
            random, pooled = np.random.default_rng(seed), PooledForecast()
            for _ in range(4):
                for group in range(groups):
                    pooled.of(group).add(*window(random, 200))
            tokens = pooled.of(0).expected().tokens_LE
            errors[groups] += float(((tokens / tokens.sum(1, keepdims=True) - SHARES) ** 2).sum())
    assert errors[4] < errors[1] / 2


@settings(max_examples=15)
@given(st.lists(st.integers(100, 4000), min_size=2, max_size=5))
def test_each_group_expects_its_own_traffic(pairs: list[int]):
    random, pooled = np.random.default_rng(0), PooledForecast()
    for _ in range(6):
        for group, count in enumerate(pairs):
            pooled.of(group).add(*window(random, count))
    assert pooled.groups == len(pairs)
    for group, count in enumerate(pairs):
        found = pooled.of(group).expected()
        assert np.abs(found.tokens_LE.sum(1) - count).max() <= 4, "whole pairs"
        assert found.steps == 20


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_an_idle_group_keeps_no_window_waiting(order: list[int]):
    """In any order of the groups' windows: a group's last window is learned from with its next one, at the latest."""
    pooled, added = PooledForecast(), list[int]()
    pooled._forecast.add = lambda tokens, *_: added.append(int(tokens.sum()))  # type: ignore[method-assign]
    one = np.ones((1, 2), np.int64)
    for number, group in enumerate(order, 1):
        pooled.of(group).add(one, one, 1)
        assert sum(added) + 2 * len(pooled._open) == 2 * number, "each counts once"
        assert len(pooled._open) < len(set(order[:number])), "one of each of the other groups waits at most"


def test_nothing_is_expected_before_a_window():
    with pytest.raises(ConfigError, match="before the first window"):
        PooledForecast().of(0).expected()
