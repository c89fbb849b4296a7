"""``CudaEngine``: the copy engine of a GPU, and the choice of a device's copy engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from epslots.cache.copy_engine import CopyEngine, EmulatedEngine, Records, SynchronousEngine, Tensors, WriteSlot
from epslots.cache.staging import Staging
from epslots.errors import ConfigError
from epslots.transport.host_wait import HostWait, wait_until
from epslots.units import parse_link

# Background copies that are queued on a GPU at once: enough to keep its link busy until the engine is called again.
_QUEUED_BACKGROUND_COPIES = 2


class _CudaTransfer:
    """One record in flight to a GPU.

    Attributes:
        queued: whether it has left the background queue.
        staged: its event, which the staging thread will make; None if the record needs no staging.
        event: its end on a stream; None until it is there.
    """

    __slots__ = ("event", "queued", "record", "slot", "staged", "write")

    def __init__(self, slot: torch.Tensor, record: torch.Tensor, write: WriteSlot) -> None:
        self.slot, self.record, self.write = slot, record, write
        self.queued = False
        self.staged: Future[Any] | None = None
        self.event: Any = None

    @property
    def on_stream(self) -> bool:
        """Whether its copy is queued on a stream, so that ``event`` is there."""
        if self.event is None and self.staged is not None and self.staged.done():
            self.event = self.staged.result()
        return self.event is not None


class CudaEngine:
    """Copies on two streams of a GPU, one of them urgent; its copy engine serves both in turn.

    A copy can't be taken back from a stream. So only a few background copies are on theirs at a time; each call of the engine
    queues the next.

    Args:
        staging_bytes: size of the largest record if not all of the store is pinned (``staging.py``).
        cuda: ``torch.cuda``, or a fake of it.

    """

    concurrent = True

    def __init__(self, device: torch.device, staging_bytes: int = 0, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._urgent_stream, self._background_stream = cuda.Stream(device), cuda.Stream(device)
        self._staging = Staging(staging_bytes) if staging_bytes else None
        self._last: _CudaTransfer | None = None
        self._background: deque[_CudaTransfer] = deque()
        self._on_background_stream: deque[_CudaTransfer] = deque()
        # By a slot's address: a cancelled transfer that crosses all the same.
        self._stale: dict[int, _CudaTransfer] = {}
        self._lock = threading.Lock()  # a model of two layouts has two pools, which two threads may be in
        self._host_wait: HostWait = wait_until

    def wait_by(self, host_wait: HostWait) -> None:
        self._host_wait = host_wait

    @property
    def busy(self) -> bool:
        with self._lock:
            self._advance()
        return bool(self._on_background_stream) or (self._last is not None and not _arrived(self._last))

    def start(self, slots: Tensors, records: Records, write: WriteSlot, *, urgent: bool) -> list[Any]:
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
            if not transfer.queued:
                self._background.remove(transfer)
                self._queue([transfer], self._urgent_stream)

    def wait(self, transfer: _CudaTransfer) -> None:
        self.set_urgent(transfer)
        self._wait_for(transfer)

    def _wait_for(self, transfer: _CudaTransfer) -> None:
        """Put the current stream behind a queued transfer."""
        if not transfer.on_stream:
            self._host_wait(lambda: transfer.on_stream)
        self._cuda.current_stream(self._device).wait_event(transfer.event)

    def poll(self, transfer: _CudaTransfer) -> bool:
        return transfer.queued and _arrived(transfer)

    def begun(self, transfer: _CudaTransfer) -> bool:
        return transfer.queued

    def cancel(self, transfer: _CudaTransfer) -> bool:
        with self._lock:
            if not transfer.queued:
                if transfer in self._background:
                    self._background.remove(transfer)
                return False
            # The next transfer into the slot waits for it, and nothing that computes does.
            self._stale[transfer.slot.data_ptr()] = transfer
        return True

    def wait_cancelled(self, slots: Tensors | None = None) -> None:
        with self._lock:
            addresses = list(self._stale) if slots is None else [slot.data_ptr() for slot in slots]
            stale = [self._stale.pop(address) for address in addresses if address in self._stale]
        for transfer in stale:
            self._wait_for(transfer)

    def _advance(self) -> None:
        """Queue further background copies if there is room on their stream."""
        while self._on_background_stream and _arrived(self._on_background_stream[0]):
            self._on_background_stream.popleft()
        while self._background and len(self._on_background_stream) < _QUEUED_BACKGROUND_COPIES:
            transfer = self._background.popleft()
            self._queue([transfer], self._background_stream)
            self._on_background_stream.append(transfer)

    def _queue(self, transfers: Sequence[_CudaTransfer], stream: Any) -> None:
        here = self._cuda.current_stream(self._device)
        stream.wait_stream(here)  # kernels may still read the slots' old content
        for transfer in transfers:
            transfer.queued, self._last = True, transfer
            stale = self._stale.pop(transfer.slot.data_ptr(), None)
            send = partial(self._send, transfer, stream, stale)
            if self._staging is None or transfer.record.is_pinned():
                transfer.event = send(transfer.record)
            else:
                transfer.staged = self._staging.send(transfer.record, send)

    def _send(self, transfer: _CudaTransfer, stream: Any, stale: _CudaTransfer | None, record: torch.Tensor) -> Any:
        """Queue a copy behind the one whose place it takes; ``record`` is pinned. Returns its end."""
        with self._cuda.stream(stream):
            if stale is not None:
                # Of two records one may be staged and one not.
                stream.wait_event(stale.staged.result() if stale.staged is not None else stale.event)
            transfer.write(transfer.slot, record)
            event = self._cuda.Event()
            event.record(stream)
        return event


def _arrived(transfer: _CudaTransfer) -> bool:
    return transfer.on_stream and bool(transfer.event.query())


def make_copy_engine(setting: str | None, device: torch.device, staging_bytes: int = 0) -> CopyEngine:
    """The copy engine of a device.

    Args:
        setting: None for the device's own link; or the speed of an emulated one, such as ``"8GB/s,20us"``.
        staging_bytes: size of the largest record if not all of the store is pinned, else 0; only for a GPU.

    Raises:
        ConfigError: not a speed, or the device has a link of its own.
    """
    if setting is None:
        return CudaEngine(device, staging_bytes) if device.type == "cuda" else SynchronousEngine()
    speed = parse_link(setting)
    if device.type != "cpu":
        raise ConfigError(f"link={setting!r}: {device} has a link of its own; one is emulated only on device='cpu'")
    return EmulatedEngine(speed)
