"""The expert loader: all fetches into slots, but those of captured decoding, to which slots are lent (``cuda_graph``).

A fetch moves one expert's record into one slot as one contiguous copy: from the node's host store through a copy engine
(``copy_engine.py``), or from a peer's slot. The pool's tables name an expert from the start of its fetch. Until its record has
arrived the slot is *in flight*: it is read after ``wait``, and a new fetch into it cancels the old one.

Legend of shape suffixes: F fetches of one layer, in order; S slots of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from epslots.arrays import BoolArray, IntArray
from epslots.cache.copy_engine import CopyEngine, put_record
from epslots.cache.host_store import HostStore
from epslots.cache.slot_pool import SlotPool
from epslots.errors import StoreError
from epslots.planner.plan import PeerCopies
from epslots.telemetry import Telemetry
from epslots.transport.transport import Transport


class ExpertLoader:
    """Serves the fetches of one pool, from the node's host store and from peers.

    ``layer`` counts within the pool: a model whose experts have two layouts has two pools.

    Args:
        pool: the slots to fill.
        store: the source of records.
        link: copies records from the store into slots.
        store_layers: the model's (and the store's) layer index of each of the pool's layers.
        telemetry: counts bytes and evictions under the model's layer indices.

    Attributes:
        in_flight: bool [S], whether each slot's record is in flight, as far as ``poll`` and ``wait`` have found out.
    """

    def __init__(
        self, pool: SlotPool, store: HostStore, link: CopyEngine, store_layers: tuple[int, ...], telemetry: Telemetry
    ) -> None:
        self.pool = pool
        self.store = store
        self.link = link
        self.store_layers = store_layers
        self.telemetry = telemetry
        self._transport: Transport | None = None
        self.in_flight: BoolArray = np.zeros(pool.num_slots, bool)
        self._transfers: dict[int, Any] = {}  # by slot
        self._unconfirmed: list[tuple[int, IntArray]] = []
        self._rows = pool.memory.unbind(0)  # taking a row out of a tensor takes microseconds

    @property
    def grouped(self) -> bool:
        """Whether ``join`` was called: peers may ask for experts."""
        return self._transport is not None

    def join(self, transport: Transport) -> None:
        """Serve a group's fetches from now on, and wait on the host as its transport does."""
        self._transport = transport
        self.link.wait_by(transport.wait_until)

    def fetch(
        self,
        layer: int,
        experts_F: IntArray,
        slots_F: IntArray,
        evicted: IntArray,
        copies: PeerCopies | None = None,
        *,
        agreed: bool = True,
        urgent: bool = True,
    ) -> None:
        """Start to fill slots with experts of one layer, in order.

        On return the tables name the new content, and copies from peers have arrived (on CUDA: are queued, see ``confirm``).

        Args:
            experts_F: ids, int64 [F].
            slots_F: slots of the pool, int64 [F]; empty, or those of ``evicted``.
            evicted: the layer's experts that lose their slots, int64 [any number]; -1 is skipped.
            copies: the experts that come from peers, and go to them; others come from the host store. Experts that go to peers
                aren't among ``evicted``, and have left on return, so no slot is reused while a peer reads it.
            agreed: whether ranks skip the comparison of sizes, which follow from the same plan.
            urgent: whether the running step needs them.

        Raises:
            CorruptExpertError: a record differs from its digest. It entered no slot; those before it did.
            PeerLost: a copy between ranks broke off. Its slot is empty, and so are those that would have come after it.
        """
        evictions = self.pool.vacate(layer, evicted)
        self._cancel(layer, slots_F)
        from_peers = 0
        started: list[int] = []  # slots that are filled or in flight
        try:
            if copies is not None:
                experts_F, slots_F, from_peers = _peers_first(experts_F, slots_F, copies)
                self.link.wait_cancelled([self._rows[slot] for slot in slots_F[:from_peers].tolist()])
                self._exchange(layer, experts_F[:from_peers], slots_F[:from_peers], copies, agreed)
                started.extend(slots_F[:from_peers].tolist())
                self._unconfirmed.append((layer, experts_F[:from_peers]))
            if from_peers < len(experts_F):
                self._start(layer, experts_F[from_peers:], slots_F[from_peers:], started, urgent=urgent)
        finally:
            self.pool.occupy(layer, experts_F[: len(started)], slots_F[: len(started)])
            self.telemetry.count(
                self.store_layers[layer],
                host_bytes=max(0, len(started) - from_peers) * self.pool.layout.nbytes,
                peer_bytes=min(len(started), from_peers) * self.pool.layout.nbytes,
                evictions=evictions,
            )

    def _start(self, layer: int, experts_F: IntArray, slots_F: IntArray, started: list[int], *, urgent: bool) -> None:
        """Start fetches from the host, and append to ``started`` the slots of those that did."""
        records: list[Any] = []
        store_layer, request = self.store_layers[layer], self.store.request
        try:
            for expert in experts_F.tolist():
                records.append(request(store_layer, expert))
        finally:
            slots_F = slots_F[: len(records)]  # of sound records
            slots = slots_F.tolist()
            transfers = self.link.start([self._rows[slot] for slot in slots], records, put_record, urgent=urgent)
            if transfers:
                self._transfers.update(zip(slots, transfers, strict=True))
                self.in_flight[slots_F] = True
            started.extend(slots)

    @property
    def any_in_flight(self) -> bool:
        """Whether any slot is in flight, as far as ``poll`` and ``wait`` have found out."""
        return bool(self._transfers)

    def wait(self, slots: IntArray) -> None:
        """Make these slots, int64 [any number], complete for the next computation. Duplicates are allowed.

        Raises:
            StoreError: a record can't be read, or differs from its digest. Its slot is empty again.
        """
        if not self._transfers:
            return
        for slot in set(slots[self.in_flight[slots]].tolist()):
            self._finish(slot, self._transfers[slot])

    def wait_all(self) -> None:
        """Make every slot complete for the next computation, and free for the next writer."""
        self.wait(np.flatnonzero(self.in_flight))
        self.link.wait_cancelled()

    def poll(self, slots: IntArray) -> None:
        """Find out which of these slots have received their records: int64 [any number], without duplicates."""
        for slot in slots[self.in_flight[slots]].tolist():
            transfer = self._transfers[slot]
            if self.link.poll(transfer):
                self._finish(slot, transfer)

    def _finish(self, slot: int, transfer: Any) -> None:
        """Wait for a transfer.

        Raises:
            CorruptExpertError: its record differs from its digest. The slot is empty again.
            StoreError: its record can't be read. The slot is empty again.
        """
        try:
            self.link.wait(transfer)  # may be interrupted, and is called again then
        except StoreError:
            layer = int(np.searchsorted(self.pool.starts, slot, side="right")) - 1
            self.pool.vacate(layer, self.pool.expert_of[[slot]])
            self.telemetry.count(self.store_layers[layer], host_bytes=-self.pool.layout.nbytes)
            self.in_flight[slot] = False
            del self._transfers[slot]
            raise
        self.in_flight[slot] = False
        del self._transfers[slot]

    def set_urgent(self, slots: IntArray) -> None:
        """Put transfers before all later fetches: those into these slots, int64 [any number], the most urgent first."""
        for slot in slots[self.in_flight[slots]].tolist():
            self.link.set_urgent(self._transfers[slot])

    def unbegun(self, slots: IntArray) -> int:
        """How many of these slots, counted from the last, the link hasn't begun to fill: int64 [any number]."""
        found = 0
        for slot in reversed(slots.tolist()):
            if slot < 0 or not self.in_flight[slot] or self.link.begun(self._transfers[slot]):
                break
            found += 1
        return found

    def take_back(self, layer: int, experts: IntArray) -> None:
        """Empty the slots that these experts of a layer, int64 [any number], are on their way to."""
        self._cancel(layer, self.pool.slot_of[layer, experts])
        self.pool.vacate(layer, experts)

    def _cancel(self, layer: int, slots: IntArray) -> None:
        """Prevent earlier transfers from writing these slots of a layer."""
        if not self._transfers:
            return
        for slot in slots[self.in_flight[slots]].tolist():
            crosses = self.link.cancel(self._transfers[slot])
            if not crosses and self.in_flight[slot]:
                self.telemetry.count(self.store_layers[layer], host_bytes=-self.pool.layout.nbytes)
            self.in_flight[slot] = False
            del self._transfers[slot]

    def confirm(self) -> None:
        """Note that all copies from peers so far have arrived: work queued behind them has reached the host."""
        self._unconfirmed.clear()

    def vacate_unconfirmed(self) -> None:
        """Empty the slots whose copies from peers may not have arrived. For use after a loss."""
        for layer, experts in self._unconfirmed:
            self.pool.vacate(layer, experts[self.pool.slot_of[layer, experts] >= 0])
        self._unconfirmed.clear()

    def _exchange(self, layer: int, experts_F: IntArray, slots_F: IntArray, copies: PeerCopies, agreed: bool) -> None:
        """Copy experts between ranks, from slot to slot; both sides order them by expert."""
        assert self._transport is not None
        order = np.argsort(experts_F)
        memory, slot_of_E = self.pool.memory, self.pool.slot_of[layer]
        sent = slot_of_E[[expert for _, expert in copies.sends]]
        assert (sent >= 0).all(), "a peer was promised an expert that isn't here"
        self.wait(sent)
        self._transport.exchange(
            [(rank, memory[slot_of_E[expert]]) for rank, expert in copies.sends],
            [
                (copies.sources[expert], memory[slot])
                for expert, slot in zip(experts_F[order].tolist(), slots_F[order].tolist(), strict=True)
            ],
            agreed=agreed,
        )

    def give_slot(self, giver: int, taker: int, evicted: int) -> None:
        """Give a slot of one layer to its neighbour in the pool. Its expert moves to an empty slot of the giver.

        Args:
            evicted: the giver's expert that loses its slot first; -1 = the giver has an empty slot.
        """
        self.wait_all()
        self._empty_slot(giver, self.pool.boundary_slot(giver, taker), evicted)
        self.pool.give_slot(giver, taker)

    def cede_level(self, evicted: Sequence[int]) -> None:
        """Let each layer of the pool cede the last slot that it uses. Its expert moves to an empty slot of the layer.

        Args:
            evicted: each layer's expert that loses its slot first; -1 = the layer has an empty slot.

        Raises:
            StoreError: a fetch that was in flight has failed; its slot is empty, and nothing else has changed.
        """
        pool = self.pool
        self.wait_all()
        for layer, expert in enumerate(evicted):
            self._empty_slot(layer, pool.slot_range(layer).stop - 1, expert)
        pool.set_levels(pool.levels + 1)

    def take_back_level(self, *, complete: bool) -> None:
        """Let each layer use the slot again that it ceded last. It is empty, and no read of it is under way.

        Args:
            complete: load the missing experts of the layers that have a slot for every one now.

        Raises:
            StoreError: one's record can't be read, or differs from its digest. The slots are ceded again.
        """
        pool = self.pool
        level = pool.levels
        pool.set_levels(level - 1)
        if not complete:
            return
        try:
            self._complete_layers()
        except StoreError:
            slots = pool.level_slots(level)
            self._drain(slots)
            for layer, slot in enumerate(slots):
                pool.vacate(layer, pool.expert_of[[slot]])
            pool.set_levels(level)
            raise

    def _drain(self, slots: IntArray) -> None:
        """Wait until nothing is in flight to these slots, int64 [any number]: records that can't be read, too, have ended."""
        while self.in_flight[slots].any():
            with suppress(StoreError):
                self.wait(slots)

    def _complete_layers(self) -> None:
        """Load the missing experts of the layers that have a slot for every one.

        Raises:
            StoreError: a record can't be read, or differs from its digest.
        """
        pool = self.pool
        for layer, spec in enumerate(pool.layers):
            missing = np.flatnonzero(pool.slot_of[layer, : spec.num_experts] < 0)
            if pool.holds_all_of(layer) and len(missing):
                slot_range = pool.slot_range(layer)
                empty = slot_range.start + np.flatnonzero(pool.expert_of[slot_range] < 0)
                self.fetch(layer, missing, empty, np.full(len(missing), -1))
                self.wait(empty)

    def _empty_slot(self, layer: int, slot: int, evicted: int) -> None:
        """Evict an expert of a layer, and move the one in ``slot``, if there is one, to an empty slot."""
        pool = self.pool
        pool.vacate(layer, np.array([evicted]))
        expert = int(pool.expert_of[slot])
        if expert >= 0:
            slot_range = pool.slot_range(layer)
            empty = slot_range.start + int(np.flatnonzero(pool.expert_of[slot_range] < 0)[0])
            pool.vacate(layer, np.array([expert]))
            pool.memory[empty].copy_(pool.memory[slot], non_blocking=True)
            pool.occupy(layer, np.array([expert]), np.array([empty]))
        self.telemetry.count(self.store_layers[layer], evictions=int(evicted >= 0))

    def fill(self, layer: int, experts_F: IntArray) -> None:
        """Load experts, int64 [F], into the layer's first F slots, which are empty."""
        slots_F = self.pool.slot_range(layer).start + np.arange(len(experts_F))
        self.fetch(layer, experts_F, slots_F, np.full(len(experts_F), -1))
        self.wait(slots_F)

    def check_content(self) -> None:
        """Assert that every occupied slot holds the store's record of its expert, byte for byte.

        Raises:
            AssertionError: naming the slot and the expert. It is a bug of ours.
        """
        self.wait_all()
        for layer in range(len(self.pool.layers)):
            slot_range = self.pool.slot_range(layer)
            for slot, expert in enumerate(self.pool.expert_of[slot_range].tolist(), slot_range.start):
                if expert >= 0:
                    with self.store.lend(self.store_layers[layer], expert) as record:
                        assert torch.equal(self.pool.memory[slot].cpu(), record), f"slot {slot} isn't expert {expert}"


def _peers_first(experts_F: IntArray, slots_F: IntArray, copies: PeerCopies) -> tuple[IntArray, IntArray, int]:
    """Fetches from peers, then the others, each in the order given; and the number of those from peers."""
    from_peer_F = np.array([expert in copies.sources for expert in experts_F.tolist()], bool)
    order = np.argsort(~from_peer_F, kind="stable")
    return experts_F[order], slots_F[order], int(np.count_nonzero(from_peer_F))
