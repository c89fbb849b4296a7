"""When a capture that ran out of memory is tried again."""

from __future__ import annotations

from itertools import count

from epslots.generation.capture_pause import FIRST_PAUSE, CapturePause


def steps_until_it_passes(pause: CapturePause) -> int:
    return next(number for number in count() if pause.passes())


def test_pauses_double_up_to_the_longest():
    pause, found = CapturePause(), []
    assert pause.passes() and pause.reason is None
    for _ in range(8):
        pause.begin()
        assert pause.reason is not None
        found.append(steps_until_it_passes(pause))
        assert pause.reason is None
    assert found == [64, 128, 256, 512, 1024, 2048, 4096, 4096] and pause.failures == 8


def test_free_memory_ends_a_pause_and_a_capture_its_growth():
    pause = CapturePause()
    pause.begin()
    pause.end()
    assert pause.reason is None and pause.passes()
    pause.begin()
    assert steps_until_it_passes(pause) == 2 * FIRST_PAUSE
    pause.reset()
    pause.begin()
    assert steps_until_it_passes(pause) == FIRST_PAUSE
