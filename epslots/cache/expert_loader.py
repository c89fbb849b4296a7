"""The mover: the only code that fills slots.

A fetch moves one expert's record into one slot as a single contiguous copy, over the link from the node's host store
(``copy_engine.py``) or straight from a peer's slot. Tables name an expert as soon as its fetch has begun; until it has
landed its slot is *flying*, and whoever reads or overwrites the slot goes through ``land`` first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.cache.copy_engine import CopyEngine
from epslots.cache.host_store import HostStore
from epslots.cache.slot_pool import SlotPool
from epslots.cache.unpacking import Unpacker
from epslots.compiled import compiled
from epslots.planner.plan import PeerCopies
from epslots.telemetry import Telemetry
from epslots.transport.transport import Transport


class ExpertLoader:
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
        self, pool: SlotPool, store: HostStore, link: CopyEngine, store_layers: tuple[int, ...], telemetry: Telemetry
    ) -> None:
        self.pool = pool
        self.store = store
        self.link = link
        self.store_layers = store_layers
        self.telemetry = telemetry
        self.transport: Transport | None = None
        self._unconfirmed: list[tuple[int, NDArray[np.int64]]] = []
        self.in_flight = np.zeros(pool.num_slots, bool)
        """Whether each slot's record is under way."""
        self._landings: dict[int, Any] = {}
        self._unpackers = [Unpacker(spec) for spec in pool.layers]
        self._rows = pool.memory.unbind(0)  # taking a row out of a tensor takes microseconds

    def fetch(
        self,
        layer: int,
        experts: NDArray[np.int64],
        slots: NDArray[np.int64],
        evicted: NDArray[np.int64],
        copies: PeerCopies | None = None,
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
        self._clear(layer, slots)
        peers = 0
        done: list[int] = []  # slots that have been filled, or are being
        try:
            if copies is not None:
                experts, slots, peers = _peers_first(experts, slots, copies)
                self._exchange(layer, experts[:peers], slots[:peers], copies, agreed)
                done.extend(slots[:peers].tolist())
                self._unconfirmed.append((layer, experts[:peers]))
            if peers < len(experts):
                self._start(layer, experts[peers:].tolist(), slots[peers:].tolist(), done, urgent=urgent)
        finally:
            self.pool.occupy(layer, experts[: len(done)], slots[: len(done)])
            self.telemetry.count(
                self.store_layers[layer],
                host_bytes=max(0, len(done) - peers) * self.pool.layers[layer].record.nbytes,
                peer_bytes=min(len(done), peers) * self.pool.layout.nbytes,
                evictions=_count_experts(evicted),
            )

    def _start(self, layer: int, experts: list[int], slots: list[int], done: list[int], *, urgent: bool) -> None:
        """Begin these fetches from the host, and append to ``done`` the slots whose fetches have begun."""
        records: list[torch.Tensor] = []
        try:
            for expert in experts:
                records.append(self.store.record(self.store_layers[layer], expert))
        finally:
            begun = slots[: len(records)]
            landings = self.link.start([self._rows[slot] for slot in begun], records, self._unpackers[layer], urgent=urgent)
            if landings:
                for slot, landing in zip(begun, landings, strict=True):
                    self._landings[slot] = landing
                self.in_flight[begun] = True
            done.extend(begun)

    @property
    def any_in_flight(self) -> bool:
        """Whether any slot's record is under way, as far as is known."""
        return bool(self._landings)

    def land(self, slots: NDArray[np.int64]) -> None:
        """What is computed next finds these slots complete; any of them may be named twice."""
        if not self._landings:
            return
        for slot in set(slots[self.in_flight[slots]].tolist()):
            self._finish(slot, self._landings[slot])

    def _finish(self, slot: int, landing: Any) -> None:
        self.link.land(landing)  # may be interrupted, and is asked again then
        self.in_flight[slot] = False
        del self._landings[slot]

    def retire(self, slots: NDArray[np.int64]) -> None:
        """What has landed in these slots by now flies no more."""
        for slot in slots[self.in_flight[slots]].tolist():
            landing = self._landings[slot]
            if self.link.landed(landing):
                self._finish(slot, landing)

    def set_urgent(self, slots: NDArray[np.int64]) -> None:
        """What is under way to these slots is needed in this step, in this order, and before what is fetched from now on."""
        for slot in slots[self.in_flight[slots]].tolist():
            self.link.set_urgent(self._landings[slot])

    def land_all(self) -> None:
        """No slot is flying afterwards."""
        self.land(np.flatnonzero(self.in_flight))

    def _clear(self, layer: int, slots: NDArray[np.int64]) -> None:
        """Nothing that began earlier is written to these slots of a layer from now on."""
        if not self._landings:
            return
        for slot in slots[self.in_flight[slots]].tolist():
            crosses = self.link.drop(self._landings[slot])
            if not crosses and self.in_flight[slot]:
                record = self.pool.layers[layer].record.nbytes
                self.telemetry.count(self.store_layers[layer], host_bytes=-record)
            self.in_flight[slot] = False
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
        copies: PeerCopies,
        agreed: bool,
    ) -> None:
        """PeerCopies between ranks, from slot to slot, in the order of the experts on both sides."""
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
        self.telemetry.count(self.store_layers[giver], evictions=int(evicted >= 0))

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


def _peers_first(
    experts: NDArray[np.int64], slots: NDArray[np.int64], copies: PeerCopies
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Experts that come from peers, then the others, each in the order given; and how many come from peers."""
    from_peer = np.array([expert in copies.sources for expert in experts.tolist()], bool)
    order = np.argsort(~from_peer, kind="stable")
    return experts[order], slots[order], int(np.count_nonzero(from_peer))


@compiled("int64(int64[::1])")
def _count_experts(experts: NDArray[np.int64]) -> int:
    """How many entries name an expert; -1 names none."""
    named = 0
    for expert in experts:
        named += expert >= 0
    return named
