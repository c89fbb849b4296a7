"""Progress bars on standard error, for work that takes longer than a breath."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from epslots.records import Progress as Advance


class ProgressDisplay:
    """Opens bars that count bytes. ``shown=None`` shows them when standard error is a terminal."""

    def __init__(self, shown: bool | None = None) -> None:
        self.shown = sys.stderr.isatty() if shown is None else shown

    @contextlib.contextmanager
    def __call__(self, title: str, total_bytes: int) -> Iterator[Advance]:
        """A bar for one piece of work; yields what to call with the bytes done."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
        console = Console(file=sys.stderr)
        bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self.shown)
        with bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda done: bar.advance(task, done)
