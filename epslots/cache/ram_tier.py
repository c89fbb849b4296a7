"""The RAM tier of a store on disk: which records have a copy in RAM. Only decisions; ``DiskStore`` moves the bytes.

A *cell* is memory for one record. It is *leased* while its bytes are read or copied, and keeps its record meanwhile. A record
that is read takes an empty cell, or the one whose record is least likely to be fetched:

    likelihood = fetches so far, a quarter of them while the record is in a slot; of equal ones, the last fetched stays

Fetches are what a slot pool lets through: a record that never leaves its slot has few, and soon none. They are counted for
records on disk, too, and halved now and then, so that a newcomer stays only if it is fetched more often than others (TinyLFU:
Einziger, Friedman and Manes, TOS 2017).
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import IntArray

NO_CELL = -1
# A fetch in fixed point: halves and quarters of a few fetches still differ.
_FETCH = 16
_IN_A_SLOT_SHIFT = 2
# All counts are halved after so many fetches for each cell; TinyLFU's samples are 8 to 16 times its cache.
_HALVE_AFTER = 8
# The low bits of a likelihood hold the number of the last fetch.
_CLOCK_BITS = 40
_LEASED = np.iinfo(np.int64).max


class RamTier:
    """The cells for records of one size.

    Args:
        cells: C, at least 1.
        slot_of: int64, the slot that holds each record, negative = none; a view of a table that its owner changes. A record's
            number is its flat index.

    Attributes:
        cell_of: int64 [records], ``NO_CELL`` = not in RAM.
        record_of: int64 [C], -1 = empty.
        leases: int64 [C].
    """

    def __init__(self, cells: int, slot_of: IntArray) -> None:
        self._slot_of = slot_of.reshape(-1)
        records = self._slot_of.size
        self.cell_of: IntArray = np.full(records, NO_CELL)
        self.record_of: IntArray = np.full(cells, -1)
        self.leases: IntArray = np.zeros(cells, np.int64)
        self._fetches = np.zeros(records, np.int64)
        self._last = np.zeros(records, np.int64)
        self._clock = 0

    def watch(self, slot_of: IntArray) -> None:
        """Take note of the slots in another table of the same size from now on."""
        assert slot_of.size == self._slot_of.size
        self._slot_of = slot_of.reshape(-1)

    def lease(self, record: int) -> tuple[int, bool]:
        """Lease a record's cell for one fetch of it.

        Returns:
            The cell, and whether the record must be read into it; ``NO_CELL`` if every cell is leased, and nothing happened.
        """
        cell = int(self.cell_of[record])
        must_read = cell == NO_CELL
        if must_read:
            cell = self._least_likely()
            if self.leases[cell]:
                return NO_CELL, False
            self._forget(cell)
            self.cell_of[record], self.record_of[cell] = cell, record
        self.leases[cell] += 1
        self._count(record)
        return cell, must_read

    def release(self, cell: int) -> None:
        """End one lease of a cell."""
        assert self.leases[cell] > 0, f"cell {cell} isn't leased"
        self.leases[cell] -= 1

    def discard(self, cell: int) -> None:
        """Forget a cell's record, whose bytes never came; its leases go on."""
        self._forget(cell)

    def _forget(self, cell: int) -> None:
        if self.record_of[cell] >= 0:
            self.cell_of[self.record_of[cell]] = NO_CELL
            self.record_of[cell] = -1

    def _least_likely(self) -> int:
        """The cell to be taken next; a leased one only if all are."""
        record_C = self.record_of
        likelihood_C = self._fetches[record_C] >> np.where(self._slot_of[record_C] >= 0, _IN_A_SLOT_SHIFT, 0)
        score_C = (likelihood_C << _CLOCK_BITS) + self._last[record_C]
        score_C[record_C < 0] = -1
        score_C[self.leases > 0] = _LEASED
        return int(score_C.argmin())

    def _count(self, record: int) -> None:
        self._clock += 1
        self._fetches[record] += _FETCH
        self._last[record] = self._clock
        if self._clock % (_HALVE_AFTER * len(self.record_of)) == 0:
            self._fetches >>= 1

    def check_integrity(self) -> None:
        """Assert that the two tables are each other's inverse.

        Raises:
            AssertionError: naming the cell. It is a bug of ours.
        """
        held = np.flatnonzero(self.record_of >= 0)
        wrong = held[self.cell_of[self.record_of[held]] != held]
        assert not len(wrong), f"cell {wrong[:1]} isn't where its record is said to be"
        assert np.count_nonzero(self.cell_of != NO_CELL) == len(held), "a record is said to be in a cell that holds another"
        assert (self.leases >= 0).all()
