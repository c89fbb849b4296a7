"""``CacheSlots``: how slots hold cells of a row cache instead of experts, with ``kv_tokens="auto"``. Pure arithmetic.

A slot that holds cells is *ceded*: its layer can't use it. One pool's memory is read as cells of one size, so any of its slots
can be ceded, and no address ever changes:

    slots of layer 0           slots of layer 1           the cache's own slots, behind all layers
    [e3][e7][e0][cells][cells] [e5][e1][cells][cells] ... [cells][cells]
                      <-- ceded              <-- ceded

A cell has the entries of one token in all tensors that grow with tokens. All layers of the pool cede equally many slots, the
last of their ranges: a *level* is one slot of each. ``SlotPool`` keeps the levels, ``generation/cell_memory.py`` reads cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from epslots.layout import LayerSpec, RecordLayout, align
from epslots.models.model_shape import CacheTensor, ModelShape

CELL_ALIGNMENT = 16
"""Of a cell, and of each tensor's entry in it, in bytes."""
LEAST_SHARE = 4
"""Layers keep a quarter of their planned slots, rounded up: with few slots, one less costs the most misses."""


class CacheSlots(msgspec.Struct, frozen=True):
    """The sizes of the exchange between a row cache and one pool's slots.

    Attributes:
        layers: indices of the pool's MoE layers.
        cell_bytes: of a cell; a slot is a whole number of cells.
        cells_per_slot: that number.
        own_slots: slots that are the cache's for good. One cell of them stands for positions before a row's first token.
        most_levels: slots that each layer may cede.
    """

    layers: tuple[int, ...]
    cell_bytes: int
    cells_per_slot: int
    own_slots: int
    most_levels: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of the pool."""
        return self.cell_bytes * self.cells_per_slot

    @property
    def own_bytes(self) -> int:
        """Bytes of the cache's own slots."""
        return self.own_slots * self.slot_bytes

    @property
    def level_tokens(self) -> int:
        """Tokens that one level holds."""
        return len(self.layers) * self.cells_per_slot

    @property
    def least_tokens(self) -> int:
        """Tokens that the cache holds at least."""
        return self.tokens(0)

    @property
    def most_tokens(self) -> int:
        """Tokens that it holds at most: the capacity of one request."""
        return self.tokens(self.most_levels)

    def tokens(self, levels: int) -> int:
        """Tokens that the cache holds while each layer has ceded so many slots."""
        return self.own_slots * self.cells_per_slot - 1 + levels * self.level_tokens

    def levels_for(self, tokens: int) -> int:
        """Levels that hold so many tokens, or all there are."""
        return min(self.most_levels, max(0, -(-(tokens - self.least_tokens) // self.level_tokens)))


def in_cells(tensor: CacheTensor) -> bool:
    """Whether a tensor's entries are in cells: one for each token, in pools of all rows."""
    return tensor.kind == "token" and tensor.pooled


def cell_offsets(cache: Sequence[CacheTensor]) -> tuple[tuple[int, ...], int]:
    """The place of each tensor's entry in a cell, and the bytes of all, for tensors that are ``in_cells``."""
    offsets, end = [], 0
    for tensor in cache:
        offsets.append(end)
        end += align(tensor.entry_bytes, CELL_ALIGNMENT)
    return tuple(offsets), end


def exchange_obstacle(shape: ModelShape) -> str | None:
    """Why no slot of a model can hold cells of its cache, as a sentence's end; None if slots can."""
    if shape.pages is not None:
        return "it is served from pages, and only rows exchange memory with slots (cache='rows')"
    if shape.whole_prompts:
        return "its prompts are computed whole, and workspace is planned for the longest one"
    if any(tensor.kind == "token" and not tensor.pooled for tensor in shape.cache):
        return "some of its layers keep objects of their own for each request"
    cells = [tensor for tensor in shape.cache if in_cells(tensor)]
    if not cells:
        return "nothing in its cache grows with every token"
    layers = largest_pool(shape.layers)
    slot, cell = shape.layers[layers[0]].layout.nbytes, cell_offsets(cells)[1]
    return f"a token's {cell:,} bytes of cache are more than a slot's {slot:,}" if cell > slot else None


def plan_cache_slots(shape: ModelShape, quotas: Sequence[int], least_tokens: int) -> CacheSlots:
    """The exchange of a model without an ``exchange_obstacle``.

    Args:
        shape: the model.
        quotas: planned slots of each of its MoE layers.
        least_tokens: tokens that the cache shall hold at least.
    """
    layers = largest_pool(shape.layers)
    slot_bytes = shape.layers[layers[0]].layout.nbytes
    used = cell_offsets([tensor for tensor in shape.cache if in_cells(tensor)])[1]
    units = slot_bytes // CELL_ALIGNMENT
    cells = next(count for count in range(slot_bytes // used, 0, -1) if units % count == 0)
    own = -(-(least_tokens + 1) // cells)
    rooms = [quotas[layer] for layer in layers]
    return CacheSlots(layers, slot_bytes // cells, cells, own, min(room - -(-room // LEAST_SHARE) for room in rooms))


def largest_pool(layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """The layers whose experts are alike and take the most bytes together: the same on all ranks, with any slots."""
    members: dict[RecordLayout, list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(layer.layout, []).append(index)
    return tuple(max(members.values(), key=lambda pool: sum(layers[i].num_experts * layers[i].layout.nbytes for i in pool)))
