"""Slot decisions on the device, by operations of fixed shape and without a host synchronisation.

Where a step can't need more experts than its layer has slots (``slots_obstacle``), a decision needs no plan: one kernel a
layer marks the needed experts, lists the missing ones, evicts the lowest scores among the others, and updates the pool's
tables; a second one copies the listed records out of pinned host memory. The idea is FreeToken's; the evictions and slots are
the same as the host's (``planner/evictions.py``, ``planner/expert_passes.py``), so that host and device can take turns. Two
more kernels choose prefetches, by the host's rule, too (``planner/prefetch_policy.py``), and copy them. Between ``enter`` and
``leave`` the pool's device tables are valid and the host's are stale (on the CPU they are the same memory).

Legend of shape suffixes: L layers of the pool, E experts, Q slots of a layer, N (token, k) pairs, M misses at most (=
N), F prefetches of a layer at most, D rows of ``UseHistory.decayed``.
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
from epslots.planner.prefetch_policy import CHANGING_SHARE, PrefetchVerdict
from epslots.planner.use_history import ROWS, SCALE_SHIFTS_D, SCORE_SHIFT, SHIFTS, UseHistory

# A score is (sum over D of factors * decayed >> SCORE_SHIFT) << STEP_BITS, plus the step of the last use.
SLOWEST, STILL = len(SHIFTS) - 1, ROWS - 1
DEVICE_POLICIES = ("lru", "lfu", "lrfu", "adaptive")
DEFAULT_DEVICE_POLICY = "adaptive"
# Prefetches of a layer, at most: in the time of a layer a link brings a few experts.
MOST_PREFETCHES = 16
UNBOUNDED = 1 << 62
"""Bytes of a step's fetches where no budget bounds its prefetches."""


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
class DevicePrefetches:
    """One layer's prefetches: views, made once.

    Attributes:
        expected_E: int64 [E], the predicted usage of experts that were absent when the layer was predicted last.
        verdict_3: int64 [3], a ``PrefetchVerdict``.
        expert_F, slot_F: int64 [F], the fetched experts, the likeliest first, and the slot of the pool that it goes to.
        count: int64 [1], number of valid entries.
        arrived_F: int64 [F], ``Kernels.chunks`` of them have arrived; counted while they are copied.
        dropped_F: int64 [F], 1 = not wanted any more: read while they are copied.
        fetched: int64 [1], prefetches since ``DeviceSlots.enter``.
    """

    expected_E: torch.Tensor
    verdict_3: torch.Tensor
    expert_F: torch.Tensor
    slot_F: torch.Tensor
    count: torch.Tensor
    arrived_F: torch.Tensor
    dropped_F: torch.Tensor
    fetched: torch.Tensor


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
        left: int64 [1], bytes that the running step may still fetch ahead; of all layers.
        ahead: the layer's prefetches.
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
    left: torch.Tensor
    ahead: DevicePrefetches


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
    prefetches: int


class Kernels(Protocol):
    """The operations of a layer's step, queued on the current stream.

    Attributes:
        chunks: pieces in which a record is copied ahead.
    """

    chunks: int

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        """Enter a step in the layer's state, and list its missing experts. Prefetches that it doesn't need are dropped.

        Args:
            layer: its state is changed.
            ids_N: int64, the experts needed, in any order and number up to Q; ids from E on need no slot.
            missing: filled.
        """
        ...

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        """Copy the missing experts' records into their slots."""
        ...

    def choose(self, layer: DeviceLayer, usage_E: torch.Tensor, running: torch.Tensor) -> None:
        """Judge the layer's last prediction, and enter and list its prefetches by a new one.

        Args:
            layer: its state is changed. Its latest prefetches are copied, and its latest step is decided.
            usage_E: int32, how likely the layer's next step uses each expert, in 256ths.
            running: int64 [1], the misses of the layer that runs: with some, the link is busy.
        """
        ...

    def copy_ahead(self, layer: DeviceLayer) -> None:
        """Copy the listed prefetches, in order, while they aren't dropped. May run beside ``decide`` of the same layer."""
        ...


