"""Who is in the cluster: starts a worker on every seat, listens to it, notices when it is lost, and replaces it.

Everything here runs in one thread, on one asyncio loop. What a seat goes through:

    hire -> load -> ready -> member of the group (``worker_group.py``) -> lost -> hire again (``worker_pool.py``)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any

import msgspec

from cluster.driver.backend import Backend, WorkerDied
from cluster.driver.controller_client import ControllerClient
from cluster.driver.loop_thread import CLOSED, LoopThread, Pulse
from cluster.driver.request_router import Caller, RequestRouter
from cluster.driver.start_display import StartDisplay
from cluster.driver.worker_group import WorkerGroup
from cluster.driver.worker_pool import WorkerPool
from cluster.driver.workers import Deadlines, LiveWorker, WorkerState
from cluster.errors import ClusterError, RankFailed
from cluster.messages.placement import PlacementRejected, Residency, WindowReport
from cluster.messages.rank import (
    Ask,
    Asleep,
    Broken,
    Command,
    Contact,
    Event,
    Failed,
    Formed,
    Load,
    Loaded,
    Outputs,
    Progress,
    RankReport,
    RankStopped,
    Stop,
    decode_events,
    encode,
)
from epslots.engine.requests import Request
from epslots.planner.cost_model import Costs

logger = logging.getLogger("epslots.cluster")

MakeDispatcher = Callable[[Callable[[Hashable, Command], None]], RequestRouter]


class Supervisor:
    """Keeps the cluster going. All methods are for its thread.

    Args:
        fleet: where workers come from.
        load: what each is told to load; ``neighbours`` is filled in.
        make_dispatcher: given the way to send commands.
        placement: what the first group begins with (``placement.pack``).

    Attributes:
        group: the ranks that serve.
        staffing: the seats.
        started: the ranks have served; what fails before that ends the start.
        controller_client: what has a controller steer them; None if no windows are cut.
        failure: why nothing can be served any more, if so.
        timeline: seconds from the beginning to the end of each stage of the start, by name.
    """

    def __init__(
        self,
        thread: LoopThread,
        fleet: Backend,
        load: Load,
        *,
        costs: Costs | None,
        deadlines: Deadlines,
        display: StartDisplay,
        make_dispatcher: MakeDispatcher,
        placement: bytes | None = None,
    ) -> None:
        self._thread, self._fleet, self._load = thread, fleet, load
        self._deadlines, self._display = deadlines, display
        self.dispatcher = make_dispatcher(self.send)
        self.failure: ClusterError | None = None
        self.timeline: dict[str, float] = {}
        self._began_s = time.monotonic()
        self._workers: dict[int, LiveWorker] = {}
        self._reports: dict[int, RankReport | None] = {}
        self._asked = 0
        self.started = False
        self._closing: asyncio.Task[None] | None = None
        self._scaling = asyncio.Lock()
        self._pulse = Pulse()
        self.group = WorkerGroup(
            self,
            self._workers,
            fleet,
            self.dispatcher,
            kv_tokens=load.config.kv_tokens,
            costs=costs,
            deadlines=deadlines,
            pulse=self._pulse,
            placement=placement,
        )
        self.staffing = WorkerPool(self, fleet, self._workers, self._pulse, self._spawn, deadlines.give_up_s)
        self.controller_client = ControllerClient(fleet, self.group, self.send) if load.window_steps else None
        thread.on_bug = lambda error: self.give_up(ClusterError(f"a bug: {error!r}"))

    # What is asked of it.

    async def start(self, ranks: int | None) -> Loaded:
        """Bring up the ranks (None: one on every GPU); returns when they serve, with what the first says of the model.

        Raises:
            ClusterError: they don't come up. The first failure is told, and nothing goes on.
        """
        self._display.stage("reserving places")
        ranks = await self._fleet.open(ranks)
        self.mark("places reserved")
        self.group.least = ranks
        self._spawn(self.group.keep_formed())
        self._spawn(self._watch())
        self._spawn(self.staffing.keep_fleet())
        self._spawn(self.staffing.tell_of_gaps())
        if self.controller_client is not None:
            self._spawn(self.controller_client.keep_steered())
        self._display.stage("starting workers")
        await self.staffing.staff_up(ranks)
        self.started = True
        self.group.least = 1
        self._display.close()
        loaded = self.group.members[0].loaded
        assert loaded is not None
        return loaded

    def submit(self, request: Request, caller: Caller, stop: Sequence[str]) -> None:
        """Take a request that has been checked."""
        if self.failure is not None or self._closing is not None:
            caller.fail(self.failure or ClusterError(CLOSED))
            return
        self.dispatcher.submit(request, caller, stop)
        self._pulse.beat()

    async def scale(self, ranks: int) -> None:
        """Change the number of ranks; returns when those serve.

        Raises:
            ClusterError: there is no place for them, or they don't come up; the others go on.
        """
        async with self._scaling:
            if ranks >= self.staffing.wanted:
                await self.staffing.resize(ranks)
                await self.staffing.staff_up(ranks)
                return
            self.staffing.staff_down(ranks)
            await self.staffing.serving(range(ranks))
            await self.staffing.resize(ranks)

    async def reports(self) -> list[tuple[LiveWorker, RankReport]]:
        """What every rank has counted; of those that are lost meanwhile, nothing."""
        asked = []
        for worker in self.group.members:
            self._asked += 1
            self._reports[self._asked] = None
            self.send(worker, Ask(self._asked))
            asked.append((worker, self._asked))
        self._pulse.beat()
        try:
            await self._pulse.until(
                lambda: all(self._reports[number] is not None or worker.state is WorkerState.LOST for worker, number in asked)
            )
        finally:  # or, if the caller gave up, an idle cluster would be watched for ever
            found = [(worker, self._reports.pop(number)) for worker, number in asked]
        return [(worker, report) for worker, report in found if report is not None]

    async def close(self) -> None:
        """End everything. Requests that aren't done fail. Twice is once; who is interrupted may wait for the rest again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.dispatcher.pause()
        self.dispatcher.fail(self.failure or ClusterError(CLOSED))
        workers = list(self._workers.values())
        loaded = [worker for worker in workers if worker.state in (WorkerState.READY, WorkerState.MEMBER)]
        for worker in loaded:
            self.send(worker, Stop())
        await self._pulse.until(
            lambda: all(worker.stopped or worker.state is WorkerState.LOST for worker in loaded), self._deadlines.stop_s
        )
        await self._thread.cancel_all()
        for worker in workers:
            worker.handle.kill()
        await self._fleet.close()
        self._display.close()

    # Workers.

    @property
    def closing(self) -> bool:
        """All is being ended."""
        return self._closing is not None

    def count_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.dispatcher.unfinished

    def listen(self, worker: LiveWorker) -> asyncio.Task[None]:
        """Begin to take a new worker's events; it is done when the worker is lost, with its ``cause`` set."""
        self.mark("workers started")
        worker.listening = self._spawn(self._listen(worker))
        return worker.listening

    async def _listen(self, worker: LiveWorker) -> None:
        """Tell a new worker to load, and take its events until it is lost."""
        try:
            neighbours = await self._fleet.neighbours(worker.seat)
            await worker.handle.command(encode(msgspec.structs.replace(self._load, neighbours=neighbours)))
            while True:
                for event in decode_events(await worker.handle.events()):
                    self._take(worker, event)
        except (WorkerDied, ClusterError) as error:
            self.lose(worker, error)

    def _take(self, worker: LiveWorker, event: Event) -> None:
        match event:
            case Outputs(outputs):
                worker.served = True
                self.group.breaks = 0
                self.dispatcher.take(worker, outputs)
                return  # nobody waits for that here
            case Asleep(epoch, step):
                self.dispatcher.fell_asleep(worker, epoch, step)
                return
            case Contact():
                self.group.pass_on(event)
                return
            case WindowReport():
                if self.controller_client is not None:
                    self.controller_client.hear(worker, event)
                return
            case Residency():
                if self.controller_client is not None:
                    self.controller_client.stand(event)
                return
            case PlacementRejected(cause):
                if self.controller_client is not None:
                    self.controller_client.refuse(worker, cause)
            case Progress(title, done, total):
                self._display.progress(worker.seat, title, done, total)
            case Loaded():
                worker.loaded, worker.state = event, WorkerState.READY
                self.mark("model loaded")
            case Formed(epoch):
                worker.formed = epoch
            case Broken(epoch, cause, stood):
                if epoch == self.group.epoch:
                    self.group.break_up(f"{worker.name} says: {cause}", stood=stood)
            case Failed():
                error = RankFailed(f"{worker.name} failed while {event.doing}: {event.kind}: {event.message}", event.kind)
                if not event.deliberate:
                    error.add_note(event.traceback)
                raise error
            case RankReport(number=number):
                if number in self._reports:  # else nobody waits for it any more
                    self._reports[number] = event
            case RankStopped():
                worker.stopped = True
        self._pulse.beat()

    def lose(self, worker: LiveWorker, cause: WorkerDied | ClusterError, *, retire: bool = False) -> None:
        """A worker is gone, or must go. Nothing that it says from now on is heard."""
        if worker.state is WorkerState.LOST:
            return
        was_member = worker.state is WorkerState.MEMBER
        worker.state, worker.cause = WorkerState.LOST, cause
        del self._workers[worker.seat]
        worker.handle.kill()
        if worker.listening is not None and worker.listening is not asyncio.current_task():
            worker.listening.cancel()
        if was_member:
            self.group.breaks = 0  # this one explains itself
            self.group.break_up(f"{worker.name} is lost: {cause}")
        moved = self.dispatcher.lose(worker, blame=not retire, cause=str(cause))
        if self.started and not retire and self._closing is None:
            what = cause if isinstance(cause, RankFailed) else f"{worker.name} is lost: {cause}"
            notes = "".join(f"\n{note}" for note in getattr(cause, "__notes__", ()))
            logger.warning("%s%s%s", what, f"; its {moved} requests move" if moved else "", notes)
        self._pulse.beat()

    def give_up(self, error: ClusterError) -> None:
        """Nothing can be served any more."""
        self.failure = self.failure or error
        self.dispatcher.pause()
        self.dispatcher.fail(self.failure)
        if self.controller_client is not None:
            self.controller_client.fail(self.failure)
        self._pulse.beat()

    def stands(self) -> None:
        """The group has formed."""
        self.mark("group formed")
        self.staffing.served(self.group.members)
        if self.started:
            self.group.least = 1
        if self.controller_client is not None:
            self.controller_client.begin()

    # Odds and ends.

    async def _watch(self) -> None:
        """While anything is awaited, see that everybody answers. An idle cluster is left alone."""
        while True:
            await self._pulse.until(lambda: bool(self.dispatcher.unfinished or self._reports) or not self.group.formed)
            await asyncio.sleep(self._deadlines.silence_s / 2)  # who asks more often learns no more
            await self.group.roll_call(list(self._workers.values()), self._deadlines.silence_s)

    def send(self, worker: Hashable, command: Command) -> None:
        """Send a command in the background; commands arrive in the order of these calls."""
        assert isinstance(worker, LiveWorker)
        self._spawn(self._deliver(worker, encode(command)))

    async def _deliver(self, worker: LiveWorker, message: bytes) -> None:
        try:
            await worker.handle.command(message)
        except WorkerDied as error:
            self.lose(worker, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._thread.spawn(work)

    def mark(self, stage: str) -> None:
        if not self.started:
            self.timeline[stage] = time.monotonic() - self._began_s
