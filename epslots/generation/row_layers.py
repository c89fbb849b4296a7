"""The model's own cache layers, with their tensors in pools: a step's keys, values and states of several rows.

A model talks to its cache through layer objects of transformers. ``pooled`` gives such an object a subclass of its own class:
what the layer would keep in attributes is written into cells of a pool, and read back from the cells of the step's rows, which
are aligned at their last tokens. So the layer's own bookkeeping (masks, offsets, flags) stays transformers'.

New tokens go into free cells, and new states stay apart until the step is committed: a step that breaks leaves no trace.
``cell_table.py`` says which cells; ``row_cache.py`` makes the pools.

Suffixes: B rows of the step, W its tokens in each row, S positions read. C cells and R rows of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from epslots.moe import cell_loops

Pools = dict[tuple[str | int, ...], Any]
"""A ``TokenPool``, or a tensor of states, by its path in a layer."""
States = dict[int, torch.Tensor]
"""States [B, ...] of a step's rows, by the ``id`` of their pool."""


@dataclass(frozen=True)
class TokenPool:
    """The cells of one tensor that grows with every token.

    Attributes:
        cells: [C, *rest]: the rest of the tensor's shape.
        window: tokens that it keeps; None = all.
        dimensions: of batch and sequence in the tensor.
    """

    cells: torch.Tensor
    window: int | None
    dimensions: tuple[int, int]

    def write(self, cell_BW: torch.Tensor, new: torch.Tensor) -> None:
        """Put a step's new tokens, in the layer's own shape, into cells."""
        flat = new.movedim(self.dimensions, (0, 1)).flatten(0, 1)
        self.cells.index_copy_(0, cell_BW, flat.to(self.cells.dtype))

    def read(self, cell_BS: torch.Tensor, rows: int) -> torch.Tensor:
        """The tokens in cells, in the layer's own shape."""
        return self.cells.index_select(0, cell_BS).unflatten(0, (rows, -1)).movedim((0, 1), self.dimensions)


