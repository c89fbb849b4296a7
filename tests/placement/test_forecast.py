"""Forecasts of the coming window: level-headed about noise, quick after a change, and never forgetful of a topic."""

from __future__ import annotations

import numpy as np
import pytest

from epslots.errors import ConfigError
from epslots.placement.forecast import ExpectedLoad, Forecast

LAYERS, EXPERTS, PAIRS = 4, 32, 3000


def topic(seed: int) -> np.ndarray:
    chances = np.exp(np.random.default_rng(seed).standard_normal((LAYERS, EXPERTS)))
    return chances / chances.sum(1, keepdims=True)


def after(*topics: int, pairs: int = PAIRS, seed: int = 0) -> ExpectedLoad:
    """The load that is expected after windows of these topics."""
    random, forecast = np.random.default_rng(seed), Forecast()
    for number in topics:
        window = random.multinomial(pairs, topic(number))
        forecast.add(window, np.minimum(window, 50), 50)
    return forecast.expected()


def error(expected: ExpectedLoad, number: int) -> float:
    shares = expected.tokens_LE / expected.tokens_LE.sum(1, keepdims=True)
    return float(((shares - topic(number)) ** 2).sum())


def test_noise_is_averaged_out():
    once, often = after(1, pairs=300), after(*[1] * 16, pairs=300)
    assert error(often, 1) < error(once, 1) / 8  # a mean of all has a sixteenth of the variance
    assert often.windows > 8 and once.windows <= 1


def test_a_switch_is_seen_in_the_window_after_it():
    before, first, second = after(*[1] * 12), after(*[1] * 12, 2), after(*[1] * 12, 2, 2)
    assert error(first, 2) < 0.5 * error(before, 2)
    assert error(second, 2) < 0.02 * error(before, 2)


def test_a_topic_that_returns_is_known_at_once():
    """After one window of it, the forecast is better than that window alone: earlier windows of the topic are used."""
    topics = ([1] * 10 + [2] * 10) * 2
    errors = [error(after(*topics, 1, pairs=300, seed=seed), 1) for seed in range(8)]
    alone = [error(after(1, pairs=300, seed=seed), 1) for seed in range(8)]
    assert np.mean(errors) < 0.6 * np.mean(alone)


def test_slow_drift_is_followed():
    random, forecast = np.random.default_rng(0), Forecast()
    for number in range(30):
        mixed = topic(1) * (1 - number / 30) + topic(2) * number / 30
        forecast.add(random.multinomial(PAIRS, mixed), np.ones((LAYERS, EXPERTS)), 10)
    last = topic(1) / 30 + topic(2) * 29 / 30
    found = forecast.expected()
    shares = found.tokens_LE / found.tokens_LE.sum(1, keepdims=True)
    static = (topic(1) + topic(2)) / 2
    assert ((shares - last) ** 2).sum() < 0.15 * ((static - last) ** 2).sum()


def test_trust_tells_signal_from_noise():
    signal, noise = after(*[1] * 10), Forecast()
    random = np.random.default_rng(0)
    for _ in range(10):
        chances = random.dirichlet(np.ones(EXPERTS), LAYERS)
        noise.add(random.multinomial(PAIRS, chances), np.ones((LAYERS, EXPERTS)), 10)
    assert signal.trust > 0.9 and noise.expected().trust < 0.2
    assert noise.expected().trust >= 0 and signal.trust <= 1


def test_the_sample_is_one_of_shares_and_the_mean_is_its():
    found = after(1, 1, 2, 1)
    assert found.sample_KLE is not None and found.weight_K is not None
    assert found.sample_KLE.sum(2) == pytest.approx(np.ones((4, LAYERS)))
    assert found.weight_K.sum() == pytest.approx(1) and found.weight_K.min() >= 0
    mean = np.tensordot(found.weight_K, found.sample_KLE, 1) * PAIRS
    assert np.abs(found.tokens_LE - mean).max() <= 0.5
    assert found.steps == 50 and found.uses_LE.max() <= 50


def test_memory_is_bounded_and_idle_windows_are_harmless(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("epslots.placement.forecast.MOST_WINDOWS", 3)
    forecast = Forecast()
    for _ in range(5):
        forecast.add(np.ones((2, 4), np.int64), np.ones((2, 4), np.int64), 1)
    assert forecast.windows == 3
    forecast.add(np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64), 0)
    found = forecast.expected()
    assert found.sample_KLE is not None and np.isfinite(found.sample_KLE).all() and len(found.sample_KLE) == 3


def test_what_is_no_window_is_refused():
    forecast, ones = Forecast(), np.ones((2, 4))
    with pytest.raises(ConfigError, match="before the first window"):
        forecast.expected()
    for tokens, uses, steps in ((ones * np.nan, ones, 1), (-ones, ones, 1), (ones, -ones, 1), (ones, ones, -1)):
        with pytest.raises(ConfigError, match="finite and at least 0"):
            forecast.add(tokens, uses, steps)
    forecast.add(ones, ones, 1)
    for tokens, uses in ((np.ones((2, 5)), np.ones((2, 5))), (ones, np.ones((2, 3))), (np.ones(4), np.ones(4))):
        with pytest.raises(ConfigError, match=r"allowed: both \[2, 4\]"):
            forecast.add(tokens, uses, 1)
