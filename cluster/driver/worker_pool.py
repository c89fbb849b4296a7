"""``WorkerPool``: keeps a worker on every place, one place for each rank that there is to be.

A place whose worker fails after the start is tried again without an end, with growing pauses; so is a lost backend. A place is
given up after ``give_up_s``, for an error that time doesn't cure, or when it fails again and again before its first group.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.driver.backend import Backend, WorkerDied
from cluster.driver.retries import Pace, Retries
from cluster.driver.worker_group import MOST_FAILURES
from cluster.driver.worker_groups import WorkerGroups
from cluster.driver.workers import Worker, Workers, WorkerState
from cluster.errors import ClusterError, RankFailed

logger = logging.getLogger("epslots.cluster")

_PACE = Pace(first_s=1.0, most_s=30.0, tell_every_s=60.0)
_INCURABLE = ("ConfigError", "RankMismatchError", "UnsupportedModelError")
"""Errors of a rank that every further attempt would raise again."""


@dataclass(eq=False)
class _Place:
    """A bundle that is to have a worker.

    Attributes:
        task: keeps a worker on it; None while the backend is lost.
        grouped: a worker of it has been in a group.
        error: the last attempt's, if it failed.
        next_s: time of the next attempt, while that is waited for.
    """

    retries: Retries
    task: asyncio.Task[None] | None = None
    grouped: bool = False
    error: ClusterError | None = None
    next_s: float | None = None


class WorkerPool:
    """The places of a cluster. For the supervisor's thread.

    Its background coroutines raise ClusterError when the cluster can't go on; ``spawn`` sees to that.

    Args:
        groups: the groups that the workers form.
        listen: takes the events of a new worker until that is lost, with its ``cause`` set.
        spawn: runs a coroutine in the background.
        give_up_s: seconds after which a failing place, or a lost backend, is given up; None = never.

    Attributes:
        size: number of ranks that there are to be.
        started: the first ranks have served; before that, the first failure ends the cluster.
    """

    def __init__(
        self,
        backend: Backend,
        workers: Workers,
        groups: WorkerGroups,
        *,
        listen: Callable[[Worker], Coroutine[Any, Any, None]],
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], asyncio.Task[None]],
        give_up_s: float | None,
    ) -> None:
        self._backend, self._workers, self._groups = backend, workers, groups
        self._listen, self._spawn, self._give_up_s = listen, spawn, give_up_s
        self.size = 0
        self.started = False
        self._places: dict[int, _Place] = {}
        self._given_up: dict[int, ClusterError] = {}
        self._lost = ""
        """Why the backend is lost, while it is."""
        self._losses = 0
        self._stopped = False
        self._failure: ClusterError | None = None

    async def start(self, ranks: int, *, adopting: bool) -> None:
        """Start the first workers; returns when all of them serve.

        Args:
            adopting: some are there already. It returns when those serve, and others are started meanwhile.

        Raises:
            ClusterError: the first failure of one; when adopting, the cluster can't go on.
        """
        self.started = adopting
        if not adopting:
            await self.grow(ranks)
            self.started = True
            return
        self._place(ranks)
        await self._workers.changes.wait_for(lambda: self._failure is not None or self._groups.any_formed)
        if self._failure is not None:
            raise self._failure

    async def grow(self, ranks: int) -> None:
        """Have a place for each of ``ranks`` ranks; returns when all of them serve.

        Raises:
            ClusterError: some don't come up.
        """
        self._place(ranks)
        await self.wait_until_serving(range(ranks))

    def _place(self, ranks: int) -> None:
        self.size = ranks
        self._groups.resize(ranks)
        for bundle in range(ranks):
            self._given_up.pop(bundle, None)
            if bundle in self._places:
                self._places[bundle].retries.reset()  # a place that waits for its next attempt makes it now
            else:
                self._places[bundle] = _Place(Retries(_PACE, self._give_up_s))
                if not self._lost:
                    self._keep(bundle)
        self._workers.changes.notify()

    def shrink(self, ranks: int) -> None:
        """End the workers and places from number ``ranks`` on."""
        self.size = ranks
        for number, group in enumerate(self._groups):
            group.require(max(1, len(set(self._groups.bundles_of(number, ranks)) & set(range(ranks)))), at_most=True)
        self._given_up = {bundle: error for bundle, error in self._given_up.items() if bundle < ranks}
        for bundle in [bundle for bundle in self._places if bundle >= ranks]:
            task = self._places.pop(bundle).task
            if task is not None:
                task.cancel()
            if (worker := self._workers.on(bundle)) is not None:
                self._workers.lose(worker, ClusterError("it is no longer needed"), retire=True)
        self._groups.resize(ranks)

    async def reserve(self, ranks: int) -> None:
        """Resize the backend, even if it is lost meanwhile, for the groups as they are dealt now.

        Raises:
            ClusterError: there is no room.
        """
        while True:
            await self._workers.changes.wait_for(lambda: not self._lost or self._failure is not None)
            losses = self._losses
            try:
                await self._backend.resize(ranks, [self._groups.number_of(bundle) for bundle in range(ranks)])
                return
            except ClusterError:
                if losses == self._losses or self._failure is not None:
                    raise

    async def wait_until_serving(self, bundles: Sequence[int]) -> None:
        """Wait until the workers on these bundles serve, and none on bundles beyond the pool's size.

        Raises:
            ClusterError: some fail again and again, or the cluster can't go on.
        """

        def failing() -> list[int]:
            often = {n for n in bundles if n in self._places and self._places[n].retries.failures >= MOST_FAILURES}
            return sorted(often | (set(bundles) & self._given_up.keys()))

        def settled() -> bool:
            serving = {worker.bundle for worker in self._groups.members}
            return (
                self._failure is not None
                or bool(failing())
                or (self._groups.formed and serving >= set(bundles) and max(serving, default=0) < self.size)
            )

        await self._workers.changes.wait_for(settled)
        if self._failure is not None:
            raise self._failure
        if ranks := failing():
            raise ClusterError(f"ranks {ranks} did not come up; the log says why. The others go on")

    # Reports of the supervisor.

    def mark_grouped(self, members: Iterable[Worker]) -> None:
        """These workers have formed a group."""
        for worker in members:
            if worker.bundle in self._places:  # else it is no longer needed
                self._places[worker.bundle].grouped = True

    def fail(self, error: ClusterError) -> None:
        """The cluster can't go on: waiting calls raise this."""
        self._failure = error

    def stop(self) -> None:
        """Replace no further worker."""
        self._stopped = True

    # One place.

    def _keep(self, bundle: int) -> None:
        place = self._places[bundle]
        place.task = self._spawn(lambda: self._keep_worker(bundle, place))

    async def _keep_worker(self, bundle: int, place: _Place) -> None:
        """Keep a worker on a place, until that is given up.

        Raises:
            ClusterError: it failed before the first ranks served, or was the last place.
        """
        while True:
            worker, error = await self._run_worker(bundle)
            if self._stopped:
                return
            if not self.started:
                raise error
            self._groups.of(bundle).require(1)  # after a lost backend, too: the other ranks needn't wait for this one
            place.error = error
            if worker is not None and worker.proven:
                place.retries.reset()
            elif not await self._wait_to_retry(bundle, place, error, logged=worker is not None):
                return

    async def _run_worker(self, bundle: int) -> tuple[Worker | None, ClusterError]:
        """Start a worker, and wait for its end; returns it, or None if it didn't start, and the reason."""
        worker = None
        try:
            worker = Worker(bundle, await self._backend.start_worker(bundle), self._groups.number_of(bundle))
            self._workers.add(worker)
            worker.listening = self._spawn(lambda: self._listen(worker))
            await asyncio.wait({worker.listening})
            assert worker.cause is not None, "listening ends with the worker"
            error = worker.cause
        except (WorkerDied, ClusterError) as failure:
            error = failure
        if not isinstance(error, ClusterError):
            name = f"rank {bundle}" if worker is None else worker.name
            error = RankFailed(f"{name} could not be started: {error}")
        return worker, error

    async def _wait_to_retry(self, bundle: int, place: _Place, error: ClusterError, *, logged: bool) -> bool:
        """Wait for the next attempt; returns False if there is to be none. ``logged``: the error is in the log already."""
        verdict = place.retries.failed(time.monotonic())
        failures = place.retries.failures
        hopeless = failures >= MOST_FAILURES and (not place.grouped or getattr(error, "kind", "") in _INCURABLE)
        if verdict.give_up or hopeless:
            logger.error("%s. That was failure %d in a row; this rank is given up", error, failures)
            del self._places[bundle]
            self._given_up[bundle] = error
            self._workers.changes.notify()
            if not self._places:
                raise error
            return False
        if verdict.tell and (failures > 1 or not logged):
            logger.warning("%s. It is tried again in %.3g s (failures in a row: %d)", error, verdict.wait_s, failures)
        place.next_s = time.monotonic() + verdict.wait_s
        self._workers.changes.notify()
        await self._workers.changes.wait_for(lambda: not place.retries.failures, verdict.wait_s)
        place.next_s = None
        return True

    # The backend as a whole.

    async def keep_backend(self) -> None:
        """Whenever the backend is lost, wait for it to come back, and start all workers anew.

        Raises:
            ClusterError: it was lost before the first ranks served, or it didn't come back in time.
        """
        while True:
            reason = await self._backend.lost()
            if not self.started:
                raise ClusterError(reason)
            began_s = time.monotonic()
            self._lost = reason
            self._losses += 1
            logger.warning("%s. All ranks end with it, and are started again when Ray is back; requests wait", reason)
            for place in self._places.values():
                if place.task is not None:
                    place.task.cancel()
                    place.task = place.next_s = None
            for worker in self._workers:
                self._workers.lose(worker, WorkerDied(reason), retire=True)
            await self._reopen()
            self._lost = ""
            for number, group in enumerate(self._groups):  # together they can go on with their placement
                group.require(max(1, len(self._places.keys() & set(self._groups.bundles_of(number, self.size)))))
            for bundle, place in self._places.items():
                place.retries.reset()
                self._keep(bundle)
            self._workers.changes.notify()
            logger.warning("Ray is back after %.1f s, and ranks are being started", time.monotonic() - began_s)

    async def _reopen(self) -> None:
        """Reopen the backend, in as many attempts as it takes.

        Raises:
            ClusterError: it isn't back after ``give_up_s``.
        """
        retries = Retries(_PACE)
        try:
            async with asyncio.timeout(self._give_up_s):
                while True:
                    try:
                        await self._backend.reopen(self.size, [self._groups.number_of(bundle) for bundle in range(self.size)])
                        return
                    except ClusterError as error:
                        verdict = retries.failed(time.monotonic())
                        if verdict.tell:
                            logger.warning("no places for the ranks could be reserved yet: %s. It is tried again", error)
                        await asyncio.sleep(verdict.wait_s)
        except TimeoutError:
            raise ClusterError(f"{self._lost}; it wasn't back within {self._give_up_s:g} s (give_up_after_s)") from None

    def missing(self) -> tuple[str, ...]:
        """A line for each rank that doesn't serve: the reason and the next step, for people. Empty if all serve."""
        if self._lost:
            return (f"{self._lost}; waiting for it to come back",)
        lines = [f"rank {bundle} was given up: {error}" for bundle, error in sorted(self._given_up.items())]
        for bundle, place in sorted(self._places.items()):
            worker = self._workers.on(bundle)
            if worker is None and place.next_s is not None:
                lines.append(f"{place.error}; it is tried again in {max(0.0, place.next_s - time.monotonic()):.0f} s")
            elif worker is None:
                lines.append(f"rank {bundle}: its process is being started")
            elif worker.state is WorkerState.LOADING:
                lines.append(f"{worker.name} loads the model")
            elif worker.state is WorkerState.READY:
                lines.append(f"{worker.name} waits for the other ranks")
        if not lines and not self._groups.formed:
            lines.append("the ranks are forming a group")
        return tuple(lines)
