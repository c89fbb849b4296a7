"""NCCL groups on simulated GPUs: ranks are threads, each with a GPU of its own.

It holds its users to NCCL's rules. A group is made with torch's watchdog tamed; all ranks queue the same operations in the
same order; a group call that is opened on a thread is closed there. An operation with a lost rank never ends on the
others' devices, until their group is aborted: then it ends with undefined results.

On the clock a collective begins when all ranks have come to it, and takes ``GpuSpec.collective_s`` and its bytes' time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch._C._distributed_c10d import ErrorType
from torch.distributed import DistBackendError

from epslots.simulated_gpu.machine import DeviceWork, current_machine
from epslots.simulated_gpu.streams import SimulatedEvent, SimulatedStream, current_stream
from epslots.simulated_gpu.tensors import GpuTensor
from epslots.simulated_gpu.timeline import Operation
from epslots.transport.nccl import ENVIRONMENT

_open_calls = threading.local()
_MEETING_S = 200.0  # the longest wait, of real time, for a rank that doesn't come


class OutOfOrderError(AssertionError):
    """Ranks queue different operations: on GPUs they would wait for each other, or mix their bytes."""


class NcclHub:
    """All ranks of one communicator."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lost: set[int] = set()
        self._meetings: dict[Any, dict[int, tuple[str, Any]]] = {}
        self._news = threading.Condition()

    def lose(self, rank: int) -> None:
        """The rank's process has ended."""
        with self._news:
            self.lost.add(rank)
            self._news.notify_all()

    def meet(self, key: Any, rank: int, ranks: set[int], name: str, given: Any) -> dict[int, Any] | None:
        """All these ranks' contributions to the operation of this key; None if one of them is lost."""
        with self._news:
            meeting = self._meetings.setdefault(key, {})
            meeting[rank] = name, given
            self._news.notify_all()
            came = self._news.wait_for(lambda: ranks <= meeting.keys() or ranks & self.lost, _MEETING_S)
            assert came, f"{name}: ranks {ranks - meeting.keys()} never came"
            if not ranks <= meeting.keys():
                return None
            names = {found for found, _ in meeting.values()}
            if len(names) > 1:
                raise OutOfOrderError(f"operation {key} is {' and '.join(sorted(names))}")
            return {rank: value for rank, (_, value) in meeting.items()}


class NcclWork:
    """Its ``wait`` makes the current stream wait, as NCCL's does."""

    def __init__(self, device: torch.device, event: SimulatedEvent) -> None:
        self._device, self._event = device, event

    def wait(self) -> None:
        current_stream(self._device).wait_event(self._event)


