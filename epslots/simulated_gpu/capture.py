"""Captured graphs: operations are recorded instead of run, and run again by ``replay`` at the same addresses.

While a thread captures, operations compute their values all the same, since Python needs shapes; what they overwrite is put
back at the end. A replay computes them anew, in order. Streams that were forked run beside the first one then, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import _disable_current_modes

from epslots.simulated_gpu.call_site import call_site
from epslots.simulated_gpu.machine import COPIES, DeviceWork, current_machine
from epslots.simulated_gpu.streams import SimulatedEvent, SimulatedStream, current_stream, default_stream
from epslots.simulated_gpu.tensors import tensors_in


@dataclass(frozen=True, eq=False)
class _GraphNode:
    """One operation of a graph; ``compute`` returns ``results`` in new memory.

    Attributes:
        stream: that it was captured on; 0 = the first one.
        after: numbers of operations of other streams that it comes after.
    """

    work: DeviceWork
    compute: Callable[[], Any]
    results: tuple[torch.Tensor, ...]
    owner: str
    stream: int
    after: tuple[int, ...]


class StepCapture:
    """The capture of one thread.

    Attributes:
        nodes: the operations so far.
        streams: streams that belong to the capture.
    """

    def __init__(self, stream: SimulatedStream) -> None:
        self.nodes: list[_GraphNode] = []
        self.streams = {stream.stream_id}
        self._origin = stream.stream_id
        self._last: dict[int, int] = {}  # by stream: the number of its last operation
        self._waits: dict[int, set[int]] = {}  # by stream: operations of others that its next one comes after
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: set[int] = set()

    def record(
        self, work: DeviceWork, stream: int, compute: Callable[[], Any] | None, results: Sequence[torch.Tensor] = ()
    ) -> None:
        """Record an operation.

        Args:
            compute: does it once more; None if it isn't allowed in a capture. Returns ``results``, in new memory.

        Raises:
            RuntimeError: it can't be in a capture, or is on a stream outside of it.
        """
        if compute is None or stream not in self.streams:
            why = "" if compute is None else " on another stream"
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {work.name}{why}")
        self._made.update(t.untyped_storage()._cdata for t in results)
        after = tuple(sorted(self._waits.pop(stream, ())))
        number = 0 if stream == self._origin else stream
        self.nodes.append(_GraphNode(work, compute, tuple(results), call_site().owner, number, after))
        self._last[stream] = len(self.nodes) - 1

    def reached(self, stream: int) -> frozenset[int]:
        """The operations that an event on a stream stands for."""
        return frozenset(self._waits.get(stream, ())) | {self._last[s] for s in (stream,) if s in self._last}

    def protect(self, written: Sequence[torch.Tensor]) -> None:
        """Keep what these tensors hold, to put it back at the end."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._before and storage._cdata not in self._made:
                with current_machine().computing_kernel():
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self._before[storage._cdata] = whole, whole.clone()

    def join(self, stream: int, event: SimulatedEvent) -> None:
        """A stream waits for an event: so it comes into the capture, or back.

        Raises:
            RuntimeError: the event was recorded outside of the capture.
        """
        if event.capture is not self:
            if stream in self.streams:
                raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
            return
        self.streams.add(stream)
        self._waits.setdefault(stream, set()).update(event.reached)

    def end(self) -> None:
        """Put back what was overwritten.

        Raises:
            RuntimeError: a stream that was forked has not been joined.
        """
        with current_machine().computing_kernel():
            for whole, before in self._before.values():
                whole.copy_(before)
        joined = self._before_the_end()
        unjoined = [stream for stream, last in self._last.items() if last not in joined]
        if unjoined:
            raise RuntimeError(f"CUDA error: capturing stream has unjoined work (streams {unjoined})")

    def _before_the_end(self) -> set[int]:
        """The operations that are done when the first stream's are."""
        found: set[int] = set()
        open_ends = list(self.reached(self._origin))
        latest: dict[int, int] = {}
        previous: list[int | None] = []
        for number, node in enumerate(self.nodes):
            previous.append(latest.get(node.stream))
            latest[node.stream] = number
        while open_ends:
            number = open_ends.pop()
            if number not in found:
                found.add(number)
                before = previous[number]
                open_ends += [*self.nodes[number].after, *([] if before is None else [before])]
        return found


class SimulatedGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.nodes: list[_GraphNode] = []
        self._forked: dict[int, SimulatedStream] = {}

    def replay(self) -> None:
        """Queue all operations at once: on the current stream, and beside it."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # no call here is the user's
            self._queue()

    def _queue(self) -> None:
        machine, here = current_machine(), current_stream()
        machine.spend(machine.spec.replay_s)
        marks: dict[int, SimulatedEvent] = {}
        marked = {number for node in self.nodes for number in node.after}
        begun = {0}
        for number, node in enumerate(self.nodes):
            stream = here if node.stream == 0 else self._forked.setdefault(node.stream, SimulatedStream(here.device))
            if node.stream not in begun:
                begun.add(node.stream)
                stream.wait_stream(here)
            for other in node.after:
                if self.nodes[other].stream != node.stream:
                    stream.wait_event(marks[other])
            work = replace(node.work, seconds=self._compute(node) + machine.spec.node_s)
            machine.operate(work, stream.stream_id, launch_s=0.0)
            if number in marked:
                marks[number] = stream.record_event()
            if work.name not in COPIES:
                machine.kernels[node.owner, work.name] += 1

    @staticmethod
    def _compute(node: _GraphNode) -> float:
        """Compute an operation's values; returns its seconds."""
        with current_machine().computing_kernel():
            computed = node.compute()
            if node.results:
                for target, value in zip(node.results, tensors_in(computed), strict=True):
                    target.copy_(value)
            return node.work.seconds if node.work.again is None else node.work.again()

    def reset(self) -> None:
        """Forget the operations."""
        self.nodes = []


class CapturingStep:
    """``torch.cuda.graph``: within the context, this thread's operations become those of a graph."""

    def __init__(
        self,
        graph: SimulatedGraph,
        pool: Any = None,
        stream: SimulatedStream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed"), capture_error_mode
        self._graph, self._stream, self._pool = graph, stream or SimulatedStream(), pool
        self._before: SimulatedStream | None = None

    def __enter__(self) -> None:
        machine = current_machine()
        if machine.capture is not None:
            raise RuntimeError("CUDA error: this thread is capturing already")
        if self._pool is not None:
            if self._pool in machine.graph_pools and not machine.graph_pools[self._pool]:
                # torch's allocator counts a pool's graphs, and asserts that there is one as long as a block of it lives.
                raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0: all graphs of this memory pool are gone")
            machine.graph_pools.setdefault(self._pool, WeakSet()).add(self._graph)
        if self._stream == default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        machine.wait_for_device("device.synchronize", machine.device)
        self._before = machine.current_streams.get(machine.device)
        machine.current_streams[machine.device] = self._stream
        machine.capture = StepCapture(self._stream)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        machine = current_machine()
        capture: StepCapture = machine.capture
        machine.capture = None
        if self._before is None:
            del machine.current_streams[machine.device]
        else:
            machine.current_streams[machine.device] = self._before
        capture.end()
        if error is None:
            self._graph.nodes = capture.nodes
