"""The slot pool: one block of device memory, cut into slots, and the tables of their content.

    slot_of[layer, expert]   the slot that holds an expert, -1 = absent
    expert_of[slot]          the expert id in a slot, -1 = empty

A layer owns a range of neighbouring slots, so that its experts are one strided tensor, which grouped matrix multiplication
reads in place. With ``kv_tokens="auto"`` it may cede the last slots of its range to the KV cache, which has further slots of
its own behind all ranges (``models/cache_slots.py``). The tables exist on the host, for plans, and on the device, where tokens
are sorted by them; on the CPU these are the same memory. ``ExpertLoader`` fills slots. A fetch first empties its slot in both
tables, and enters the expert once it is in flight: a failed fetch leaves a smaller cache, never a wrong one. Only the loader
knows which slots are in flight; readers of a slot call its ``wait`` first. A layer's row reaches the device with ``publish``,
once before it is read.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from epslots.arrays import IntArray
from epslots.cache.unpacking import Weight, weights_of
from epslots.compiled import compiled
from epslots.device_copy import copy_to_device
from epslots.layout import LayerSpec


def slot_weights(layer: LayerSpec, slots: torch.Tensor) -> dict[str, Weight]:
    """Slots, uint8 [Q, layout.nbytes], as weights [Q, ...] by the module's parameter names, which share their memory."""
    views = {}
    for spec in layer.layout.tensors:
        typed = slots[:, spec.offset : spec.offset + spec.nbytes].view(getattr(torch, spec.dtype))
        views[spec.name] = typed.view(typed.shape[0], *spec.shape)
    return weights_of(layer, views)


