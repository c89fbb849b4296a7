"""``DiskLink``: the copy engine of a store on disk. A record is read into RAM, and then crosses the device's own link.

    waiting    for a cell of RAM: urgent transfers first, of the others the newest
    reading    its cell is leased, and the record's bytes are there or on their way
    crossing   the device's copy engine has it; the cell stays leased until the copy has ended

Reads proceed by themselves; every call of the engine moves transfers on. Where the device's engine copies at once (a CPU's), a
transfer that nothing waits for stays in RAM until it is waited for: a dropped prefetch costs no time of the CPU.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import wait as wait_for_any
from enum import Enum, auto
from typing import Any

import torch

from epslots.cache.copy_engine import CopyEngine, Records, Tensors, WriteSlot
from epslots.cache.disk_store import DiskStore, RecordKey, RecordLease
from epslots.cache.record_reader import READERS
from epslots.transport.host_wait import HostWait, wait_until

# Reads of records that nothing waits for, at a time: a miss finds a thread, and half of the disk, free.
_BACKGROUND_READS = READERS // 2


class _State(Enum):
    WAITING = auto()
    READING = auto()
    CROSSING = auto()
    DONE = auto()


class _DiskTransfer:
    """One record on its way from the disk into a slot.

    Attributes:
        lease: from READING on.
        copy: the device engine's transfer, while CROSSING; None = that engine copied at once.
        error: its record couldn't be read.
        cancelled: its slot is another's by now; only its lease has to end.
    """

    __slots__ = ("cancelled", "copy", "error", "key", "lease", "slot", "state", "urgent", "write")

    def __init__(self, slot: torch.Tensor, key: RecordKey, write: WriteSlot, urgent: bool) -> None:
        self.slot, self.key, self.write, self.urgent = slot, key, write, urgent
        self.state = _State.WAITING
        self.lease: RecordLease | None = None
        self.copy: Any = None
        self.error: BaseException | None = None
        self.cancelled = False

    @property
    def is_read(self) -> bool:
        """Whether its bytes are in RAM, or can't be read; of one that is READING."""
        assert self.lease is not None
        return self.lease.read is None or self.lease.read.done()


