"""Time for tests of the supervisor: no deadline passes because the machine is busy, and one that must pass does so at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from functools import partial

import pytest

from cluster.driver.workers import Deadlines
from tests.support.rank_helpers import PATIENCE_S

_PAUSE_S = 1e-3  # for messages of other threads, before time is skipped
_LEAST_SKIP_S = 1.0  # tests that poll would otherwise take as many turns as the deadline has polls


class ClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time can be skipped; otherwise it is the system's."""

    def __init__(self) -> None:
        self._skipped_s = 0.0
        self._skips: list[tuple[Callable[[], bool], Callable[[], bool]]] = []
        super().__init__(_SkippingSelector(self))

    def time(self) -> float:
        return super().time() + self._skipped_s

    def skip_until(self, over: Callable[[], bool], *, settled: Callable[[], bool] = lambda: True) -> None:
        """From any thread: skip the time in which the loop has nothing to do.

        Args:
            over: whether the skipping ends, asked in the loop's thread.
            settled: whether time may be skipped now: no answer is under way that has to come in time.
        """
        self.call_soon_threadsafe(self._skips.append, (over, settled))

    def skips(self) -> bool:
        """Whether time is to be skipped."""
        self._skips = [skip for skip in self._skips if not skip[0]()]
        return bool(self._skips)

    def settled(self) -> bool:
        """Whether time may be skipped now."""
        return all(settled() for _, settled in self._skips)

    def skip(self, seconds: float) -> None:
        """Skip time."""
        self._skipped_s += max(seconds, _LEAST_SKIP_S)


class _SkippingSelector(selectors.DefaultSelector):
    """Has the loop go on to its next timer instead of waiting for that."""

    def __init__(self, loop: ClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not timeout or not self._loop.skips():
            return super().select(timeout)
        settled = self._loop.settled()  # before the pause: an answer that comes at its end is taken first
        found = super().select(_PAUSE_S)
        if settled and not found:
            self._loop.skip(timeout)
        return found


def use_clock_loops(patch: pytest.MonkeyPatch) -> None:
    """Have supervisors run on a ``ClockLoop``. Deadlines are far off: a test that needs one skips the time until then."""
    patient = partial(Deadlines, health_check_s=PATIENCE_S, form_s=PATIENCE_S, stop_s=PATIENCE_S)
    patch.setattr("cluster.api.Deadlines", patient)
    patch.setattr("cluster.driver.loop_thread.new_event_loop", ClockLoop)


@pytest.fixture
def clock_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``use_clock_loops``, for one test."""
    use_clock_loops(monkeypatch)
