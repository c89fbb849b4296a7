"""``RowCache``: the cache of many requests in the model's own layers; each request is a *row*.

    with cache.step([row, other], width=1) as step:     # of rows from cache.open()
        logits = model(past_key_values=step.cache, attention_mask=step.attention_mask, position_ids=step.position_ids, ...)
        step.commit()

All memory is allocated at the start, by the memory plan's list (``CacheTensor``): a pool of cells for each tensor that grows
with tokens, and of rows for each state; with ``kv_tokens="auto"``, in slots of experts (``cell_memory.py``). A row is a list
of cells (``cell_table.py``), which rows may share, and nothing moves when a row comes or goes. A step's layers
(``row_layers.py``) read the pools and write new tokens into free cells. Layers of unknown classes keep objects of their own
for each row (deepseek_v4's compressors), and attention computes them row by row (``row_attention.py``).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from epslots.arrays import IntArray
from epslots.device_copy import to_device
from epslots.errors import UnsupportedModelError
from epslots.generation.cache_image import TensorPlace
from epslots.generation.cell_memory import CellMemory
from epslots.generation.cell_table import CellTable
from epslots.generation.row_attention import LayerOfRows
from epslots.generation.row_layers import Pools, RowStep, States, TokenPool, can_be_pooled, pool_layer
from epslots.models.cache_slots import in_cells
from epslots.models.model_shape import OF_THE_CACHE, CacheTensor


@dataclass(eq=False)
class Row:
    """A request's place in the cache.

    Attributes:
        number: of the row in pools of states.
        length: tokens that the cache holds of it.
        own: its layers that aren't pooled, by index.
    """

    number: int
    length: int = 0
    own: dict[int, Any] = field(default_factory=dict)


def empty_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of the model's own kind.

    Raises:
        UnsupportedModelError: it has a cache for another kind of generation than token by token.
    """
    found: dict[str, Any] = {}
    prepare = model._prepare_cache_for_generation
    if getattr(prepare, "__func__", None) is not GenerationMixin._prepare_cache_for_generation:
        raise UnsupportedModelError(
            f"{type(model).__name__} prepares its cache in a way of its own: it doesn't generate token by token (diffusion)"
        )
    prepare(GenerationConfig(), found, GenerationMode.GREEDY_SEARCH, 1, 1)
    cache = found.get("past_key_values")
    if cache is None:  # minimax makes its own, in which layers of linear attention would pass for empty ones of full attention
        cache = _minimax_cache(model)
    return cache


def _minimax_cache(model: PreTrainedModel) -> Cache:
    kinds = model.config.get_text_config().layer_types
    module: Any = inspect.getmodule(type(model))
    cache: Cache = module.MiniMaxCache()
    cache.layers = [DummyLayer() if kind == "linear_attention" else DynamicLayer() for kind in kinds]
    return cache


class StepOfRows:
    """One forward pass over some rows, with the model's arguments.

    Attributes:
        cache: ``past_key_values``.
        attention_mask: int64 [B, tokens of the longest row], zeros before a row's first token; None if all are equally long.
        position_ids: int64 [B, W].
    """

    def __init__(self, owner: RowCache, rows: Sequence[Row], width: int) -> None:
        self._owner, self._rows, self._width = owner, rows, width
        lengths = [row.length for row in rows]
        past, device = max(lengths), owner.device
        length_B1 = to_device(np.array(lengths, np.int64), device)[:, None]
        self.position_ids = length_B1 + torch.arange(width, device=device)
        self.attention_mask: torch.Tensor | None = None
        if min(lengths) < past:
            columns = torch.arange(past + width, device=device)
            self.attention_mask = (columns >= past - length_B1).long()
        self.cache = owner._fill_cache(rows, np.array([row.number for row in rows], np.int64), width)

    def commit(self) -> None:
        """The step has ended well: its tokens and states are the rows' own."""
        self._owner._commit(self._rows, self._width)


