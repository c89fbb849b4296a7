"""Keeps a worker on every wanted seat, and says what is missing while a seat has none.

Everything here runs in the supervisor's thread. A seat that fails after the start is tried again without an end, later and
later; so is a fleet that is lost as a whole. A seat ends by ``give_up_s``, by an error that time doesn't cure, or by failing
again and again before it has ever served (``scale`` tells of it).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.driver.backend import Backend, WorkerDied
from cluster.driver.loop_thread import Pulse
from cluster.driver.retries import Pace, Retries
from cluster.driver.worker_group import MOST_FAILURES, WorkerGroup
from cluster.driver.workers import LiveWorker, WorkerState
from cluster.errors import ClusterError, RankFailed

logger = logging.getLogger("epslots.cluster")

_PACE = Pace(first_s=1.0, most_s=30.0, tell_every_s=60.0)
_GAP_S = 5.0  # without a rank that serves, before that is said
_GAP_AGAIN_S = 60.0
_INCURABLE = ("ConfigError", "RankMismatchError", "UnsupportedModelError")
"""Errors of a rank that come again however long one waits."""


class PoolCallbacks(Protocol):
    """The supervisor.

    Attributes:
        started: the ranks have served once; before, the first failure ends all.
        closing: all is being ended.
    """

    group: WorkerGroup

    @property
    def started(self) -> bool: ...

    @property
    def closing(self) -> bool: ...

    @property
    def failure(self) -> ClusterError | None: ...

    def listen(self, worker: LiveWorker) -> asyncio.Task[None]:
        """Begin to take a new worker's events; it is done when the worker is lost, with its ``cause`` set."""

    def lose(self, worker: LiveWorker, cause: WorkerDied | ClusterError, *, retire: bool = False) -> None:
        """Give a worker up. ``retire``: without a word, and without blaming its requests."""

    def give_up(self, error: ClusterError) -> None:
        """Nothing can be served any more."""

    def count_unfinished(self) -> int:
        """Requests that wait or run."""


@dataclass(eq=False)
class _Place:
    """A wanted seat.

    Attributes:
        staffing: keeps a worker on it; None while the fleet is lost.
        served: a worker of it has been in a group.
        error: what the last attempt came to, if it failed.
        next_s: when the next attempt begins, while it is waited for.
    """

    retries: Retries
    staffing: asyncio.Task[None] | None = None
    served: bool = False
    error: ClusterError | None = None
    next_s: float | None = None


