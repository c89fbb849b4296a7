"""Speeds of ranks, learned from their windows, at any share of the work; and placements that follow from them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.load_window import LoadWindow
from epslots.placement.balance import holders, rank_loads
from epslots.placement.forecast import ExpectedLoad
from epslots.placement.placement import default_placement
from epslots.placement.planner import RankHardware, propose
from epslots.placement.rank_speeds import USUAL, RankSpeeds, busy_calls, work_ns
from epslots.planner.cost_model import Costs
from tests.support.controller_helpers import COSTS, LAYERS, window

MS = 1e6
FAST = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])


def learn(speeds: RankSpeeds, work_ns_R: Any, taken_ns_R: Any, calls: int = 1, busy: Any = 1.0) -> bool:
    """Learn from a window in which such a share of the calls had work."""
    return speeds.learn(work_ns_R, taken_ns_R, calls, np.rint(busy * np.full(len(work_ns_R), calls)).astype(np.int64))


@given(st.lists(st.tuples(FAST, st.floats(10, 1000)), min_size=1, max_size=9))
def test_speeds_are_the_ranks_own_whatever_their_work(ranks: list[tuple[float, float]]):
    """A rank with ten times the work takes ten times as long, and is no slower."""
    true_R, work_R = (np.array(values) for values in zip(*ranks, strict=True))
    speeds = RankSpeeds(len(ranks))
    for _ in range(60):
        learn(speeds, work_R * MS, work_R * MS / true_R)
    found_R, usual = speeds.speed_R / USUAL, np.median(true_R)
    assert np.abs(found_R / (true_R / usual) - 1).max() <= 0.26, "but for changes that are taken for noise"


@given(st.lists(st.floats(0.9, 1.11), min_size=8, max_size=40), st.integers(0, 3))
def test_noise_changes_no_speed(noise: list[float], rank: int):
    speeds = RankSpeeds(4)
    for factor in noise:
        taken_R = np.full(4, 30 * MS)
        taken_R[rank] *= factor
        assert not learn(speeds, np.full(4, 30 * MS), taken_R)
    assert (speeds.speed_R == USUAL).all()


def test_a_rank_without_times_is_a_usual_one():
    """As all are on GPUs, whose times the host doesn't know; or one that had nothing to compute."""
    speeds = RankSpeeds(3)
    assert not learn(speeds, np.full(3, MS * 1000), np.zeros(3))
    assert learn(speeds, np.array([500, 100, 0]) * MS, np.array([500, 400, 0]) * MS)
    assert speeds.speed_R[2] == USUAL and speeds.speed_R[0] / speeds.speed_R[1] == pytest.approx(4, 0.01)


def test_a_rank_that_recovers_is_found_out():
    speeds, work_R = RankSpeeds(2), np.full(2, 100 * MS)
    learn(speeds, work_R, np.array([100, 300]) * MS)
    assert speeds.speed_R[0] == 3 * speeds.speed_R[1]
    for _ in range(40):
        learn(speeds, work_R, work_R)
    assert speeds.speed_R.max() <= 1.25 * 1.25 * speeds.speed_R.min()


def test_work_is_that_of_the_rank_that_computes():
    one = msgspec.msgpack.decode(window((8,) * 6), type=LoadWindow)
    moved = msgspec.structs.replace(one, pairs_sent=(7,) * LAYERS, pairs_received=(9,) * LAYERS)
    uses = LAYERS * 6 * COSTS.expert_compute
    assert work_ns(one, COSTS) == LAYERS * 48 * COSTS.pair_compute + uses
    assert work_ns(moved, COSTS) == LAYERS * 50 * COSTS.pair_compute + uses
    assert busy_calls(one) == LAYERS * 6, "at most as many as uses"
    assert busy_calls(msgspec.structs.replace(one, hits=(70,) * LAYERS)) == LAYERS * one.steps, "and as calls"


