"""What a user sees while a cluster starts: one bar for all ranks, on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from epslots.streams import is_terminal
from epslots.units import format_bytes


class StartDisplay:
    """One bar, whose title is the stage, and whose length the bytes that all ranks have loaded of what they have announced.

    Args:
        shown: whether it is drawn; None draws it when standard error is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        shown = is_terminal(sys.stderr) if shown is None else shown
        self._work: dict[tuple[int, str], tuple[int, int]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(file=sys.stderr), disable=not shown, transient=True)
        self._task: TaskID | None = None

    def stage(self, title: str) -> None:
        """What goes on now."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=None, amount="")
        self._bar.update(self._task, description=title)

    def progress(self, seat: int, title: str, done_bytes: int, total_bytes: int) -> None:
        """How far a rank is with a piece of work."""
        if self._task is None:
            return
        self._work[seat, title] = done_bytes, total_bytes
        busy = sum(done < total for done, total in self._work.values())
        done, total = (sum(numbers) for numbers in zip(*self._work.values(), strict=True))
        self._bar.update(
            self._task,
            amount=f"{format_bytes(done)} of {format_bytes(total)}",
            description=f"{title} ({busy} ranks)" if busy else "ranks meet",
            completed=done,
            total=total,
        )

    def close(self) -> None:
        """Take the bar away. Twice is once."""
        if self._task is not None:
            self._bar.stop()
            self._task = None
