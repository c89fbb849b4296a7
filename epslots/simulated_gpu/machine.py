"""``SimulatedMachine``: all simulated GPUs of a process, and the findings about the code on them.

Everything that is done to a device comes here: ``operators.py`` brings torch's operations, ``cuda_api.py`` the calls of
``torch.cuda``. A machine counts them by source line, orders them (``ordering.py``) and times them (``timeline.py``).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from epslots.simulated_gpu.call_site import CallSite, call_site
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.ordering import HOST, Access, Ordering, Race
from epslots.simulated_gpu.tensors import byte_range
from epslots.simulated_gpu.timeline import Operation, Timeline
from epslots.simulated_gpu.true_sizes import AS_THEY_ARE, TrueSizes

_MOST_RACES = 50
COPIES = ("H2D", "D2H", "P2P")
"""Names of operations that aren't kernels."""


class DeviceHangsError(RuntimeError):
    """The host waits, in the driver, for something that never ends."""


@dataclass(eq=False)
class MemoryBlock:
    """One allocation: of a device, or pinned host memory.

    Attributes:
        device: its number; None = pinned memory.
        stream: the stream that it was allocated on, which reuses it when it is freed.
        accesses: those that later ones may race with.
    """

    device: int | None
    stream: int
    nbytes: int
    accesses: list[Access] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class DeviceWork:
    """The work of one kernel or copy.

    Attributes:
        name: of the kernel, or "H2D", "D2H", "P2P".
        engine: what serves it; "" = nothing does.
        seconds: on its engine.
        reads, writes: device and pinned memory that it accesses.
        nbytes: bytes that it moves.
        over_link: whether a kernel reads pinned memory by the link.
        again: its seconds when a graph runs it once more, after it is computed; None = the same.
        queued: told of the operation.
    """

    name: str
    engine: str = ""
    seconds: float = 0.0
    reads: Sequence[torch.Tensor] = ()
    writes: Sequence[torch.Tensor] = ()
    nbytes: int = 0
    over_link: bool = False
    again: Callable[[], float] | None = None
    queued: Callable[[Operation], None] | None = None