FIXED_NS = 30_000.0
"""Of a call with work, little or much."""
IDLE_NS = FIXED_NS / 10
"""Of a call without."""


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.booleans(), min_size=2, max_size=6),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.booleans(),
)
def test_nearly_idle_ranks_are_usual_ones(seed: int, busy: list[bool], most: float, rarely: bool):
    """Their calls take time all the same: with no work, with hardly any, and with as much as the calls take themselves.

    Some ``rarely`` have work, and calls without any return at once. What is taken for a change is at least a quarter: busy
    ranks whose times differ by a tenth are usual ones, too.
    """
    random, speeds, calls, ranks = np.random.default_rng(seed), RankSpeeds(len(busy)), 2400, len(busy)
    for _ in range(40):
        much_R, little_R = random.uniform(0.3, 1, ranks) * 2000 * MS, random.uniform(0, most, ranks) * calls * FIXED_NS
        share_R = np.where(busy, 1.0, random.choice([0, 0.01, 0.1, 0.5, 1] if rarely else [0, 1], ranks))
        work_R = np.where(busy, much_R, share_R * little_R)
        taken_R = work_R + calls * (share_R * FIXED_NS + (1 - share_R) * IDLE_NS)
        assert not learn(speeds, work_R, taken_R * random.uniform(0.95, 1.05, ranks), calls, share_R)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), FAST, st.floats(0.001, 1), st.floats(0, FIXED_NS))
def test_a_speed_is_known_as_far_as_there_was_work(seed: int, true: float, share: float, fixed_ns: float):
    """One rank of four is faster or slower, and gets less work: it is never taken for more than it is."""
    random, speeds, calls = np.random.default_rng(seed), RankSpeeds(4), 2400
    share_R, true_R = np.array([1, 1, 1, share]), np.array([1, 1, 1, true])
    for _ in range(60):
        work_R = random.uniform(0.5, 1, 4) * share_R * 5000 * MS
        learn(speeds, work_R, (work_R + calls * fixed_ns) / true_R, calls)
    found = speeds.speed_R[3] / np.median(speeds.speed_R[:3])
    assert min(1, true) / 1.3 <= found <= max(1, true) * 1.3
    if share >= 0.4:
        assert true / 1.6 <= found <= true * 1.6 and (found - 1) * (true - 1) >= 0


def test_short_calls_tell_the_fixed_part_for_a_while():
    """After a window of nearly idle ranks, a speed is known from less work: half of the time isn't taken for that of calls.

    Where no such window follows, that is forgotten, since it may have been another one's: the half fast rank is a usual one.
    """
    calls, true_R = 2400, np.array([1, 1, 0.5])
    work_R = np.array([2000, 2000, 200]) * 1000.0 * calls
    speeds = RankSpeeds(3)
    for nearly_idle in (False, True):
        for _ in range(20):
            learn(speeds, work_R, (work_R + calls * FIXED_NS) / true_R, calls)
        found = speeds.speed_R[2] / USUAL
        assert 0.5 <= found < 0.65 if nearly_idle else found > 0.75
        learn(speeds, np.full(3, 1.0), np.full(3, calls * FIXED_NS) / true_R, calls)
    before = speeds._shortest_ns
    learn(speeds, np.zeros(3), np.full(3, calls * IDLE_NS), calls, 0)
    assert speeds._shortest_ns == before, "calls without work tell nothing"
    for _ in range(200):
        learn(speeds, work_R, (work_R + calls * FIXED_NS) / true_R, calls)
    assert speeds._shortest_ns > 5 * before


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([2.0, 3.0]))
def test_a_rank_twice_as_slow_gets_half_the_load(seed: int, slow: int, times: float):
    """Planned by the speeds that its windows tell."""
    layers, experts, ranks, slots = 2, 24, 4, 12
    tokens = np.random.default_rng(seed).integers(50, 150, (layers, experts)) * 10**6
    expected = ExpectedLoad(tokens, np.minimum(tokens, 100), 100, 1.0, 8.0)
    placement = default_placement([experts] * layers, np.full((layers, ranks), slots))
    speeds, factor_R = RankSpeeds(ranks), np.ones(ranks)
    factor_R[slow] = times
    for _ in range(3):
        load_R = rank_loads(holders(placement), tokens).sum(0)
        learn(speeds, load_R, load_R * factor_R)
        hardware = RankHardware(np.zeros(ranks, np.int64), speeds.speed_R, Costs(1, 1, 1, 1000, 1, 1, 1))
        placement = propose(placement, expected, hardware).placement
    load_R = rank_loads(holders(placement), tokens).sum(0)
    usual = np.delete(load_R, slow).mean()
    assert abs(load_R[slow] * times / usual - 1) < 0.12