@dataclass(eq=False)
class WorkerPool:
    """The seats.

    Args:
        workers: by seat; filled here, and emptied by ``PoolCallbacks.lose``.
        clock: in seconds, from anywhere.

    Attributes:
        wanted: how many seats are to serve.
    """

    employer: PoolCallbacks
    fleet: Backend
    workers: dict[int, LiveWorker]
    pulse: Pulse
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    give_up_s: float | None
    clock: Callable[[], float] = time.monotonic
    wanted: int = 0
    _seats: dict[int, _Place] = field(default_factory=dict)
    _given_up: dict[int, ClusterError] = field(default_factory=dict)
    _lost: str = ""
    """Why the fleet is lost, while it is."""
    _losses: int = 0

    async def staff_up(self, ranks: int) -> None:
        """Staff the seats up to ``ranks``; returns when all of them serve.

        Raises:
            ClusterError: what keeps one from it.
        """
        self.wanted = ranks
        for seat in range(ranks):
            self._given_up.pop(seat, None)
            if seat in self._seats:
                self._seats[seat].retries.reset()  # one that waits for its next attempt makes it now
            else:
                self._seats[seat] = _Place(Retries(_PACE, self.give_up_s))
                if not self._lost:
                    self._staff(seat)
        self.pulse.beat()
        await self.serving(range(ranks))

    def staff_down(self, ranks: int) -> None:
        """End the seats from ``ranks`` on."""
        self.wanted = ranks
        self.employer.group.least = min(self.employer.group.least, ranks)
        self._given_up = {seat: error for seat, error in self._given_up.items() if seat < ranks}
        for seat in [seat for seat in self._seats if seat >= ranks]:
            staffing = self._seats.pop(seat).staffing
            if staffing is not None:
                staffing.cancel()
            if seat in self.workers:
                self.employer.lose(self.workers[seat], ClusterError("it is no longer needed"), retire=True)

    async def resize(self, ranks: int) -> None:
        """Have the fleet reserve as many seats, even if it is lost meanwhile.

        Raises:
            ClusterError: there is no room.
        """
        while True:
            await self.pulse.until(lambda: not self._lost or self.employer.failure is not None)
            losses = self._losses
            try:
                await self.fleet.resize(ranks)
                return
            except ClusterError:
                if losses == self._losses or self.employer.failure is not None:
                    raise

    async def serving(self, seats: Sequence[int]) -> None:
        """Wait until these seats serve, and none beyond the wanted ones.

        Raises:
            ClusterError: what keeps one from it.
        """

        def failing() -> list[int]:
            often = {seat for seat in seats if seat in self._seats and self._seats[seat].retries.failures >= MOST_FAILURES}
            return sorted(often | (set(seats) & self._given_up.keys()))

        def settled() -> bool:
            group = self.employer.group
            serving = {worker.seat for worker in group.members}
            return (
                self.employer.failure is not None
                or bool(failing())
                or (group.formed and serving >= set(seats) and max(serving, default=0) < self.wanted)
            )

        await self.pulse.until(settled)
        if self.employer.failure is not None:
            raise self.employer.failure
        if ranks := failing():
            raise ClusterError(f"ranks {ranks} did not come up; the log says why. The others go on")

    def served(self, members: Iterable[LiveWorker]) -> None:
        """These stand in a group."""
        for worker in members:
            if worker.seat in self._seats:  # else it is no longer wanted
                self._seats[worker.seat].served = True

    def _staff(self, seat: int) -> None:
        self._seats[seat].staffing = self.spawn(self._keep_staffed(seat, self._seats[seat]))

    async def _keep_staffed(self, number: int, seat: _Place) -> None:
        """Keep a worker on a seat, until it is given up."""
        while True:
            worker = None
            try:
                worker = LiveWorker(number, await self.fleet.hire(number))
                self.workers[number] = worker
                await asyncio.wait({self.employer.listen(worker)})
                assert worker.cause is not None, "listening ends with the worker"
                error = worker.cause
            except (WorkerDied, ClusterError) as failure:
                error = failure
            if not isinstance(error, ClusterError):
                name = f"rank {number}" if worker is None else worker.name
                error = RankFailed(f"{name} could not be started: {error}")
            if self.employer.closing:
                return
            if not self.employer.started:
                self.employer.give_up(error)
                return
            self.employer.group.least = 1  # after the whole fleet was lost: the others needn't wait for this one
            seat.error = error
            if worker is not None and worker.proven:
                seat.retries.reset()
            elif not await self._wait(number, seat, error, said=worker is not None):
                return

    async def _wait(self, number: int, seat: _Place, error: ClusterError, *, said: bool) -> bool:
        """Wait for the next attempt after a failure; whether there is to be one. ``said``: the log has it already."""
        verdict = seat.retries.failed(self.clock())
        failures = seat.retries.failures
        hopeless = failures >= MOST_FAILURES and (not seat.served or getattr(error, "kind", "") in _INCURABLE)
        if verdict.give_up or hopeless:
            logger.error("%s. That was the %dth failure in a row; its seat is given up", error, failures)
            del self._seats[number]
            self._given_up[number] = error
            if not self._seats:
                self.employer.give_up(error)
            self.pulse.beat()
            return False
        if verdict.tell and (failures > 1 or not said):
            logger.warning("%s. It is tried again, in %.3g s (failures in a row: %d)", error, verdict.wait_s, failures)
        seat.next_s = self.clock() + verdict.wait_s
        self.pulse.beat()
        await self.pulse.until(lambda: not seat.retries.failures, verdict.wait_s)
        seat.next_s = None
        return True

    # The fleet as a whole.

    async def keep_fleet(self) -> None:
        """Whenever the fleet is lost as a whole, wait for it, and staff all seats anew."""
        while True:
            reason = await self.fleet.lost()
            if not self.employer.started:
                self.employer.give_up(ClusterError(reason))
                return
            began_s = self.clock()
            self._lost = reason
            self._losses += 1
            logger.warning(
                "%s. All ranks end with it, and are started again when Ray is there; requests wait meanwhile", reason
            )
            for seat in self._seats.values():
                if seat.staffing is not None:
                    seat.staffing.cancel()
                    seat.staffing = seat.next_s = None
            for worker in list(self.workers.values()):
                self.employer.lose(worker, WorkerDied(reason), retire=True)
            if not await self._reopen():
                return
            self._lost = ""
            self.employer.group.least = max(1, len(self._seats))  # together they can go on with their placement
            for number, seat in self._seats.items():
                seat.retries.reset()
                self._staff(number)
            self.pulse.beat()
            logger.warning("after %.1f s Ray is there again, and ranks are being started", self.clock() - began_s)

    async def _reopen(self) -> bool:
        """Wait for the fleet; whether it is there again."""
        retries = Retries(_PACE)
        try:
            async with asyncio.timeout(self.give_up_s):
                while True:
                    try:
                        await self.fleet.reopen(self.wanted)
                        return True
                    except ClusterError as error:
                        verdict = retries.failed(self.clock())
                        if verdict.tell:
                            logger.warning("there are no places for the ranks yet: %s. It is tried again", error)
                        await asyncio.sleep(verdict.wait_s)
        except TimeoutError:
            self.employer.give_up(ClusterError(f"{self._lost}; it wasn't back within {self.give_up_s:g} s (give_up_after_s)"))
            return False

    # What is said of it.

    def missing(self) -> tuple[str, ...]:
        """What keeps wanted ranks from serving, and what is done about it, for people; empty if all serve."""
        if self._lost:
            return (f"{self._lost}; it is waited for",)
        lines = [f"rank {seat} was given up: {error}" for seat, error in sorted(self._given_up.items())]
        for number, seat in sorted(self._seats.items()):
            worker = self.workers.get(number)
            if worker is None and seat.next_s is not None:
                lines.append(f"{seat.error}; it is tried again in {max(0.0, seat.next_s - self.clock()):.0f} s")
            elif worker is None:
                lines.append(f"rank {number}: its process is being started")
            elif worker.state is WorkerState.LOADING:
                lines.append(f"{worker.name} loads the model")
            elif worker.state is WorkerState.READY:
                lines.append(f"{worker.name} waits for the others")
        if not lines and not self.employer.group.formed:
            lines.append("the ranks are meeting")
        return tuple(lines)

    async def tell_of_gaps(self) -> None:
        """Say so when no rank serves for some seconds: callers only see that nothing comes."""
        group = self.employer.group
        while True:
            await self.pulse.until(lambda: self.employer.started and not group.formed)
            began_s = self.clock()
            told = False
            while not await self.pulse.until(lambda: group.formed, _GAP_AGAIN_S if told else _GAP_S):
                told = True
                logger.warning(
                    "no rank has served for %.0f s, and %d requests wait: %s",
                    self.clock() - began_s,
                    self.employer.count_unfinished(),
                    "; ".join(self.missing()),
                )
            if told:
                logger.warning("%d ranks serve again after %.0f s", group.serving, self.clock() - began_s)
