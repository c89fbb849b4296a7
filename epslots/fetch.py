"""The mover: the only code that fills slots.

A fetch moves one expert's record into one slot as a single contiguous copy. On CUDA it is queued on the stream that computes:
in order with the kernels that still read what gives way, and with those that read what comes. It starts from the pinned store
itself, or from a pinned staging record where the store couldn't be pinned.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.host_store import HostStore
from epslots.slot_pool import SlotPool
from epslots.telemetry import Telemetry


class Mover:
    """Serves the fetches of one pool from the node's host store.

    Args:
        pool: the slots to fill.
        store: where records come from.
        store_layers: the model's (and the store's) layer index of each of the pool's layers: a model whose experts have two
            layouts has two pools, and ``layer`` in the methods below counts within one.
        telemetry: counts bytes and evictions under the store's layer indices.
    """

    def __init__(self, pool: SlotPool, store: HostStore, store_layers: tuple[int, ...], telemetry: Telemetry) -> None:
        self.pool = pool
        self.store = store
        self.store_layers = store_layers
        self.telemetry = telemetry
        self._staging: torch.Tensor | None = None
        if pool.device.type == "cuda" and not store.pinned:
            self._staging = torch.empty(pool.layout.nbytes, dtype=torch.uint8, pin_memory=True)

    def fetch(self, layer: int, experts: NDArray[np.int64], slots: NDArray[np.int64], evicted: NDArray[np.int64]) -> None:
        """Fill ``slots`` with ``experts`` of one layer in the place of ``evicted`` (-1 = empty), in order.

        On return the tables name the new content, and work queued on the current stream sees it.

        Raises:
            CorruptExpertError: a record differs from its digest. It entered no slot; those before it did.
        """
        self.pool.vacate(layer, evicted)
        done = 0
        try:
            for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
                self._copy(self.pool.memory[slot], self.store.record(self.store_layers[layer], expert))
                done += 1
        finally:
            self.pool.occupy(layer, experts[:done], slots[:done])
            self.telemetry.count_fetches(
                self.store_layers[layer],
                bytes_fetched=done * self.pool.layout.nbytes,
                evictions=int((evicted >= 0).sum()),
            )

    def fill(self, layer: int) -> None:
        """Load every expert of a layer that has a slot for each."""
        assert self.pool.holds_all_of(layer)
        experts = np.arange(self.pool.layers[layer].num_experts)
        self.fetch(layer, experts, experts + self.pool.window(layer).start, np.full_like(experts, -1))

    def check_content(self) -> None:
        """Assert that every occupied slot holds the store's record of its expert, byte for byte.

        Raises:
            AssertionError: naming the slot and the expert. It is a bug of ours.
        """
        for layer in range(len(self.pool.layers)):
            window = self.pool.window(layer)
            for slot, expert in enumerate(self.pool.expert_of[window].tolist(), window.start):
                if expert >= 0:
                    record = self.store.record(self.store_layers[layer], expert)
                    assert torch.equal(self.pool.memory[slot].cpu(), record), f"slot {slot} isn't expert {expert}"

    def _copy(self, slot: torch.Tensor, record: torch.Tensor) -> None:
        if self._staging is not None:
            torch.cuda.current_stream(self.pool.device).synchronize()  # the copy before may still read the staging record
            record = self._staging.copy_(record)
        slot.copy_(record, non_blocking=True)
