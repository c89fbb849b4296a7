"""The generator of traffic that changes."""

from __future__ import annotations

import numpy as np
import pytest

from epslots.errors import ConfigError
from epslots.simulation.traffic import KINDS, SyntheticTraffic, generate

SMALL = {"layers": 2, "experts": 16, "top_k": 2, "windows": 24, "prompts": 60, "tokens": 50, "pace": 6}


def shares(loads: np.ndarray) -> np.ndarray:
    return loads / loads.sum(2, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_has_all_pairs_and_a_seed_gives_the_same(kind: str):
    traffic = SyntheticTraffic(kind=kind, **SMALL)
    loads = generate(traffic, 3)
    assert loads.shape == (24, 2, 16) and loads.dtype == np.int64 and loads.min() >= 0
    assert (loads.sum(2) == 60 * 50 * 2).all()
    assert np.array_equal(loads, generate(traffic, 3)) and not np.array_equal(loads, generate(traffic, 4))


def test_switches_happen_at_their_pace_and_stillness_is_still():
    def steps(kind: str) -> np.ndarray:
        loads = shares(generate(SyntheticTraffic(kind=kind, whim=0.1, topics=8, **SMALL), 1))
        return np.abs(np.diff(loads, axis=0)).sum((1, 2))

    switching = steps("switch")
    at_switch = np.arange(1, 24) % 6 == 0
    assert switching[at_switch].mean() > 2 * switching[~at_switch].mean()
    assert steps("still").max() < switching[at_switch].mean()


def test_drift_leads_away_for_good():
    loads = shares(generate(SyntheticTraffic(kind="drift", whim=0.1, **SMALL), 2))
    near, far = np.abs(loads[1:] - loads[:-1]).sum((1, 2)).mean(), np.abs(loads[12:] - loads[:-12]).sum((1, 2)).mean()
    assert far > 1.3 * near


def test_flash_crowds_come_and_go():
    def apart(kind: str) -> np.ndarray:
        loads = shares(generate(SyntheticTraffic(kind=kind, **SMALL), 0))
        return np.abs(loads - loads.mean(0)).sum((1, 2))

    crowded = apart("flash") > 2 * apart("still").mean()
    assert crowded.any() and not crowded.all()
    runs = "".join("1" if window else " " for window in crowded).split()
    assert len(runs) >= 2


@pytest.mark.parametrize(("name", "value"), [("kind", "chaos"), ("prompts", 0), ("top_k", 17)])
def test_bad_settings_are_named(name: str, value: object):
    with pytest.raises(ConfigError, match=name):
        SyntheticTraffic(**(SMALL | {name: value}))  # type: ignore[arg-type]
