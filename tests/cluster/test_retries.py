"""When something that failed is tried again, and what is said of it; on a clock that the test sets."""

from __future__ import annotations

from itertools import pairwise

from cluster.driver.retries import Pace, Retries


def fail_for(retries: Retries, seconds: float) -> list[tuple[float, bool]]:
    """When each attempt failed, and whether that was said; an attempt takes no time."""
    found, now = [], 0.0
    while now <= seconds:
        verdict = retries.failed(now)
        found.append((now, verdict.tell))
        if verdict.give_up:
            break
        now += verdict.wait_s
    return found


def test_attempts_come_later_and_later_and_never_end():
    found = fail_for(Retries(Pace(1.0, 30.0, 60.0)), 7 * 86400)
    times = [time for time, _ in found]
    assert times[:7] == [0, 1, 3, 7, 15, 31, 61]
    assert {later - earlier for earlier, later in pairwise(times[6:])} == {30}
    assert times[-1] > 7 * 86400 - 31


def test_trouble_is_said_at_once_and_then_once_a_minute():
    said = [time for time, told in fail_for(Retries(Pace(1.0, 7.0, 60.0)), 3600) if told]
    assert said[0] == 0
    gaps = [later - earlier for earlier, later in pairwise(said)]
    assert all(60 <= gap < 67 for gap in gaps)


def test_an_end_comes_when_it_was_asked_for():
    found = fail_for(Retries(Pace(1.0, 30.0), give_up_after_s=40.0), 3600)
    assert [time for time, _ in found] == [0, 1, 3, 7, 15, 31, 40]  # the last attempt is made at the very end


def test_a_success_begins_a_new_row():
    retries = Retries(Pace(1.0, 30.0), give_up_after_s=10.0)
    for now in range(0, 1000, 9):
        verdict = retries.failed(now)
        assert verdict.wait_s == 1.0
        assert verdict.tell
        assert not verdict.give_up
        retries.reset()
    assert retries.failures == 0
