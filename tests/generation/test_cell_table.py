"""The cells of a row cache: none is lost, none is held twice by mistake, and each position is found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.generation.cell_table import CellTable

ROWS, POSITIONS, CELLS = 4, 24, 40


class Rows:
    """A table, beside plain lists of what each row's positions should hold."""

    def __init__(self, window: int | None) -> None:
        self.table = CellTable(CELLS, ROWS, POSITIONS, window, torch.device("cpu"))
        self.memory = torch.zeros(CELLS + 1, dtype=torch.int64)
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.written = 0

    def step(self, chosen: list[int], width: int, commit: bool) -> None:
        """Write numbers that nothing else holds; without a commit they may be overwritten."""
        chosen = [row for row in chosen if len(self.rows[row]) + width <= POSITIONS]
        if not chosen or len(chosen) * width > self.table.free:
            return
        row_B = np.array(chosen)
        cells = self.table.lay_out(row_B, width)
        new = torch.arange(self.written, self.written + len(cells)) + 1
        self.memory.index_copy_(0, cells, new)
        self.check_read(row_B, width, new.view(len(chosen), width).tolist())
        if commit:
            self.written += len(cells)
            self.table.take(row_B, width)
            for row, part in zip(chosen, new.view(len(chosen), width).tolist(), strict=True):
                self.rows[row] += part

    def check_read(self, row_B: np.ndarray, width: int, new: list[list[int]]) -> None:
        found = self.memory[self.table.read(row_B, width).long()].view(len(row_B), -1)
        for row, part, numbers in zip(row_B.tolist(), new, found.tolist(), strict=True):
            whole = [*self.rows[row], *part]
            window = self.table.window
            kept = whole if window is None else whole[-(window - 1 + width) :]
            assert numbers[len(numbers) - len(kept) :] == kept
            assert set(numbers[: len(numbers) - len(kept)]) <= {0}, "positions before the first are zeros"

    def copy(self, source: int, target: int, length: int) -> None:
        if self.rows[target] or source == target:
            return
        length = len(self.rows[source]) if self.table.window else min(length, len(self.rows[source]))
        self.table.copy(source, target, length)
        self.rows[target] = self.rows[source][:length]

    def cut(self, row: int, length: int) -> None:
        length = len(self.rows[row]) if self.table.window else min(length, len(self.rows[row]))
        self.table.cut(row, length)
        self.rows[row] = self.rows[row][:length]

    def release(self, row: int) -> None:
        self.table.release(row)
        self.rows[row] = []


ROW = st.integers(0, ROWS - 1)
STEP = st.tuples(st.just("step"), st.lists(ROW, unique=True, min_size=1), st.integers(1, 9), st.booleans())
COPY = st.tuples(st.just("copy"), ROW, ROW, st.integers(0, POSITIONS))
CUT = st.tuples(st.just("cut"), ROW, st.integers(0, POSITIONS))
RELEASE = st.tuples(st.just("release"), ROW)


@pytest.mark.parametrize("window", [None, 2, 5, 100])
@settings(max_examples=60)
@given(events=st.lists(st.one_of(STEP, STEP, COPY, CUT, RELEASE), max_size=30))
def test_every_position_is_found_and_no_cell_is_lost(window: int | None, events: list[tuple]):
    rows = Rows(window)
    for name, *arguments in events:
        getattr(rows, name)(*arguments)
        rows.table.check()
        assert int(rows.memory[rows.table.no_token]) == 0
    for row in range(ROWS):
        rows.release(row)
    rows.table.check()
    assert rows.table.free == CELLS


def test_cells_behind_a_window_are_free_at_once():
    table = CellTable(20, 1, 100, 4, torch.device("cpu"))
    row_B = np.array([0])
    for width in (9, 1, 1, 5):
        table.lay_out(row_B, width)
        table.take(row_B, width)
        assert table.free == 17, "three tokens are kept"


def test_shared_cells_outlive_their_first_row():
    table = CellTable(10, 2, 10, None, torch.device("cpu"))
    table.lay_out(np.array([0]), 6)
    table.take(np.array([0]), 6)
    table.copy(0, 1, 4)
    table.release(0)
    assert table.free == 6
    table.release(1)
    assert table.free == 10
