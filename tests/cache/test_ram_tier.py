"""Which records stay in RAM: leased cells keep theirs, and the record least likely to be fetched is evicted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epslots.cache.ram_cells import deal_cells, least_ram
from epslots.cache.ram_tier import NO_CELL, RamTier
from epslots.layout import LayerSpec, RecordLayout

RECORDS = 9
WIDE = RecordLayout.of([("up", (64, 64), "float32")])  # four pages
NARROW = RecordLayout.of([("up", (8, 8), "float32")])  # a page


class Tier(RuleBasedStateMachine):
    """A tier beside its rules written down a second time: fetches as floats, which halve and quarter without rounding."""

    @initialize(cells=st.integers(1, 4))
    def begin(self, cells: int) -> None:
        self.slot_of = np.full((3, 3), -1)
        self.tier = RamTier(cells, self.slot_of)
        self.held: dict[int, int] = {}  # cell -> record
        self.leases: list[int] = []
        self.fetches, self.last, self.clock = [0.0] * RECORDS, [0] * RECORDS, 0

    def gives_way(self) -> int | None:
        """The cell that another record takes; None if all are leased."""
        free = [cell for cell in range(len(self.tier.record_of)) if cell not in self.leases]
        if not free:
            return None
        if empty := [cell for cell in free if cell not in self.held]:
            return empty[0]
        return min(free, key=lambda cell: self.likelihood(self.held[cell]))

    def likelihood(self, record: int) -> tuple[float, int]:
        in_a_slot = self.slot_of.flat[record] >= 0
        return (16 * self.fetches[record]) // (4 if in_a_slot else 1), self.last[record]

    @rule(record=st.integers(0, RECORDS - 1))
    def lease(self, record: int) -> None:
        known = [cell for cell, held in self.held.items() if held == record]
        expected = (known or [self.gives_way()])[0]
        cell, must_read = self.tier.lease(record)
        if expected is None:
            assert (cell, must_read) == (NO_CELL, False)
            return
        assert (cell, must_read) == (expected, not known)
        self.held[cell] = record
        self.leases.append(cell)
        self.clock += 1
        self.fetches[record] += 1
        self.last[record] = self.clock
        if self.clock % (8 * len(self.tier.record_of)) == 0:
            self.fetches = [(16 * fetches // 2) / 16 for fetches in self.fetches]

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        cell = data.draw(st.sampled_from(self.leases))
        self.tier.release(cell)
        self.leases.remove(cell)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        """A read failed."""
        cell = data.draw(st.sampled_from(self.leases))
        self.tier.discard(cell)
        self.held.pop(cell, None)

    @rule(record=st.integers(0, RECORDS - 1), slot=st.integers(-1, 3))
    def enter_or_leave_a_slot(self, record: int, slot: int) -> None:
        self.slot_of.flat[record] = slot

    @invariant()
    def tables_agree(self) -> None:
        self.tier.check_integrity()
        found = {cell: record for cell, record in enumerate(self.tier.record_of.tolist()) if record >= 0}
        assert found == self.held
        assert self.tier.leases.tolist() == [self.leases.count(cell) for cell in range(len(self.tier.leases))]


Tier.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestTier = Tier.TestCase


def fetch(tier: RamTier, record: int) -> bool:
    """Whether the record had to be read."""
    cell, must_read = tier.lease(record)
    tier.release(cell)
    return must_read


def test_a_single_fetch_of_many_displaces_no_hot_record():
    """A prompt touches experts that are never fetched again."""
    tier = RamTier(3, np.full(100, -1))
    for _ in range(4):
        fetch(tier, 0), fetch(tier, 1)
    assert all(fetch(tier, record) for record in range(2, 20))
    assert not fetch(tier, 0) and not fetch(tier, 1)


def test_a_resident_gives_way_before_what_must_be_fetched():
    slot_of = np.full(4, -1)
    tier = RamTier(2, slot_of)
    for _ in range(3):
        fetch(tier, 0)
    fetch(tier, 1), fetch(tier, 1)
    slot_of[0] = 5
    fetch(tier, 2)
    assert tier.cell_of[0] == NO_CELL and tier.cell_of[1] != NO_CELL


def test_what_was_hot_long_ago_gives_way():
    tier = RamTier(2, np.full(3, -1))
    for _ in range(40):
        fetch(tier, 0)
    for _ in range(24):  # less often than the first in all
        fetch(tier, 1), fetch(tier, 2)
    assert tier.cell_of[0] == NO_CELL


LAYERS = (LayerSpec("a", 8, WIDE), LayerSpec("b", 8, NARROW), LayerSpec("c", 8, WIDE))


@pytest.mark.parametrize(
    ("quotas", "ram_bytes", "cells"),
    [
        ((2, 2, 2), 0, {WIDE: 2, NARROW: 2}),
        ((2, 2, 2), 10 * 2**20, {WIDE: 16, NARROW: 8}),  # as many as there are
        ((8, 2, 8), 20 * 2**10, {WIDE: 2, NARROW: 7}),  # layers that never miss need none
        ((2, 2, 2), 54 * 4096, {WIDE: 14, NARROW: 8}),
    ],
)
def test_cells_follow_the_experts_without_a_slot(quotas: tuple[int, ...], ram_bytes: int, cells: dict[RecordLayout, int]):
    least = least_ram(LAYERS, 2)
    assert least == 2 * 4 * 4096 + 2 * 4096
    assert deal_cells(LAYERS, quotas, 2, least + ram_bytes) == cells
    assert sum(count * layout.stride for layout, count in cells.items()) <= least + ram_bytes
