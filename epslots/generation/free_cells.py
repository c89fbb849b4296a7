"""``FreeCells``: the cells that no row holds, by level; those of the lowest level are given out first.

A cache of fixed size has one level. In slots (``models/cache_slots.py``), level 0 is the cache's own, and each further level
may go back to the experts: only once none of its cells is held, which is why the lowest are given out first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import IntArray

CellArray = NDArray[np.int32]


@dataclass(frozen=True)
class CellNumbers:
    """The numbers of a table's cells.

    Attributes:
        levels: cells of each level, int32. The last of them are given out first.
        no_token: a cell that no row gets.
        total: numbers that the memory has, these or others.
    """

    levels: tuple[CellArray, ...]
    no_token: int
    total: int

    @classmethod
    def plain(cls, cells: int) -> CellNumbers:
        """One level, numbered from 1; 0 is ``no_token``."""
        return cls((np.arange(cells, 0, -1, dtype=np.int32),), 0, cells + 1)


class FreeCells:
    """A stack for each level.

    Args:
        levels: cells of each level, int32. All are free; at first, only level 0 is open.

    Attributes:
        count: free cells of open levels.
        open_levels: the highest level of which cells are given out.
    """

    def __init__(self, levels: tuple[CellArray, ...]) -> None:
        self._stacks = [level.copy() for level in levels]
        self._free = [len(level) for level in levels]
        self.open_levels = 0
        self.count = self._free[0]
        self._level_of: NDArray[np.int32] | None = None
        if len(levels) > 1:
            self._level_of = np.zeros(max(int(level.max()) for level in levels) + 1, np.int32)
            for number, level in enumerate(levels):
                self._level_of[level] = number

    @property
    def held_levels(self) -> int:
        """The highest level of which a cell is held; 0 also if none is."""
        held = (level for level in range(len(self._stacks) - 1, 0, -1) if self._free[level] < len(self._stacks[level]))
        return next(held, 0)

    @property
    def held(self) -> int:
        """Cells that are held."""
        return sum(map(len, self._stacks)) - sum(self._free)

    def any_above(self, cells: CellArray, level: int) -> bool:
        """Whether some of these cells are of a higher level."""
        return self._level_of is not None and bool((self._level_of[cells] > level).any())

    def open_to(self, level: int) -> None:
        """Give out cells up to this level from now on. None above it may be held."""
        assert self.held_levels <= level < len(self._stacks), "cells of a closed level are held"
        self.open_levels = level
        self.count = sum(self._free[: level + 1])

    def next(self, count: int) -> CellArray:
        """The cells that ``take`` takes next, int32 [count]."""
        assert count <= self.count, "the batcher makes room first"
        parts = [self._stacks[level][self._free[level] - part : self._free[level]] for level, part in self._parts(count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, count: int) -> None:
        """The cells of ``next`` are held from now on."""
        for level, part in self._parts(count):
            self._free[level] -= part
        self.count -= count

    def _parts(self, count: int) -> list[tuple[int, int]]:
        """The levels that so many cells come from, and how many of each."""
        if count <= self._free[0]:
            return [(0, count)]
        parts = []
        for level, free in enumerate(self._free):
            if part := min(free, count):
                parts.append((level, part))
                count -= part
        return parts

    def give(self, cells: IntArray | CellArray) -> None:
        """Cells of open levels, without duplicates, are free again."""
        self.count += len(cells)
        if self._level_of is None:
            self._push(0, cells)
            return
        level_C = self._level_of[cells]
        for level in np.unique(level_C).tolist():
            self._push(level, cells[level_C == level])

    def _push(self, level: int, cells: IntArray | CellArray) -> None:
        free = self._free[level]
        self._stacks[level][free : free + len(cells)] = cells
        self._free[level] = free + len(cells)

    def check(self, uses: NDArray[np.int32]) -> None:
        """Assert that exactly the cells without uses are free, each in its level; for tests."""
        for level, (stack, free) in enumerate(zip(self._stacks, self._free, strict=True)):
            cells = np.sort(stack[:free])
            assert (np.diff(cells) > 0).all() and (uses[cells] == 0).all(), (
                f"level {level}: a free cell is held, or twice there"
            )
            assert self._level_of is None or (self._level_of[cells] == level).all(), f"level {level} has another one's cells"
        assert sum(self._free) == sum(map(len, self._stacks)) - np.count_nonzero(uses), "a cell is lost"
        assert self.count == sum(self._free[: self.open_levels + 1]) and self.held_levels <= self.open_levels
