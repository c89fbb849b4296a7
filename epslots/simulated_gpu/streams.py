"""Streams and events with ``torch.cuda``'s names, on a ``SimulatedMachine``."""

from __future__ import annotations

from typing import Any

import torch

from epslots.simulated_gpu.machine import DeviceWork, current_machine
from epslots.simulated_gpu.ordering import HOST
from epslots.simulated_gpu.timeline import Operation


def device_number(device: Any = None) -> int:
    """The number of a device given as torch takes it: None or "cuda" = the current one.

    Raises:
        RuntimeError: there is no such device.
    """
    machine = current_machine()
    if isinstance(device, int):
        number = device
    else:
        named = None if device is None else torch.device(device)
        number = machine.device if named is None or named.index is None else named.index
    if number < 0:
        return machine.device
    if number >= machine.count:
        raise RuntimeError(f"CUDA error: invalid device ordinal: {number} of {machine.count}")
    return number


class SimulatedStream:
    """A stream of a device. Its priority has no effect on copies, and none here."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.machine = current_machine()
        self.device_index = device_number(device)
        self.device = torch.device("cuda", self.device_index)
        self.device_type = 1
        self.priority = priority
        self.stream_id = self.cuda_stream = self.machine.new_stream(self.device_index)

    def wait_event(self, event: SimulatedEvent) -> None:
        """Later operations of this stream come after what the event recorded."""
        if event.clock is None:
            return
        capture = self.machine.capture
        if capture is not None:
            capture.join(self.stream_id, event)
            return
        with self.machine.lock:
            if event.operation is not None and event.operation.stream != self.stream_id:
                self.machine.operate(DeviceWork("wait"), self.stream_id, [event.operation], launch_s=0.0)
            self.machine.ordering.wait(self.stream_id, event.clock)

    def wait_stream(self, other: SimulatedStream) -> None:
        """Later operations of this stream come after all that the other one has."""
        self.wait_event(other.record_event())

    def record_event(self, event: SimulatedEvent | None = None) -> SimulatedEvent:
        """An event after all that this stream has."""
        event = event or SimulatedEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all is done."""
        return self.machine.done(self.machine.timeline.last(self.stream_id))

    def synchronize(self) -> None:
        """Wait until all is done."""
        self.machine.wait_for_stream("stream.synchronize", self.stream_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return self.stream_id

    def __repr__(self) -> str:
        return f"<simulated stream {self.stream_id} of {self.device}>"


class SimulatedEvent:
    """A point of a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.machine = current_machine()
        self.enable_timing = enable_timing
        self.clock: dict[int, int] | None = None
        self.operation: Operation | None = None
        self.recorded_s = 0.0
        self.capture: Any = None
        self.reached: frozenset[int] = frozenset()

    def record(self, stream: SimulatedStream | None = None) -> None:
        """Move the event behind all that a stream has; by default the current stream. The device gets a context."""
        stream = stream or current_stream()
        machine = self.machine
        with machine.lock:
            self.clock = machine.ordering.snapshot(stream.stream_id)
            self.operation, self.recorded_s = machine.timeline.last(stream.stream_id), machine.now_s
            captures = machine.capture is not None and stream.stream_id in machine.capture.streams
            self.capture = machine.capture if captures else None
            if self.capture is not None:
                self.reached = self.capture.reached(stream.stream_id)
            machine.contexts.add(stream.device_index)

    def query(self) -> bool:
        """Whether it is reached."""
        if self.capture is not None:
            self.machine.refuse_in_capture("event.query")
        if self.clock is None:
            return True
        reached = self.machine.done(self.operation)
        if reached:
            self.machine.ordering.wait(HOST, self.clock)
        return reached

    def synchronize(self) -> None:
        """Wait until it is reached."""
        if self.clock is not None:
            self.machine.wait("event.synchronize", [self.operation], [self.clock])

    def wait(self, stream: SimulatedStream | None = None) -> None:
        """Have a stream wait for the event, like ``stream.wait_event``."""
        (stream or current_stream()).wait_event(self)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        """Milliseconds from here to another event. Neither is reached before it was recorded."""
        ends = [0.0 if e.operation is None else self.machine.timeline.end_of(e.operation) for e in (self, end)]
        return 1000 * (max(ends[1], end.recorded_s) - max(ends[0], self.recorded_s))


def default_stream(device: Any = None) -> SimulatedStream:
    """A device's default stream, the same for all threads."""
    machine, number = current_machine(), device_number(device)
    with machine.lock:
        streams = machine.default_streams
        if number not in streams:
            streams[number] = SimulatedStream(number)
    found: SimulatedStream = streams[number]
    return found


def current_stream(device: Any = None) -> SimulatedStream:
    """This thread's current stream of a device."""
    number = device_number(device)
    found: SimulatedStream | None = current_machine().current_streams.get(number)
    return default_stream(number) if found is None else found
