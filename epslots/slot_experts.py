"""The experts of one layer on one rank: rows and expert ids in, results out, computed from slots.

Rows are sorted by where their expert is; one grouped pass through the experts for each wave. Three numbers say where that is:
its *slot* in the whole pool, its *position* in the layer's window (slot - window start), and in a step of several waves its
*key* (wave * Q + position).

Legend of shape suffixes: T rows given, N = T * K (row, k) pairs, E experts, Q slots of the layer's window, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from epslots.device_copy import to_device
from epslots.eviction import IntArray
from epslots.fetch import Mover
from epslots.kernel import ExpertKernel
from epslots.residency import BoolArray
from epslots.shared_layer import Copies, OwnMove
from epslots.telemetry import Telemetry
from epslots.waves import Wave, plan_waves

_NOTHING = np.zeros(0, np.int64)


class SlotExperts:
    """Computes with one layer's window of slots, and fetches into it what is missing.

    Args:
        index: the layer's number among the model's MoE layers.
        pool_layer: its number within the mover's pool.
        num_experts: E, experts that have weights. Ids from here on stand for experts that return their input.
        kernel: computes rows sorted by slot.

    Attributes:
        slots: Q; ``quota_1`` is the same as int64 [1].
    """

    def __init__(
        self, *, index: int, pool_layer: int, num_experts: int, kernel: ExpertKernel, mover: Mover, telemetry: Telemetry
    ) -> None:
        pool = mover.pool
        self.pool = pool
        self.num_experts = num_experts
        self._index = index
        self._pool_layer = pool_layer
        self.kernel = kernel
        self._mover = mover
        self._telemetry = telemetry
        self._slot_of_E = pool.slot_of[pool_layer][:num_experts]
        self._slot_of_device_E = pool.slot_of_device[pool_layer][:num_experts]
        self.dtype = kernel.dtype
        self._read_window()

    def _read_window(self) -> None:
        self._window = self.pool.window(self._pool_layer)
        self.slots = self._window.stop - self._window.start
        self.quota_1 = np.array([self.slots])
        self._expert_of_Q = self.pool.expert_of[self._window]
        self.never_misses = self.pool.holds_all_of(self._pool_layer)

    def use_window(self) -> None:
        """Compute with the slots that the layer has by now."""
        self._read_window()
        self.kernel.use(self.pool.weights(self._pool_layer))
        self._telemetry.set_slots(self._index, self.slots)

    @property
    def resident_E(self) -> BoolArray:
        """Whether each expert is in a slot."""
        resident: BoolArray = self._slot_of_E >= 0
        return resident

    def zeros(self, rows: int) -> torch.Tensor:
        """Results [rows, H] where there is nothing to compute."""
        return torch.zeros(rows, self.kernel.hidden_size, dtype=self.dtype, device=self.pool.device)

    def waves(self, needed_E: BoolArray, score_E: IntArray, evicted_E: BoolArray) -> tuple[Wave, ...]:
        """The way to a step's outcome as ``residency.settle`` decided it; nothing if nothing is missing."""
        position_E = np.where(self._slot_of_E < 0, -1, self._slot_of_E - self._window.start)
        return plan_waves(needed_E, position_E, self._expert_of_Q, score_E, evicted_E)

    def fetch(self, wave: Wave, copies: Copies | None = None, *, agreed: bool = True) -> None:
        """Bring a wave's missing experts into their slots, and give peers their copies. Arguments as ``Mover.fetch``."""
        began = time.perf_counter()
        self._mover.fetch(
            self._pool_layer,
            wave.fetch_experts,
            wave.fetch_positions + self._window.start,
            wave.evicted,
            copies,
            agreed=agreed,
        )
        self._telemetry.count_stall(self._index, time.perf_counter() - began)

    def move(self, move: OwnMove, *, agreed: bool = True) -> None:
        """Do this rank's part of the moves at the end of a step: see ``Mover.fetch``."""
        experts, slots, evicted = _NOTHING, _NOTHING, _NOTHING
        if move.expert >= 0:
            experts, evicted = np.array([move.expert]), np.array([move.evicted])
            slots = (
                self._slot_of_E[evicted]
                if move.evicted >= 0
                else self._window.start + np.flatnonzero(self._expert_of_Q < 0)[:1]
            )
        began = time.perf_counter()
        self._mover.fetch(self._pool_layer, experts, slots, evicted, move.copies, agreed=agreed)
        self._telemetry.count_move(self._index, len(experts), time.perf_counter() - began)

    def pass_slot(self, taker: SlotExperts, evicted: int) -> None:
        """Pass a slot to a neighbouring layer; arguments as ``Mover.pass_slot``."""
        self._mover.pass_slot(self._pool_layer, taker._pool_layer, evicted)
        self.use_window()
        taker.use_window()

    def confirm(self) -> None:
        """Copies from peers, in whichever layer, have arrived: see ``Mover.confirm``."""
        self._mover.confirm()

    def execute(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """All pairs at once: every needed expert is in a slot. Returns [N, H], pair by pair."""
        if not len(ids_N):
            return self.zeros(0)
        key_E = torch.nn.functional.pad(self._slot_of_device_E - self._window.start, (0, 1), value=self.slots)
        order_N, key_N, ends_Q, rows_NH = _sort(hidden_TH, ids_N, key_E, self.slots)
        result_NH = self.kernel(rows_NH, ends_Q, key_N)
        return _unsort(result_NH, order_N)

    def execute_waves(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts_E: IntArray, waves: Sequence[Wave]
    ) -> torch.Tensor:
        """Wave after wave: a pair's key is (wave, position), so that each wave is a run of the sorted pairs.

        Args:
            counts_E: pairs of each expert, on the host.
        """
        keys = len(waves) * self.slots
        key_host = np.full(self.num_experts + 1, keys, np.int64)
        for number, wave in enumerate(waves):
            key_host[wave.experts] = number * self.slots + wave.positions
        key_E = to_device(key_host, ids_N.device)
        order_N, key_N, ends, rows_NH = _sort(hidden_TH, ids_N, key_E, keys)
        result_NH = torch.empty_like(rows_NH)
        start = 0
        for number, wave in enumerate(waves):
            if len(wave.fetch_experts):
                self.fetch(wave)
            rows = slice(start, start + int(counts_E[wave.experts].sum()))
            first_key = number * self.slots
            result_NH[rows] = self.kernel(
                rows_NH[rows], ends[first_key : first_key + self.slots] - start, key_N[rows] - first_key
            )
            start = rows.stop
        return _unsort(result_NH, order_N)


def _sort(
    hidden_TH: torch.Tensor, ids_N: torch.Tensor, key_E: torch.Tensor, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs by their expert's key.

    Returns:
        order_N (the pair in each sorted row), key_N (sorted), ends int32 [keys] (where each key's rows end), and the
        sorted rows' hidden states [N, H].
    """
    top_k = ids_N.shape[0] // hidden_TH.shape[0]
    key_N, order_N = torch.sort(key_E[ids_N], stable=True)
    ends = torch.searchsorted(key_N, torch.arange(keys, device=key_N.device), right=True, out_int32=True)
    return order_N, key_N, ends, hidden_TH[order_N // top_k]


def _unsort(result_NH: torch.Tensor, order_N: torch.Tensor) -> torch.Tensor:
    """Results in the order of the pairs."""
    return torch.empty_like(result_NH).index_copy_(0, order_N, result_NH)
