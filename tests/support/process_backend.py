"""A backend of processes without Ray: forked in a tenth of a second, joined by gloo, killed and stopped by real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from cluster.driver.backend import ControllerHandle, WorkerDied
from cluster.rank.contact_store import form_transport
from cluster.rank.rank_loop import RankLoop
from tests.support.rank_helpers import FORKED


def _worker(commands: Connection, events: Connection) -> None:
    """A rank's process: commands in the main thread, events in another, steps in a third."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    loop = RankLoop(form_transport)
    loop.start()

    def pump() -> None:
        while True:
            batch = loop.events()
            assert batch is not None
            events.send_bytes(batch)

    threading.Thread(target=pump, daemon=True).start()
    try:
        while True:
            commands.send_bytes(loop.command(commands.recv_bytes()))
    except EOFError:
        os._exit(0)


class ProcessWorker:
    """A process on a bundle."""

    def __init__(self, bundle: int) -> None:
        self.bundle = bundle
        self.adopted = False
        self._asyncio = asyncio.get_running_loop()
        self._commands, theirs_c = FORKED.Pipe()
        self._events, theirs_e = FORKED.Pipe()
        self.process = FORKED.Process(target=_worker, args=(theirs_c, theirs_e), daemon=True)
        self.process.start()
        theirs_c.close()
        theirs_e.close()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._batches: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.said = threading.Event()
        """Set with each batch of events, heard or not."""
        for source, take in ((self._commands, self._answer), (self._events, self._batches.put_nowait)):
            threading.Thread(target=self._read, args=(source, take), daemon=True).start()

    @property
    def where(self) -> str:
        return f"node here, pid {self.process.pid}"

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    async def command(self, message: bytes) -> bytes:
        future: asyncio.Future[bytes] = self._asyncio.create_future()
        self._waiting.append(future)
        try:
            self._commands.send_bytes(message)
        except OSError as error:
            raise WorkerDied("its process has ended") from error
        return await future

    async def events(self) -> bytes:
        batch = await self._batches.get()
        if batch is None:
            self._batches.put_nowait(None)
            raise WorkerDied("its process has ended")
        return batch

    @property
    def owes(self) -> bool:
        """Whether an answer of it is awaited. Of the loop's thread."""
        return bool(self._waiting)

    def kill(self) -> None:
        self.process.kill()

    def _read(self, source: Connection, take: object) -> None:
        assert callable(take)
        try:
            while True:
                message = source.recv_bytes()
                if source is self._events:
                    self.said.set()
                self._call(take, message)
        except (EOFError, OSError):
            self._call(self._end)

    def _call(self, function: object, *arguments: object) -> None:
        if not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]

    def _answer(self, answer: bytes) -> None:
        future = self._waiting.popleft()
        if not future.done():
            future.set_result(answer)

    def _end(self) -> None:
        self._batches.put_nowait(None)
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(WorkerDied("its process has ended"))


class ProcessBackend:
    """Processes on this machine."""

    def __init__(self) -> None:
        self.workers: dict[int, ProcessWorker] = {}
        self.started: list[ProcessWorker] = []

    @property
    def survivors(self) -> frozenset[int]:
        return frozenset()

    async def keep_lease(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("it is never set")

    async def open(self, ranks: int | None) -> int:
        return ranks or 1

    async def resize(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        pass

    async def start_worker(self, bundle: int) -> ProcessWorker:
        worker = self.workers[bundle] = ProcessWorker(bundle)
        self.started.append(worker)
        return worker

    async def start_controller(self) -> ControllerHandle:
        raise WorkerDied("there are none here")

    async def neighbours(self, bundle: int) -> int:
        return len(self.workers)

    async def lost(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError("it never is")

    async def reopen(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        raise AssertionError("it never is lost")

    async def close(self, *, leave_ranks: bool = False) -> None:
        for worker in self.started:
            worker.kill()
            worker.process.join()
