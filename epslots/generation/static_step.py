"""``StaticStep``: a decoding step of a row cache whose tensors stay in place, so that it can be captured.

Everything that differs from step to step is in one tensor of numbers, which the host overwrites before the step: tokens, rows,
lengths, and cells for the new tokens. The rest follows from them on the device. Rows read as many positions as ``span``
allows, for any lengths: what a step with a longer row would read, which changes no result.

Legend of shape suffixes: B rows of the step, S positions that they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers.cache_utils import Cache

from epslots.device_copy import copy_to_device
from epslots.generation.row_cache import Row, RowCache
from epslots.generation.row_layers import RowStep

_TOKEN, _ROW, _LENGTH, _COUNT, _CELLS = range(5)


class StaticStep:
    """One new token for each of B rows, at most S positions each.

    Args:
        cache: of a model without a ``RowSupport.capture_obstacle``.
        batch: B.
        span: S.

    Attributes:
        count: rows that are no repetition, of the latest ``begin``.
        new_states: pools of states, and the step's new states of its rows. Filled by each step through Python.
    """

    def __init__(self, cache: RowCache, batch: int, span: int) -> None:
        self._cache, self.batch, self.span = cache, batch, span
        self._tables = cache.tables
        self._numbers = torch.zeros(_CELLS + len(self._tables), batch, dtype=torch.int64, device=cache.device)
        self.count = 0
        self.new_states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        """Set the rows and their new tokens. Spare places repeat the first row, which needs no expert of its own."""
        self.count = len(rows)
        cells = [table.next_cells(len(rows)) for table in self._tables.values()]
        known = [tokens, [row.number for row in rows], [row.length for row in rows], [len(rows)] * len(rows), *cells]
        numbers = np.array(known, np.int64)
        spare = np.repeat(numbers[:, :1], self.batch - len(rows), axis=1)
        copy_to_device(np.concatenate([numbers, spare], axis=1), self._numbers)

    @property
    def row_B(self) -> torch.Tensor:
        return self._numbers[_ROW]

    @property
    def count_1(self) -> torch.Tensor:
        """How many rows are no repetition, int64 [1]."""
        return self._numbers[_COUNT, :1]

    @contextmanager
    def inputs(self) -> Iterator[dict[str, torch.Tensor | Cache]]:
        """The model's arguments, by its own names; to be captured together with the call."""
        row_B, length_B, span = self.row_B, self._numbers[_LENGTH], self.span
        cells = dict(zip(self._tables, self._numbers[_CELLS:], strict=True))
        for window, table in self._tables.items():
            table.lay_out_there(row_B, length_B, cells[window])
        columns = torch.arange(span, device=row_B.device)

        def read_cells(window: int | None) -> torch.Tensor:
            return self._tables[window].read_there(row_B, length_B, span)

        step = RowStep(row_B, None, span - 1, 1, cells, read_cells, {})
        with self._cache.in_place(step) as cache:
            yield {
                "input_ids": self._numbers[_TOKEN, :, None],
                "position_ids": length_B[:, None],
                "attention_mask": (columns >= span - 1 - length_B[:, None]).long(),
                "past_key_values": cache,
            }
        self.new_states = self._cache.set_apart(step.new_states)  # filled by the end of the context

    def keep_states(self) -> None:
        """Make the new states those of the rows; may be captured."""
        for pool, state in self.new_states:
            pool.index_copy_(0, self.row_B, state.to(pool.dtype))
