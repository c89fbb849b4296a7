"""``CellTable``: which cells of a row cache are free, and which cell holds which position of which row.

A *cell* is the room of one token in a pool (``row_cache.py``). Tensors that keep equally many tokens share a table: there is
one for those that keep every token, and one for each window. Only bookkeeping; the cells' numbers also stand in a tensor on
the device, so that a step's indices are made there. ``free_cells.py`` keeps those that no row holds.

Suffixes: B rows of a step, W its tokens in each row, S positions that a layer reads, R rows of the cache, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.device_copy import to_device
from epslots.generation.free_cells import CellNumbers, FreeCells


class CellTable:
    """The cells of one kind.

    Args:
        numbers: of the cells; or how many there are, which are numbered from 1 then.
        rows: rows of the cache.
        positions: tokens of one row, at most.
        window: positions that a token attends to, itself included; None = all. Cells behind it are freed.
        device: of the pools.

    Attributes:
        no_token: the cell that stands for positions before a row's first token. It stays zero.
    """

    def __init__(
        self, numbers: CellNumbers | int, rows: int, positions: int, window: int | None, device: torch.device
    ) -> None:
        if isinstance(numbers, int):
            numbers = CellNumbers.plain(numbers)
        self.window, self.no_token = window, numbers.no_token
        self._free = FreeCells(numbers.levels)
        self._uses = np.zeros(numbers.total, np.int32)
        """Rows that hold each cell."""
        self._shared = 0
        """Holds of cells that other rows hold, too."""
        self._held_RP = np.zeros((rows, positions), np.int32)
        self._first_R = np.zeros(rows, np.int64)
        self._length_R = np.zeros(rows, np.int64)
        self._table_RP = torch.zeros(rows, positions, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._table_RP.nbytes

    @property
    def free(self) -> int:
        """Cells that a row may get."""
        return self._free.count

    @property
    def open_levels(self) -> int:
        """Levels of cells that rows may get, besides the first."""
        return self._free.open_levels

    @property
    def held_levels(self) -> int:
        """The highest level of which a cell is held."""
        return self._free.held_levels

    @property
    def held(self) -> int:
        """Cells that rows hold; one that several hold counts once."""
        return self._free.held

    def held_by(self, rows: Sequence[int]) -> int:
        """Cells that these rows hold; one that several of them hold counts once."""
        if not self._shared:
            return int((self._length_R - self._first_R)[list(rows)].sum())
        is_held = np.zeros(len(self._uses), bool)
        for row in rows:
            is_held[self._held_cells(row)] = True
        return int(np.count_nonzero(is_held))

    def reaches_above(self, row: int, level: int) -> bool:
        """Whether a row holds a cell of a higher level."""
        return self._free.any_above(self._held_cells(row), level)

    def _held_cells(self, row: int) -> NDArray[np.int32]:
        return self._held_RP[row, self._first_R[row] : self._length_R[row]]

    def open_to(self, level: int) -> None:
        """Let rows get cells only up to this level; none above it may be held."""
        self._free.open_to(level)

    def lay_out(self, row_B: IntArray, width: int) -> torch.Tensor:
        """Put free cells behind each row, int64 [B * W]. They stay free until ``take``: a repeated step may get others."""
        cells_BW = self._next_cells(len(row_B), width)
        place_BW = (row_B * self._table_RP.shape[1] + self._length_R[row_B])[:, None] + np.arange(width)
        device = self._table_RP.device
        new_BW = to_device(cells_BW.flatten(), device)
        self._table_RP.view(-1).index_copy_(0, to_device(place_BW.flatten(), device), new_BW)
        return new_BW.long()

    def next_cells(self, rows: int) -> IntArray:
        """Free cells for a token of each of so many rows, int64 [B]. They stay free until ``take``."""
        return self._next_cells(rows, 1)[:, 0].astype(np.int64)

    def lay_out_there(self, row_B: torch.Tensor, length_B: torch.Tensor, cell_B: torch.Tensor) -> None:
        """``lay_out`` of one token for each row, by numbers on the device: rows, their lengths, and ``next_cells``."""
        place_B = row_B * self._table_RP.shape[1] + length_B
        self._table_RP.view(-1).index_copy_(0, place_B, cell_B.to(torch.int32))

    def read_there(self, row_B: torch.Tensor, length_B: torch.Tensor, span: int) -> torch.Tensor:
        """``read`` after ``lay_out_there``: cells of ``span`` positions of each row, or of a window, int32 [B * S].

        Args:
            span: at least as many as any row has.
        """
        span = span if self.window is None else min(span, self.window)
        place_BS = (length_B + 1 - span)[:, None] + torch.arange(span, device=row_B.device)
        cells_BS = self._table_RP[row_B[:, None], place_BS.clamp(min=0)]
        return cells_BS.masked_fill_(place_BS < 0, self.no_token).flatten()

    def _next_cells(self, rows: int, width: int) -> NDArray[np.int32]:
        return self._free.next(rows * width).reshape(rows, width)

    def read(self, row_B: IntArray, width: int) -> torch.Tensor:
        """Cells of the positions that a step reads, its own included, int32 [B * S].

        Rows are aligned at their last positions; those before a row's first are ``no_token``.
        """
        end_B = self._length_R[row_B] + width
        span = int(end_B.max()) if self.window is None else min(int(end_B.max()), self.window - 1 + width)
        device = self._table_RP.device
        if len(row_B) == 1:
            (row,), (end,) = row_B.tolist(), end_B.tolist()
            return self._table_RP[row, end - span : end]
        rows_3B = to_device(np.stack([row_B, end_B - span]), device)
        place_BS = rows_3B[1][:, None] + torch.arange(span, device=device)
        cells_BS = self._table_RP[rows_3B[0][:, None], place_BS.clamp(min=0)]
        if int(end_B.min()) < span:
            cells_BS.masked_fill_(place_BS < 0, self.no_token)
        return cells_BS.flatten()

    def take(self, row_B: IntArray, width: int) -> None:
        """The step is made: the cells that ``lay_out`` gave are the rows' own. Cells that left the window are freed."""
        cells_BW = self._next_cells(len(row_B), width)
        self._free.take(cells_BW.size)
        self._uses[cells_BW] = 1
        self._held_RP[row_B[:, None], self._length_R[row_B][:, None] + np.arange(width)] = cells_BW
        self._length_R[row_B] += width
        if self.window is not None:
            first_B = np.maximum(self._first_R[row_B], self._length_R[row_B] - (self.window - 1))
            self._give_back(row_B, first_B)
            self._first_R[row_B] = first_B

    def copy(self, source: int, target: int, length: int) -> None:
        """Let an empty row hold the first ``length`` positions of another one, too."""
        assert self._length_R[target] == 0 and length <= self._length_R[source]
        assert self.window is None or length == self._length_R[source], "earlier positions have left the window"
        first = self._first_R[source]
        cells = self._held_RP[source, first:length]
        self._uses[cells] += 1
        self._shared += len(cells)
        self._held_RP[target, first:length] = cells
        self._table_RP[target, first:length] = self._table_RP[source, first:length]
        self._first_R[target], self._length_R[target] = first, length

    def occupy(self, row: int, length: int) -> None:
        """Give an empty row cells for a sequence of so many tokens, or for those that its window keeps."""
        assert self._length_R[row] == 0
        first = 0 if self.window is None else max(0, length - (self.window - 1))
        cells = self._next_cells(1, length - first)[0]
        self._free.take(len(cells))
        self._uses[cells] = 1
        self._held_RP[row, first:length] = cells
        self._table_RP[row, first:length] = to_device(cells, self._table_RP.device)
        self._first_R[row], self._length_R[row] = first, length

    def cells_of(self, row: int) -> torch.Tensor:
        """The cells that a row holds, in the order of positions, int64 on the device."""
        return self._table_RP[row, self._first_R[row] : self._length_R[row]].long()

    def cut(self, row: int, length: int) -> None:
        """Let a row hold only its first ``length`` positions; of a window, all of them."""
        assert length == self._length_R[row] or (self.window is None and length < self._length_R[row])
        row_B, first = np.array([row]), int(self._first_R[row])
        self._first_R[row] = length
        self._give_back(row_B, self._length_R[row_B])
        self._first_R[row], self._length_R[row] = first, length

    def release(self, row: int) -> None:
        """Empty a row; cells that no other row holds are free."""
        row_B = np.array([row])
        self._give_back(row_B, self._length_R[row_B])
        self._first_R[row] = self._length_R[row] = 0

    def _give_back(self, row_B: IntArray, end_B: IntArray) -> None:
        """Give back the cells from each row's first position up to another one."""
        count_B = end_B - self._first_R[row_B]
        total = int(count_B.sum())
        if not total:
            return
        before_B = np.cumsum(count_B) - count_B
        position = np.arange(total) - np.repeat(before_B - self._first_R[row_B], count_B)
        cells = self._held_RP[np.repeat(row_B, count_B), position]
        np.subtract.at(self._uses, cells, 1)  # rows that share cells may give them back together
        freed = np.unique(cells[self._uses[cells] == 0])
        self._shared -= total - len(freed)
        self._free.give(freed)

    def check(self) -> None:
        """Assert that every cell is either free, or held as often as is counted."""
        uses = np.zeros_like(self._uses)
        for row, (first, length) in enumerate(zip(self._first_R.tolist(), self._length_R.tolist(), strict=True)):
            np.add.at(uses, self._held_RP[row, first:length], 1)
            assert (self._table_RP[row, first:length].cpu().numpy() == self._held_RP[row, first:length]).all()
        assert (uses == self._uses).all() and uses[self.no_token] == 0
        assert self._shared == uses.sum() - np.count_nonzero(uses)
        self._free.check(uses)
