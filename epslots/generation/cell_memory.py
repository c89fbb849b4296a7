"""``CellMemory``: slots of experts read as the cells of a row cache (``models/cache_slots.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from epslots.arrays import IntArray
from epslots.cache.slot_pool import SlotPool
from epslots.errors import ConfigError
from epslots.generation.free_cells import CellArray, CellNumbers
from epslots.models.cache_slots import CacheSlots, cell_offsets, in_cells
from epslots.models.model_shape import CacheTensor


class CellMemory:
    """One pool's slots as cells. All of its memory is numbered, also the slots that hold experts.

    Args:
        pool: has the cache's own slots.
        sizes: of the exchange.
        cache: the tensors that the model's own cache keeps of a sequence.

    Attributes:
        pool, sizes: as given.
        numbers: of the cells that rows may get, level by level. The last of the memory is ``no_token``, and zero.

    Raises:
        ConfigError: another cache is in these slots.
    """

    def __init__(self, pool: SlotPool, sizes: CacheSlots, cache: Sequence[CacheTensor]) -> None:
        if pool.has_reader:
            raise ConfigError(
                "another engine keeps its requests in this model's slots (kv_tokens='auto'); close its batcher before, or "
                "give this one a number of kv_tokens"
            )
        assert len(pool.level_slots(0)) == sizes.own_slots
        pool.read_by(self)
        self.pool, self.sizes = pool, sizes
        tensors = [tensor for tensor in cache if in_cells(tensor)]
        self._offset_of = dict(zip(tensors, cell_offsets(tensors)[0], strict=True))
        total = pool.num_slots * sizes.cells_per_slot
        own, *ceded = (self._cells_of(pool.level_slots(level)) for level in range(sizes.most_levels + 1))
        self.numbers = CellNumbers((own[own != total - 1], *ceded), total - 1, total)
        pool.memory[-1, -sizes.cell_bytes :].zero_()

    def _cells_of(self, slots: IntArray) -> CellArray:
        cells = slots[:, None] * self.sizes.cells_per_slot + np.arange(self.sizes.cells_per_slot)
        return cells.ravel()[::-1].astype(np.int32)

    def view(self, tensor: CacheTensor) -> torch.Tensor:
        """The entries of a tensor that is ``in_cells``, [cells, *its shape], in the slots' memory."""
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        flat = self.pool.memory.view(-1)[self._offset_of[tensor] :]
        typed = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
        inner = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        return typed.as_strided((self.numbers.total, *tensor.shape), (self.sizes.cell_bytes // dtype.itemsize, *inner))

    def close(self) -> None:
        """Another cache may be in the slots from now on."""
        self.pool.read_by(None)
