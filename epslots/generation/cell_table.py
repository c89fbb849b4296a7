"""``CellTable``: which cells of a row cache are free, and which cell holds which position of which row.

A *cell* is the room of one token in a pool (``row_cache.py``). Tensors that keep equally many tokens share a table: there is
one for those that keep every token, and one for each window. Bookkeeping alone; the cells' numbers also stand in a tensor on
the device, so that a step's indices are made there.

Suffixes: B rows of a step, W its tokens in each row, S positions that a layer reads, R rows of the cache, P positions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.device_copy import to_device

NO_TOKEN_CELL = 0
"""Stays zero: it stands for the positions before a row's first token."""


class CellTable:
    """The cells of one kind.

    Args:
        cells: tokens that they hold together.
        rows: rows of the cache.
        positions: tokens of one row, at most.
        window: positions that a token attends to, itself included; None = all. Cells behind it are freed.
        device: of the pools.
    """

    def __init__(self, cells: int, rows: int, positions: int, window: int | None, device: torch.device) -> None:
        self.window = window
        self._free: NDArray[np.int32] = np.arange(cells, 0, -1, dtype=np.int32)
        """A stack: the first ``free`` entries."""
        self.free = cells
        self._uses = np.zeros(cells + 1, np.int32)
        """Rows that hold each cell."""
        self._held_RP = np.zeros((rows, positions), np.int32)
        self._first_R = np.zeros(rows, np.int64)
        self._length_R = np.zeros(rows, np.int64)
        self._table_RP = torch.zeros(rows, positions, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._table_RP.nbytes

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
        return cells_BS.masked_fill_(place_BS < 0, NO_TOKEN_CELL).flatten()

    def _next_cells(self, rows: int, width: int) -> NDArray[np.int32]:
        count = rows * width
        assert count <= self.free, "the batcher makes room first"
        return self._free[self.free - count : self.free].reshape(rows, width)

    def read(self, row_B: IntArray, width: int) -> torch.Tensor:
        """Cells of the positions that a step reads, its own included, int32 [B * S].

        Rows are aligned at their last positions; those before a row's first are ``NO_TOKEN_CELL``.
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
            cells_BS.masked_fill_(place_BS < 0, NO_TOKEN_CELL)
        return cells_BS.flatten()

    def take(self, row_B: IntArray, width: int) -> None:
        """The step is made: the cells that ``lay_out`` gave are the rows' own. Cells that left the window are freed."""
        cells_BW = self._next_cells(len(row_B), width)
        self.free -= cells_BW.size
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
        self._held_RP[target, first:length] = cells
        self._table_RP[target, first:length] = self._table_RP[source, first:length]
        self._first_R[target], self._length_R[target] = first, length

    def occupy(self, row: int, length: int) -> None:
        """Give an empty row cells for a sequence of so many tokens, or for those that its window keeps."""
        assert self._length_R[row] == 0
        first = 0 if self.window is None else max(0, length - (self.window - 1))
        cells = self._next_cells(1, length - first)[0]
        self.free -= len(cells)
        self._uses[cells] = 1
        self._held_RP[row, first:length] = cells
        self._table_RP[row, first:length] = to_device(cells, self._table_RP.device)
        self._first_R[row], self._length_R[row] = first, length

    def cells_of(self, row: int) -> torch.Tensor:
        """The cells that a row holds, in the order of positions, int64 on the device."""
        return self._table_RP[row, self._first_R[row] : self._length_R[row]].long()

    def cut(self, row: int, length: int) -> None:
        """Let a row hold its first ``length`` positions alone; of a window, all of them."""
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
        self._free[self.free : self.free + len(freed)] = freed
        self.free += len(freed)

    def check(self) -> None:
        """Assert that every cell is either free, or held as often as is counted."""
        uses = np.zeros_like(self._uses)
        for row, (first, length) in enumerate(zip(self._first_R.tolist(), self._length_R.tolist(), strict=True)):
            np.add.at(uses, self._held_RP[row, first:length], 1)
            assert (self._table_RP[row, first:length].cpu().numpy() == self._held_RP[row, first:length]).all()
        assert (uses == self._uses).all() and uses[NO_TOKEN_CELL] == 0
        free = np.sort(self._free[: self.free])
        assert (free == np.flatnonzero(uses[1:] == 0) + 1).all()
