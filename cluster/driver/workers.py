"""The workers of a cluster as the driver knows them, and how they are reached, watched and lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cluster.driver.backend import WorkerDied, WorkerHandle
from cluster.driver.loop_thread import Notifier
from cluster.errors import ClusterError, RankFailed, Superseded
from cluster.messages.rank import Command, Failed, Loaded, Ping, decode_pong, encode

_PROVEN_S = 60.0
_SECOND_LOOK_S = 0.1


@dataclass(frozen=True)
class Deadlines:
    """Seconds.

    Attributes:
        health_check_s: a rank's answer before a group is formed; a rank that is later is lost.
        silence_s: a rank's answer while there is work, or while it loads.
        form_s: the ranks' rendezvous.
        operation_s: one operation between ranks.
        stop_s: a rank's release of everything, before it is killed.
        give_up_s: attempts to replace a rank, or to get a lost Ray back; None = without an end.
    """

    health_check_s: float = 3.0
    silence_s: float = 10.0
    form_s: float = 10.0
    operation_s: float = 60.0
    stop_s: float = 5.0
    give_up_s: float | None = None


class WorkerState(Enum):
    """Loading -> ready -> member of the group; lost from any of these, for good."""

    LOADING = "loading"
    READY = "ready"
    MEMBER = "member"
    LOST = "lost"


@dataclass(eq=False)
class Worker:
    """A worker's process, and the driver's knowledge of it.

    Attributes:
        group: number of its group.
        rank: in the current epoch, or in the worker's last; -1 before its first.
        formed: the last epoch that the worker reported as formed.
        served: it has sent outputs.
        cause: why it is lost.
        listening: the task that takes its events.
    """

    bundle: int
    handle: WorkerHandle
    group: int = 0
    state: WorkerState = WorkerState.LOADING
    rank: int = -1
    formed: int = -1
    served: bool = False
    stopped: bool = False
    loaded: Loaded | None = None
    cause: WorkerDied | ClusterError | None = None
    listening: asyncio.Task[None] | None = None
    since_s: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """For people."""
        of = f" of group {self.group}" if self.group and self.rank >= 0 else ""
        return f"rank {self.bundle if self.rank < 0 else self.rank}{of} ({self.handle.where})"

    @property
    def proven(self) -> bool:
        """Whether it has worked, or lived for long: then its end isn't a failed start."""
        return self.served or time.monotonic() - self.since_s > _PROVEN_S

    def failure(self, event: Failed) -> RankFailed:
        """The error of a worker that failed by itself; for a bug, with its traceback."""
        error = RankFailed(f"{self.name} failed while {event.doing}: {event.kind}: {event.message}", event.kind)
        if not event.deliberate:
            error.add_note(event.traceback)
        return error


class Workers:
    """The workers that aren't lost, one a bundle at most. For one loop's thread.

    Args:
        spawn: runs a coroutine in the background.
        on_lost: called with a worker that has just been lost, with whether it was a member of the group, and with ``retire``.

    Attributes:
        changes: to be notified of every change of a worker, the group or the pool.
    """

    def __init__(
        self,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_lost: Callable[[Worker, bool, bool], None],
    ) -> None:
        self._spawn, self._on_lost = spawn, on_lost
        self._by_bundle: dict[int, Worker] = {}
        self.changes = Notifier()

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._by_bundle.values()))

    def on(self, bundle: int) -> Worker | None:
        """The worker on a bundle."""
        return self._by_bundle.get(bundle)

    def add(self, worker: Worker) -> None:
        """Add a new worker, whose bundle is free."""
        self._by_bundle[worker.bundle] = worker

    def send(self, worker: Hashable, command: Command) -> None:
        """Send a command in the background; commands arrive in the order of these calls."""
        assert isinstance(worker, Worker)
        self._spawn(self._deliver(worker, encode(command)))

    async def _deliver(self, worker: Worker, message: bytes) -> None:
        try:
            await worker.handle.command(message)
        except Superseded:
            pass  # the lease says so, too, and that ends this cluster
        except WorkerDied as error:
            self.lose(worker, error)

    def lose(self, worker: Worker, cause: WorkerDied | ClusterError, *, retire: bool = False) -> None:
        """Kill a worker, if it still lives, and take no more events of it.

        Args:
            retire: it is no fault of the worker or its requests, and isn't logged.
        """
        if worker.state is WorkerState.LOST:
            return
        was_member = worker.state is WorkerState.MEMBER
        worker.state, worker.cause = WorkerState.LOST, cause
        del self._by_bundle[worker.bundle]
        worker.handle.kill()
        if worker.listening is not None and worker.listening is not asyncio.current_task():
            worker.listening.cancel()
        self._on_lost(worker, was_member, retire)
        self.changes.notify()

    # Health.

    async def check_health(self, workers: Iterable[Worker], deadline_s: float) -> None:
        """Ping workers, and lose those that don't answer in time."""
        await asyncio.gather(*(self._ping(worker, deadline_s) for worker in workers))

    async def _ping(self, worker: Worker, deadline_s: float) -> None:
        asking = asyncio.ensure_future(worker.handle.command(encode(Ping())))
        try:
            await asyncio.wait({asking}, timeout=deadline_s)
            if not asking.done():  # this process may have stood still, and the answer be waiting here
                await asyncio.wait({asking}, timeout=_SECOND_LOOK_S)
            if not asking.done():
                raise WorkerDied(f"it did not answer within {deadline_s:g} s")
            if not decode_pong(asking.result()).running:  # its last event, which says why, is on the way
                await self.changes.wait_for(lambda: worker.state is WorkerState.LOST, deadline_s)
                raise WorkerDied("it has ended its work")
        except Superseded:
            pass  # the lease says so, too, and that ends this cluster
        except WorkerDied as error:
            self.lose(worker, error)
        finally:
            asking.cancel()


class GroupWorkers:
    """The workers of one group."""

    def __init__(self, workers: Workers, group: int) -> None:
        self._workers, self._group = workers, group
        self.changes, self.send, self.lose, self.check_health = (
            workers.changes,
            workers.send,
            workers.lose,
            workers.check_health,
        )

    def __iter__(self) -> Iterator[Worker]:
        return (worker for worker in self._workers if worker.group == self._group)

    @property
    def members(self) -> list[Worker]:
        """The ranks of the current epoch, in order."""
        return sorted((worker for worker in self if worker.state is WorkerState.MEMBER), key=lambda worker: worker.rank)

    @property
    def candidates(self) -> list[Worker]:
        """The possible members of the next epoch: first those of the current one, then the ready ones."""
        return self.members + [worker for worker in self if worker.state is WorkerState.READY]
