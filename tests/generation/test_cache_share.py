"""A level of slots goes to the cache or to the experts: by seconds of a window, with bounds and patience."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epslots.generation.cache_share import CALM_WINDOWS, CacheShare, ShareWindow, cache_gain_s
from epslots.models.cache_slots import CacheSlots

SIZES = CacheSlots(layers=(0, 1), cell_bytes=64, cells_per_slot=50, own_slots=2, most_levels=3)  # 99 + 100 a level
BUSY = ShareWindow(steps=30, seconds=3.0, fixed_s=0.09, running=8, waiting=4, lack=100, tokens=100, held=90)
QUIET = ShareWindow(steps=30, seconds=3.0, fixed_s=0.09, running=2, held=60, saved_s=0.5)


def test_a_level_is_worth_the_steps_that_it_makes_fuller():
    """One of the waiting requests fits: nine in a step instead of eight, so a ninth of 30 steps' fixed time.

    The first lacks less than the others need, which find nothing free.
    """
    assert cache_gain_s(BUSY, SIZES) == pytest.approx(30 * 0.09 / 9)
    assert cache_gain_s(replace(BUSY, lack=10, tokens=10), SIZES) == pytest.approx(30 * 0.09 * 4 / 12), (
        "no more than those that wait"
    )
    assert cache_gain_s(replace(BUSY, lack=400), SIZES) == pytest.approx(30 * 0.09 * 0.25 / 8.25), "a quarter of one"
    assert cache_gain_s(replace(BUSY, lack=1, tokens=50), SIZES) == pytest.approx(30 * 0.09 * 2.98 / 10.98)
    assert cache_gain_s(replace(BUSY, waiting=0), SIZES) == cache_gain_s(replace(BUSY, waiting=0, running=0), SIZES) == 0


def test_the_cache_grows_only_for_more_than_experts_lose():
    share = CacheShare(SIZES)
    assert share.change(BUSY, 0) == 1
    assert share.change(replace(BUSY, lost_s=0.2), 0) == 1
    assert share.change(replace(BUSY, lost_s=0.29), 0) == 0, "by a margin"
    assert share.change(BUSY, 3) == 0, "there is no further level"


def test_without_a_sample_experts_cede_to_lasting_waits_alone():
    """Captured steps and layers with all experts sample no use: what a level is worth there isn't known."""
    share, blind = CacheShare(SIZES), replace(BUSY, sampled=False)
    assert share.change(blind, 0) == 1
    assert share.change(replace(blind, waiting=0.5), 0) == 0 < share.change(replace(BUSY, waiting=0.5), 0)
    assert {share.change(replace(QUIET, sampled=False), 1) for _ in range(2 * CALM_WINDOWS)} == {0}


def test_experts_get_a_level_back_after_calm_windows():
    share = CacheShare(SIZES)
    found = [share.change(QUIET, 1) for _ in range(CALM_WINDOWS + 1)]
    assert found[: CALM_WINDOWS - 1] == [0] * (CALM_WINDOWS - 1) and found[CALM_WINDOWS - 1] == -1
    assert [share.change(window, 1) for window in (BUSY, *[QUIET] * (CALM_WINDOWS - 1))] == [1] + [0] * (CALM_WINDOWS - 1)
    assert share.change(QUIET, 1) == -1
    assert CacheShare(SIZES).change(QUIET, 0) == 0, "there is none to give back"


@pytest.mark.parametrize(
    "window",
    [
        replace(QUIET, held=100),
        replace(QUIET, waiting=0.1, lost_s=9.0),
        replace(QUIET, saved_s=0.004),
        replace(QUIET, kept=78, reused_s=1.0),
    ],
    ids=["requests hold it", "some wait", "experts hardly gain", "beginnings are reused"],
)
def test_a_level_that_the_cache_needs_stays(window: ShareWindow):
    share = CacheShare(SIZES)
    assert {share.change(window, 1) for _ in range(3 * CALM_WINDOWS)} == {0}


def test_kept_beginnings_count_by_the_part_that_goes():
    """39 cells are left for 40 kept ones, of which one goes: a fortieth of what they saved."""
    share = CacheShare(SIZES)
    window = replace(QUIET, kept=40, reused_s=1.0)
    assert [share.change(window, 1) for _ in range(CALM_WINDOWS)][-1] == -1