class RowCache:
    """The rows of one model.

    Args:
        model: served from the cache.
        tensors: what its cache keeps of a sequence.
        kv_tokens: tokens of all rows together.
        max_requests: rows.
        in_flight: new tokens of one step, at most.
        by_row: layers whose attention is computed row by row, though they are pooled.
        slots: memory of the cells; None = it is allocated here.

    Attributes:
        free_rows: rows that are free.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: Sequence[CacheTensor],
        *,
        kv_tokens: int,
        max_requests: int,
        in_flight: int,
        by_row: frozenset[int] = frozenset(),
        slots: CellMemory | None = None,
    ) -> None:
        self.device: torch.device = model.device
        self._by_row = by_row
        self._cache = empty_cache(model)
        self._pooled = {i for i, layer in enumerate(self._cache.layers) if can_be_pooled(layer)}
        self._numbers = list(range(max_requests))
        """Free ones, a heap: the lowest is taken first, so that rows are neighbours."""
        self._tables: dict[int | None, CellTable] = {}
        self._states: list[torch.Tensor] = []
        self._allocated = 0
        if slots is not None:
            self._tables[None] = CellTable(slots.numbers, max_requests, kv_tokens, None, self.device)
        pools: dict[int, Pools] = {index: {} for index in (OF_THE_CACHE, *self._pooled)}
        for tensor in tensors:
            if tensor.layer not in pools:
                continue  # a row's own
            entries = tensor.entries(kv_tokens, max_requests, in_flight)
            if slots is not None and in_cells(tensor):
                memory = slots.view(tensor)
            else:
                memory = torch.zeros(entries, *tensor.shape, dtype=getattr(torch, tensor.dtype), device=self.device)
                self._allocated += memory.nbytes
            if tensor.kind == "row":
                pools[tensor.layer][tensor.path] = memory
                self._states.append(memory)
                continue
            if tensor.window not in self._tables:
                self._tables[tensor.window] = CellTable(entries - 1, max_requests, kv_tokens, tensor.window, self.device)
            batch, sequence = tensor.dimensions
            assert sequence is not None
            pools[tensor.layer][tensor.path] = TokenPool(memory, tensor.window, (batch, sequence))
        self._pools = pools
        if None not in self._tables:
            self._tables[None] = CellTable(kv_tokens, max_requests, kv_tokens, None, self.device)
        self._templates: list[Any] = list(self._cache.layers)
        self._apart: dict[int, torch.Tensor] = {}
        """By the ``id`` of a pool of states: those that a captured step leaves."""
        self._steps: list[RowStep] = []
        self._left: tuple[list[Row], States] = [], {}
        """The rows that decoded in the latest step, if it was committed, and their states as they stand in the pools."""
        for index in self._pooled:
            self._templates[index] = pool_layer(self._templates[index], pools[index])
        self._linear = {int(path[1]): pool for path, pool in pools[OF_THE_CACHE].items()}
        """Pools of minimax's linear attention, whose states its cache keeps itself."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pools that were allocated here, and of the tables of their cells."""
        return self._allocated + sum(table.nbytes for table in self._tables.values())

    @property
    def keeps_states(self) -> bool:
        """Whether a row keeps more than its tokens: another row can continue it only at its present length."""
        return bool(self._states) or len(self._tables) > 1 or self.keeps_objects

    @property
    def tables(self) -> dict[int | None, CellTable]:
        """The cells of tensors that grow with tokens, by the window of those that keep one."""
        return self._tables

    @property
    def keeps_objects(self) -> bool:
        """Whether layers of some kind keep objects of their own for each row: it isn't known how these will grow."""
        return len(self._pooled) < len(self._templates)

    @property
    def free_tokens(self) -> int:
        """Tokens for which there are free cells."""
        return self.cells.free

    @property
    def free_rows(self) -> int:
        return len(self._numbers)

    @property
    def cells(self) -> CellTable:
        """The cells of tensors that keep every token."""
        return self._tables[None]

    def open(self) -> Row:
        """An empty row; there must be a free one."""
        return Row(heappop(self._numbers))

    def copy(self, source: Row, length: int) -> Row:
        """A new row with the first ``length`` tokens of another one, whose cells it shares. There must be a free row."""
        row = self.open()
        for table in self._tables.values():
            table.copy(source.number, row.number, length)
        for state in self._states:
            state[row.number].copy_(state[source.number])
        row.length, row.own = length, {index: _twin(layer) for index, layer in source.own.items()}
        return row

    def open_for(self, length: int) -> Row:
        """A new row with cells for ``length`` tokens, of any content; they and a row must be free."""
        row = self.open()
        for table in self._tables.values():
            table.occupy(row.number, length)
        row.length = length
        return row

    def places(self, row: Row) -> Iterator[tuple[str, TensorPlace]]:
        """The places of a row's tokens and states in the pools, by name, in the same order in every process."""
        for layer, pools in sorted(self._pools.items()):
            for path, pool in sorted(pools.items(), key=str):
                name = ".".join(map(str, (layer, *path)))
                if isinstance(pool, TokenPool):
                    most = None if pool.window is None else pool.window - 1
                    yield name, TensorPlace(pool.cells, self._tables[pool.window].cells_of(row.number), most)
                else:
                    yield name, TensorPlace(pool[row.number].view(-1))

    def empty_layer(self, index: int) -> Any:
        """A layer that isn't pooled, for a row to keep, without tokens."""
        return _twin(self._templates[index])

    def cut(self, row: Row, length: int) -> None:
        """Keep only the first ``length`` tokens of a row: all of them, where it keeps more than tokens."""
        for table in self._tables.values():
            table.cut(row.number, length)
        row.length = length

    def close(self, row: Row) -> None:
        """Free a row and its cells."""
        for table in self._tables.values():
            table.release(row.number)
        heappush(self._numbers, row.number)
        row.own.clear()

    @contextmanager
    def step(self, rows: Sequence[Row], width: int) -> Iterator[StepOfRows]:
        """One forward pass: ``width`` new tokens of each row. Without ``commit`` it leaves no trace.

        Args:
            rows: all empty, or none. There must be free cells for the new tokens.
        """
        assert len({row.length == 0 for row in rows}) == 1
        try:
            yield StepOfRows(self, rows, width)
        finally:
            self._let_go()

    @contextmanager
    def in_place(self, step: RowStep) -> Iterator[Cache]:
        """The model's cache for a step of rows that all have a past; its states are in ``step.new_states`` afterwards.

        Only without a ``RowSupport.capture_obstacle``.
        """
        layers = [_begun(self._templates[index], step) for index in range(len(self._templates))]
        self._cache.layers = layers
        try:
            yield self._cache
            for layer in layers:
                layer.end()
        finally:
            self._let_go()

    def set_apart(self, new_states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A step's new states, copied to memory that all steps share: a graph needn't keep some of its own.

        Args:
            new_states: pools, and the states [B, ...] of the step's rows.
        """
        for pool, _ in new_states:
            if id(pool) not in self._apart:
                self._apart[id(pool)] = torch.empty_like(pool)
        apart = [self._apart[id(pool)][: len(state)] for pool, state in new_states]
        if apart:
            torch._foreach_copy_(apart, [state for _, state in new_states])
        return [(pool, copied) for (pool, _), copied in zip(new_states, apart, strict=True)]

    def _let_go(self) -> None:
        """Drop a step's tensors."""
        self._steps, self._cache.layers = [], []
        if self._linear:
            setattr(self._cache, "linear_cache", [])  # noqa: B010
        for index in self._pooled:
            self._templates[index].let_go()

    def _fill_cache(self, rows: Sequence[Row], row_B: IntArray, width: int) -> Cache:
        """The model's cache as the step of these rows is to find it."""
        new_cells = {window: table.lay_out(row_B, width) for window, table in self._tables.items()}
        past = max(row.length for row in rows)
        (left_rows, left_states), self._left = self._left, ([], {})
        step = self._row_step(row_B, past, width, new_cells, left_states if left_rows == rows else {})
        single = [
            self._row_step(row_B[r : r + 1], row.length, width, {w: c[r * width :][:width] for w, c in new_cells.items()}, {})
            for r, row in enumerate(rows)
            if self._by_row
        ]
        layers: list[Any] = []
        for index, template in enumerate(self._templates):
            if index not in self._pooled:
                layers.append(LayerOfRows([_twin(row.own.get(index, template)) for row in rows]))
                continue
            if index in self._by_row:
                template.divide([_begun(copy.copy(template), one) for one in single])
            layers.append(_begun(template, step))
        self._steps, self._cache.layers = [step, *single], layers
        if self._linear:
            known = {i: step.states_of(pool) if past else None for i, pool in self._linear.items()}
            setattr(self._cache, "linear_cache", [known.get(i, []) for i in range(len(layers))])  # noqa: B010
        return self._cache

    def _row_step(
        self, row_B: IntArray, past: int, width: int, new_cells: dict[int | None, torch.Tensor], left_states: States
    ) -> RowStep:
        def read_cells(window: int | None) -> torch.Tensor:
            return self._tables[window].read(row_B, width)

        first, end = int(row_B[0]), int(row_B[0]) + len(row_B)
        neighbours = slice(first, end) if np.array_equal(row_B, np.arange(first, end)) else None
        return RowStep(to_device(row_B, self.device), neighbours, past, width, new_cells, read_cells, left_states)

    def _commit(self, rows: Sequence[Row], width: int) -> None:
        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, LayerOfRows):
                for row, own in zip(rows, layer.rows, strict=True):
                    row.own[index] = own
                continue
            for part in (layer, *layer.rows):
                part.end()
        whole, *single = self._steps
        whole.leave_states([(pool, getattr(self._cache, "linear_cache")[i]) for i, pool in self._linear.items()])  # noqa: B009
        left_states = whole.commit_states()
        for step in single:
            step.commit_states()
        self.take(rows, width)
        if width == 1 and not single:  # the same rows most likely decode next
            self._left = list(rows), left_states

    def take(self, rows: Sequence[Row], width: int) -> None:
        """Give the cells of a step's tokens to their rows, whose states are in the pools."""
        self._left = [], {}
        row_B = np.array([row.number for row in rows], np.int64)
        for table in self._tables.values():
            table.take(row_B, width)
        for row in rows:
            row.length += width

    def check(self) -> None:
        """Assert that the tables agree, for tests."""
        for table in self._tables.values():
            table.check()


def _begun(layer: Any, step: RowStep) -> Any:
    layer.begin(step)
    return layer


def _twin(layer: Any) -> Any:
    """A copy that shares tensors, which such layers replace and don't change, but neither attributes nor dicts and lists."""
    twin = copy.copy(layer)
    vars(twin).update({name: copy.copy(value) for name, value in vars(layer).items() if isinstance(value, dict | list)})
    return twin
