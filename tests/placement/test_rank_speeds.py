"""Speeds of ranks, learned from their windows: whatever their share of the work; and placements that follow them."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.load_window import LoadWindow
from epslots.placement.balance import holders, rank_loads
from epslots.placement.forecast import ExpectedLoad
from epslots.placement.placement import default_placement
from epslots.placement.planner import RankHardware, propose
from epslots.placement.rank_speeds import USUAL, RankSpeeds, work_ns
from epslots.planner.cost_model import Costs
from tests.support.controller_helpers import COSTS, LAYERS, window

MS = 1e6
FAST = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])


@given(st.lists(st.tuples(FAST, st.floats(10, 1000)), min_size=1, max_size=9))
def test_speeds_are_the_ranks_own_whatever_their_work(ranks: list[tuple[float, float]]):
    """A rank with ten times the work takes ten times as long, and is no slower."""
    true_R, work_R = (np.array(values) for values in zip(*ranks, strict=True))
    speeds = RankSpeeds(len(ranks))
    for _ in range(60):
        speeds.learn(work_R * MS, work_R * MS / true_R)
    found_R, usual = speeds.speed_R / USUAL, np.median(true_R)
    assert np.abs(found_R / (true_R / usual) - 1).max() <= 0.26, "but for changes that are taken for noise"


@given(st.lists(st.floats(0.9, 1.11), min_size=8, max_size=40), st.integers(0, 3))
def test_noise_changes_no_speed(noise: list[float], rank: int):
    speeds = RankSpeeds(4)
    for factor in noise:
        taken_R = np.full(4, 30 * MS)
        taken_R[rank] *= factor
        assert not speeds.learn(np.full(4, 30 * MS), taken_R)
    assert (speeds.speed_R == USUAL).all()


def test_a_rank_without_times_is_a_usual_one():
    """As all are on GPUs, whose times the host doesn't know; or one that had nothing to compute."""
    speeds = RankSpeeds(3)
    assert not speeds.learn(np.full(3, MS * 1000), np.zeros(3))
    assert speeds.learn(np.array([500, 100, 0]) * MS, np.array([500, 400, 0]) * MS)
    assert speeds.speed_R[2] == USUAL and speeds.speed_R[1] * 4 == speeds.speed_R[0]


def test_a_rank_that_recovers_is_found_out():
    speeds, work_R = RankSpeeds(2), np.full(2, 100 * MS)
    speeds.learn(work_R, np.array([100, 300]) * MS)
    assert speeds.speed_R[0] == 3 * speeds.speed_R[1]
    for _ in range(40):
        speeds.learn(work_R, work_R)
    assert speeds.speed_R.max() <= 1.25 * 1.25 * speeds.speed_R.min()


def test_work_is_that_of_the_rank_that_computes():
    one = msgspec.msgpack.decode(window((8,) * 6), type=LoadWindow)
    moved = msgspec.structs.replace(one, pairs_sent=(7,) * LAYERS, pairs_received=(9,) * LAYERS)
    uses = LAYERS * 6 * COSTS.expert_compute
    assert work_ns(one, COSTS) == LAYERS * 48 * COSTS.pair_compute + uses
    assert work_ns(moved, COSTS) == LAYERS * 50 * COSTS.pair_compute + uses


def test_an_idle_ranks_calls_do_not_make_it_slow():
    speeds = RankSpeeds(2)
    speeds.learn(np.array([500, 500]) * MS, np.array([500, 500]) * MS)
    for _ in range(40):
        assert not speeds.learn(np.array([500, 0]) * MS, np.array([500, 30]) * MS)


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
        speeds.learn(load_R, load_R * factor_R)
        hardware = RankHardware(np.zeros(ranks, np.int64), speeds.speed_R, Costs(1, 1, 1, 1000, 1, 1, 1))
        placement = propose(placement, expected, hardware).placement
    load_R = rank_loads(holders(placement), tokens).sum(0)
    usual = np.delete(load_R, slow).mean()
    assert abs(load_R[slow] * times / usual - 1) < 0.12
