"""Progress bars on standard error, for work that takes longer than a breath."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from epslots.layout import Progress as Advance
from epslots.streams import is_terminal

Tell = Callable[[str, int, int], None]
"""Takes a piece of work's title, bytes done and bytes in all; called at its start and after every part."""


class ProgressDisplay:
    """Opens bars that count bytes.

    Args:
        shown: whether they are drawn; None draws them when standard error is a terminal.
        tell: called instead of drawing anything: for ranks whose progress is shown elsewhere.
    """

    def __init__(self, shown: bool | None = None, tell: Tell | None = None) -> None:
        self.shown = tell is None and (is_terminal(sys.stderr) if shown is None else shown)
        self._tell = tell

    @contextlib.contextmanager
    def __call__(self, title: str, total_bytes: int) -> Iterator[Advance]:
        """A bar for one piece of work; yields what to call with the bytes done."""
        if self._tell is not None:
            yield _Counter(title, total_bytes, self._tell)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
        console = Console(file=sys.stderr)
        bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self.shown)
        with bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda done: bar.advance(task, done)


class _Counter:
    """Adds up the bytes done."""

    def __init__(self, title: str, total_bytes: int, tell: Tell) -> None:
        self._title, self._total, self._done, self._tell = title, total_bytes, 0, tell
        tell(title, 0, total_bytes)

    def __call__(self, done: int) -> None:
        self._done += done
        self._tell(self._title, self._done, self._total)
