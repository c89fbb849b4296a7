"""Slot decisions on the device, by operations of fixed shape and without a host synchronisation.

Where a step can't need more experts than its layer has slots (``slots_obstacle``), a decision needs no plan: one kernel a
layer marks the needed experts, lists the missing ones, evicts the lowest scores among the others, and updates the pool's
tables; a second one copies the listed records out of pinned host memory. The idea is FreeToken's; the evictions and slots are
the same as the host's (``planner/evictions.py``, ``planner/expert_passes.py``), so that host and device can take turns.
Between ``enter`` and ``leave`` the pool's device tables are valid and the host's are stale (on the CPU they are the same
memory).

Legend of shape suffixes: L layers of the pool, E experts, Q slots of a layer, N (token, k) pairs, M misses at most (=
N), D rows of ``UseHistory.decayed``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from epslots.arrays import IntArray
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.slot_pool import SlotPool
from epslots.device_copy import copy_to_device
from epslots.errors import ConfigError
from epslots.moe.expert_compute import ExpertCompute
from epslots.planner.use_history import ROWS, SCALE_SHIFTS_D, SCORE_SHIFT, SHIFTS, SNAPSHOT_EVERY, STEP_BITS, USE, UseHistory

# A score is (sum over D of factors * decayed >> SCORE_SHIFT) << STEP_BITS, plus the step of the last use.
SLOWEST, STILL = len(SHIFTS) - 1, ROWS - 1
DEVICE_POLICIES = ("lru", "lfu", "lrfu", "adaptive")
DEFAULT_DEVICE_POLICY = "adaptive"


def score_factors(policy: str, weights_D: IntArray) -> IntArray:
    """The weight of each row of ``decayed`` in a policy's scores: int64 [D].

    ``adaptive`` comes without its knowledge of experts that follow each other, a table of E x E on the device. The host's
    learned ``weights_D`` stay as they are while the device decides.
    """
    factors_D = np.zeros(ROWS, np.int64)
    if policy == "adaptive":
        return weights_D << SCALE_SHIFTS_D
    if policy != "lru":
        factors_D[SHIFTS.index(7)] = 1 << SCORE_SHIFT
    if policy == "lrfu":
        factors_D[SHIFTS.index(4)] = 2 << SCORE_SHIFT
    return factors_D


@dataclass(frozen=True)
class DeviceLayer:
    """One layer's part of the state: views, made once.

    Attributes:
        number: the layer's number in its pool.
        start: its first slot.
        slot_of_E: int64 [E], the pool's table on the device.
        expert_of_Q: int64 [Q], the pool's table on the device.
        last_use_E: int64 [E], the device's copy of ``UseHistory.last_use``.
        decayed_DE: int64 [D, E], the device's copy of ``UseHistory.decayed``.
        step: int64 [1], steps that the history counts.
        factors_D: int64 [D], from ``score_factors``.
        tally_3: int64 [3], hits, misses and evictions since ``DeviceSlots.enter``.
    """

    number: int
    start: int
    slot_of_E: torch.Tensor
    expert_of_Q: torch.Tensor
    last_use_E: torch.Tensor
    decayed_DE: torch.Tensor
    step: torch.Tensor
    factors_D: torch.Tensor
    tally_3: torch.Tensor


@dataclass(frozen=True)
class Missing:
    """The experts that a layer's step has to fetch. One set of buffers serves all layers, one after the other on the stream.

    Attributes:
        expert_M: int64 [M], the missing experts by rising id.
        slot_M: int64 [M], the slot of the pool that each is fetched into.
        count: int64 [1], number of valid entries.
    """

    expert_M: torch.Tensor
    slot_M: torch.Tensor
    count: torch.Tensor


class DeviceCounts(NamedTuple):
    """A layer's counters while the device decided."""

    steps: int
    hits: int
    misses: int
    evictions: int


