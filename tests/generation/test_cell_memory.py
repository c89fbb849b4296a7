"""Slots as cells: experts and rows never share one, and each reads what was written for it, however levels change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epslots.errors import ConfigError
from epslots.generation.cell_memory import CellMemory
from epslots.generation.cell_table import CellTable
from epslots.generation.free_cells import CellNumbers, FreeCells
from epslots.models.cache_slots import CacheSlots, cell_offsets, exchange_obstacle, in_cells, plan_cache_slots
from epslots.models.model_shape import CacheTensor, ModelShape
from tests.support.slot_pools import CPU, LAYOUT, make

KEYS = CacheTensor(0, ("keys",), "token", (2, 3), "float32", (0, 2))
VALUES = CacheTensor(0, ("values",), "token", (5,), "bfloat16", (0, 2))
POSITIONS = CacheTensor(1, ("positions",), "token", (), "int64", (0, 1))
WINDOW = CacheTensor(1, ("keys",), "window", (4,), "float32", (0, 2), window=8)
CACHE = (KEYS, WINDOW, VALUES, POSITIONS)
ROWS = 3


def shape_of(cache: tuple[CacheTensor, ...], experts: int = 6, layers: int = 2, whole_prompts: bool = False) -> ModelShape:
    specs = make([1] * layers, experts)[0].layers
    return ModelShape("m", "float32", specs, 2, 10, cache, 4, 100, whole_prompts=whole_prompts)


class Exchange(RuleBasedStateMachine):
    """Rows of cells and layers of experts in one pool; beside them, plain copies of what each should hold."""

    @initialize(layers=st.integers(1, 3), quota=st.integers(2, 6), least=st.integers(1, 20))
    def begin(self, layers: int, quota: int, least: int) -> None:
        self.sizes = plan_cache_slots(shape_of(CACHE, layers=layers), [quota] * layers, least)
        self.pool, self.loader, *_ = make([quota] * layers, 6, own_slots=self.sizes.own_slots)
        self.memory = CellMemory(self.pool, self.sizes, CACHE)
        self.views = {tensor: self.memory.view(tensor) for tensor in CACHE if in_cells(tensor)}
        self.table = CellTable(self.memory.numbers, ROWS, self.sizes.most_tokens, None, CPU)
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.written, self.address = 0, self.pool.memory.data_ptr()

    def entry(self, tensor: CacheTensor, numbers: list[int]) -> torch.Tensor:
        """The values of tokens with these numbers in a tensor."""
        values = torch.tensor(numbers).view(-1, *[1] * len(tensor.shape)).expand(-1, *tensor.shape)
        return (values % 200).to(getattr(torch, tensor.dtype))

    @rule(row=st.integers(0, ROWS - 1), tokens=st.integers(1, 30), commits=st.booleans())
    def write(self, row: int, tokens: int, commits: bool) -> None:
        tokens = min(tokens, self.table.free)
        if not tokens:
            return
        cells = self.table.lay_out(np.array([row]), tokens)
        numbers = list(range(self.written, self.written + tokens))
        for tensor, view in self.views.items():
            view.index_copy_(0, cells, self.entry(tensor, numbers))
        if commits:
            self.table.take(np.array([row]), tokens)
            self.rows[row] += numbers
            self.written += tokens

    @rule(row=st.integers(0, ROWS - 1))
    def release(self, row: int) -> None:
        self.table.release(row)
        self.rows[row] = []

    @rule(source=st.integers(0, ROWS - 1), row=st.integers(0, ROWS - 1), share=st.floats(0, 1))
    def copy(self, source: int, row: int, share: float) -> None:
        if self.rows[row] or source == row:
            return
        length = int(share * len(self.rows[source]))
        self.table.copy(source, row, length)
        self.rows[row] = self.rows[source][:length]

    @precondition(lambda self: self.pool.levels < self.sizes.most_levels)
    @rule()
    def cede(self) -> None:
        full = [int((self.pool.expert_of[self.pool.slot_range(layer)] >= 0).all()) for layer in range(len(self.pool.layers))]
        first = [int(self.pool.expert_of[self.pool.slot_range(layer)].max()) for layer in range(len(full))]
        self.loader.cede_level([expert if of else -1 for expert, of in zip(first, full, strict=True)])
        self.table.open_to(self.pool.levels)

    @precondition(lambda self: self.pool.levels > self.table.held_levels)
    @rule()
    def take_back(self) -> None:
        self.table.open_to(self.pool.levels - 1)
        self.loader.take_back_level(complete=False)

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        layer = data.draw(st.integers(0, len(self.pool.layers) - 1))
        absent = np.flatnonzero(self.pool.slot_of[layer] < 0)
        if not len(absent):
            return
        slot_range = self.pool.slot_range(layer)
        slot = data.draw(st.integers(slot_range.start, slot_range.stop - 1))
        expert = data.draw(st.sampled_from(absent.tolist()))
        self.loader.fetch(layer, np.array([expert]), np.array([slot]), self.pool.expert_of[[slot]])

    @invariant()
    def rows_hold_their_cells_alone_or_together(self) -> None:
        cells = [set(self.table.cells_of(row).tolist()) for row in range(ROWS)]
        assert self.table.held == len(set().union(*cells)) == self.table.held_by(range(ROWS))
        assert self.table.held_by([0, 1]) == len(cells[0] | cells[1])
        top = self.pool.levels
        if top:
            of_top = set(self.memory.numbers.levels[top].tolist())
            assert [self.table.reaches_above(row, top - 1) for row in range(ROWS)] == [bool(each & of_top) for each in cells]

    @invariant()
    def nothing_is_shared_and_all_is_found(self) -> None:
        self.table.check()
        self.pool.check_integrity()
        self.loader.check_content()
        assert self.pool.memory.data_ptr() == self.address
        ceded = {int(slot) for level in range(self.pool.levels + 1) for slot in self.pool.level_slots(level)}
        for row, numbers in enumerate(self.rows):
            cells = self.table.cells_of(row)
            assert {int(cell) // self.sizes.cells_per_slot for cell in cells} <= ceded, "a cell is in an expert's slot"
            for tensor, view in self.views.items():
                assert torch.equal(view.index_select(0, cells), self.entry(tensor, numbers)), tensor.path
        for tensor, view in self.views.items():
            assert not view[self.table.no_token].any(), f"positions before the first are zeros: {tensor.path}"
        assert self.table.free + len(set(self.held())) == self.sizes.tokens(self.pool.levels)

    def held(self) -> list[int]:
        return [int(cell) for row in range(ROWS) for cell in self.table.cells_of(row)]


TestExchange = Exchange.TestCase
TestExchange.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_cells_of_lower_levels_come_first():
    """Else a level would never be free of cells while any request runs."""
    levels = tuple(np.arange(start, start + 3, dtype=np.int32) for start in (0, 10, 20))
    cells = FreeCells(levels)
    cells.open_to(2)
    first = cells.next(5)
    cells.take(5)
    assert set(first[:3]) == {0, 1, 2} and set(first[3:]) <= {10, 11, 12}
    cells.give(np.array([2, 0]))
    assert set(cells.next(3)) & {20, 21, 22} == set() and cells.held_levels == 1
    cells.give(first[3:])
    assert cells.held_levels == 0
    cells.open_to(0)
    assert cells.count == 2


def test_a_slot_is_a_whole_number_of_cells():
    sizes = plan_cache_slots(shape_of(CACHE), [5, 4], least_tokens=17)
    used = cell_offsets([tensor for tensor in CACHE if in_cells(tensor)])[1]
    assert used == 32 + 16 + 16, "each entry is aligned"
    assert sizes.slot_bytes == LAYOUT.nbytes and sizes.cell_bytes >= used and sizes.cell_bytes % 16 == 0
    assert sizes.layers == (0, 1) and sizes.most_levels == 3, "of five slots two stay, of four one"
    assert 17 <= sizes.least_tokens < 17 + sizes.cells_per_slot
    assert [sizes.levels_for(sizes.tokens(level)) for level in range(4)] == [0, 1, 2, 3]
    assert sizes.levels_for(sizes.tokens(1) + 1) == 2 and sizes.levels_for(10**9) == 3 == sizes.levels_for(sizes.most_tokens)


def test_a_second_cache_in_the_slots_is_refused():
    sizes = plan_cache_slots(shape_of(CACHE), [4, 4], 8)
    pool = make([4, 4], 6, own_slots=sizes.own_slots)[0]
    memory = CellMemory(pool, sizes, CACHE)
    with pytest.raises(ConfigError, match="another engine"):
        CellMemory(pool, sizes, CACHE)
    memory.close()
    CellMemory(pool, sizes, CACHE)


@pytest.mark.parametrize(
    ("cache", "whole_prompts", "reason"),
    [
        (CACHE, False, None),
        (CACHE, True, "its prompts are computed whole"),
        ((WINDOW,), False, "nothing in its cache grows"),
        ((KEYS, CacheTensor(1, ("x",), "token", (1,), "float32", (0, 1), pooled=False)), False, "objects of their own"),
        ((CacheTensor(0, ("keys",), "token", (4096,), "float32", (0, 2)),), False, "16,384 bytes of cache are more than"),
    ],
)
def test_models_that_cant_exchange_say_why(cache: tuple[CacheTensor, ...], whole_prompts: bool, reason: str | None):
    found = exchange_obstacle(shape_of(cache, whole_prompts=whole_prompts))
    assert found is reason is None or reason in (found or "")


def test_plain_numbers_begin_behind_the_cell_of_no_token():
    numbers = CellNumbers.plain(3)
    assert numbers.no_token == 0 and numbers.total == 4 and FreeCells(numbers.levels).next(3).tolist() == [3, 2, 1]


def test_least_and_most_follow_from_the_slots():
    sizes = CacheSlots((0, 1, 2), 64, 10, 2, 4)
    assert (sizes.least_tokens, sizes.level_tokens, sizes.most_tokens) == (19, 30, 139)
    assert sizes.own_bytes == 2 * 640
