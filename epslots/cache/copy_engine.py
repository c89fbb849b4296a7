"""Copy engines: they bring records from the host store into slots.

A *transfer* is one record in flight into one slot. Before a slot is read, its transfer is waited for (``wait``); before it is
overwritten, its transfer is cancelled (``cancel``). Urgent transfers, which a step needs, go first. Of the others the newest
goes first: a guess that has waited for long is probably out of date.

    SynchronousEngine   the CPU copies; the slot is complete on return
    CudaEngine          CUDA copies beside the kernels; events order the two
    EmulatedEngine      as slow as a link of a given speed: measures without a GPU what would overlap on one

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

from epslots.errors import ConfigError
from epslots.units import LinkSpeed, parse_link

# Background copies that are queued on a GPU at once: enough to keep its link busy until the engine is called again.
_QUEUED_BACKGROUND_COPIES = 2
# Copying a record of up to this size takes less time than waking a thread.
_INLINE_COPY_BYTES = 256 << 10
# The end of a wait is spent awake: a sleep takes some 60 us longer than asked for.
_SPIN_S = 100e-6

Tensors = Sequence[torch.Tensor]
SlotWriter = Callable[[torch.Tensor, torch.Tensor], object]
"""Writes a slot (uint8, on the device) from a record (uint8, on the host); queued on the current stream if there is one."""


class CopyEngine(Protocol):
    """Fills slots from host memory.

    Attributes:
        concurrent: whether transfers proceed while the caller computes.
        busy: whether any are in flight now.
    """

    concurrent: bool

    @property
    def busy(self) -> bool: ...

    def start(self, slots: Tensors, records: Tensors, write: SlotWriter, *, urgent: bool) -> list[Any]:
        """Start one transfer per slot, in order; returns them. An empty list: all slots are complete.

        The slots may be written at any time from now on: no read of their old content may be started after this call.

        Args:
            slots: uint8 [slot bytes] each, on the device.
            records: uint8 [record bytes] each, on the host; as many as slots.
            urgent: whether the running step needs them.
        """
        ...

    def wait(self, transfer: Any) -> None:
        """Make the slot complete for all that this thread computes from now on. The transfer becomes urgent."""
        ...

    def poll(self, transfer: Any) -> bool:
        """Whether the record has arrived, so that ``wait`` takes no time."""
        ...

    def set_urgent(self, transfer: Any) -> None:
        """Put the transfer before all that are started later."""
        ...

    def cancel(self, transfer: Any) -> bool:
        """Stop the transfer if it hasn't begun; later transfers into its slot are written after it in any case.

        Returns:
            Whether the record crosses the link all the same, or has.
        """
        ...

    def settle(self, slots: Tensors | None = None) -> None:
        """Let cancelled transfers end before this thread's other writers of these slots, by default of all slots."""
        ...


class SynchronousEngine:
    """Copies before it returns."""

    concurrent = False
    busy = False

    def start(self, slots: Tensors, records: Tensors, write: SlotWriter, *, urgent: bool) -> list[Any]:
        for slot, record in zip(slots, records, strict=True):
            write(slot, record)
        return []

    def wait(self, transfer: Any) -> None:
        raise AssertionError("a synchronous engine has no transfer in flight")

    set_urgent = wait

    def poll(self, transfer: Any) -> bool:
        raise AssertionError("a synchronous engine has no transfer in flight")

    cancel = poll

    def settle(self, slots: Tensors | None = None) -> None:
        pass


class _CudaTransfer:
    """One record in flight to a GPU: in the background queue while ``event`` is None, then on a stream."""

    __slots__ = ("event", "record", "slot", "write")

    def __init__(self, slot: torch.Tensor, record: torch.Tensor, write: SlotWriter) -> None:
        self.slot, self.record, self.write = slot, record, write
        self.event: Any = None


