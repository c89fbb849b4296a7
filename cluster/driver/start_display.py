"""The progress bar of a cluster's start: one bar for all ranks, on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from epslots.streams import is_terminal
from epslots.units import format_bytes


class StartDisplay:
    """One bar: its title is the stage, its length the bytes that all ranks have loaded, of those that they have announced.

    Args:
        shown: draw it; None = if standard error is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        shown = is_terminal(sys.stderr) if shown is None else shown
        self._work: dict[tuple[int, str], tuple[int, int]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(file=sys.stderr), disable=not shown, transient=True)
        self._task: TaskID | None = None

    def stage(self, title: str) -> None:
        """Show a stage of the start."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=None, amount="")
        self._bar.update(self._task, description=title)

    def progress(self, bundle: int, title: str, done_bytes: int, total_bytes: int) -> None:
        """Show a rank's progress with one stage of loading."""
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
        """Remove the bar. A second call does nothing."""
        if self._task is not None:
            self._bar.stop()
            self._task = None
