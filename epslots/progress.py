"""Progress on standard error: bars in a terminal, drawn by rich. The only module that draws any.

ProgressDisplay   a bar per piece of work, in bytes: loading, stores; or calls a listener instead, on a cluster's rank
StartDisplay      one bar for all ranks of a cluster that starts: the driver shows what its ranks' listeners send
counting          a bar per piece of work, in numbers: steps, texts
LoggedProgress    a bar in a terminal, and in a log a line from time to time: jobs
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from epslots.streams import is_terminal, say
from epslots.units import format_bytes

LOG_EVERY_S = 10.0
_LOG_PARTS = 10

Advance = Callable[[int], object]
"""Called with the bytes or number done since its last call."""

ProgressListener = Callable[[str, int, int], None]
"""Takes a piece of work's title, bytes done and bytes in all; called at its start and after every part."""


def _bar(
    *columns: str | ProgressColumn, shown: bool | None = None, stream: TextIO | None = None, transient: bool = False
) -> Progress:
    """A rich display on a stream, standard error by default; ``shown=None`` draws it if that is a terminal."""
    stream = sys.stderr if stream is None else stream
    shown = is_terminal(stream) if shown is None else shown
    return Progress(*columns, console=Console(file=stream), disable=not shown, transient=transient)


@contextlib.contextmanager
def counting(title: str, total: int, shown: bool | None = None) -> Iterator[Advance]:
    """A bar for one piece of work that is counted; yields its ``Advance``.

    Args:
        shown: whether it is drawn; None draws it when standard error is a terminal.
    """
    with _bar("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), shown=shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


class ProgressDisplay:
    """Opens bars that count bytes.

    Args:
        shown: whether they are drawn; None draws them when standard error is a terminal.
        listener: called instead of drawing anything: for ranks whose progress is shown by a driver.
    """

    def __init__(self, shown: bool | None = None, listener: ProgressListener | None = None) -> None:
        self.shown = listener is None and (is_terminal(sys.stderr) if shown is None else shown)
        self._listener = listener

    @contextlib.contextmanager
    def __call__(self, title: str, total_bytes: int) -> Iterator[Advance]:
        """A bar for one piece of work; yields its ``Advance``, which takes bytes."""
        if self._listener is not None:
            yield _ListenedProgress(title, total_bytes, self._listener)
            return
        columns = "{task.description}", BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn()
        with _bar(*columns, shown=self.shown) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda done: bar.advance(task, done)


class _ListenedProgress:
    """An ``Advance`` that tells a listener the sum."""

    def __init__(self, title: str, total_bytes: int, listener: ProgressListener) -> None:
        self._title, self._total, self._done, self._listener = title, total_bytes, 0, listener
        listener(title, 0, total_bytes)

    def __call__(self, done: int) -> None:
        self._done += done
        self._listener(self._title, self._done, self._total)


class StartDisplay:
    """One bar for a start. Its title is the stage; its length, the bytes that all ranks have loaded of those announced.

    Args:
        shown: whether it is drawn; None draws it when standard error is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        self._work: dict[tuple[int, str], tuple[int, int]] = {}
        columns = "{task.description}", BarColumn(), "{task.fields[amount]}", TimeElapsedColumn()
        self._bar = _bar(*columns, shown=shown, transient=True)
        self._task: TaskID | None = None

    def stage(self, title: str) -> None:
        """Show the stage that begins now; the first one shows the bar."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=None, amount="")
        self._bar.update(self._task, description=title)

    def progress(self, bundle: int, title: str, done_bytes: int, total_bytes: int) -> None:
        """Show how far the rank on a bundle is with a piece of work."""
        if self._task is None:
            return
        self._work[bundle, title] = done_bytes, total_bytes
        busy = sum(done < total for done, total in self._work.values())
        done, total = (sum(numbers) for numbers in zip(*self._work.values(), strict=True))
        self._bar.update(
            self._task,
            amount=f"{format_bytes(done)} of {format_bytes(total)}",
            description=f"{title} ({busy} ranks)" if busy else "ranks form a group",
            completed=done,
            total=total,
        )

    def close(self) -> None:
        """Take the bar away. May be repeated."""
        if self._task is not None:
            self._bar.stop()
            self._task = None


class LoggedProgress:
    """Progress of counted work. In a terminal it is a bar; in a log a line every 10 s, and after each tenth of the work.

    Args:
        title: of the bar.
        done: number done before the start.
        stream: standard error by default; a bar is drawn if it is a terminal.
        clock: seconds.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._total = clock, total
        self._logged_s, self._logged_part = clock(), 0
        columns = title, BarColumn(), MofNCompleteColumn(), "{task.description}", TimeRemainingColumn()
        self._bar = _bar(*columns, stream=self._stream)
        self._task = self._bar.add_task("", total=total, completed=done)

    def start(self, done: int, line: str) -> None:
        """Show the bar, or log the line."""
        self._bar.start()
        self._log(done, line)

    def update(self, done: int, note: str, line: Callable[[], str]) -> None:
        """Show how many are done.

        Args:
            note: shown in the bar.
            line: makes the line for the log, where it is time for one.
        """
        self._bar.update(self._task, completed=done, description=note)
        if self._bar.disable and (self._clock() - self._logged_s >= LOG_EVERY_S or self._part(done) > self._logged_part):
            self._log(done, line())

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar.disable:
            say(text, self._stream)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _log(self, done: int, line: str) -> None:
        self._logged_s, self._logged_part = self._clock(), self._part(done)
        if self._bar.disable:
            self.say(line)

    def _part(self, done: int) -> int:
        return done * _LOG_PARTS // max(1, self._total)
