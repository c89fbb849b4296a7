"""The experts of one layer on one rank: rows and expert ids in, results out, computed from slots.

Rows are sorted by where their expert is; one grouped pass through the experts for each wave. Three numbers say where that is:
its *slot* in the whole pool, its *position* in the layer's window (slot - window start), and in a step of several waves its
*key* (wave * Q + position).

Legend of shape suffixes: T rows given, N = T * K (row, k) pairs, E experts, Q slots of the layer's window, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from epslots.arrays import BoolArray, IntArray
from epslots.cache.expert_loader import ExpertLoader
from epslots.compiled import compiled
from epslots.device_copy import to_device
from epslots.moe.cpu_experts import CpuExperts, CpuRows
from epslots.moe.grouped_gemm import GroupedGemm
from epslots.planner.expert_passes import NO_PASS, ExpertPass, plan_passes
from epslots.planner.layer_planner import PeerCopies, RankMigration
from epslots.telemetry import Telemetry

_NOTHING = np.zeros(0, np.int64)

# What a pass costs besides reading its experts' weights, as bytes that are read meanwhile. On the CPU measured (90 us, most of
# them torch's); on CUDA reckoned from launches of some microseconds each: nothing else there is short enough to matter.
_PASS_BYTES = {"cpu": 2 << 20, "cuda": 16 << 20}


class Needs(NamedTuple):
    """What a step needs of a layer's experts, and what of it is in no slot; and how many experts these are."""

    needed_E: BoolArray
    missing_E: BoolArray
    needed: int
    missing: int


