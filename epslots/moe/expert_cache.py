"""The slots of one layer on one rank: a step's hits, misses and fetches in flight.

``MoELayer`` calls ``schedule``, ``fetch`` and ``migrate``, ``ExpertCompute`` calls ``begin_pass``, and the layer before calls
``prefetch``. All fetches go through the pool's ``ExpertLoader``.

Legend of shape suffixes: E experts, Q slots of the layer, S slots of the pool, F fetches.
"""

from __future__ import annotations

import time

import numpy as np

from epslots.arrays import NO_EXPERTS, BoolArray, IntArray
from epslots.cache.expert_loader import ExpertLoader
from epslots.compiled import compiled
from epslots.planner.expert_passes import NO_PASS, ExpertPass, plan_passes
from epslots.planner.plan import PeerCopies, RankPlan
from epslots.telemetry import Telemetry

# A pass's cost besides reading its experts' weights, as bytes that are read meanwhile. On the CPU measured (90 us, most of
# them torch's); on CUDA reckoned from launches of some microseconds each: nothing else there is short enough to matter.
_PASS_BYTES = {"cpu": 2 << 20, "cuda": 16 << 20}


class ExpertCache:
    """One layer's range of a slot pool.

    Args:
        index: the layer's number among the model's MoE layers.
        pool_layer: its number within the loader's pool.
        num_experts: E, experts that have weights.

    Attributes:
        slot_range: the layer's slots in the pool.
        slots: Q.
        room: slots of its range, those included that it has ceded to the KV cache.
        slot_of_E: int64, the slot of each expert, or the one that it is on its way to; -1 = absent.
        holds_all: whether the layer has a slot for every expert, so that none is ever missing.
    """

    def __init__(self, index: int, pool_layer: int, num_experts: int, loader: ExpertLoader, telemetry: Telemetry) -> None:
        self.pool = pool = loader.pool
        self.pool_layer = pool_layer
        self.num_experts = num_experts
        self._index = index
        self._loader = loader
        self._telemetry = telemetry
        self.slot_of_E = pool.slot_of[pool_layer][:num_experts]
        self._reads_a_pass = -(-_PASS_BYTES[pool.device.type] // pool.layout.nbytes)
        self._late_E = np.empty(num_experts, bool)
        self._read_slot_range()

    def _read_slot_range(self) -> None:
        self.slot_range = self.pool.slot_range(self.pool_layer)
        self.slots, self.room = self.slot_range.stop - self.slot_range.start, self.pool.rooms[self.pool_layer]
        self._expert_of_Q = self.pool.expert_of[self.slot_range]
        self._awaited_Q = np.empty(self.slots, np.int64)
        self.holds_all = self.pool.holds_all_of(self.pool_layer)

    def use_slot_range(self) -> None:
        """Follow a change of the layer's slots."""
        self._read_slot_range()
        self._telemetry.set_slots(self._index, self.slots)

    @property
    def resident_E(self) -> BoolArray:
        """Whether each expert is in a slot, or on its way there."""
        resident: BoolArray = self.slot_of_E >= 0
        return resident

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: its record, and its slot."""
        return self.pool.layout.nbytes

    @property
    def fetches_meanwhile(self) -> bool:
        """Whether something can be computed while fetches are in flight."""
        return self._loader.link.concurrent

    @property
    def link_is_busy(self) -> bool:
        """Whether fetches of any layer are in flight."""
        return self._loader.link.busy

    def schedule(self, plan: RankPlan) -> None:
        """Plan the passes over the plan's experts, and count hits and misses."""
        late_E, awaited_Q = self._late_E, self._awaited_Q
        tables = plan.slots_E, self.slot_of_E, self._loader.in_flight, late_E, awaited_Q
        needed, absent, awaited = _look_up(*tables)
        if awaited:
            self._loader.poll(awaited_Q[:awaited])
            needed, absent, awaited = _look_up(*tables)
            self._loader.set_urgent(awaited_Q[:awaited])  # they are computed before those that are fetched now
            self._telemetry.count(self._index, late=awaited)
        if awaited or absent:
            if plan.copies is not None and plan.copies.sources:
                late_E[list(plan.copies.sources)] = False
            plan.passes = plan_passes(
                plan.slots_E,
                self.slot_of_E,
                self._expert_of_Q,
                plan.score_E,
                plan.evicted_E,
                late_E,
                start=self.slot_range.start,
                concurrent=self._loader.link.concurrent,
                worth=self._reads_a_pass,
            )
        uses = needed + len(plan.cpu_experts)
        passes = max(1, len(plan.passes)) if uses > self.slots else 1
        misses = absent + len(plan.cpu_experts)
        self._telemetry.count_planned(self._index, hits=uses - misses, misses=misses, passes=passes)

    def fetch(self, plan: RankPlan, *, agreed: bool) -> None:
        """Begin the fetches that wait for no pass, and send peers their copies.

        Args:
            agreed: whether ranks skip the comparison of sizes, which follow from the same plan.
        """
        if plan.copies is not None:
            self._fetch(plan.passes[0] if plan.passes else NO_PASS, plan.copies, agreed=agreed)
            plan.begun = 1
        self._begin(plan, computed=0)

    def begin_pass(self, plan: RankPlan, number: int) -> None:
        """Begin the fetches that may begin when ``number`` passes are computed, and wait for those of the next pass."""
        self._begin(plan, computed=number)
        if self._loader.any_in_flight:
            began = time.perf_counter()
            self._loader.wait(plan.passes[number].slots)
            self._telemetry.count(self._index, stall_s=time.perf_counter() - began)

    def _begin(self, plan: RankPlan, computed: int) -> None:
        passes = plan.passes
        while plan.begun < len(passes) and passes[plan.begun].after <= computed:
            if len(passes[plan.begun].fetch_experts):
                self._fetch(passes[plan.begun])
            plan.begun += 1

    def _fetch(self, expert_pass: ExpertPass, copies: PeerCopies | None = None, *, agreed: bool = True) -> None:
        began, one = time.perf_counter(), expert_pass
        self._loader.fetch(self.pool_layer, one.fetch_experts, one.fetch_slots, one.evicted, copies, agreed=agreed)
        self._telemetry.count(self._index, stall_s=time.perf_counter() - began)

    def prefetch(self, experts: IntArray, evicted_E: BoolArray) -> None:
        """Begin to fetch experts, int64 [F], before a step asks for them: into empty slots, then those of ``evicted_E``.

        Raises:
            CorruptExpertError: a record differs from its digest. It entered no slot.
        """
        slots, displaced = np.empty((2, len(experts)), np.int64)
        found = _place(self.slot_of_E, evicted_E, self._expert_of_Q, self.slot_range.start, slots, displaced)
        assert found == len(experts), "more prefetches than slots for them"
        self._loader.fetch(self.pool_layer, experts, slots, displaced, urgent=False)
        self._telemetry.count(self._index, prefetches=len(experts))

    def unbegun(self, experts: IntArray) -> int:
        """How many of these prefetches, counted from the last, the link hasn't begun: experts, int64 [any number]."""
        return self._loader.unbegun(self.slot_of_E[experts]) if self._loader.any_in_flight else 0

    def take_back(self, experts: IntArray) -> None:
        """Empty the slots of prefetches: experts, int64 [any number]."""
        self._loader.take_back(self.pool_layer, experts)
        self._telemetry.count(self._index, taken_back=len(experts))

    def migrate(self, plan: RankPlan, *, agreed: bool) -> None:
        """Do this rank's part of the step's migrations, behind its demand.

        Args:
            agreed: whether ranks skip the comparison of sizes, which follow from the same plan.
        """
        if plan.migrated < 0 and plan.migration_copies is None:
            return
        experts, slots, evicted = NO_EXPERTS, NO_EXPERTS, NO_EXPERTS
        if plan.migrated >= 0:
            experts, evicted = np.array([plan.migrated]), np.array([plan.displaced])
            empty = self.slot_range.start + np.flatnonzero(self._expert_of_Q < 0)[:1]
            slots = self.slot_of_E[evicted] if plan.displaced >= 0 else empty
        began = time.perf_counter()
        self._loader.fetch(self.pool_layer, experts, slots, evicted, plan.migration_copies, agreed=agreed, urgent=False)
        self._telemetry.count(self._index, migrations=len(experts), migration_s=time.perf_counter() - began)

    def give_slot(self, taker: ExpertCache, evicted: int) -> None:
        """Give a slot to a neighbouring layer of the pool; both layers' ranges change.

        Args:
            evicted: this layer's expert that is evicted before; -1 = the layer has an empty slot.
        """
        self._loader.give_slot(self.pool_layer, taker.pool_layer, evicted)

    def wait_for_all(self) -> None:
        """Wait for all fetches into the layer's slots."""
        if self._loader.any_in_flight:
            self._loader.wait(np.arange(self.slot_range.start, self.slot_range.stop))

    def confirm_copies(self) -> None:
        """Note that copies from peers, in any layer, have arrived: counts queued behind them are on the host."""
        self._loader.confirm()


@compiled("UniTuple(int64, 3)(int64[::1], int64[::1], b1[::1], b1[::1], int64[::1])")
def _look_up(
    counts_E: IntArray, slot_of_E: IntArray, in_flight_S: BoolArray, late_E: BoolArray, awaited_Q: IntArray
) -> tuple[int, int, int]:
    """Enter which experts are absent or in flight, and the slots of those in flight that have pairs.

    Returns:
        How many experts have pairs; how many of these are absent; and how many are in flight.
    """
    needed = absent = awaited = 0
    for expert in range(len(counts_E)):
        slot = slot_of_E[expert]
        late_E[expert] = slot < 0 or in_flight_S[slot]
        if counts_E[expert] > 0:
            needed += 1
            absent += slot < 0
            if slot >= 0 and late_E[expert]:
                awaited_Q[awaited] = slot
                awaited += 1
    return needed, absent, awaited


@compiled("int64(int64[::1], b1[::1], int64[::1], int64, int64[::1], int64[::1])")
def _place(
    slot_of_E: IntArray, evicted_E: BoolArray, expert_of_Q: IntArray, start: int, slot_F: IntArray, displaced_F: IntArray
) -> int:
    """Enter slots of the layer for fetches: empty ones, then those of ``evicted_E``; returns how many were found."""
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
