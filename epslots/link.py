"""The way of records from the host store into slots: at once, on a copy stream of the GPU, or at an emulated pace.

A *landing* is one record under way into one slot. Whoever reads the slot waits for it (``land``); whoever overwrites it has it
stopped if it hasn't begun (``drop``). What is urgent, because a step needs it, goes before what is only expected to be needed,
and of this the newest goes first: what has waited for long is most likely out of date.

    AtOnce          the CPU copies, and the slot is complete on return
    CopyStreams     CUDA copies beside the kernels; events order the two
    EmulatedLink    a thread copies and lets as much time pass as a link of a given speed would take: it makes a machine
                    without a GPU behave like one with one, so that overlap can be measured there
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter, sleep
from typing import Any, Protocol

import torch

from epslots.errors import ConfigError
from epslots.units import LinkSpeed, parse_link

# Copies that aren't urgent which a GPU has at once: enough to keep its link busy until the host comes by again.
_SPARE_COPIES = 2

Put = Callable[[torch.Tensor, torch.Tensor], object]
"""Brings a record (uint8, on the host) into a slot (uint8, on the device), queued on the current stream if there is one."""


def copy(slot: torch.Tensor, record: torch.Tensor) -> None:
    """A record that crosses as the slot has it."""
    slot.copy_(record, non_blocking=True)


class Link(Protocol):
    """Fills slots.

    Attributes:
        concurrent: whether records are on their way while the caller goes on.
        busy: whether any are now.
    """

    concurrent: bool

    @property
    def busy(self) -> bool: ...

    def start(self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], put: Put, *, urgent: bool) -> list[Any]:
        """Fill slots with records, in order; returns their landings.

        On return the link may write the slots at any time: nothing that reads their old content may be started later.
        """
        ...

    def land(self, landing: Any) -> None:
        """What this thread computes next finds the slot complete. It is urgent from now on."""
        ...

    def landed(self, landing: Any) -> bool:
        """Whether the record is there, so that ``land`` takes no time."""
        ...

    def drop(self, landing: Any) -> None:
        """The record isn't wanted any more; what is started from now on is written after it."""
        ...


class AtOnce:
    """Copies before it returns."""

    concurrent = False
    busy = False

    def start(self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], put: Put, *, urgent: bool) -> list[Any]:
        for slot, record in zip(slots, records, strict=True):
            put(slot, record)
        return []

    def land(self, landing: Any) -> None:
        raise AssertionError("nothing is ever under way")

    def landed(self, landing: Any) -> bool:
        raise AssertionError("nothing is ever under way")

    drop = land


class _Copy:
    """One record on its way to a GPU: in the queue of what isn't urgent, or (``event``) on a stream."""

    __slots__ = ("event", "put", "record", "slot")

    def __init__(self, slot: torch.Tensor, record: torch.Tensor, put: Put) -> None:
        self.slot, self.record, self.put = slot, record, put
        self.event: Any = None


class CopyStreams:
    """Copies on two streams of a GPU, one of them for what is urgent; the device serves both in turn.

    What has been queued on a stream can't be taken back. So of what isn't urgent only a few copies are, and the next whenever
    the host comes by.

    Args:
        staging_bytes: the largest record, if the store isn't pinned: then records pass through a pinned buffer, and the host
            waits for the copy before.
        cuda: ``torch.cuda``, or what acts like it.
    """

    concurrent = True

    def __init__(self, device: torch.device, staging_bytes: int = 0, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._urgent = cuda.Stream(device, priority=-1)  # torch's number for a stream that goes first
        self._spare = cuda.Stream(device)
        self._staging = torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=True) if staging_bytes else None
        self._staged: Any = None
        self._waiting: deque[_Copy] = deque()
        self._on_spare: deque[_Copy] = deque()
        self._lock = threading.Lock()  # a model of two layouts has two pools, which two threads may be in

    @property
    def busy(self) -> bool:
        with self._lock:
            self._go_on()
        return bool(self._on_spare) or (self._staged is not None and not self._staged.query())

    def start(self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], put: Put, *, urgent: bool) -> list[Any]:
        copies = [_Copy(slot, record, put) for slot, record in zip(slots, records, strict=True)]
        with self._lock:
            if urgent:
                self._queue(copies, self._urgent)
            else:
                self._waiting.extendleft(reversed(copies))
            self._go_on()
        return copies

    def land(self, landing: _Copy) -> None:
        with self._lock:
            if landing.event is None:
                self._waiting.remove(landing)
                self._queue([landing], self._urgent)
        self._cuda.current_stream(self._device).wait_event(landing.event)

    def landed(self, landing: _Copy) -> bool:
        return landing.event is not None and landing.event.query()

    def drop(self, landing: _Copy) -> None:
        with self._lock:
            if landing.event is None:
                if landing in self._waiting:
                    self._waiting.remove(landing)
                return
        # What is started later waits for the current stream, so this orders it behind the landing on either stream.
        self._cuda.current_stream(self._device).wait_event(landing.event)

    def _go_on(self) -> None:
        """Queue more of what isn't urgent, if there is room."""
        while self._on_spare and self._on_spare[0].event.query():
            self._on_spare.popleft()
        while self._waiting and len(self._on_spare) < _SPARE_COPIES:
            copy = self._waiting.popleft()
            self._queue([copy], self._spare)
            self._on_spare.append(copy)

    def _queue(self, copies: Sequence[_Copy], stream: Any) -> None:
        stream.wait_stream(self._cuda.current_stream(self._device))  # kernels may still read what was in the slots
        with self._cuda.stream(stream):
            for copy in copies:
                copy.put(copy.slot, self._stage(copy.record))
                copy.event = self._cuda.Event()
                copy.event.record(stream)
                self._staged = copy.event

    def _stage(self, record: torch.Tensor) -> torch.Tensor:
        if self._staging is None:
            return record
        if self._staged is not None:
            self._staged.synchronize()
        return self._staging[: record.nbytes].copy_(record)


