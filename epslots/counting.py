"""A progress bar on standard error for work that is counted, such as steps. (``progress.py`` counts bytes.)"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from epslots.streams import is_terminal


@contextlib.contextmanager
def counting(title: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar for one piece of work; yields what to call with the number done since.

    Args:
        shown: whether it is drawn; None draws it when standard error is a terminal.
    """
    shown = is_terminal(sys.stderr) if shown is None else shown
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
