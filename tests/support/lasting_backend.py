"""Ranks on threads that outlive their driver: a backend takes over the workers of the one whose driver has ended.

first = LastingBackend()
cluster = Cluster(folder, backend=first, ...)
abandon(cluster)                         # as SIGKILL does it: nothing is closed
cluster = Cluster(folder, backend=LastingBackend(first), ...)
"""

from __future__ import annotations

import asyncio
import threading

from cluster.api import Cluster
from cluster.errors import Superseded
from cluster.lasting.descriptions import RankDescription
from tests.support.fake_backend import FakeBackend, FakeWorker


class AdoptedWorker:
    """Another driver's handle of a worker."""

    def __init__(self, worker: FakeWorker, term: int) -> None:
        self.bundle, self.adopted = worker.bundle, True
        self._worker, self._term = worker, term
        self._worker.take_over(term)

    @property
    def where(self) -> str:
        return self._worker.where

    async def command(self, message: bytes) -> bytes:
        self._check()
        return await self._worker.command(message)

    async def events(self) -> bytes:
        self._check()
        try:
            return await self._worker.events()
        finally:
            self._check()

    def kill(self) -> None:
        if self._worker.term == self._term:
            self._worker.kill()

    def _check(self) -> None:
        if self._worker.term > self._term:
            raise Superseded("another driver has adopted this rank")


class LastingBackend(FakeBackend):
    """Threads that may go on without their driver.

    Args:
        before: the backend whose workers are adopted.
    """

    def __init__(self, before: LastingBackend | None = None) -> None:
        super().__init__()
        self.term = 1 if before is None else before.term + 1
        self.superseded = asyncio.Event()
        self._before = before
        self._survivors: dict[int, FakeWorker] = {}
        if before is not None:
            self.started, self._all, self._hubs, self._lock = before.started, before._all, before._hubs, before._lock

    async def open(self, ranks: int | None) -> int:
        if self._before is not None:
            alive = {bundle: worker for bundle, worker in self._before.workers.items() if not worker.dead}
            self._survivors = {bundle: worker for bundle, worker in alive.items() if self.describe(worker).load is not None}
        for bundle in [bundle for bundle in self._survivors if ranks is not None and bundle >= ranks]:
            self._survivors.pop(bundle).kill()
        return await super().open(ranks)

    def describe(self, worker: FakeWorker) -> RankDescription:
        return worker.loop.describe()

    @property
    def survivors(self) -> frozenset[int]:
        return frozenset(self._survivors)

    async def start_worker(self, bundle: int) -> FakeWorker:
        worker = self._survivors.pop(bundle, None)
        if worker is None:
            return await super().start_worker(bundle)
        self.workers[bundle] = worker
        return AdoptedWorker(worker, self.term)  # type: ignore[return-value]

    async def close(self, *, leave_ranks: bool = False) -> None:
        if not leave_ranks:
            await super().close()


def abandon(cluster: Cluster) -> None:
    """End a cluster's driver without a word to anybody, as a process that is killed."""
    thread = cluster._thread
    thread.call(thread.cancel_all())
    thread.end()
    assert threading.current_thread() is not thread._thread
