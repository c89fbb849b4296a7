"""``CountedRows``: a ``RowCache`` that counts its cells and holds nothing, for the admission of a simulated rank.

A row is a list of *runs* of cells. Rows that begin alike share runs: each holds the first cells of a run, and as many of them
are in use as the row with most of them holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

import torch

from epslots.generation.cache_image import TensorPlace
from epslots.generation.row_cache import Row, RowCache

_Run = dict[int, int]
"""The number of a run's cells that each row holds, by the row's number."""


class CountedRows(RowCache):
    """The rows of a simulated rank. Beside tokens they keep no state, as in models of plain attention.

    Args:
        kv_tokens: cells.
        max_requests: rows.
    """

    def __init__(self, kv_tokens: int, max_requests: int) -> None:
        self.device = torch.device("cpu")
        self._cells, self._free = kv_tokens, kv_tokens
        self._numbers = list(range(max_requests))
        self._runs: dict[int, list[_Run]] = {}
        """By the row's number."""

    @property
    def keeps_states(self) -> bool:
        return False

    @property
    def keeps_objects(self) -> bool:
        return False

    @property
    def free_tokens(self) -> int:
        return self._free

    def open(self) -> Row:
        row = Row(heappop(self._numbers))
        self._runs[row.number] = []
        return row

    def open_for(self, length: int) -> Row:
        row = self.open()
        self.extend(row, length)
        return row

    def extend(self, row: Row, tokens: int) -> None:
        """Give a row free cells for further tokens."""
        assert tokens <= self._free, "room is made first"
        runs, number = self._runs[row.number], row.number
        if not runs or runs[-1][number] < max(runs[-1].values()):  # the cells that follow are another row's
            runs.append({number: 0})
        runs[-1][number] += tokens
        self._free -= tokens
        row.length += tokens

    def copy(self, source: Row, length: int) -> Row:
        row = self.open()
        left = length
        for run in self._runs[source.number]:
            if not left:
                break
            run[row.number] = held = min(left, run[source.number])
            self._runs[row.number].append(run)
            left -= held
        row.length = length
        return row

    def cut(self, row: Row, length: int) -> None:
        runs, left = self._runs[row.number], length
        kept = []
        for run in runs:
            held = min(left, run[row.number])
            left -= held
            self._hold(run, row.number, held)
            kept += [run] if held else []
        self._runs[row.number], row.length = kept, length

    def close(self, row: Row) -> None:
        self.cut(row, 0)
        del self._runs[row.number]
        heappush(self._numbers, row.number)

    def _hold(self, run: _Run, number: int, held: int) -> None:
        before = max(run.values())
        if held:
            run[number] = held
        else:
            del run[number]
        self._free += before - max(run.values(), default=0)

    def places(self, row: Row) -> Iterator[tuple[str, TensorPlace]]:
        return iter(())

    def check(self) -> None:
        """Assert that every cell is either free, or in use by a row."""
        runs = {id(run): run for runs in self._runs.values() for run in runs}
        assert self._free + sum(max(run.values()) for run in runs.values()) == self._cells
