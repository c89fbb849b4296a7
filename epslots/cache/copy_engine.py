"""The way of records from the host store into slots: at once, on a copy stream of the GPU, or at an emulated pace.

A *landing* is one record under way into one slot. Whoever reads the slot waits for it (``land``); whoever overwrites it has it
stopped if it hasn't begun (``drop``). What is urgent, because a step needs it, goes before what is only expected to be needed,
and of this the newest goes first: what has waited for long is most likely out of date.

    SynchronousEngine          the CPU copies, and the slot is complete on return
    CudaEngine     CUDA copies beside the kernels; events order the two
    EmulatedEngine    lets as much time pass as a link of a given speed would take: it makes a machine without a GPU behave
                    like one with one, so that overlap can be measured there
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

# Copies that aren't urgent which a GPU has at once: enough to keep its link busy until the host comes by again.
_SPARE_COPIES = 2
# Up to this size a record is copied sooner than a thread is woken.
_SMALL = 256 << 10
_AWAKE_S = 100e-6

Put = Callable[[torch.Tensor, torch.Tensor], object]
"""Brings a record (uint8, on the host) into a slot (uint8, on the device), queued on the current stream if there is one."""


def copy(slot: torch.Tensor, record: torch.Tensor) -> None:
    """A record that crosses as the slot has it."""
    slot.copy_(record, non_blocking=True)


class CopyEngine(Protocol):
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

    def set_urgent(self, landing: Any) -> None:
        """It is urgent from now on, and goes before what is started later."""
        ...

    def landed(self, landing: Any) -> bool:
        """Whether the record is there, so that ``land`` takes no time."""
        ...

    def drop(self, landing: Any) -> bool:
        """The record isn't wanted any more; what is started from now on is written after it.

        Returns:
            Whether it crosses all the same, or has.
        """
        ...


class SynchronousEngine:
    """Copies before it returns."""

    concurrent = False
    busy = False

    def start(self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], put: Put, *, urgent: bool) -> list[Any]:
        for slot, record in zip(slots, records, strict=True):
            put(slot, record)
        return []

    def land(self, landing: Any) -> None:
        raise AssertionError("nothing is ever under way")

    set_urgent = land

    def landed(self, landing: Any) -> bool:
        raise AssertionError("nothing is ever under way")

    drop = landed


class _Copy:
    """One record on its way to a GPU: in the queue of what isn't urgent, or (``event``) on a stream."""

    __slots__ = ("event", "put", "record", "slot")

    def __init__(self, slot: torch.Tensor, record: torch.Tensor, put: Put) -> None:
        self.slot, self.record, self.put = slot, record, put
        self.event: Any = None


class CudaEngine:
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

    def set_urgent(self, landing: _Copy) -> None:
        with self._lock:
            if landing.event is None:
                self._waiting.remove(landing)
                self._queue([landing], self._urgent)

    def land(self, landing: _Copy) -> None:
        self.set_urgent(landing)
        self._cuda.current_stream(self._device).wait_event(landing.event)

    def landed(self, landing: _Copy) -> bool:
        return landing.event is not None and landing.event.query()

    def drop(self, landing: _Copy) -> bool:
        with self._lock:
            if landing.event is None:
                if landing in self._waiting:
                    self._waiting.remove(landing)
                return False
        # What is started later waits for the current stream, so this orders it behind the landing on either stream.
        self._cuda.current_stream(self._device).wait_event(landing.event)
        return True

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
    """One record on an emulated link.

    ``started`` says since when it waits, ``due`` when it will have crossed, or None as long as its turn hasn't come.
    """

    __slots__ = ("due", "put", "started", "taken_s", "urgent")

    def __init__(self, started: float, taken_s: float, put: Future[object] | None, urgent: bool) -> None:
        self.started, self.taken_s, self.put, self.urgent = started, taken_s, put, urgent
        self.due: float | None = None


