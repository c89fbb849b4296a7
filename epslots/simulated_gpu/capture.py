"""Captured graphs: operations are recorded instead of run, and run again by ``replay`` at the same addresses.

While a thread captures, operations compute their values all the same, since Python needs shapes; what they overwrite is put
back at the end. A replay computes them anew, in order. On the clock, streams that were forked run beside each other again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from epslots.simulated_gpu.call_site import call_site
from epslots.simulated_gpu.machine import DeviceWork, current_machine
from epslots.simulated_gpu.streams import SimulatedEvent, SimulatedStream, current_stream, default_stream
from epslots.simulated_gpu.tensors import tensors_in


@dataclass(frozen=True, eq=False)
class _Node:
    """One operation of a graph.

    Attributes:
        compute: does it once more; returns ``results`` in new memory.
        stream: on which it was captured; None = the one that the capture began on.
        after: places in the graph of operations of other streams that it waits for.
    """

    work: DeviceWork
    compute: Callable[[], Any]
    results: tuple[torch.Tensor, ...]
    owner: str
    stream: int | None
    after: frozenset[int]


class StepCapture:
    """The capture of one thread.

    Attributes:
        nodes: the operations so far.
        streams: streams that belong to the capture.
    """

    def __init__(self, stream: SimulatedStream) -> None:
        self.nodes: list[_Node] = []
        self.streams = {stream.stream_id}
        self._origin = stream.stream_id
        self._reached: dict[int, frozenset[int]] = {}  # by stream: what an event that is recorded now comes after
        self._awaited: dict[int, frozenset[int]] = {}  # by stream: what its next operation waits for
        self._last: dict[int, int] = {}
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: set[int] = set()

    def record(
        self, work: DeviceWork, stream: int, compute: Callable[[], Any] | None, results: Sequence[torch.Tensor] = ()
    ) -> None:
        """Record an operation.

        Args:
            compute: does it once more; None if no capture may have it. Returns ``results``, in new memory.

        Raises:
            RuntimeError: it can't be in a capture, or is on a stream outside of it.
        """
        if compute is None or stream not in self.streams:
            why = "" if compute is None else " on another stream"
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {work.name}{why}")
        self._made.update(t.untyped_storage()._cdata for t in results)
        forked = None if stream == self._origin else stream
        after = self._awaited.pop(stream, frozenset())
        self._last[stream] = number = len(self.nodes)
        self._reached[stream] = frozenset([number])
        self.nodes.append(_Node(work, compute, tuple(results), call_site().owner, forked, after))

    def protect(self, written: Sequence[torch.Tensor]) -> None:
        """Keep what these tensors hold, to put it back at the end."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._before and storage._cdata not in self._made:
                with current_machine().computing_kernel():
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self._before[storage._cdata] = whole, whole.clone()

    def reached(self, stream: int) -> frozenset[int]:
        """The operations that an event comes after, which is recorded on a stream now."""
        return self._reached.get(stream, frozenset())

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
        self._awaited[stream] = self._awaited.get(stream, frozenset()) | event.nodes
        self._reached[stream] = self.reached(stream) | event.nodes

    def end(self) -> None:
        """Put back what was overwritten.

        Raises:
            RuntimeError: a stream that was forked has not been joined.
        """
        with current_machine().computing_kernel():
            for whole, before in self._before.values():
                whole.copy_(before)
        joined = self._before_the_end()
        unjoined = [stream for stream, last in self._last.items() if stream != self._origin and last not in joined]
        if unjoined:
            raise RuntimeError(f"CUDA error: capturing stream has unjoined work (streams {unjoined})")

    def _before_the_end(self) -> set[int]:
        """The operations that the first stream comes after, by its own order and by waits."""
        found: set[int] = set()
        ahead = list(self.reached(self._origin))
        while ahead:
            number = ahead.pop()
            if number not in found:
                found.add(number)
                node = self.nodes[number]
                earlier = [other for other in range(number) if self.nodes[other].stream == node.stream]
                ahead += [*node.after, *earlier[-1:]]
        return found


class SimulatedGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.nodes: list[_Node] = []
        self._forked: dict[int | None, SimulatedStream] = {}  # by the captured stream, one that its operations run on

    def replay(self) -> None:
        """Queue all operations at once: on the current stream, and on one for each that was forked."""
        machine = current_machine()
        machine.spend(machine.spec.replay_s)
        seconds = []
        with machine.computing_kernel():
            for node in self.nodes:
                computed = node.compute()
                seconds.append(node.work.seconds if node.work.again is None else node.work.again())
                if node.results:
                    for target, value in zip(node.results, tensors_in(computed), strict=True):
                        target.copy_(value)
        self._queue(seconds)

    def _queue(self, seconds: Sequence[float]) -> None:
        machine, here = current_machine(), current_stream()
        awaited = {number for node in self.nodes for number in node.after}
        ends: dict[int, SimulatedEvent] = {}
        for captured in {node.stream for node in self.nodes} - {None} - self._forked.keys():
            self._forked[captured] = SimulatedStream(here.device_index)
        for stream in self._forked.values():
            stream.wait_stream(here)
        for number, (node, node_s) in enumerate(zip(self.nodes, seconds, strict=True)):
            stream = here if node.stream is None else self._forked[node.stream]
            for other in node.after:
                stream.wait_event(ends[other])
            work = replace(node.work, seconds=node_s + machine.spec.node_s)
            machine.operate(work, stream.stream_id, launch_s=0.0)
            if work.engine.startswith("SM"):
                machine.kernels[node.owner, work.name] += 1
            if number in awaited:
                ends[number] = stream.record_event()
        for stream in self._forked.values():
            here.wait_stream(stream)

    def reset(self) -> None:
        """Forget the operations."""
        self.nodes = []
        self._forked = {}


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
        self._graph, self._stream = graph, stream or SimulatedStream()
        self._before: SimulatedStream | None = None

    def __enter__(self) -> None:
        machine = current_machine()
        if machine.capture is not None:
            raise RuntimeError("CUDA error: this thread is capturing already")
        if self._stream == default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        machine.wait_for_device("device.synchronize", machine.device)
        gc.collect()
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