class Kernels(Protocol):
    """The two operations of a layer's step, queued on the current stream."""

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        """Enter a step in the layer's state, and list its missing experts.

        Args:
            layer: its state is changed.
            ids_N: int64, the experts needed, in any order and number up to Q; ids from E on need no slot.
            missing: filled.
        """
        ...

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        """Copy the missing experts' records into their slots."""
        ...


class TorchKernels:
    """The decision as torch operations: for the CPU, and the reference of the Triton kernels.

    ``decide`` never reads a value on the host; ``copy`` does, which costs nothing on the CPU alone.
    """

    def __init__(self, loader: ExpertLoader) -> None:
        self._loader = loader
        device = loader.pool.device
        self._shift_D1 = torch.tensor([*SHIFTS, 63], device=device)[:, None]  # nothing is lost by a shift of 63
        self._use_D1 = torch.tensor([*[USE] * len(SHIFTS), 0], device=device)[:, None]

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        experts, slots = layer.slot_of_E.shape[0], layer.expert_of_Q.shape[0]
        device, most = ids_N.device, ids_N.shape[0]
        needed_E = torch.zeros(experts + 1, dtype=torch.bool, device=device)
        needed_E = needed_E.index_fill_(0, ids_N.clamp(max=experts), True)[:experts]
        score_E = self._record(layer, needed_E)

        resident_E = layer.slot_of_E >= 0
        missing_E = needed_E & ~resident_E
        count = missing_E.sum()
        number_E = torch.arange(experts, device=device)
        expert_M = torch.where(missing_E, number_E, experts).sort().values[:most]

        # The order in which slots are taken: empty ones by position, then residents that aren't needed by rising score.
        order_E = score_E.sort(stable=True).indices
        rank_E = torch.empty_like(order_E).index_copy_(0, order_E, number_E)
        number_Q = torch.arange(slots, device=device)
        occupant_Q = layer.expert_of_Q
        sitting_Q = occupant_Q.clamp(min=0)
        turn_Q = torch.where(needed_E[sitting_Q], experts, rank_E[sitting_Q])
        turn_Q = torch.where(occupant_Q < 0, number_Q - slots, turn_Q)
        position_M = turn_Q.sort(stable=True).indices[:most]
        displaced_M = occupant_Q[position_M]

        # Invalid entries go to one place past the end.
        valid_M = number_Q[:most] < count
        gone_M = torch.where(valid_M & (displaced_M >= 0), displaced_M, experts)
        come_M = torch.where(valid_M, expert_M, experts)
        slot_M = layer.start + position_M
        after_E = torch.nn.functional.pad(layer.slot_of_E, (0, 1)).index_fill_(0, gone_M, -1).index_copy_(0, come_M, slot_M)
        after_Q = torch.nn.functional.pad(occupant_Q, (0, 1))
        after_Q = after_Q.index_copy_(0, torch.where(valid_M, position_M, slots), expert_M)
        layer.slot_of_E.copy_(after_E[:experts])
        layer.expert_of_Q.copy_(after_Q[:slots])

        evictions = (valid_M & (displaced_M >= 0)).sum()
        layer.tally_3.add_(torch.stack([needed_E.sum() - count, count, evictions]))
        missing.count.copy_(count)
        missing.expert_M[:most].copy_(expert_M)
        missing.slot_M[:most].copy_(slot_M)

    def _record(self, layer: DeviceLayer, needed_E: torch.Tensor) -> torch.Tensor:
        """Update the history like the host's ``record_use``; returns the scores, int64 [E]."""
        step, decayed_DE = layer.step.add_(1), layer.decayed_DE
        decayed_DE.sub_(decayed_DE >> self._shift_D1).add_(self._use_D1 * needed_E)
        still = (step % SNAPSHOT_EVERY == 0) | (step & (step - 1) == 0)
        decayed_DE[STILL].copy_(torch.where(still, decayed_DE[SLOWEST], decayed_DE[STILL]))
        layer.last_use_E.copy_(torch.where(needed_E, step, layer.last_use_E))
        uses_E = (decayed_DE * layer.factors_D[:, None]).sum(0)
        return ((uses_E >> SCORE_SHIFT) << STEP_BITS) + layer.last_use_E

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        count = int(missing.count)
        experts, slots = missing.expert_M[:count].tolist(), missing.slot_M[:count].tolist()
        store, memory = self._loader.store, self._loader.pool.memory
        done = 0
        try:
            for expert, slot in zip(experts, slots, strict=True):
                memory[slot].copy_(store.record(self._loader.store_layers[layer.number], expert))
                done += 1
        finally:  # a corrupt record is in no slot, and neither are those after it
            layer.slot_of_E[experts[done:]] = -1
            layer.expert_of_Q[[slot - layer.start for slot in slots[done:]]] = -1


