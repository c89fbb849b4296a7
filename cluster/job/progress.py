"""The progress of a job on standard error: its numbers, its warnings and its last line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from epslots.progress import LoggedProgress

MOST_WARNINGS = 10


@dataclass
class Counts:
    """The lines that a job has done: in this run, and before it."""

    total: int
    before: int
    errors_before: int
    served: int = 0
    errors: int = 0
    tokens: int = 0

    @property
    def done(self) -> int:
        return self.before + self.served

    @property
    def all_errors(self) -> int:
        return self.errors_before + self.errors


class JobProgress:
    """Shows how far a job is.

    Args:
        counts: kept by the job.
        stream: standard error by default; a bar is drawn if it is a terminal.
        clock: seconds.
    """

    def __init__(self, counts: Counts, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts = counts
        self._clock = clock
        self._began_s = clock()
        self._warnings = 0
        self._progress = LoggedProgress("prompts", counts.total, done=counts.done, stream=stream, clock=clock)
        self.say = self._progress.say

    def start(self) -> None:
        """The cluster serves: time counts from here."""
        self._began_s = self._clock()
        self._progress.start(self._counts.done, self._state())

    def warn(self, text: str) -> None:
        """Print a prompt's problem; the first few of them."""
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            self.say(f"warning: {text}")
        elif self._warnings == MOST_WARNINGS + 1:
            self.say("warning: there are more prompts with errors; the output has them all")

    def advance(self) -> None:
        """Another prompt is done."""
        self._progress.update(self._counts.done, self._rate(), self._state)

    def finish(self, how: str) -> None:
        """Print the last line."""
        self._progress.stop()
        counts = self._counts
        parts = [f"{counts.done:,} of {counts.total:,} prompts done"]
        if counts.before:
            parts.append(f"{counts.before:,} of them in earlier runs")
        parts += [f"{counts.all_errors:,} with errors", f"{counts.tokens:,} new tokens", self._rate()]
        self.say(f"{how}: {', '.join(parts)}")

    def _rate(self) -> str:
        seconds = self._clock() - self._began_s
        return f"{self._counts.tokens / seconds if seconds > 0 else 0:,.1f} tokens/s"

    def _state(self) -> str:
        return f"{self._counts.done:,}/{self._counts.total:,} prompts, {self._counts.all_errors:,} errors, {self._rate()}"