def slots_obstacle(loader: ExpertLoader, pairs: int) -> str | None:
    """The reason why the device can't decide about a pool's slots, as a sentence's end; None if it can.

    Args:
        loader: serves the pool.
        pairs: the most (token, k) pairs of a step, each of which may need another expert.
    """
    pool = loader.pool
    misses = [layer for layer in range(len(pool.layers)) if not pool.holds_all_of(layer)]
    if loader.grouped:
        return "ranks learn from each other's counts what to fetch, and that is the host's part"
    for layer in misses:
        if pool.quotas[layer] < pairs:
            return f"{pool.layers[layer].name} has {pool.quotas[layer]} slots, and a step may need {pairs} experts"
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
        left: int64 [1], bytes that the running step may still fetch ahead; None = unbounded.

    Attributes:
        layers: each layer's state.
        misses_L: int64 [L], misses of each layer since ``enter``.
        misses: int64 [1], those of the layer that was decided last.
    """

    def __init__(
        self,
        loader: ExpertLoader,
        kernels: Kernels,
        pairs: int,
        *,
        policy: str = DEFAULT_DEVICE_POLICY,
        left: torch.Tensor | None = None,
    ) -> None:
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
        self.misses = self._missing.count
        self._left = torch.full((1,), UNBOUNDED, dtype=torch.int64, device=pool.device) if left is None else left
        self._expected = torch.zeros_like(self._last_use)
        self._verdicts = torch.zeros((count, len(PrefetchVerdict._fields)), dtype=torch.int64, device=pool.device)
        self._lists = torch.zeros((4, count, MOST_PREFETCHES), dtype=torch.int64, device=pool.device)
        self._totals = torch.zeros((2, count, 1), dtype=torch.int64, device=pool.device)
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
            left=self._left,
            ahead=self._view_ahead(layer, experts, min(max(pool.quotas[layer] // CHANGING_SHARE, 1), MOST_PREFETCHES)),
        )

    def _view_ahead(self, layer: int, experts: int, most: int) -> DevicePrefetches:
        expert_F, slot_F, arrived_F, dropped_F = self._lists[:, layer, :most]
        return DevicePrefetches(
            expected_E=self._expected[layer, :experts],
            verdict_3=self._verdicts[layer],
            expert_F=expert_F,
            slot_F=slot_F,
            count=self._totals[0, layer],
            arrived_F=arrived_F,
            dropped_F=dropped_F,
            fetched=self._totals[1, layer],
        )

    def enter(
        self, histories: Sequence[UseHistory], steps: Sequence[int], verdicts: Sequence[PrefetchVerdict] | None = None
    ) -> None:
        """Let the device decide from now on.

        Args:
            histories: of each layer, on the host.
            steps: the steps that each of them counts.
            verdicts: on each layer's predictions; None = they are good.
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
        good = PrefetchVerdict(active=True, predicted=0, used=0)
        copy_to_device(np.array([good] * len(steps) if verdicts is None else verdicts, np.int64), self._verdicts)
        for counted in (self._tallies, self._expected, self._totals):
            counted.zero_()

    def prepare(self, layer: int, ids_N: torch.Tensor) -> None:
        """Fetch every expert that these pairs need into the layer's slots, before later queued work; raises as ``decide``."""
        self.decide(layer, ids_N)
        self.copy(layer)

    def decide(self, layer: int, ids_N: torch.Tensor) -> None:
        """Decide the slots of these pairs' experts, and list the missing ones.

        Args:
            layer: its number in the pool.
            ids_N: int64, on the device; ids from E on need no slot.

        Raises:
            ConfigError: there are more pairs than the device can decide about: the step isn't the engine's.
        """
        if ids_N.shape[0] > self._pairs:
            raise ConfigError(
                f"a step of {ids_N.shape[0]} (token, expert) pairs, and the device decides about slots in steps of "
                f"{self._pairs} at most; end the engine's requests before the model is used otherwise"
            )
        self._kernels.decide(self.layers[layer], ids_N, self._missing)

    def copy(self, layer: int) -> None:
        """Copy the experts that ``decide`` found missing.

        Raises:
            CorruptExpertError: a record differs from its digest (on CUDA all were verified before). It entered no slot.
        """
        self._kernels.copy(self.layers[layer], self._missing)

    def choose(self, layer: int, usage_E: torch.Tensor, running: torch.Tensor) -> None:
        """Choose a layer's prefetches by its predicted usage (``Kernels.choose``)."""
        self._kernels.choose(self.layers[layer], usage_E, running)

    def copy_ahead(self, layer: int) -> None:
        """Copy what ``choose`` has chosen for a layer."""
        self._kernels.copy_ahead(self.layers[layer])

    def leave(self, histories: Sequence[UseHistory]) -> tuple[list[int], list[DeviceCounts], list[PrefetchVerdict]]:
        """Let the host decide again: update its tables and the histories. Synchronises with the device.

        Returns:
            The steps that each history counts now, each layer's counters since ``enter``, and the verdicts on its predictions.
        """
        last_use, decayed = self._last_use.cpu().numpy(), self._decayed.cpu().numpy()
        steps: list[int] = self._steps[:, 0].tolist()
        read_device_tables(self._pool)
        for layer, history in enumerate(histories):
            experts = len(history.last_use)
            history.last_use[:] = last_use[layer, :experts]
            history.decayed[:] = decayed[layer, :, :experts]
        counts = torch.cat([self._tallies, self._totals[1]], 1).tolist()
        tallies = [
            DeviceCounts(step - before, *of) for step, before, of in zip(steps, self._entered.tolist(), counts, strict=True)
        ]
        verdicts = [PrefetchVerdict(bool(active), *sums) for active, *sums in self._verdicts.tolist()]
        for counted in (self._tallies, self._totals):
            counted.zero_()
        self._entered[:] = steps
        return steps, tallies, verdicts


def read_device_tables(pool: SlotPool) -> None:
    """Copy the pool's device tables to the host's; a no-op where they are the same memory, as on the CPU."""
    for host, device in ((pool.slot_of, pool.slot_of_device), (pool.expert_of, pool.expert_of_device)):
        if host.ctypes.data != device.data_ptr():
            # Waits for the current stream, and so for copies to the device that are still queued there.
            host[:] = device.cpu().numpy()
