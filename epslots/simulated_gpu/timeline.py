"""The clock: when each queued operation starts and ends.

Streams serve their operations in order. Each engine (the multiprocessors, and one copy engine a direction) serves one
operation at a time, in the order in which they become ready; priorities of streams don't count. So does CUDA with copies.
Kernels of several streams share the multiprocessors one after the other, which is so for kernels that fill them.

``SimulatedMachine`` queues operations; nothing here knows torch. Times are seconds from the start.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Operation:
    """One operation on a stream.

    Attributes:
        name: of the kernel or copy; "event" and "wait" take no time.
        stream: its number.
        engine: what serves it; "" = nothing does.
        queued_s: the host's clock when it was queued.
        duration_s: on its engine; infinite if it never ends.
        nbytes: bytes that it reads and writes, or copies.
        site: the source line that queued it.
        owner: whose line that is: "epslots", "transformers" or "other".
        after: operations of other streams that it waits for.
        over_link: whether a kernel reads the host's memory by the link.
        start_s, end_s: its times; None until the clock has come there.
    """

    name: str
    stream: int
    engine: str
    queued_s: float
    duration_s: float
    nbytes: int = 0
    site: str = ""
    owner: str = ""
    after: tuple[Operation, ...] = ()
    over_link: bool = False
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class Timeline:
    """All streams and engines of a machine.

    Attributes:
        operations: every operation, in the order of queueing; ``clear`` empties it.
    """

    operations: list[Operation] = field(default_factory=list)
    _waiting: dict[int, deque[Operation]] = field(default_factory=dict)
    _last: dict[int, Operation] = field(default_factory=dict)
    _stream_free_s: dict[int, float] = field(default_factory=dict)
    _engine_free_s: dict[str, float] = field(default_factory=dict)

    def queue(self, operation: Operation) -> None:
        """Append an operation to its stream. Later calls have no earlier ``queued_s``."""
        self.operations.append(operation)
        self._waiting.setdefault(operation.stream, deque()).append(operation)
        self._last[operation.stream] = operation

    def last(self, stream: int) -> Operation | None:
        """The operation that was queued last on a stream."""
        return self._last.get(stream)

    def run(self, until_s: float) -> None:
        """Serve everything that becomes ready by ``until_s``: nothing queued later can come before it."""
        while (ready := self._next()) is not None and ready[0] <= until_s:
            self._serve(*ready)

    def end_of(self, operation: Operation) -> float:
        """When an operation ends; infinite if it never does."""
        while operation.end_s is None:
            ready = self._next()
            if ready is None:
                return math.inf  # it waits for something that was never queued
            self._serve(*ready)
        return operation.end_s

    def end_sooner(self, operation: Operation, end_s: float) -> None:
        """Let an operation end before its time. It is the last of its stream and of its engine."""
        assert self._last[operation.stream] is operation and operation.start_s is not None and operation.end_s is not None
        assert operation.start_s <= end_s <= operation.end_s == self._engine_free_s[operation.engine]
        operation.duration_s, operation.end_s = end_s - operation.start_s, end_s
        self._stream_free_s[operation.stream] = self._engine_free_s[operation.engine] = end_s

    def clear(self) -> None:
        """Forget all operations that have been served."""
        self.run(math.inf)
        self.operations.clear()

    def _next(self) -> tuple[float, Operation] | None:
        """The operation that becomes ready first among the streams' next ones, and when."""
        found: tuple[float, Operation] | None = None
        for stream, waiting in self._waiting.items():
            if not waiting:
                continue
            head = waiting[0]
            if any(other.end_s is None for other in head.after):
                continue
            ends = (other.end_s for other in head.after if other.end_s is not None)
            ready_s = max(head.queued_s, self._stream_free_s.get(stream, 0.0), *ends)
            if found is None or ready_s < found[0]:
                found = ready_s, head
        return found

    def _serve(self, ready_s: float, operation: Operation) -> None:
        self._waiting[operation.stream].popleft()
        operation.start_s = ready_s
        if operation.engine:
            operation.start_s = max(ready_s, self._engine_free_s.get(operation.engine, 0.0))
        operation.end_s = self._stream_free_s[operation.stream] = operation.start_s + operation.duration_s
        if operation.engine:
            self._engine_free_s[operation.engine] = operation.end_s
