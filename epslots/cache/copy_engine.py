"""Copy engines: they bring records from the host store into slots.

A *transfer* is one record in flight into one slot. Before a slot is read, its transfer is waited for (``wait``); before it is
overwritten, its transfer is cancelled (``cancel``). Urgent transfers, which a step needs, go first. Of the others the newest
goes first: a prefetch that has waited for long is probably out of date.

    SynchronousEngine   the CPU copies; the slot is complete on return
    CudaEngine          CUDA copies beside the kernels; events order the two (cuda_engine.py)
    EmulatedEngine      as slow as a link of a given speed: measures without a GPU what would overlap on one
    DiskLink            before one of these: records come from the disk first (disk_link.py)

``ExpertLoader`` is the caller.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter, sleep
from typing import Any, Protocol

import torch

from epslots.transport.host_wait import HostWait
from epslots.units import LinkSpeed

# Copying a record of up to this size takes less time than waking a thread.
_INLINE_COPY_BYTES = 256 << 10
# The end of a wait is spent awake: a sleep takes some 60 us longer than asked for.
_SPIN_S = 100e-6

Tensors = Sequence[torch.Tensor]
Records = Sequence[Any]
"""From ``HostStore.request``: uint8 [record bytes] each, on the host; a ``DiskStore``'s are only for ``DiskLink``."""
WriteSlot = Callable[[torch.Tensor, torch.Tensor], object]
"""Writes a slot (uint8, on the device) from a record (uint8, on the host); queued on the current stream if there is one."""


def put_record(slot: torch.Tensor, record: torch.Tensor) -> None:
    """Copy a record into a slot, byte for byte: the ``WriteSlot`` of the loader's fetches."""
    slot.copy_(record, non_blocking=True)


class CopyEngine(Protocol):
    """Fills slots from host memory.

    Attributes:
        concurrent: whether transfers proceed while the caller computes.
        busy: whether any are in flight now.
    """

    concurrent: bool

    @property
    def busy(self) -> bool: ...

    def wait_by(self, host_wait: HostWait) -> None:
        """Let the host wait for copies in memory as a group's transport does, from now on."""
        ...

    def start(self, slots: Tensors, records: Records, write: WriteSlot, *, urgent: bool) -> list[Any]:
        """Start one transfer per slot, in order; returns them. An empty list: all slots are complete.

        The slots may be written at any time from now on: no read of their old content may be started after this call.

        Args:
            slots: uint8 [record bytes] each, on the device.
            records: as many as slots, from the store that the engine belongs to.
            urgent: whether the running step needs them.
        """
        ...

    def wait(self, transfer: Any) -> None:
        """Make the slot complete for all that this thread computes from now on. The transfer becomes urgent.

        Raises:
            StoreError: the record can't be read, or differs from its digest. The slot wasn't written.
        """
        ...

    def poll(self, transfer: Any) -> bool:
        """Whether the record has arrived, or can't be read, so that ``wait`` takes no time."""
        ...

    def set_urgent(self, transfer: Any) -> None:
        """Put the transfer before all that are started later."""
        ...

    def begun(self, transfer: Any) -> bool:
        """Whether the record crosses the link now, or has crossed it: ``cancel`` would be too late."""
        ...

    def cancel(self, transfer: Any) -> bool:
        """Stop the transfer if it hasn't begun; later transfers into its slot are written after it in any case.

        Returns:
            Whether the record crosses the link all the same, or has.
        """
        ...

    def wait_cancelled(self, slots: Tensors | None = None) -> None:
        """Let cancelled transfers end before this thread's other writers of these slots, by default of all slots."""
        ...


class SynchronousEngine:
    """Copies before it returns."""

    concurrent = False
    busy = False

    def wait_by(self, host_wait: HostWait) -> None:
        pass  # the host waits for nothing else

    def start(self, slots: Tensors, records: Records, write: WriteSlot, *, urgent: bool) -> list[Any]:
        for slot, record in zip(slots, records, strict=True):
            write(slot, record)
        return []

    def wait(self, transfer: Any) -> None:
        raise AssertionError("a synchronous engine has no transfer in flight")

    set_urgent = wait

    def poll(self, transfer: Any) -> bool:
        raise AssertionError("a synchronous engine has no transfer in flight")

    begun = cancel = poll

    def wait_cancelled(self, slots: Tensors | None = None) -> None:
        pass