class _Flight:
    """One record on an emulated link."""

    __slots__ = ("begun", "due", "error", "put", "record", "slot", "taken_s", "urgent")

    def __init__(self, slot: torch.Tensor, record: torch.Tensor, put: Put, urgent: bool, taken_s: float) -> None:
        self.slot, self.record, self.put, self.urgent, self.taken_s = slot, record, put, urgent, taken_s
        self.begun = False
        self.due = 0.0
        self.error: BaseException | None = None


class _Queue:
    """What an emulated link and its thread share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.urgent: deque[_Flight] = deque()
        self.spare: deque[_Flight] = deque()
        self.open = True
        self.free = 0.0  # when the link is free again

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()

    def carry(self) -> None:
        """The thread: one flight after the other, urgent ones first; it sleeps while bytes would be crossing."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.urgent or self.spare or not self.open)
                if not self.open:
                    return
                flight = (self.urgent or self.spare).popleft()
            due = self.free = max(self.free, perf_counter()) + flight.taken_s
            try:
                flight.put(flight.slot, flight.record)
            except BaseException as error:  # whoever waits for it is told
                flight.error = error
            with self.changed:
                flight.due, flight.begun = due, True
                self.changed.notify_all()
            del flight
            self.free = max(due, perf_counter())
            _sleep_until(due)


class EmulatedLink:
    """A link of a given speed between host and device, on a machine that has none.

    The bytes are copied by a thread; then it sleeps for as long as they would take to cross. One record at a time, so that
    the link's time is never shared. What the copying itself takes is part of that time.
    """

    concurrent = True

    def __init__(self, speed: LinkSpeed) -> None:
        self.speed = speed
        self._queue = queue = _Queue()
        self._thread = threading.Thread(target=queue.carry, name="epslots-link", daemon=True)
        self._thread.start()
        weakref.finalize(self, queue.close)

    @property
    def busy(self) -> bool:
        queue = self._queue
        return bool(queue.urgent or queue.spare) or perf_counter() < queue.free

    def start(self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], put: Put, *, urgent: bool) -> list[Any]:
        flights = [
            _Flight(slot, record, put, urgent, self.speed.seconds(record.nbytes))
            for slot, record in zip(slots, records, strict=True)
        ]
        queue = self._queue
        with queue.changed:
            if urgent:
                queue.urgent.extend(flights)
            else:
                queue.spare.extendleft(reversed(flights))  # the newest guesses first: older ones may be out of date
            queue.changed.notify_all()
        return flights

    def land(self, landing: _Flight) -> None:
        queue = self._queue
        with queue.changed:
            if not landing.begun and landing in queue.spare:
                queue.spare.remove(landing)
                queue.urgent.append(landing)
            queue.changed.wait_for(lambda: landing.begun)
        if landing.error is not None:
            raise RuntimeError(f"a record couldn't be brought into its slot: {landing.error!r}") from landing.error
        _sleep_until(landing.due)

    def landed(self, landing: _Flight) -> bool:
        return landing.begun and landing.error is None and perf_counter() >= landing.due

    def drop(self, landing: _Flight) -> None:
        queue = self._queue
        with queue.changed:
            for waiting in (queue.spare, queue.urgent):
                if landing in waiting:
                    waiting.remove(landing)
                    landing.begun = True  # nobody need wait for it, should this call be interrupted here and made again
                    return
            queue.changed.wait_for(lambda: landing.begun)


def _sleep_until(due: float) -> None:
    left = due - perf_counter()
    if left > 0:
        sleep(left)


def make_link(setting: str | None, device: torch.device, staging_bytes: int = 0) -> Link:
    """The link of a device.

    Args:
        setting: None for the device's own; or an emulated one's speed, such as ``"8GB/s,20us"``.
        staging_bytes: as ``CopyStreams`` has it.

    Raises:
        ConfigError: not a speed, or the device has a link of its own.
    """
    if setting is None:
        return CopyStreams(device, staging_bytes) if device.type == "cuda" else AtOnce()
    speed = parse_link(setting)
    if device.type != "cpu":
        raise ConfigError(f"link={setting!r}: {device} has a link of its own; one is emulated on device='cpu' alone")
    return EmulatedLink(speed)