class SimulatedMachine:
    """Simulated GPUs, all of one kind.

    Attributes:
        syncs: host synchronisations by kind and source line.
        kernels: kernels by owner ("epslots", "transformers", "other") and name.
        copies: copies between host and device by kind ("H2D", "D2H") and source line.
        races: accesses that nothing orders, each pair of lines once.
        contexts: devices on which the process has a context, of some hundred MB.
        allocated: bytes of each device's live tensors; ``peak``: the most there were.
        waits: of each device, when the host waited for it, in the driver or by looking at events: begin and end, in seconds.
        sizes: what tensors weigh in the kernels' and copies' times.
        graph_pools: the graphs that share memory, by what ``graph_pool_handle`` returned.
        finds_races: whether it looks for races, which takes most of a simulation's time.
    """

    def __init__(self, spec: GpuSpec, count: int = 1, memory_bytes: int | None = None) -> None:
        self.spec, self.count = spec, count
        self.memory_bytes = spec.memory_bytes if memory_bytes is None else memory_bytes
        self.timeline, self.ordering = Timeline(), Ordering()
        self.lock = threading.RLock()
        self.allocated, self.peak = [0] * count, [0] * count
        self.contexts: set[int] = set()
        self._blocks: dict[int, MemoryBlock] = {}
        self._pinned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._registered: dict[int, tuple[int, MemoryBlock]] = {}  # by address: the end, and the block
        self._device_of: dict[int, int] = {}  # by stream
        self.default_streams: dict[int, Any] = {}
        self.graph_pools: dict[Any, weakref.WeakSet[Any]] = {}
        self._here = threading.local()
        self._latest_s = 0.0
        self.sizes, self.finds_races = AS_THEY_ARE, True
        self.reset()

    def reset(self) -> None:
        """Start counting anew; streams, memory and clocks stay."""
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.races: list[Race] = []
        self.waits: list[list[tuple[float, float]]] = [[] for _ in range(self.count)]
        self._known_races: set[tuple[str, str]] = set()
        self.timeline.clear()

    # ------------------------------------------------------------------ what a thread has set

    @property
    def now_s(self) -> float:
        """This thread's clock."""
        return getattr(self._here, "now_s", 0.0)

    def spend(self, seconds: float) -> None:
        """Let this thread's clock go on."""
        self._here.now_s = self.now_s + seconds
        self._latest_s = max(self._latest_s, self._here.now_s)

    def stand_for(self, sizes: TrueSizes) -> None:
        """Let kernels and copies take the time of a larger model's from now on, and look for no races."""
        self.sizes, self.finds_races = sizes, False

    def begin_thread(self) -> None:
        """Set a new thread's clock to that of the thread that is furthest."""
        self._here.now_s = max(self.now_s, self._latest_s)

    @property
    def device(self) -> int:
        """This thread's current device."""
        return getattr(self._here, "device", 0)

    @device.setter
    def device(self, number: int) -> None:
        self._here.device = number

    @property
    def current_streams(self) -> dict[int, Any]:
        """This thread's current stream of each device where it has set one."""
        streams: dict[int, Any] = self._here.__dict__.setdefault("streams", {})
        return streams

    @property
    def capture(self) -> Any:
        """The capture that this thread makes; None = none."""
        return getattr(self._here, "capture", None)

    @capture.setter
    def capture(self, capture: Any) -> None:
        self._here.capture = capture

    @property
    def in_kernel(self) -> bool:
        """Whether this thread computes a kernel's values: torch's operations are parts of it then, and count for nothing."""
        return getattr(self._here, "in_kernel", False)

    @contextmanager
    def computing_kernel(self) -> Iterator[None]:
        """Within the context ``in_kernel`` is true, and no call of torch's functions is looked at."""
        before = self.in_kernel
        self._here.in_kernel = True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._here.in_kernel = before

    def new_stream(self, device: int) -> int:
        """The number of a new stream of a device. The device has a context then."""
        number = len(self._device_of) + 1
        self._device_of[number] = device
        self.contexts.add(device)
        return number

    def streams_of(self, device: int) -> list[int]:
        """All streams of a device."""
        return [stream for stream, owner in self._device_of.items() if owner == device]

    # ------------------------------------------------------------------ memory

    def block(self, memory: torch.Tensor) -> MemoryBlock | None:
        """The block that a tensor of device or pinned memory is in; None for pageable memory."""
        storage = memory.untyped_storage()
        found = self._blocks.get(storage._cdata)
        if found is None and self._registered:
            address = storage.data_ptr()
            for start, (stop, block) in self._registered.items():
                if start <= address < stop:
                    return block
        return found

    def is_pinned(self, memory: torch.Tensor) -> bool:
        """Whether host memory is page-locked."""
        block = self.block(memory)
        return block is not None and block.device is None

    def pin(self, memory: torch.Tensor) -> torch.Tensor:
        """Make new host memory pinned memory. A context comes to be on the current device."""
        self.contexts.add(self.device)
        self._enter_block(memory, MemoryBlock(None, HOST, memory.untyped_storage().nbytes()))
        self._pinned[memory.data_ptr()] = memory
        return memory

    def pinned_at(self, address: int) -> torch.Tensor | None:
        """The pinned memory that begins at an address; None if there is none."""
        return self._pinned.get(address)

    @property
    def pinned_blocks(self) -> int:
        """Blocks of pinned memory that are in use."""
        return sum(block.device is None for block in self._blocks.values())

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory that exists (cudaHostRegister)."""
        self.contexts.add(self.device)
        self._registered[address] = address + nbytes, MemoryBlock(None, HOST, nbytes)

    def unregister(self, address: int) -> None:
        """End ``register``."""
        self._registered.pop(address, None)

    def allocate(self, memory: torch.Tensor, device: int, stream: int) -> None:
        """Make new host memory device memory, unless it is.

        Raises:
            OutOfMemoryError: it exceeds what the device has.
        """
        storage = memory.untyped_storage()
        if storage._cdata in self._blocks:
            return
        self.contexts.add(device)
        if self.allocated[device] + storage.nbytes() > self.memory_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes; {self.allocated[device]} of "
                f"{self.memory_bytes} are in use"
            )
        self.allocated[device] += storage.nbytes()
        self.peak[device] = max(self.peak[device], self.allocated[device])
        self._enter_block(memory, MemoryBlock(device, stream, storage.nbytes()))

    def _enter_block(self, memory: torch.Tensor, block: MemoryBlock) -> None:
        storage = memory.untyped_storage()
        self._blocks[storage._cdata] = block
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, key: int) -> None:
        """The caching allocator gives the block to what its stream queues next."""
        with self.lock:
            block = self._blocks.pop(key)
            if block.device is None:
                return  # pinned memory is reused after the last copy
            self.allocated[block.device] -= block.nbytes
            for access in block.accesses:
                known = self.ordering.knows(block.stream, access) or self.ordering.knows(HOST, access)
                if not known:
                    self._report(Race("freed in use", access.what, f"freed, and reused by stream {block.stream}"))

    # ------------------------------------------------------------------ operations

    def operate(
        self, work: DeviceWork, stream: int, after: Sequence[Operation] = (), *, launch_s: float | None = None
    ) -> Operation:
        """Queue one operation on a stream.

        Args:
            after: operations of other streams that it waits for.
            launch_s: the host's time for it; by default that of a launch.
        """
        with self.lock:
            site = call_site()
            self.spend(self.spec.launch_s if launch_s is None else launch_s)
            operation = Operation(
                work.name,
                stream,
                work.engine,
                self.now_s,
                work.seconds,
                work.nbytes,
                site.line,
                site.owner,
                tuple(after),
                work.over_link,
            )
            self.timeline.queue(operation)
            self.access(stream, f"{work.name} on stream {stream} at {site.line}", work.reads, work.writes)
            if work.queued is not None:
                work.queued(operation)
            return operation

    def access(self, stream: int, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """The next operation on a stream, or of the host, reads and writes this memory."""
        if not self.finds_races:
            return
        step = self.ordering.begin(stream)
        with torch._C.DisableTorchFunction():  # a mode would be asked for each size
            for tensors, writing in ((reads, False), (writes, True)):
                for tensor in tensors:
                    block = self.block(tensor) if tensor.numel() else None
                    if block is None:
                        continue
                    start, stop = byte_range(tensor)
                    for race in self.ordering.enter(block.accesses, Access(start, stop, writing, stream, step, what)):
                        self._report(race)

    def _report(self, race: Race) -> None:
        if (race.first, race.second) not in self._known_races and len(self.races) < _MOST_RACES:
            self._known_races.add((race.first, race.second))
            self.races.append(race)

    def host_accesses(self, what: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """The host reads and writes pinned memory: a race if a copy may be in progress."""
        with self.lock:
            self.access(HOST, f"{what} on the host at {call_site().line}", reads, writes)

    def wait(self, what: str, operations: Iterable[Operation | None], clocks: Iterable[dict[int, int]]) -> None:
        """The host waits for operations, in the driver.

        Args:
            what: the synchronisation, to be counted once.
            operations: the last ones that are waited for.
            clocks: vector clocks of the work that is done then.

        Raises:
            DeviceHangsError: it never ends.
            RuntimeError: this thread captures, and mustn't wait.
        """
        site = call_site()
        self.refuse_in_capture(what, site)
        with self.lock:
            self.syncs[what, site.line] += 1
            began_s = self.now_s
            for operation in operations:
                end_s = 0.0 if operation is None else self.timeline.end_of(operation)
                if math.isinf(end_s):
                    raise DeviceHangsError(f"{what} at {site.line} waits for ever: {operation.name if operation else ''}")
                self._here.now_s = max(self.now_s, end_s)
            self.spend(self.spec.wake_s)
            self._waited(began_s)
            for clock in clocks:
                self.ordering.wait(HOST, clock)

    def _waited(self, began_s: float) -> None:
        """This thread has waited until now; looks that follow one another are one wait."""
        waits = self.waits[self.device]
        if waits and waits[-1][1] == began_s:
            began_s = waits.pop()[0]
        waits.append((began_s, self.now_s))

    def wait_for_stream(self, what: str, stream: int) -> None:
        """The host waits for all that a stream has: a hidden or an open synchronisation."""
        self.wait(what, [self.timeline.last(stream)], [self.ordering.snapshot(stream)])

    def wait_for_device(self, what: str, device: int) -> None:
        """The host waits for all streams of a device."""
        streams = self.streams_of(device)
        self.wait(what, map(self.timeline.last, streams), map(self.ordering.snapshot, streams))

    def refuse_in_capture(self, what: str, site: CallSite | None = None) -> None:
        """Raise what CUDA raises for an operation that no capture allows."""
        if self.capture is not None:
            line = (site or call_site()).line
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what} at {line}")

    def done(self, operation: Operation | None) -> bool:
        """Whether an operation has ended by this thread's clock, which looking costs some of."""
        with self.lock:
            began_s = self.now_s
            self.spend(self.spec.query_s)
            if operation is None:
                return True
            self.timeline.run(self.now_s)
            if operation.end_s is not None and operation.end_s <= self.now_s:
                return True
            self._waited(began_s)
            return False


_machines: list[SimulatedMachine] = []
"""The machine that is simulated, if any."""


def current_machine() -> SimulatedMachine:
    """The machine that is simulated now."""
    assert _machines, "no GPU is simulated"
    return _machines[-1]
