"""Ctrl-C and SIGTERM as one exception, so that whatever is open is closed on the way out, and closed undisturbed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class JobStopped(BaseException):
    """The process was told to stop. Not an Exception: nobody but the last caller handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells make of a process that a signal ended."""
        return 128 + self.number


class StopSignals:
    """While entered, the first of the signals raises ``JobStopped`` in the main thread, and further ones do nothing.

    In another thread than the main one nothing is changed: signals are handled elsewhere then.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._ignoring = False

    def ignore(self) -> None:
        """From now on they do nothing: what is being closed is not to be interrupted."""
        self._ignoring = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._ignoring:
            self._ignoring = True
            raise JobStopped(number)

    def take_back(self) -> None:
        """Handle the signals again, after something else has begun to: Ray's handler calls ours, and prints a stack trace."""
        for number in self._before:
            signal.signal(number, self._handle)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