class _EmulatedTransfer:
    """One record on an emulated link.

    Attributes:
        queued_s: clock when it was queued.
        crossing_s: seconds that it occupies the link.
        copy: the thread's copy of the bytes; None if they were copied at once.
        due: clock when it will have crossed; None until its turn comes.
    """

    __slots__ = ("copy", "crossing_s", "due", "queued_s", "urgent")

    def __init__(self, queued_s: float, crossing_s: float, copy: Future[object] | None, urgent: bool) -> None:
        self.queued_s, self.crossing_s, self.copy, self.urgent = queued_s, crossing_s, copy, urgent
        self.due: float | None = None


class EmulatedEngine:
    """A link of a given speed between host and device, for machines without one.

    Each call works out by the clock which records have crossed: they follow each other without a gap, one at a time, so that
    no two share the link's time; ``wait`` lasts until the record would be there. The bytes are copied early, small records
    at once and large ones by a thread, so that crossing takes no time of a core. They aren't read before they are due.
    """

    concurrent = True

    def __init__(self, speed: LinkSpeed) -> None:
        self.speed = speed
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="epslots-link")
        self._lock = threading.Lock()
        self._urgent: deque[_EmulatedTransfer] = deque()
        self._background: deque[_EmulatedTransfer] = deque()
        self._free_from = 0.0  # clock when the link is free again

    def wait_by(self, host_wait: HostWait) -> None:
        pass  # a thread copies, and its future is waited for

    @property
    def busy(self) -> bool:
        with self._lock:
            now = self._advance()
            return bool(self._urgent or self._background) or now < self._free_from

    def start(self, slots: Tensors, records: Records, write: WriteSlot, *, urgent: bool) -> list[Any]:
        with self._lock:
            now = self._advance()
            transfers = []
            for slot, record in zip(slots, records, strict=True):
                copy = None
                if record.nbytes > _INLINE_COPY_BYTES:
                    copy = self._copier.submit(write, slot, record)
                else:
                    write(slot, record)
                transfers.append(_EmulatedTransfer(now, self.speed.seconds(record.nbytes), copy, urgent))
            if urgent:
                self._urgent.extend(transfers)
            else:
                self._background.extendleft(reversed(transfers))
        return transfers

    def set_urgent(self, transfer: _EmulatedTransfer) -> None:
        with self._lock:
            self._set_urgent(transfer)

    def _set_urgent(self, transfer: _EmulatedTransfer) -> None:
        now = self._advance()
        if transfer.due is None and not transfer.urgent:
            self._urgent.append(transfer)
            self._background.remove(transfer)
            transfer.urgent, transfer.queued_s = True, now

    def wait(self, transfer: _EmulatedTransfer) -> None:
        with self._lock:
            self._set_urgent(transfer)
            while transfer.due is None:  # those before it are urgent as well: no new one can come between
                self._begin_next()
        if transfer.copy is not None:
            transfer.copy.result()
        _sleep_until(transfer.due)

    def poll(self, transfer: _EmulatedTransfer) -> bool:
        with self._lock:
            now = self._advance()
            return transfer.due is not None and transfer.due <= now and (transfer.copy is None or transfer.copy.done())

    def begun(self, transfer: _EmulatedTransfer) -> bool:
        with self._lock:
            self._advance()
            return transfer.due is not None

    def cancel(self, transfer: _EmulatedTransfer) -> bool:
        with self._lock:
            self._advance()
            crosses = transfer.due is not None
            if not crosses:
                (self._urgent if transfer.urgent else self._background).remove(transfer)
                transfer.due = 0.0  # a second call, after an interrupt of this one, finds it crossed
        if transfer.copy is not None and not transfer.copy.cancel():
            wait([transfer.copy])  # the slot's next writer may be another thread than the copier
        return crosses

    def wait_cancelled(self, slots: Tensors | None = None) -> None:
        pass

    def _advance(self) -> float:
        """Begin the transfers whose turn has come by now; returns the clock."""
        now = perf_counter()
        while (self._urgent or self._background) and self._free_from <= now:
            self._begin_next()
        return now

    def _begin_next(self) -> None:
        queue = self._urgent or self._background
        transfer = queue[0]
        transfer.due = self._free_from = max(self._free_from, transfer.queued_s) + transfer.crossing_s
        queue.popleft()


def _sleep_until(due: float) -> None:
    while (left := due - perf_counter()) > 0:
        sleep(left - _SPIN_S if left > 2 * _SPIN_S else 0)