class SlotExperts:
    """Computes with one layer's window of slots, and fetches into it what is missing.

    Args:
        index: the layer's number among the model's MoE layers.
        pool_layer: its number within the mover's pool.
        num_experts: E, experts that have weights. Ids from here on stand for experts that return their input.
        kernel: computes rows sorted by slot.
        identity: whether there are any such ids.

    Attributes:
        slots: Q; ``quota_1`` is the same as int64 [1].
    """

    def __init__(
        self,
        *,
        index: int,
        pool_layer: int,
        num_experts: int,
        kernel: GroupedGemm,
        loader: ExpertLoader,
        telemetry: Telemetry,
        host: CpuExperts | None = None,
        identity: bool = False,
    ) -> None:
        pool = loader.pool
        self.pool = pool
        self.num_experts = num_experts
        self._index = index
        self._pool_layer = pool_layer
        self.kernel = kernel
        self.host = host
        self._loader = loader
        self._telemetry = telemetry
        self._slot_of_E = pool.slot_of[pool_layer][:num_experts]
        self._slot_of_device_E = pool.slot_of_device[pool_layer][:num_experts]
        self.dtype = kernel.dtype
        self._identity = identity
        self._worth = -(-_PASS_BYTES[pool.device.type] // pool.layout.nbytes)
        self._positions_E = np.empty(num_experts, np.int64)
        self._in_flight_E = np.zeros(num_experts, bool)
        self._read_window()

    def _read_window(self) -> None:
        self._window = self.pool.window(self._pool_layer)
        self.slots = self._window.stop - self._window.start
        self.quota_1 = np.array([self.slots])
        self._expert_of_Q = self.pool.expert_of[self._window]
        self.never_misses = self.pool.holds_all_of(self._pool_layer)
        # Read by captured steps, which are made anew when the window changes: so it stays where it is until then.
        self._keys = torch.arange(self.slots, device=self.pool.device)

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

    @property
    def fetches_meanwhile(self) -> bool:
        """Whether something can be computed while fetches are under way."""
        return self._loader.link.concurrent

    @property
    def record_bytes(self) -> int:
        """What crosses the link for an expert."""
        return self.pool.layers[self._pool_layer].record.nbytes

    @property
    def link_is_busy(self) -> bool:
        """Whether fetches are under way, of whichever layer."""
        return self._loader.link.busy

    def zeros(self, rows: int) -> torch.Tensor:
        """Results [rows, H] where there is nothing to compute."""
        return torch.zeros(rows, self.kernel.hidden_size, dtype=self.dtype, device=self.pool.device)

    def needs(self, counts_E: IntArray) -> Needs:
        """What a step with these pairs of each expert needs."""
        needed_E, missing_E = np.empty((2, self.num_experts), bool)
        needed, missing = _need(counts_E, self._slot_of_E, needed_E, missing_E)
        return Needs(needed_E, missing_E, needed, missing)

    def passes(
        self, counts_E: IntArray, score_E: IntArray, evicted_E: BoolArray, copies: PeerCopies | None = None
    ) -> tuple[ExpertPass, ...]:
        """The way to a step's outcome as ``residency.settle`` decided it; nothing if all that is needed is there.

        Args:
            counts_E: pairs that this rank computes.
            score_E, evicted_E: as in ``plan_passes``.
            copies: this rank's part of the step's copies between ranks.
        """
        position_E, in_flight_E, first_E = self._positions_E, self._in_flight_E, None
        tables = counts_E, self._slot_of_E, self._loader.in_flight, self._window.start, position_E, in_flight_E
        absent, late = _look_up(*tables)
        if late:
            self._loader.poll(self._slot_of_E[(counts_E > 0) & in_flight_E])
            absent, late = _look_up(*tables)
            self._loader.set_urgent(self._slot_of_E[(counts_E > 0) & in_flight_E])  # it is computed before what is fetched now
            self._telemetry.count(self._index, late=late)
        if not late and not absent:
            return ()
        if copies is not None and copies.sources:
            first_E = np.zeros(self.num_experts, bool)
            first_E[list(copies.sources)] = True
        return plan_passes(
            counts_E,
            position_E,
            self._expert_of_Q,
            score_E,
            evicted_E,
            concurrent=self._loader.link.concurrent,
            in_flight_E=in_flight_E if late else None,
            first_E=first_E,
            worth=self._worth,
        )

    def fetch(self, passes: Sequence[ExpertPass], copies: PeerCopies | None = None, *, agreed: bool = True) -> int:
        """Begin the fetches that need not wait for anything computed, and give peers their copies.

        Args:
            copies, agreed: as in ``ExpertLoader.fetch``.

        Returns:
            How many of the waves have their fetches under way.
        """
        if copies is None:
            return self._begin(passes, 0, 0)
        self._fetch(passes[0] if passes else NO_PASS, copies, agreed=agreed)
        return self._begin(passes, 1, 0)

    def _begin(self, passes: Sequence[ExpertPass], begun: int, computed: int) -> int:
        """Begin the fetches of waves from number ``begun`` on that wait for no more than ``computed`` waves."""
        while begun < len(passes) and passes[begun].after <= computed:
            if len(passes[begun].fetch_experts):
                self._fetch(passes[begun])
            begun += 1
        return begun

    def _fetch(self, wave: ExpertPass, copies: PeerCopies | None = None, *, agreed: bool = True) -> None:
        began = time.perf_counter()
        slots = wave.fetch_positions + self._window.start
        self._loader.fetch(self._pool_layer, wave.fetch_experts, slots, wave.evicted, copies, agreed=agreed)
        self._telemetry.count(self._index, stall_s=time.perf_counter() - began)

    def prefetch(self, experts: IntArray, evicted_E: BoolArray) -> None:
        """Begin to fetch what is expected to be needed into empty slots, and in the place of ``evicted_E``."""
        slots, displaced = np.empty((2, len(experts)), np.int64)
        found = _place(self._slot_of_E, evicted_E, self._expert_of_Q, self._window.start, slots, displaced)
        assert found == len(experts), "more is fetched ahead than there is room for"
        self._loader.fetch(self._pool_layer, experts, slots, displaced, urgent=False)
        self._telemetry.count(self._index, prefetches=len(experts))

    def move(self, move: RankMigration, *, agreed: bool = True) -> None:
        """Do this rank's part of the moves at the end of a step: see ``ExpertLoader.fetch``."""
        experts, slots, evicted = _NOTHING, _NOTHING, _NOTHING
        if move.expert >= 0:
            experts, evicted = np.array([move.expert]), np.array([move.evicted])
            slots = (
                self._slot_of_E[evicted]
                if move.evicted >= 0
                else self._window.start + np.flatnonzero(self._expert_of_Q < 0)[:1]
            )
        began = time.perf_counter()
        self._loader.fetch(self._pool_layer, experts, slots, evicted, move.copies, agreed=agreed, urgent=False)
        self._telemetry.count(self._index, moves=len(experts), move_s=time.perf_counter() - began)

    def pass_slot(self, taker: SlotExperts, evicted: int) -> None:
        """Pass a slot to a neighbouring layer; arguments as ``ExpertLoader.pass_slot``."""
        self._loader.pass_slot(self._pool_layer, taker._pool_layer, evicted)
        self.use_window()
        taker.use_window()

    def confirm(self) -> None:
        """PeerCopies from peers, in whichever layer, have arrived: see ``ExpertLoader.confirm``."""
        self._loader.confirm()

    def begin_on_host(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, hosted: IntArray, counts_E: IntArray
    ) -> CpuRows | None:
        """Let the rows of hosted experts set out for the host: before anything is queued that they needn't wait for."""
        if not len(hosted):
            return None
        assert self.host is not None
        return self.host.begin(hidden_TH, ids_N, hosted.tolist(), counts_E[hosted].tolist())

    def finish_on_host(self, begun: CpuRows | None, result_NH: torch.Tensor) -> torch.Tensor:
        """Compute hosted experts, and enter their results."""
        if begun is not None:
            assert self.host is not None
            began = time.perf_counter()
            self.host.finish(begun, result_NH)
            self._telemetry.count(self._index, hosted=len(begun.experts), hosted_s=time.perf_counter() - began)
        return result_NH

    def compute(
        self,
        hidden_TH: torch.Tensor,
        ids_N: torch.Tensor,
        counts_E: IntArray,
        passes: Sequence[ExpertPass],
        begun: int,
        here: int | None = None,
    ) -> torch.Tensor:
        """A step's pairs, as its waves have it. Returns [N, H], pair by pair. Arguments as the two methods below."""
        if len(passes) > 1:
            return self.execute_passes(hidden_TH, ids_N, counts_E, passes, begun)
        for wave in passes:
            self._land(wave)
        return self.execute(hidden_TH, ids_N, here)

    def land(self) -> None:
        """Wait for all that is under way to the layer's slots."""
        if self._loader.any_in_flight:
            self._loader.wait(np.arange(self._window.start, self._window.stop))

    def execute(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, here: int | None = None) -> torch.Tensor:
        """All pairs at once. Returns [N, H], pair by pair.

        Args:
            here: pairs whose expert is in a slot, if these aren't all; the others come out undefined.
        """
        if not len(ids_N):
            return self.zeros(0)
        key_E = self._slot_of_device_E - self._window.start
        if self._identity:
            key_E = torch.nn.functional.pad(key_E, (0, 1), value=self.slots)
        if here is not None:
            key_E = torch.where(key_E < 0, self.slots, key_E)  # what is absent goes last
        order_N, key_N, ends_Q, rows_NH = self._sort(hidden_TH, ids_N, key_E, self.slots)
        if here is not None:
            result_NH = torch.empty(len(ids_N), self.kernel.hidden_size, dtype=self.dtype, device=ids_N.device)
            return result_NH.index_copy_(0, order_N[:here], self.kernel(rows_NH[:here], ends_Q, key_N[:here]))
        result_NH = self.kernel(rows_NH, ends_Q, key_N)
        return _unsort(result_NH, order_N)

    def execute_passes(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts_E: IntArray, passes: Sequence[ExpertPass], begun: int
    ) -> torch.Tensor:
        """ExpertPass after wave: a pair's key is (wave, position), so that each wave is a run of the sorted pairs.

        Args:
            counts_E: pairs of each expert, on the host.
            begun: waves whose fetches are under way.
        """
        keys = len(passes) * self.slots
        key_host = np.full(self.num_experts + 1, keys, np.int64)
        for number, wave in enumerate(passes):
            key_host[wave.experts] = number * self.slots + wave.positions
        key_E = to_device(key_host, ids_N.device)
        order_N, key_N, ends, rows_NH = self._sort(hidden_TH, ids_N, key_E, keys)
        result_NH = torch.empty_like(rows_NH)
        start = 0
        for number, wave in enumerate(passes):
            begun = self._begin(passes, begun, number)
            self._land(wave)
            rows = slice(start, start + int(counts_E[wave.experts].sum()))
            first_key = number * self.slots
            result_NH[rows] = self.kernel(
                rows_NH[rows], ends[first_key : first_key + self.slots] - start, key_N[rows] - first_key
            )
            start = rows.stop
        return _unsort(result_NH, order_N)

    def _land(self, wave: ExpertPass) -> None:
        """Wait for what a wave computes."""
        if self._loader.any_in_flight:
            began = time.perf_counter()
            self._loader.wait(wave.positions + self._window.start)
            self._telemetry.count(self._index, stall_s=time.perf_counter() - began)

    def _sort(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, key_E: torch.Tensor, keys: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort the pairs by their expert's key.

        Returns:
            order_N (the pair in each sorted row), key_N (sorted), ends int32 [keys] (where each key's rows end), and the
            sorted rows' hidden states [N, H].
        """
        all_keys = self._keys if keys == self.slots else torch.arange(keys, device=ids_N.device)
        top_k = ids_N.shape[0] // hidden_TH.shape[0]
        key_N, order_N = torch.sort(key_E[ids_N], stable=True)
        ends = torch.searchsorted(key_N, all_keys, right=True, out_int32=True)
        return order_N, key_N, ends, hidden_TH[order_N // top_k]


def _unsort(result_NH: torch.Tensor, order_N: torch.Tensor) -> torch.Tensor:
    """Results in the order of the pairs."""
    return torch.empty_like(result_NH).index_copy_(0, order_N, result_NH)


@compiled("UniTuple(int64, 2)(int64[::1], int64[::1], b1[::1], b1[::1])")
def _need(counts_E: IntArray, slot_of_E: IntArray, needed_E: BoolArray, missing_E: BoolArray) -> tuple[int, int]:
    """Enter which experts have pairs, and which of these are in no slot; returns how many they are."""
    needed = missing = 0
    for expert in range(len(counts_E)):
        needs = counts_E[expert] > 0
        misses = needs and slot_of_E[expert] < 0
        needed_E[expert], missing_E[expert] = needs, misses
        needed += needs
        missing += misses
    return needed, missing


@compiled("UniTuple(int64, 2)(int64[::1], int64[::1], b1[::1], int64, int64[::1], b1[::1])")
def _look_up(
    counts_E: IntArray, slot_of_E: IntArray, in_flight_S: BoolArray, start: int, position_E: IntArray, in_flight_E: BoolArray
) -> tuple[int, int]:
    """Enter where experts are in the window that begins with slot ``start``, and which are under way; returns how many of
    those with pairs are absent, and under way.
    """
    absent = late = 0
    for expert in range(len(counts_E)):
        slot = slot_of_E[expert]
        position_E[expert] = -1 if slot < 0 else slot - start
        in_flight_E[expert] = slot >= 0 and in_flight_S[slot]
        if counts_E[expert] > 0:
            absent += slot < 0
            late += in_flight_E[expert]
    return absent, late


@compiled("int64(int64[::1], b1[::1], int64[::1], int64, int64[::1], int64[::1])")
def _place(
    slot_of_E: IntArray, evicted_E: BoolArray, expert_of_Q: IntArray, start: int, slot_F: IntArray, displaced_F: IntArray
) -> int:
    """Enter slots of the window for fetches: empty ones, then those of ``evicted_E``; returns how many were found."""
    found = 0
    for position in range(len(expert_of_Q)):
        if expert_of_Q[position] < 0 and found < len(slot_F):
            slot_F[found], displaced_F[found] = start + position, -1
            found += 1
    for expert in range(len(slot_of_E)):
        if evicted_E[expert] and found < len(slot_F):
            slot_F[found], displaced_F[found] = slot_of_E[expert], expert
            found += 1
    return found
