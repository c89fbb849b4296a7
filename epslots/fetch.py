"""The mover: the only code that fills slots.

A fetch moves one expert's record into one slot as a single contiguous copy, over the link from the node's host store
(``link.py``) or straight from a peer's slot. Tables name an expert as soon as its fetch has begun; until it has landed its
slot is *flying*, and whoever reads or overwrites the slot goes through ``land`` first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.host_store import HostStore
from epslots.link import Link
from epslots.packed_records import Unpacker
from epslots.shared_layer import Copies
from epslots.slot_pool import SlotPool
from epslots.telemetry import Telemetry
from epslots.transport import Transport


class Mover:
    """Serves the fetches of one pool, from the node's host store and from peers.

    Set ``transport`` to fetch from peers, and to be one.

    Args:
        pool: the slots to fill.
        store: where records come from.
        link: the way from there.
        store_layers: the model's (and the store's) layer index of each of the pool's layers: a model whose experts have two
            layouts has two pools, and ``layer`` in the methods below counts within one.
        telemetry: counts bytes and evictions under the store's layer indices.
    """

    def __init__(
        self, pool: SlotPool, store: HostStore, link: Link, store_layers: tuple[int, ...], telemetry: Telemetry
    ) -> None:
        self.pool = pool
        self.store = store
        self.link = link
        self.store_layers = store_layers
        self.telemetry = telemetry
        self.transport: Transport | None = None
        self._unconfirmed: list[tuple[int, NDArray[np.int64]]] = []
        self.flying = np.zeros(pool.num_slots, bool)
        """Whether each slot's record is under way."""
        self._landings: dict[int, Any] = {}
        self._unpackers = [Unpacker(spec) for spec in pool.layers]

    def fetch(
        self,
        layer: int,
        experts: NDArray[np.int64],
        slots: NDArray[np.int64],
        evicted: NDArray[np.int64],
        copies: Copies | None = None,
        *,
        agreed: bool = True,
        urgent: bool = True,
    ) -> None:
        """Begin to fill ``slots`` with ``experts`` of one layer in the place of ``evicted`` (-1 = empty), in order.

        On return the tables name the new content, and what came from peers is there.

        Args:
            copies: what comes from peers, and what goes to them; all else comes from the host store. What goes to peers
                isn't among ``evicted``, and is there on return, so no slot is reused while a peer reads it.
            agreed: as in ``Transport.exchange``.
            urgent: whether a step waits for it.

        Raises:
            CorruptExpertError: a record differs from its digest. It entered no slot; those before it did.
            PeerLost: a copy between ranks broke off. Its slot is empty, as are those that would have come after it. On CUDA
                a copy is only queued on return: see ``confirm``.
        """
        self.pool.vacate(layer, evicted)
        self._clear(slots)
        done = np.zeros(len(experts), bool)
        from_peer = done.copy() if copies is None else np.array([e in copies.sources for e in experts.tolist()], bool)
        try:
            if copies is not None:
                self._exchange(layer, experts[from_peer], slots[from_peer], copies, agreed)
                done[from_peer] = True
                self._unconfirmed.append((layer, experts[from_peer]))
            if not from_peer.all():
                self._start(layer, experts, slots, np.flatnonzero(~from_peer), done, urgent=urgent)
        finally:
            self.pool.occupy(layer, experts[done], slots[done])
            size = self.pool.layout.nbytes
            self.telemetry.count_fetches(
                self.store_layers[layer],
                host_bytes=int((done & ~from_peer).sum()) * self.pool.layers[layer].record.nbytes,
                peer_bytes=int((done & from_peer).sum()) * size,
                evictions=int((evicted >= 0).sum()),
            )

    def _start(
        self,
        layer: int,
        experts: NDArray[np.int64],
        slots: NDArray[np.int64],
        numbers: NDArray[np.int64],
        done: NDArray[np.bool_],
        *,
        urgent: bool,
    ) -> None:
        """Begin these fetches from the host, marking in ``done`` those that have begun."""
        records: list[torch.Tensor] = []
        try:
            for expert in experts[numbers].tolist():
                records.append(self.store.record(self.store_layers[layer], expert))
        finally:
            begun = numbers[: len(records)]
            targets = slots[begun].tolist()
            landings = self.link.start(
                [self.pool.memory[slot] for slot in targets], records, self._unpackers[layer], urgent=urgent
            )
            if landings:
                self.flying[targets] = True
                self._landings.update(zip(targets, landings, strict=True))
            done[begun] = True

    def land(self, slots: NDArray[np.int64]) -> None:
        """What is computed next finds these slots complete; any of them may be named twice."""
        for slot in set(slots[self.flying[slots]].tolist()):
            self.link.land(self._landings[slot])
            self.flying[slot] = False
            del self._landings[slot]

    def retire(self, slots: NDArray[np.int64]) -> None:
        """What has landed in these slots by now flies no more."""
        for slot in slots[self.flying[slots]].tolist():
            if self.link.landed(self._landings[slot]):
                self.land(np.array([slot]))

    def land_all(self) -> None:
        """No slot is flying afterwards."""
        self.land(np.flatnonzero(self.flying))

    def _clear(self, slots: NDArray[np.int64]) -> None:
        """Nothing that began earlier is written to these slots from now on."""
        for slot in slots[self.flying[slots]].tolist():
            self.link.drop(self._landings[slot])
            self.flying[slot] = False
            del self._landings[slot]

    def confirm(self) -> None:
        """All copies from peers so far have arrived: something that was queued after them came through to the host."""
        self._unconfirmed.clear()

    def give_up_unconfirmed(self) -> None:
        """Empty the slots of copies from peers that may not have arrived, after a peer was lost."""
        for layer, experts in self._unconfirmed:
            self.pool.vacate(layer, experts[self.pool.slot_of[layer, experts] >= 0])
            self.pool.publish(layer)
        self._unconfirmed.clear()

    def _exchange(
        self,
        layer: int,
        experts: NDArray[np.int64],
        slots: NDArray[np.int64],
        copies: Copies,
        agreed: bool,
    ) -> None:
        """Copies between ranks, from slot to slot, in the order of the experts on both sides."""
        assert self.transport is not None
        order = np.argsort(experts)
        experts, slots = experts[order], slots[order]
        memory, slot_of_E = self.pool.memory, self.pool.slot_of[layer]
        given = slot_of_E[[expert for _, expert in copies.sends]]
        assert (given >= 0).all(), "a peer was promised an expert that isn't here"
        self.land(given)
        self.transport.exchange(
            [(rank, memory[slot_of_E[expert]]) for rank, expert in copies.sends],
            [(copies.sources[expert], memory[slot]) for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True)],
            agreed=agreed,
        )

    def pass_slot(self, giver: int, taker: int, evicted: int) -> None:
        """Pass a slot from a layer to its neighbour in the pool; what is in it moves to an empty slot of the giver.

        Args:
            evicted: the giver's expert that gives way before; -1 = the giver has an empty slot.
        """
        pool = self.pool
        self.land_all()
        pool.vacate(giver, np.array([evicted]))
        slot = pool.boundary_slot(giver, taker)
        expert = int(pool.expert_of[slot])
        if expert >= 0:
            window = pool.window(giver)
            empty = window.start + int(np.flatnonzero(pool.expert_of[window] < 0)[0])
            pool.vacate(giver, np.array([expert]))
            pool.memory[empty].copy_(pool.memory[slot], non_blocking=True)
            pool.occupy(giver, np.array([expert]), np.array([empty]))
        pool.pass_slot(giver, taker)
        pool.publish(giver)
        pool.publish(taker)
        self.telemetry.count_fetches(self.store_layers[giver], host_bytes=0, peer_bytes=0, evictions=int(evicted >= 0))

    def fill(self, layer: int, experts: NDArray[np.int64]) -> None:
        """Load experts into the layer's first slots, which are empty."""
        slots = self.pool.window(layer).start + np.arange(len(experts))
        self.fetch(layer, experts, slots, np.full(len(experts), -1))
        self.land(slots)

    def check_content(self) -> None:
        """Assert that every occupied slot holds the store's record of its expert, byte for byte.

        Raises:
            AssertionError: naming the slot and the expert. It is a bug of ours.
        """
        self.land_all()
        for layer in range(len(self.pool.layers)):
            window = self.pool.window(layer)
            for slot, expert in enumerate(self.pool.expert_of[window].tolist(), window.start):
                if expert >= 0:
                    record = self.store.record(self.store_layers[layer], expert)
                    same = self._unpackers[layer].same(self.pool.memory[slot], record)
                    assert same, f"slot {slot} isn't expert {expert}"
