"""Tables of rows: a heading with a function for each column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

Row = TypeVar("Row")
Columns = Sequence[tuple[str, Callable[[Row], str]]]
"""Each column's heading, and its cell for a row."""


def column_table(title: str, columns: Columns[Row], rows: Iterable[Row], caption: str | None = None) -> Table:
    """A table whose first column is flush left, and the others flush right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table