def slots_obstacle(loader: ExpertLoader, pairs: int) -> str | None:
    """The reason why the device can't decide about a pool's slots, as a sentence's end; None if it can.

    Args:
        loader: serves the pool.
        pairs: the most (token, k) pairs of a step, each of which may need another expert.
    """
    pool = loader.pool
    misses = [layer for layer in range(len(pool.layers)) if not pool.holds_all_of(layer)]
    if loader.transport is not None:
        return "ranks learn from each other's counts what to fetch, and that is the host's part"
    for layer in misses:
        if pool.quotas[layer] < pairs:
            return f"{pool.layers[layer].name} has {pool.quotas[layer]} slots, and a step may need {pairs} experts"
        if loader.store.manifest.layers[loader.store_layers[layer]].record != pool.layout:
            return f"the records of {pool.layers[layer].name} are kept in another form than their slots'"
    if misses and pool.device.type == "cuda":
        if not loader.store.pinned:
            return "the host store isn't pinned, so the GPU can't read it"
        if importlib.util.find_spec("triton") is None:
            return "triton isn't installed, with which the GPU would read the host store"
    return None


class DeviceSlots:
    """A pool whose slots the device decides about, between ``enter`` and ``leave``.

    Args:
        loader: serves the pool, which has no ``slots_obstacle``.
        kernels: torch's on the CPU, Triton's on CUDA.
        pairs: the most (token, k) pairs of a step.
        policy: the eviction policy, one of ``DEVICE_POLICIES``. It may be another than the host's: each continues with the
            history that the other leaves.

    Attributes:
        layers: each layer's state.
        misses_L: int64 [L], misses of each layer since ``enter``.
    """

    def __init__(self, loader: ExpertLoader, kernels: Kernels, pairs: int, *, policy: str = DEFAULT_DEVICE_POLICY) -> None:
        pool = loader.pool
        self._loader, self._pool, self._pairs = loader, pool, pairs
        self._kernels = kernels
        count, experts = pool.slot_of_device.shape
        self._policy = policy
        self._last_use = torch.zeros((count, experts), dtype=torch.int64, device=pool.device)
        self._decayed = torch.zeros((count, ROWS, experts), dtype=torch.int64, device=pool.device)
        self._factors = torch.zeros((count, ROWS), dtype=torch.int64, device=pool.device)
        self._steps = torch.zeros((count, 1), dtype=torch.int64, device=pool.device)
        self._tallies = torch.zeros((count, 3), dtype=torch.int64, device=pool.device)
        self.misses_L = self._tallies[:, 1]
        self._missing = Missing(*(torch.zeros(size, dtype=torch.int64, device=pool.device) for size in (pairs, pairs, 1)))
        self._entered = np.zeros(count, np.int64)
        self.layers = tuple(self._view(layer) for layer in range(count))

    def _view(self, layer: int) -> DeviceLayer:
        pool = self._pool
        experts, slot_range = pool.layers[layer].num_experts, pool.slot_range(layer)
        return DeviceLayer(
            number=layer,
            start=slot_range.start,
            slot_of_E=pool.slot_of_device[layer, :experts],
            expert_of_Q=pool.expert_of_device[slot_range],
            last_use_E=self._last_use[layer, :experts],
            decayed_DE=self._decayed[layer, :, :experts],
            step=self._steps[layer],
            factors_D=self._factors[layer],
            tally_3=self._tallies[layer],
        )

    def enter(self, histories: Sequence[UseHistory], steps: Sequence[int]) -> None:
        """Let the device decide from now on.

        Args:
            histories: each layer's row, on the host.
            steps: the steps that each of them counts.
        """
        self._loader.wait_all()
        self._pool.publish_all()
        last_use, decayed = np.zeros(self._last_use.shape, np.int64), np.zeros(self._decayed.shape, np.int64)
        for layer, history in enumerate(histories):
            experts = len(history.last_use)
            last_use[layer, :experts], decayed[layer, :, :experts] = history.last_use, history.decayed
        factors = np.stack([score_factors(self._policy, history.weights) for history in histories])
        self._entered[:] = steps
        state = (last_use, self._last_use), (decayed, self._decayed), (factors, self._factors), (self._entered, self._steps)
        for host, device in state:
            copy_to_device(host, device)
        self._tallies.zero_()

    def prepare(self, layer: int, ids_N: torch.Tensor) -> None:
        """Fetch every expert that these pairs need into the layer's slots, before later queued work.

        Args:
            layer: its number in the pool.
            ids_N: int64, on the device; ids from E on need no slot.

        Raises:
            ConfigError: there are more pairs than the device can decide about.
            CorruptExpertError: a record differs from its digest (on CUDA all were verified before). It entered no slot.
        """
        if ids_N.shape[0] > self._pairs:
            raise ConfigError(
                f"a step of {ids_N.shape[0]} (token, expert) pairs, and the device decides about slots in steps of "
                f"{self._pairs} at most; close the DecodeGraph before the model is used otherwise"
            )
        state = self.layers[layer]
        self._kernels.decide(state, ids_N, self._missing)
        self._kernels.copy(state, self._missing)

    def leave(self, histories: Sequence[UseHistory]) -> tuple[list[int], list[DeviceCounts]]:
        """Let the host decide again: update its tables and the histories. Synchronises with the device.

        Returns:
            The steps that each history counts now, and each layer's counters since ``enter``.
        """
        last_use, decayed = self._last_use.cpu().numpy(), self._decayed.cpu().numpy()
        steps: list[int] = self._steps[:, 0].tolist()
        adopt_device_tables(self._pool)
        for layer, history in enumerate(histories):
            experts = len(history.last_use)
            history.last_use[:] = last_use[layer, :experts]
            history.decayed[:] = decayed[layer, :, :experts]
        tallies = [
            DeviceCounts(step - before, *counts)
            for step, before, counts in zip(steps, self._entered.tolist(), self._tallies.tolist(), strict=True)
        ]
        self._tallies.zero_()
        self._entered[:] = steps
        return steps, tallies


def adopt_device_tables(pool: SlotPool) -> None:
    """Copy the pool's device tables to the host's; a no-op where they are the same memory, as on the CPU."""
    for host, device in ((pool.slot_of, pool.slot_of_device), (pool.expert_of, pool.expert_of_device)):
        if host.ctypes.data != device.data_ptr():
            # Waits for the current stream, and so for copies to the device that are still queued there.
            host[:] = device.cpu().numpy()


class DeviceExperts:
    """Computes one layer while the device rules its slots; the layer takes it for one that never misses.

    Args:
        inner: computes from the slots.
        slots: decides about them; None for a layer with a slot for every expert.
        layer: the layer's number in the pool.

    Attributes:
        calls: steps that went through Python. A captured step is repeated without.
    """

    def __init__(self, inner: ExpertCompute, slots: DeviceSlots | None, layer: int) -> None:
        self._inner = inner
        self._slots = slots
        self._layer = layer
        self.calls = 0

    def execute_resident(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """Fetch missing experts, then ``ExpertCompute.execute``."""
        self.calls += 1
        if self._slots is not None:
            self._slots.prepare(self._layer, ids_N)
        return self._inner.execute_resident(hidden_TH, ids_N)