class SlotPool:
    """Slots of equal size for the MoE layers whose experts have equal layouts.

    Args:
        layers: the layers served, all with the same layout; indices below are positions in this sequence.
        quotas: slots of each layer, from 1 to its number of experts.
        device: the device of the slots. The memory is allocated here, once, and never moves.
        own_slots: slots of the KV cache, behind those of the layers.

    Attributes:
        memory: uint8 [slots, layout.nbytes].
        rooms: slots of each layer's range, those included that it has ceded.
        quotas: slots that each layer can use now.
        levels: slots that each layer has ceded, the last of its range.
        layouts: how often ranges were laid out. Views of them, and state by layer, are of one layout.
        slot_of, expert_of: the host's tables, int64 [layers, experts] and [slots].
        slot_of_device, expert_of_device: the device's.
        lock: held by a thread for its step: another thread's step could evict what this one computes with.
        reader: of cells in the slots; there may be one at a time.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], quotas: Sequence[int], device: torch.device, *, own_slots: int = 0
    ) -> None:
        assert len({layer.layout for layer in layers}) == 1
        assert all(1 <= q <= layer.num_experts for q, layer in zip(quotas, layers, strict=True))
        self.layers = tuple(layers)
        self.layout = layers[0].layout
        self.levels, self._own_slots = 0, own_slots
        self.layouts = 0
        self._lay_out(quotas)
        self.device = device
        self.memory = torch.empty(self.num_slots, self.layout.nbytes, dtype=torch.uint8, device=device)
        experts = max(layer.num_experts for layer in layers)
        shapes = (len(layers), experts), (self.num_slots,)
        tables = [torch.full(shape, -1, dtype=torch.int64, device="cpu") for shape in shapes]
        self.slot_of: IntArray = tables[0].numpy()
        self.expert_of: IntArray = tables[1].numpy()
        self.slot_of_device, self.expert_of_device = (table.to(device) for table in tables)
        self._unpublished = [False] * len(layers)
        self.lock = threading.Lock()
        self._reader: weakref.ref[object] | None = None

    def _lay_out(self, rooms: Sequence[int]) -> None:
        self.layouts += 1
        self.rooms = tuple(int(room) for room in rooms)
        self.quotas = tuple(room - self.levels for room in self.rooms)
        self.starts = tuple(int(s) for s in np.concatenate([[0], np.cumsum(self.rooms)]))

    @property
    def num_slots(self) -> int:
        """Slots of all layers, and the KV cache's own."""
        return self.starts[-1] + self._own_slots

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.layout.nbytes

    @property
    def has_reader(self) -> bool:
        """Whether a KV cache is in the slots that experts cede."""
        return self._reader is not None and self._reader() is not None

    def read_by(self, reader: object | None) -> None:
        """Let a KV cache be in the slots that experts cede, for as long as it lives; None = none."""
        self._reader = None if reader is None else weakref.ref(reader)

    def holds_all_of(self, layer: int) -> bool:
        """Whether every expert of the layer has a slot of its own. Nothing is evicted there then."""
        return self.quotas[layer] == self.layers[layer].num_experts

    def slot_range(self, layer: int) -> slice:
        """The slots that the layer can use."""
        return slice(self.starts[layer], self.starts[layer] + self.quotas[layer])

    def weights(self, layer: int) -> dict[str, Weight]:
        """The layer's slots as weights [quota, ...] by the module's parameter names, which share the slots' memory."""
        return slot_weights(self.layers[layer], self.memory[self.slot_range(layer)])

    def vacate(self, layer: int, experts: IntArray) -> int:
        """Empty the slots of these resident experts, int64 [any number]; -1 is skipped. Returns how many these are.

        The device's table changes with the next ``publish``.
        """
        self._unpublished[layer] = True
        return _vacate(self.slot_of[layer], self.expert_of, experts)

    def give_slot(self, giver: int, taker: int) -> None:
        """Shift the boundary between two neighbouring layers by one slot, ``boundary_slot``, which must be empty."""
        assert abs(giver - taker) == 1 and self.quotas[giver] > 1 and self.expert_of[self.boundary_slot(giver, taker)] == -1
        assert not self.levels, "the cache's cells are in the way"
        quotas = list(self.quotas)
        quotas[giver] -= 1
        quotas[taker] += 1
        self._lay_out(quotas)

    def boundary_slot(self, giver: int, taker: int) -> int:
        """The giver's slot that is next to the taker's."""
        slot_range = self.slot_range(giver)
        return slot_range.stop - 1 if taker > giver else slot_range.start

    def divide(self, quotas: Sequence[int]) -> None:
        """Give each layer another number of slots, with the same sum. All slots are empty afterwards."""
        assert sum(quotas) == self.starts[-1] and not self.levels
        assert all(1 <= q <= layer.num_experts for q, layer in zip(quotas, self.layers, strict=True))
        self.slot_of[:] = -1
        self.expert_of[:] = -1
        self._lay_out(quotas)
        self._unpublished = [True] * len(self.layers)

    def set_levels(self, levels: int) -> None:
        """Let all layers cede so many slots, or use them again; those must be empty."""
        assert 0 <= levels < min(self.rooms), f"{levels} levels of ranges of {self.rooms} slots"
        now, self.levels = self.levels, levels
        for level in range(now + 1, levels + 1):
            assert (self.expert_of[self.level_slots(level)] == -1).all(), "ceded slots are empty"
        self._lay_out(self.rooms)

    def level_slots(self, level: int) -> IntArray:
        """The slots of a level, one of each layer, int64 [layers]. Level 0 is the KV cache's own slots, int64 [own slots]."""
        if not level:
            return np.arange(self.starts[-1], self.num_slots)
        return np.array(self.starts[1:], np.int64) - level

    def occupy(self, layer: int, experts: IntArray, slots: IntArray) -> None:
        """Enter experts in empty slots of the layer, int64 [F] both. Their records are there, or in flight.

        The device's table changes with the next ``publish``.
        """
        self._unpublished[layer] = True
        done = _occupy(self.slot_of[layer], self.expert_of, experts, slots)
        assert done == len(experts), f"slot {slots[done]} isn't empty, or expert {experts[done]} is elsewhere"

    def publish(self, layer: int) -> None:
        """Copy the layer's row of ``slot_of`` to the device if it has changed. On the CPU they are the same memory.

        The upload is queued on the current stream, and the host may change its table at once. ``ExpertCompute`` calls this
        before it sorts by the row.
        """
        if self._unpublished[layer] and self.device.type != "cpu":
            copy_to_device(self.slot_of[layer], self.slot_of_device[layer])
        self._unpublished[layer] = False

    def publish_all(self) -> None:
        """Copy both tables to the device, which needs ``expert_of`` while it decides about slots (``device_slots.py``)."""
        for layer in range(len(self.layers)):
            self.publish(layer)
        if self.device.type != "cpu":
            copy_to_device(self.expert_of, self.expert_of_device)

    def check_integrity(self) -> None:
        """Assert that tables and quotas agree.

        Free + used = capacity, each table is the other's inverse, and the device's rows are equal where they are published.

        Raises:
            AssertionError: naming the layer and slot that break the rule. It is a bug of ours.
        """
        for layer, spec in enumerate(self.layers):
            slot_range = self.slot_range(layer)
            row, inside = self.slot_of[layer], self.expert_of[slot_range]
            resident = np.flatnonzero(row >= 0)
            assert (resident < spec.num_experts).all(), f"layer {layer}: an expert beyond {spec.num_experts}"
            slots = row[resident]
            assert ((slots >= slot_range.start) & (slots < slot_range.stop)).all(), f"layer {layer}: a slot outside its layer"
            wrong = resident[self.expert_of[slots] != resident]
            assert not len(wrong), f"layer {layer}: slot {row[wrong[:1]]} doesn't hold expert {wrong[:1]}"
            used = int((inside >= 0).sum())
            assert used == len(resident), f"layer {layer}: {used} slots in use for {len(resident)} experts"
        used, filled = int((self.slot_of >= 0).sum()), int((self.expert_of >= 0).sum())
        assert used == filled, f"{filled} slots hold experts, and {used} of them are in layers' ranges"
        rows = [layer for layer, unpublished in enumerate(self._unpublished) if not unpublished]
        assert np.array_equal(self.slot_of_device.cpu().numpy()[rows], self.slot_of[rows]), "slot_of differs on the device"
        assert self.memory.nbytes == self.nbytes == math.prod(self.memory.shape)


@compiled("int64(int64[::1], int64[::1], int64[::1])")
def _vacate(slot_of_E: IntArray, expert_of_S: IntArray, experts: IntArray) -> int:
    vacated = 0
    for expert in experts:
        if expert >= 0:
            expert_of_S[slot_of_E[expert]] = -1
            slot_of_E[expert] = -1
            vacated += 1
    return vacated


@compiled("int64(int64[::1], int64[::1], int64[::1], int64[::1])")
def _occupy(slot_of_E: IntArray, expert_of_S: IntArray, experts: IntArray, slots: IntArray) -> int:
    """Enter experts up to the first that can't be; returns how many were entered."""
    for number in range(len(experts)):
        expert, slot = experts[number], slots[number]
        if slot_of_E[expert] != -1 or expert_of_S[slot] != -1:
            return number
        slot_of_E[expert], expert_of_S[slot] = slot, expert
    return len(experts)