class DiskLink:
    """A copy engine for the records of a ``DiskStore``, before the engine of the device.

    Args:
        device_link: copies from RAM into slots.
    """

    concurrent = True

    def __init__(self, device_link: CopyEngine, store: DiskStore) -> None:
        self._device_link, self._store = device_link, store
        self._waiting: deque[_DiskTransfer] = deque()
        self._waiting_urgent: deque[_DiskTransfer] = deque()
        self._reading: list[_DiskTransfer] = []
        self._crossing: list[_DiskTransfer] = []
        self._host_wait: HostWait = wait_until
        self._lock = threading.RLock()  # a model of two layouts has two pools, which two threads may be in

    def wait_by(self, host_wait: HostWait) -> None:
        self._host_wait = host_wait
        self._device_link.wait_by(host_wait)

    @property
    def busy(self) -> bool:
        with self._lock:
            self._advance()
            reads = any(not transfer.is_read for transfer in self._reading)
            return reads or bool(self._waiting or self._waiting_urgent) or self._device_link.busy

    def start(self, slots: Tensors, records: Records, write: WriteSlot, *, urgent: bool) -> list[Any]:
        transfers = [_DiskTransfer(slot, key, write, urgent) for slot, key in zip(slots, records, strict=True)]
        with self._lock:
            if urgent:
                self._waiting_urgent.extend(transfers)
            else:
                self._waiting.extendleft(reversed(transfers))
            self._advance()
        return transfers

    def set_urgent(self, transfer: _DiskTransfer) -> None:
        with self._lock:
            if transfer.urgent:
                return
            transfer.urgent = True
            if transfer.state is _State.WAITING:
                self._waiting.remove(transfer)
                self._waiting_urgent.append(transfer)
            elif transfer.state is _State.CROSSING and transfer.copy is not None:
                self._device_link.set_urgent(transfer.copy)
            self._advance()

    def wait(self, transfer: _DiskTransfer) -> None:
        """Make the slot complete for all that this thread computes from now on.

        Raises:
            CorruptExpertError: the record differs from its digest. The slot is as it was.
            StoreError: it can't be read.
        """
        self.set_urgent(transfer)
        while True:
            with self._lock:
                self._advance()
                if transfer.state is _State.READING and transfer.is_read:
                    self._cross(transfer)
                if transfer.state in (_State.CROSSING, _State.DONE):
                    break
                reads = [t.lease.read for t in self._awaited(transfer) if t.lease is not None and t.lease.read is not None]
            if reads:
                wait_for_any(reads, return_when=FIRST_COMPLETED)
            else:  # every cell is leased for copies from it
                self._host_wait(lambda: self._has_cell(transfer))
        if transfer.error is not None:
            raise transfer.error
        if transfer.copy is not None:
            self._device_link.wait(transfer.copy)

    def _awaited(self, transfer: _DiskTransfer) -> list[_DiskTransfer]:
        """The transfers of which one must be read before this one can go on."""
        return [transfer] if transfer.state is _State.READING else self._reading

    def _has_cell(self, transfer: _DiskTransfer) -> bool:
        with self._lock:
            _ = self._device_link.busy  # its own queue moves on
            self._advance()
            return transfer.state is not _State.WAITING

    def poll(self, transfer: _DiskTransfer) -> bool:
        with self._lock:
            self._advance()
            if transfer.state is _State.READING:
                return transfer.is_read and not self._device_link.concurrent
            done = transfer.state is _State.DONE
            return done or (transfer.state is _State.CROSSING and self._device_link.poll(transfer.copy))

    def begun(self, transfer: _DiskTransfer) -> bool:
        with self._lock:
            self._advance()
            if transfer.state is _State.CROSSING:
                return transfer.copy is None or self._device_link.begun(transfer.copy)
            return transfer.state is _State.DONE

    def cancel(self, transfer: _DiskTransfer) -> bool:
        with self._lock:
            self._advance()
            if transfer.state is _State.WAITING:
                (self._waiting_urgent if transfer.urgent else self._waiting).remove(transfer)
                transfer.state = _State.DONE
                return False
            if transfer.state is _State.READING:  # the record stays in RAM
                transfer.cancelled = True
                self._advance()
                return False
            if transfer.state is _State.CROSSING:
                crosses = self._device_link.cancel(transfer.copy)
                if not crosses:
                    self._crossing.remove(transfer)
                    self._end(transfer)
                return crosses
            return transfer.error is None

    def wait_cancelled(self, slots: Tensors | None = None) -> None:
        self._device_link.wait_cancelled(slots)

    def _advance(self) -> None:
        """Move every transfer on as far as it goes without waiting."""
        self._end_crossings()
        self._begin_crossings(all_read=False)
        while (queue := self._next_queue()) and (lease := self._lease(queue[0])) is not None:
            transfer = queue.popleft()
            transfer.lease, transfer.state = lease, _State.READING
            self._reading.append(transfer)
        self._begin_crossings(all_read=False)

    def _next_queue(self) -> deque[_DiskTransfer]:
        """The transfers of which the first is to get a cell; empty if none is."""
        if self._waiting_urgent or not self._waiting:
            return self._waiting_urgent
        background = sum(not (transfer.urgent or transfer.is_read) for transfer in self._reading)
        return self._waiting if background < _BACKGROUND_READS else self._waiting_urgent

    def _lease(self, transfer: _DiskTransfer) -> RecordLease | None:
        """A lease of the record's cell; None while every cell's bytes are still being read or copied."""
        lease = self._store.lease(transfer.key)
        if lease is None and self._begin_crossings(all_read=True):
            lease = self._store.lease(transfer.key)
        return lease

    def _begin_crossings(self, *, all_read: bool) -> bool:
        """Begin the copies of records that were read.

        Args:
            all_read: also of those that may wait in RAM, to end their leases.

        Returns:
            Whether a lease ended.
        """
        ended = False
        for transfer in [t for t in self._reading if t.is_read]:
            if transfer.cancelled or transfer.urgent or all_read or self._device_link.concurrent:
                self._cross(transfer)
                ended |= transfer.state is _State.DONE
        return ended

    def _cross(self, transfer: _DiskTransfer) -> None:
        """Begin the copy of a record that was read, or end the transfer if there is nothing to copy."""
        assert transfer.lease is not None
        self._reading.remove(transfer)
        transfer.error = None if transfer.lease.read is None else transfer.lease.read.exception()
        if transfer.error is not None or transfer.cancelled:
            self._end(transfer)
            return
        slots, records = [transfer.slot], [transfer.lease.record]
        copies = self._device_link.start(slots, records, transfer.write, urgent=transfer.urgent)
        if copies:
            transfer.state, transfer.copy = _State.CROSSING, copies[0]
            self._crossing.append(transfer)
        else:
            self._end(transfer)

    def _end_crossings(self) -> None:
        """End the leases of records whose copies have ended."""
        for transfer in [t for t in self._crossing if self._device_link.poll(t.copy)]:
            self._crossing.remove(transfer)
            self._end(transfer)

    def _end(self, transfer: _DiskTransfer) -> None:
        assert transfer.lease is not None
        transfer.state = _State.DONE
        self._store.release(transfer.lease)