class EmulatedEngine:
    """A link of a given speed between host and device, on a machine that has none.

    What crosses when is worked out by the clock whenever somebody asks: records follow each other without a gap, one at a
    time, so that the link's time is never shared; and whoever needs one waits until it would be there. The bytes are copied
    as soon as can be, small records at once, others by a thread, so that crossing takes no time of a core. No one looks
    at them before they are due.
    """

    concurrent = True

    def __init__(self, speed: LinkSpeed) -> None:
        self.speed = speed
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="epslots-link")
        self._lock = threading.Lock()
        self._urgent: deque[_Flight] = deque()
        self._spare: deque[_Flight] = deque()
        self._free = 0.0  # when the link is free again

    @property
    def busy(self) -> bool:
        with self._lock:
            now = self._go_on()
            return bool(self._urgent or self._spare) or now < self._free

    def start(self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], put: Put, *, urgent: bool) -> list[Any]:
        with self._lock:
            now = self._go_on()
            flights = []
            for slot, record in zip(slots, records, strict=True):
                copying = None
                if record.nbytes > _SMALL:
                    copying = self._copier.submit(put, slot, record)
                else:
                    put(slot, record)
                flights.append(_Flight(now, self.speed.seconds(record.nbytes), copying, urgent))
            if urgent:
                self._urgent.extend(flights)
            else:
                self._spare.extendleft(reversed(flights))  # the newest guesses first: older ones may be out of date
        return flights

    def set_urgent(self, landing: _Flight) -> None:
        with self._lock:
            self._hurry(landing)

    def _hurry(self, landing: _Flight) -> None:
        now = self._go_on()
        if landing.due is None and not landing.urgent:
            self._urgent.append(landing)
            self._spare.remove(landing)
            landing.urgent, landing.started = True, now

    def land(self, landing: _Flight) -> None:
        with self._lock:
            self._hurry(landing)
            while landing.due is None:  # what is before it is urgent as well: nothing can come between
                self._begin()
        if landing.put is not None:
            landing.put.result()
        _wait_until(landing.due)

    def landed(self, landing: _Flight) -> bool:
        with self._lock:
            now = self._go_on()
            return landing.due is not None and landing.due <= now and (landing.put is None or landing.put.done())

    def drop(self, landing: _Flight) -> bool:
        with self._lock:
            self._go_on()
            crosses = landing.due is not None
            if not crosses:
                (self._urgent if landing.urgent else self._spare).remove(landing)
                landing.due = 0.0  # nobody need wait for it, should this call be interrupted here and made again
        if landing.put is not None and not landing.put.cancel():
            wait([landing.put])  # whoever writes the slot next may be another than the copier
        return crosses

    def _go_on(self) -> float:
        """Begin what has begun by now, in its turn; returns the time."""
        now = perf_counter()
        while (self._urgent or self._spare) and self._free <= now:
            self._begin()
        return now

    def _begin(self) -> None:
        queue = self._urgent or self._spare
        flight = queue[0]
        flight.due = self._free = max(self._free, flight.started) + flight.taken_s
        queue.popleft()


def _wait_until(due: float) -> None:
    """Sleep, and stay awake for the last of it: sleeping takes some 60 us longer than it is asked to."""
    while (left := due - perf_counter()) > 0:
        sleep(left - _AWAKE_S if left > 2 * _AWAKE_S else 0)


def make_copy_engine(setting: str | None, device: torch.device, staging_bytes: int = 0) -> CopyEngine:
    """The link of a device.

    Args:
        setting: None for the device's own; or an emulated one's speed, such as ``"8GB/s,20us"``.
        staging_bytes: as ``CudaEngine`` has it.

    Raises:
        ConfigError: not a speed, or the device has a link of its own.
    """
    if setting is None:
        return CudaEngine(device, staging_bytes) if device.type == "cuda" else SynchronousEngine()
    speed = parse_link(setting)
    if device.type != "cpu":
        raise ConfigError(f"link={setting!r}: {device} has a link of its own; one is emulated on device='cpu' alone")
    return EmulatedEngine(speed)