class RowStep:
    """The rows of one forward pass, as pooled layers see them.

    Args:
        row_B: numbers of the rows, int64 on the device.
        neighbours: the same as a slice, if they follow one another: on the CPU, it is written in a third of the time.
        past: tokens that the longest of them has in the cache.
        width: new tokens of each row.
        new_cells: cells of the new tokens, int64 [B * W], by window.
        read_cells: makes the cells that a layer reads, [B * S], for a window.
        left_states: what pools hold of these rows' states, if the step before left it; the layers may change it.
    """

    def __init__(
        self,
        row_B: torch.Tensor,
        neighbours: slice | None,
        past: int,
        width: int,
        new_cells: Mapping[int | None, torch.Tensor],
        read_cells: Callable[[int | None], torch.Tensor],
        left_states: States,
    ) -> None:
        self.row_B, self.past, self.width = row_B, past, width
        self._neighbours = neighbours
        self._left_states = left_states
        self._new_cells = new_cells
        self._make_cells = read_cells
        self._cells: dict[int | None, torch.Tensor] = {}
        self.new_states: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pools of states, with the states that the step leaves of its rows; filled when it ends."""

    def states_of(self, pool: torch.Tensor) -> torch.Tensor:
        """The rows' states [B, ...], for one layer to change; pools themselves change when the step is committed."""
        left = self._left_states.pop(id(pool), None)
        return pool.index_select(0, self.row_B) if left is None else left

    def leave_states(self, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Enter more pools of states, with the states that the step leaves of its rows."""
        self.new_states += states

    def commit_states(self) -> States:
        """Put the rows' new states into their pools. Returns them in the form that the next step of the same rows takes."""
        found: States = {}
        for pool, state in self.new_states:
            found[id(pool)] = new = state.to(pool.dtype)
            if self._neighbours is None:
                pool.index_copy_(0, self.row_B, new)
            else:
                pool[self._neighbours].copy_(new)
        return found

    def append(self, pool: TokenPool, new: torch.Tensor) -> torch.Tensor:
        """Put new tokens into their cells; returns all that the layer reads, these included."""
        self.write(pool, new)
        return pool.read(self._read_cells(pool.window), len(self.row_B))

    def append_both(
        self, pools: tuple[TokenPool, TokenPool], new: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``append`` of keys and values, which keep equally many tokens."""
        keys, values = pools
        if keys.dimensions == values.dimensions == (0, 2):
            cells_BS = self._read_cells(keys.window)
            if cell_loops.fits(keys.cells, new[0], cells_BS) and cell_loops.fits(values.cells, new[1], cells_BS):
                return cell_loops.append((keys.cells, values.cells), new, self._new_cells[keys.window], cells_BS)
        return self.append(keys, new[0]), self.append(values, new[1])

    def write(self, pool: TokenPool, new: torch.Tensor) -> None:
        """Put new tokens into their cells."""
        pool.write(self._new_cells[pool.window], new)

    def past_of(self, pool: TokenPool) -> torch.Tensor:
        """The layer's entries from before this step."""
        cells_BS = self._read_cells(pool.window).view(len(self.row_B), -1)[:, : -self.width]
        return pool.read(cells_BS.flatten(), len(self.row_B))

    def cells(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells of new tokens, int64 [B * W], and of those that a layer reads, int32 [B * S]."""
        return self._new_cells[window], self._read_cells(window)

    def _read_cells(self, window: int | None) -> torch.Tensor:
        if window not in self._cells:
            self._cells[window] = self._make_cells(window)
        return self._cells[window]


class LazyStates(dict[int, Any]):
    """A layer's states of a step's rows, by number. Each is read when the layer first asks for it.

    Args:
        pools: [R, ...] of each state.
        count: numbers that the layer has.
        step: of the rows; None = they have no states yet.
    """

    def __init__(self, pools: Mapping[int, torch.Tensor], count: int, step: RowStep | None) -> None:
        super().__init__(dict.fromkeys(range(count)))
        self._pools, self._step = pools, step
        self._unread = set() if step is None else set(pools)

    def __getitem__(self, number: int) -> Any:
        if number in self._unread:
            assert self._step is not None
            self[number] = self._step.states_of(self._pools[number])
        return super().__getitem__(number)

    def __setitem__(self, number: int, value: Any) -> None:
        self._unread.discard(number)
        super().__setitem__(number, value)

    def found(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each pool of which the step has read or set the states, with these as they are now."""
        return [(self._pools[number], state) for number, state in super().items() if state is not None]


class PooledLayer:
    """A layer of a model's cache that keeps nothing itself.

    Attributes:
        pools: of tensors that grow with tokens, by attribute; of states, [R, ...] by attribute and number.
        step: the forward pass under way.
        rows: a layer for each row, where attention runs row by row.
    """

    pools: Pools
    step: RowStep
    rows: Sequence[PooledLayer] = ()

    def begin(self, step: RowStep) -> None:
        """A forward pass begins."""
        self.step = step

    def divide(self, rows: Sequence[PooledLayer]) -> None:
        """Attention runs row by row in the forward pass under way, over these layers."""
        self.rows = rows

    def end(self) -> None:
        """The forward pass has ended well: the step takes new states."""

    def let_go(self) -> None:
        """Drop the step's tensors."""
        self.rows = ()


class PooledTokens(PooledLayer):
    """Keys and values of all tokens.

    Attributes:
        appends_both: whether ``update`` appends keys and values, and does nothing else but ``count_new``.
    """

    appends_both = True

    def begin(self, step: RowStep) -> None:
        super().begin(step)
        self._length = step.past
        self.is_initialized = step.past > 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.step.append_both((self.pools["keys",], self.pools["values",]), (key_states, value_states))
        self.count_new()
        return keys, values

    def count_new(self) -> None:
        """Count the step's tokens as the layer's own."""
        self._length = self.step.past + self.step.width
        self.is_initialized = True

    def cells(self) -> tuple[TokenPool, TokenPool, torch.Tensor, torch.Tensor]:
        """Pools of keys and values; cells of new tokens, int64 [B * W]; of read ones, int32 [B * S]."""
        keys, values = self.pools["keys",], self.pools["values",]
        return keys, values, *self.step.cells(keys.window)

    def get_seq_length(self) -> int:
        return self._length


class _PooledWindow(PooledTokens):
    """Keys and values of a sliding window."""

    def begin(self, step: RowStep) -> None:
        super().begin(step)
        self.cumulative_length = step.past

    def count_new(self) -> None:
        super().count_new()
        self.cumulative_length += self.step.width


class _PooledIndexer(PooledTokens):
    """Keys and values of all tokens, and the keys of an indexer that chooses among them (DeepSeek's sparse attention)."""

    appends_both = False

    def begin(self, step: RowStep) -> None:
        super().begin(step)
        self._positions: torch.Tensor | None = None
        self.is_indexer_initialized = step.past > 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        self.keys = keys.new_zeros(1).expand(keys.shape)  # glm5_next asks for the shape
        return keys, values

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        self.is_indexer_initialized = True
        return self.step.append(self.pools["indexer_keys",], indexer_key_states)

    # qwen4_exp keeps the positions [3, B, tokens] of all tokens on one of its layers, and appends new ones by itself.

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        pool = self.pools.get(("indexer_position_ids",))
        if self._positions is None and pool is not None and self.step.past:
            self._positions = self.step.past_of(pool)
        return self._positions

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor) -> None:
        self._positions = positions
        self.step.write(self.pools["indexer_position_ids",], positions[..., -self.step.width :])


class _PooledIndexKeys(PooledTokens):
    """Keys and values of all tokens, and the keys of minimax_m3's indexer."""

    def update_index(self, idx_k: torch.Tensor) -> torch.Tensor:
        return self.step.append(self.pools["idx_keys",], idx_k)


class _PooledStates(PooledLayer):
    """States of convolutions and recurrences, which each step replaces."""

    number_of_states: int

    @cached_property
    def _state_pools(self) -> tuple[dict[int, torch.Tensor], ...]:
        """Pools of convolutions' states, and of recurrences', by number."""
        return tuple({int(path[1]): pool for path, pool in self.pools.items() if path[0] == kind} for kind in _STATES)

    def begin(self, step: RowStep) -> None:
        super().begin(step)
        count, known = self.number_of_states, step.past > 0
        conv_pools, recurrent_pools = self._state_pools
        self.conv_states = LazyStates(conv_pools, count, step if known else None)
        self.recurrent_states = LazyStates(recurrent_pools, count, step if known else None)
        self.is_conv_states_initialized = {n: known and n in conv_pools for n in range(count)}
        self.is_recurrent_states_initialized = {n: known and n in recurrent_pools for n in range(count)}
        self.has_previous_state = dict(self.is_conv_states_initialized)  # set where convolutions are updated
        self.conv_kernel_size = {n: conv_pools[n].shape[-1] if n in conv_pools else None for n in range(count)}

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states  # transformers copies: its states stay where they are
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def end(self) -> None:
        super().end()
        self.step.new_states += self.conv_states.found() + self.recurrent_states.found()

    def let_go(self) -> None:
        super().let_go()
        self.conv_states = self.recurrent_states = LazyStates({}, 0, None)


_STATES = ("conv_states", "recurrent_states")

_PARTS: Mapping[type, tuple[type, ...]] = {
    DynamicLayer: (PooledTokens,),
    DynamicSlidingWindowLayer: (_PooledWindow,),
    DynamicIndexedLayer: (_PooledIndexer,),
    LinearAttentionLayer: (_PooledStates,),
    LinearAttentionAndFullAttentionLayer: (_PooledStates, PooledTokens),
    LinearAttentionAndSlidingWindowAttentionLayer: (_PooledStates, _PooledWindow),
    DummyLayer: (PooledLayer,),
}
# Classes in the files of models, which aren't imported for their sake.
_PARTS_BY_NAME: Mapping[str, tuple[type, ...]] = {"MiniMaxM3VLSparseCacheLayer": (_PooledIndexKeys,)}


@cache
def _pooled_class(kind: Any) -> Any:
    parts = _PARTS.get(kind) or _PARTS_BY_NAME.get(kind.__name__)
    # transformers registers each subclass with a layer type as the class of all such layers.
    return None if parts is None else type(f"Pooled{kind.__name__}", (*parts, kind), {"_layer_type": None})


def _kind_of(layer: object) -> Any:
    return type(layer)


def can_be_pooled(layer: object) -> bool:
    """Whether ``pool_layer`` knows the layer's class, exactly: a subclass may keep more."""
    return _pooled_class(_kind_of(layer)) is not None


def pool_layer(layer: object, pools: Pools) -> PooledLayer:
    """A layer that takes the place of an empty one of a model's cache, and keeps its tensors in pools."""
    kind = _pooled_class(_kind_of(layer))
    assert kind is not None, "can_be_pooled"
    pooled = kind.__new__(kind)
    vars(pooled).update(vars(layer), pools=pools)
    assert isinstance(pooled, PooledLayer)
    return pooled