class SimulatedNcclGroup:
    """One rank's end of a communicator; the methods that ``TorchTransport`` calls.

    Attributes:
        fails: called with each operation's name as it is queued; may raise what NCCL would.
        broken: whether the watchdog has seen a connection break.
    """

    def __init__(self, hub: NcclHub, rank: int, device: torch.device) -> None:
        wrong = {name for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}
        assert not wrong, f"torch reads {wrong} when a group is made"
        assert not getattr(_open_calls, "count", 0), "a group call is open on this thread: nothing would ever be launched"
        self.hub, self._rank, self.device = hub, rank, device
        self.fails: Callable[[str], object] = lambda name: None
        self.aborted = self.broken = False
        self._stream = SimulatedStream(device)
        self._number = 0
        self._pairs: dict[tuple[int, int], int] = {}
        self._never: list[Operation] = []

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.hub.size

    def name(self) -> str:
        return "nccl"

    def _get_backend(self, _: torch.device) -> SimulatedNcclGroup:
        return self

    def get_error(self) -> Any:
        return ErrorType.COMM_ERROR if self.broken else ErrorType.SUCCESS

    def set_timeout(self, _: Any) -> None:
        raise AssertionError("the watchdog's timeout stays longer than every deadline")

    def abort(self) -> None:
        """End what is on the device; raises if a connection is broken."""
        self.aborted = True
        for operation in self._never:
            operation.end_s = current_machine().now_s
        if self.broken:
            raise DistBackendError("NCCL error: remote process exited")

    def all_gather_single(self, result: GpuTensor, mine: GpuTensor) -> NcclWork:
        def fill(all_mine: dict[int, torch.Tensor]) -> None:
            result.memory.copy_(torch.cat([all_mine[rank] for rank in range(self.size())]))

        return self._collective("all_gather", mine, result, fill)

    def all_to_all_single(self, result: GpuTensor, rows: GpuTensor, receives: list[int], sends: list[int]) -> NcclWork:
        def fill(given: dict[int, Any]) -> None:
            parts = [given[rank][0].split(given[rank][1])[self._rank] for rank in range(self.size())]
            assert [len(part) for part in parts] == receives, "sizes differ: NCCL would hang, or write past the end"
            result.memory.copy_(torch.cat(parts))

        return self._collective("all_to_all", rows, result, fill, sends)

    def reduce_scatter_single(self, result: GpuTensor, blocks: GpuTensor, _: Any) -> NcclWork:
        def fill(given: dict[int, torch.Tensor]) -> None:
            count = result.memory.numel()
            mine = [given[rank][self._rank * count : (self._rank + 1) * count] for rank in range(self.size())]
            result.memory.copy_(torch.stack(mine).sum(0))

        return self._collective("reduce_scatter", blocks, result, fill)

    def exchange(self, outgoing: bool, peer: int, tensor: GpuTensor) -> tuple[Any, GpuTensor, bool]:
        """One operation of a batch: the meeting's key, the tensor, and whether it is sent."""
        pair = (self._rank, peer) if outgoing else (peer, self._rank)
        number = self._pairs[pair] = self._pairs.get(pair, 0) + 1
        return (*pair, number), tensor, outgoing

    def batch(self, operations: Sequence[tuple[bool, int, GpuTensor]]) -> list[NcclWork]:
        """``batch_isend_irecv``: a group call, which stays open if an operation in it fails."""
        _open_calls.count = getattr(_open_calls, "count", 0) + 1
        self.fails("exchange")
        keyed = [self.exchange(*one) for one in operations]
        _open_calls.count -= 1
        current = current_stream(self.device)
        self._stream.wait_stream(current)
        lost = False
        begins, senders = self._begin("exchange"), list[Operation]()
        for key, tensor, outgoing in keyed:  # sends first: they wait for no one here
            if outgoing:
                self._offer(key, tensor, begins)
        for key, tensor, outgoing in keyed:
            if not outgoing:
                found = self._take(key)
                if found is None:
                    lost = True
                else:
                    senders.append(found[1])
                    with current_machine().computing_kernel():
                        tensor.memory.copy_(found[0])
        reads = [tensor.memory for _, tensor, outgoing in keyed if outgoing]
        writes = [tensor.memory for _, tensor, outgoing in keyed if not outgoing]
        return [self._queue("exchange", reads, writes, senders, lost=lost)]

    def _offer(self, key: Any, tensor: GpuTensor, begins: Operation) -> None:
        with self.hub._news:
            with current_machine().computing_kernel():
                self.hub._meetings.setdefault(("pair", *key), {})[0] = "send", (tensor.memory.clone(), begins)
            self.hub._news.notify_all()

    def _take(self, key: Any) -> tuple[torch.Tensor, Operation] | None:
        found = self.hub.meet(("pair", *key), 1, {0, 1}, "send", None) if key[0] not in self.hub.lost else None
        return None if found is None else found[0]

    def _collective(
        self, name: str, given: GpuTensor, result: GpuTensor, fill: Callable[[Any], None], extra: Any = None
    ) -> NcclWork:
        if self.aborted:
            raise RuntimeError("NCCL communicator was aborted")
        self.fails(name)
        self._number += 1
        self._stream.wait_stream(current_stream(self.device))
        begins, others = self._begin(name), list[Operation]()
        with current_machine().computing_kernel():
            value = given.memory.clone()
            everyone, mine = set(range(self.size())), (value if extra is None else (value, extra), begins)
            found = self.hub.meet(self._number, self._rank, everyone, name, mine)
            if found is not None:
                fill({rank: value for rank, (value, _) in found.items()})
                others = [operation for rank, (_, operation) in found.items() if rank != self._rank]
        return self._queue(name, [given.memory], [result.memory], others, lost=found is None)

    def _begin(self, name: str) -> Operation:
        """This rank has come to an operation."""
        return current_machine().operate(DeviceWork(f"nccl {name} begins"), self._stream.stream_id, launch_s=0.0)

    def _queue(self, name: str, reads: Any, writes: Any, after: list[Operation], *, lost: bool) -> NcclWork:
        machine, never = current_machine(), Operation("a lost peer", 0, "", 0.0, 0.0)
        if lost:
            self._never.append(never)
            after = [*after, never]
        nbytes = max(sum(map(machine.sizes.nbytes, tensors)) for tensors in (reads, writes))
        seconds = machine.spec.collective_s + nbytes / machine.spec.peer_rate
        machine.operate(DeviceWork(f"nccl {name}", "", seconds, reads, writes, nbytes), self._stream.stream_id, after)
        return NcclWork(self.device, self._stream.record_event())


def simulated_dist(real: Any) -> SimpleNamespace:
    """``torch.distributed`` as ``torch_transport.py`` uses it, for fake groups."""

    def batch(operations: list[Any]) -> list[NcclWork]:
        return operations[0][2].batch([(op == "isend", peer, tensor) for op, tensor, _, peer in operations])

    return SimpleNamespace(
        get_backend=lambda group: "nccl",
        isend="isend",
        irecv="irecv",
        P2POp=lambda op, tensor, group, group_peer: (op, tensor, group, group_peer),
        batch_isend_irecv=batch,
        destroy_process_group=lambda group: None,
        ReduceScatterOptions=real.ReduceScatterOptions,
        distributed_c10d=SimpleNamespace(_abort_process_group=lambda group: group.abort()),
        Work=real.Work,
        ProcessGroup=real.ProcessGroup,
    )
