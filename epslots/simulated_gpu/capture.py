"""Captured graphs: operations are recorded instead of run, and run again by ``replay`` at the same addresses.

While a thread captures, operations compute their values all the same, since Python needs shapes; what they overwrite is put
back at the end. A replay computes them anew, in order, on one stream.
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
    """One operation of a graph; ``compute`` returns ``results`` in new memory."""

    work: DeviceWork
    compute: Callable[[], Any]
    results: tuple[torch.Tensor, ...]
    owner: str


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
        self._joined: dict[int, int] = {}  # nodes of a forked stream that the first one comes after
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
        self.nodes.append(_Node(work, compute, tuple(results), call_site().owner))
        self._last[stream] = len(self.nodes)

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
        if stream == self._origin:
            self._joined.update(self._last)

    def end(self) -> None:
        """Put back what was overwritten.

        Raises:
            RuntimeError: a stream that was forked has not been joined.
        """
        with current_machine().computing_kernel():
            for whole, before in self._before.values():
                whole.copy_(before)
        unjoined = [s for s, last in self._last.items() if s != self._origin and self._joined.get(s, 0) < last]
        if unjoined:
            raise RuntimeError(f"CUDA error: capturing stream has unjoined work (streams {unjoined})")


class SimulatedGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.nodes: list[_Node] = []

    def replay(self) -> None:
        """Queue all operations on the current stream at once."""
        machine = current_machine()
        stream = current_stream().stream_id
        machine.spend(machine.spec.replay_s)
        seconds = []
        with machine.computing_kernel():
            for node in self.nodes:
                computed = node.compute()
                seconds.append(node.work.seconds if node.work.again is None else node.work.again())
                if node.results:
                    for target, value in zip(node.results, tensors_in(computed), strict=True):
                        target.copy_(value)
        for node, node_s in zip(self.nodes, seconds, strict=True):
            work = replace(node.work, seconds=node_s + machine.spec.node_s)
            machine.operate(work, stream, launch_s=0.0)
            if work.engine.startswith("SM"):
                machine.kernels[node.owner, work.name] += 1

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