class CudaEngine:
    """Copies on two streams of a GPU, one of them urgent; the device serves both in turn.

    A copy can't be taken back from a stream. So only a few background copies are on theirs at a time; each call of the engine
    queues the next.

    Args:
        staging_bytes: size of the largest record if the store isn't pinned: records then pass through a pinned buffer, and the
            host waits for the copy before.
        cuda: ``torch.cuda``, or a fake of it.
    """

    concurrent = True

    def __init__(self, device: torch.device, staging_bytes: int = 0, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._urgent_stream = cuda.Stream(device, priority=-1)  # torch's number for a stream that goes first
        self._background_stream = cuda.Stream(device)
        self._staging = torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=True) if staging_bytes else None
        self._last_copy: Any = None
        self._background: deque[_CudaTransfer] = deque()
        self._on_background_stream: deque[_CudaTransfer] = deque()
        # By a slot's address: the end of a cancelled transfer that crosses all the same.
        self._stale: dict[int, Any] = {}
        self._lock = threading.Lock()  # a model of two layouts has two pools, which two threads may be in

    @property
    def busy(self) -> bool:
        with self._lock:
            self._advance()
        return bool(self._on_background_stream) or (self._last_copy is not None and not self._last_copy.query())

    def start(self, slots: Tensors, records: Tensors, write: SlotWriter, *, urgent: bool) -> list[Any]:
        transfers = [_CudaTransfer(slot, record, write) for slot, record in zip(slots, records, strict=True)]
        with self._lock:
            if urgent:
                self._queue(transfers, self._urgent_stream)
            else:
                self._background.extendleft(reversed(transfers))
            self._advance()
        return transfers

    def set_urgent(self, transfer: _CudaTransfer) -> None:
        with self._lock:
            if transfer.event is None:
                self._background.remove(transfer)
                self._queue([transfer], self._urgent_stream)

    def wait(self, transfer: _CudaTransfer) -> None:
        self.set_urgent(transfer)
        self._cuda.current_stream(self._device).wait_event(transfer.event)

    def poll(self, transfer: _CudaTransfer) -> bool:
        return transfer.event is not None and transfer.event.query()

    def cancel(self, transfer: _CudaTransfer) -> bool:
        with self._lock:
            if transfer.event is None:
                if transfer in self._background:
                    self._background.remove(transfer)
                return False
            # The next transfer into the slot waits for it, and nothing that computes does.
            self._stale[transfer.slot.data_ptr()] = transfer.event
        return True

    def settle(self, slots: Tensors | None = None) -> None:
        with self._lock:
            addresses = list(self._stale) if slots is None else [slot.data_ptr() for slot in slots]
            for event in [self._stale.pop(address) for address in addresses if address in self._stale]:
                self._cuda.current_stream(self._device).wait_event(event)

    def _advance(self) -> None:
        """Queue further background copies if there is room on their stream."""
        while self._on_background_stream and self._on_background_stream[0].event.query():
            self._on_background_stream.popleft()
        while self._background and len(self._on_background_stream) < _QUEUED_BACKGROUND_COPIES:
            transfer = self._background.popleft()
            self._queue([transfer], self._background_stream)
            self._on_background_stream.append(transfer)

    def _queue(self, transfers: Sequence[_CudaTransfer], stream: Any) -> None:
        stream.wait_stream(self._cuda.current_stream(self._device))  # kernels may still read the slots' old content
        with self._cuda.stream(stream):
            for transfer in transfers:
                if (stale := self._stale.pop(transfer.slot.data_ptr(), None)) is not None:
                    stream.wait_event(stale)
                transfer.write(transfer.slot, self._stage(transfer.record))
                transfer.event = self._cuda.Event()
                transfer.event.record(stream)
                self._last_copy = transfer.event

    def _stage(self, record: torch.Tensor) -> torch.Tensor:
        """The record in pinned memory."""
        if self._staging is None:
            return record
        if self._last_copy is not None:
            self._last_copy.synchronize()
        return self._staging[: record.nbytes].copy_(record)


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

    @property
    def busy(self) -> bool:
        with self._lock:
            now = self._advance()
            return bool(self._urgent or self._background) or now < self._free_from

    def start(self, slots: Tensors, records: Tensors, write: SlotWriter, *, urgent: bool) -> list[Any]:
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

    def settle(self, slots: Tensors | None = None) -> None:
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


def make_copy_engine(setting: str | None, device: torch.device, staging_bytes: int = 0) -> CopyEngine:
    """The copy engine of a device.

    Args:
        setting: None for the device's own link; or the speed of an emulated one, such as ``"8GB/s,20us"``.
        staging_bytes: size of the largest record if the store isn't pinned, else 0; for a GPU alone.

    Raises:
        ConfigError: not a speed, or the device has a link of its own.
    """
    if setting is None:
        return CudaEngine(device, staging_bytes) if device.type == "cuda" else SynchronousEngine()
    speed = parse_link(setting)
    if device.type != "cpu":
        raise ConfigError(f"link={setting!r}: {device} has a link of its own; one is emulated on device='cpu' alone")
    return EmulatedEngine(speed)
