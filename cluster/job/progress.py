"""How far a job is, on standard error: a bar in a terminal, and a line from time to time in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from epslots.streams import is_terminal, say

MOST_WARNINGS = 10
LOG_EVERY_S = 10.0
_LOG_PARTS = 10


@dataclass
class Counts:
    """What a job has done: in this run, and before it."""

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
    """Says how a job goes.

    Args:
        counts: kept by the job.
        stream: where to; a bar is drawn if it is a terminal.
        clock: seconds.
    """

    def __init__(self, counts: Counts, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts = counts
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began_s = self._told_s = clock()
        self._told_part = 0
        self._warnings = 0
        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        drawn = is_terminal(self._stream)
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=self._stream), disable=not drawn)
        self._task = self._bar.add_task("", total=counts.total, completed=counts.done)

    def start(self) -> None:
        """The cluster serves: time counts from here."""
        self._began_s = self._told_s = self._clock()
        self._told_part = self._part()
        self._bar.start()
        if self._bar.disable:
            self.say(self._state())

    def warn(self, text: str) -> None:
        """Say what is wrong with a prompt; the first few of them."""
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            self.say(f"warning: {text}")
        elif self._warnings == MOST_WARNINGS + 1:
            self.say("warning: there are more prompts with errors; the output has them all")

    def advance(self) -> None:
        """Another prompt is done."""
        now = self._clock()
        self._bar.update(self._task, completed=self._counts.done, description=self._rate())
        if self._bar.disable and (now - self._told_s >= LOG_EVERY_S or self._part() > self._told_part):
            self._told_s, self._told_part = now, self._part()
            self.say(self._state())

    def finish(self, how: str) -> None:
        """The last word."""
        self._bar.stop()
        counts = self._counts
        parts = [f"{counts.done:,} of {counts.total:,} prompts done"]
        if counts.before:
            parts.append(f"{counts.before:,} of them in earlier runs")
        parts += [f"{counts.all_errors:,} with errors", f"{counts.tokens:,} new tokens", self._rate()]
        self.say(f"{how}: {', '.join(parts)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar.disable:
            say(text, self._stream)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _part(self) -> int:
        return self._counts.done * _LOG_PARTS // max(1, self._counts.total)

    def _rate(self) -> str:
        seconds = self._clock() - self._began_s
        return f"{self._counts.tokens / seconds if seconds > 0 else 0:,.1f} tokens/s"

    def _state(self) -> str:
        return f"{self._counts.done:,}/{self._counts.total:,} prompts, {self._counts.all_errors:,} errors, {self._rate()}"
