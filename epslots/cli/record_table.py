"""Tables from records: a row for each record, and a heading with a function for each column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

Record = TypeVar("Record")
Columns = Sequence[tuple[str, Callable[[Record], str]]]
"""Each column's heading, and its cell for a record."""


def record_table(title: str, columns: Columns[Record], records: Iterable[Record], caption: str | None = None) -> Table:
    """A table whose first column is flush left, and the others flush right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for record in records:
        table.add_row(*(cell(record) for _, cell in columns))
    return table
