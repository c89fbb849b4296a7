"""Ctrl-C and SIGTERM as one exception, so that cluster and files are closed on the way out."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class JobStopped(BaseException):
    """A signal told the process to stop. No Exception, so that only the outermost caller handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code that shells give to a process ended by the signal."""
        return 128 + self.number


class StopSignals:
    """While entered, the first of the signals raises ``JobStopped`` in the main thread, and further ones do nothing.

    Entered in another thread than the main one, it changes nothing: Python lets only the main thread handle signals.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._ignoring = False

    def ignore(self) -> None:
        """Let further signals do nothing, so that they don't interrupt closing."""
        self._ignoring = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._ignoring:
            self._ignoring = True
            raise JobStopped(number)

    def take_back(self) -> None:
        """Replace handlers that were set since: Ray's calls ours, but prints a stack trace first."""
        for number in self._before:
            signal.signal(number, self._handle)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
