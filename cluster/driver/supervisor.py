"""``Supervisor``: the driver's center. Starts and ends the cluster, takes the workers' events, and reacts when one is lost.

    Supervisor -> WorkerPool          a worker on every place, replaced when it is lost
               -> WorkerGroups        the process groups of the workers that have loaded the model
               -> ControllerClient    for each group: the controller, its windows and its placements
               -> RequestRouter       requests and their outputs
    all of them -> Workers            the workers; send and lose

Everything runs in one thread, on one asyncio loop. A worker's life: started -> loads (or is
adopted) -> ready -> member -> lost -> replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from functools import partial
from typing import Any

import msgspec

from cluster.driver.backend import Backend, WorkerDied
from cluster.driver.controller_client import ControllerClient
from cluster.driver.epochs import Epochs
from cluster.driver.gap_log import log_gaps
from cluster.driver.loop_thread import CLOSED, LoopThread
from cluster.driver.request_router import Caller, RequestRouter
from cluster.driver.scaling import Scaling
from cluster.driver.shared_controller import SharedController
from cluster.driver.worker_group import WorkerGroup
from cluster.driver.worker_groups import WorkerGroups
from cluster.driver.worker_pool import WorkerPool
from cluster.driver.workers import Deadlines, GroupWorkers, Worker, Workers, WorkerState
from cluster.errors import ClusterError, RankFailed, Superseded
from cluster.messages.hand_over import HandedOver, HandOverContact, PromptProgress
from cluster.messages.placement import GroupState, LoadReport, PlacementRejected
from cluster.messages.rank import (
    Adopt,
    Adopted,
    Asleep,
    Broken,
    Command,
    Contact,
    Event,
    Failed,
    Formed,
    GetReport,
    Load,
    Loaded,
    LoadProgress,
    Outputs,
    RankReport,
    RankStopped,
    Stop,
    WakesOthers,
    decode_events,
    encode,
)
from epslots.generation.requests import Request
from epslots.planner.cost_model import Costs
from epslots.progress import StartDisplay

logger = logging.getLogger("epslots.cluster")

_LAST_STAGE = "group formed"
DETACHED = "the cluster's ranks were left to the next driver; send the request again, to that one"

MakeRouter = Callable[[Callable[[Hashable, Command], None]], RequestRouter]


class Supervisor:
    """Keeps the cluster going. All methods are for its thread.

    Args:
        backend: runs the processes.
        load: the workers' first command; ``neighbours`` and ``ranks`` are filled in for each.
        costs: the costs to plan with; None = measured ones.
        make_router: called with the function that sends commands.
        placement: of each group's first ranks (``placement.pack``); None = the default one.

    Attributes:
        pool: the places for workers.
        groups: the ranks that serve.
        router: the requests.
        controllers: of each group; none if there is no controller, because no windows are reported.
        failure: why the cluster can't go on, if so.
        timeline: seconds from the beginning to the end of each stage of the start, by name.
    """

    def __init__(
        self,
        thread: LoopThread,
        backend: Backend,
        load: Load,
        *,
        costs: Costs | None,
        deadlines: Deadlines,
        display: StartDisplay,
        make_router: MakeRouter,
        placement: bytes | None = None,
    ) -> None:
        self._thread, self._backend, self._load = thread, backend, load
        self._deadlines, self._display = deadlines, display
        self.failure: ClusterError | None = None
        self.timeline: dict[str, float] = {}
        self._began_s = time.monotonic()
        self._reports: dict[int, RankReport | None] = {}
        self._reports_asked = 0
        self._closing: asyncio.Task[None] | None = None
        self.workers = Workers(thread.spawn, self._take_loss)
        self._changes = self.workers.changes
        self.router = make_router(self.workers.send)
        self._costs, self._placement, self._epochs = costs, placement, Epochs()
        self._controller = SharedController(backend)
        self.controllers: list[ControllerClient] = []
        self._controller_tasks: list[asyncio.Task[None]] = []
        self.groups = WorkerGroups(self._make_group, self._end_group, self._spawn)
        self.pool = WorkerPool(
            backend, self.workers, self.groups, listen=self._listen, spawn=self._spawn, give_up_s=deadlines.give_up_s
        )
        self._scaling = Scaling(self.pool, self.groups, outlives=load.origin is not None)
        thread.report_bugs(lambda error: self._give_up(ClusterError(f"a bug: {error!r}")))

    # Calls of the cluster.

    async def start(
        self, ranks: int | None, groups: int = 1, check: Callable[[], object] | None = None, *, prefill_ranks: int = 0
    ) -> Loaded:
        """Start the ranks; returns when they serve, with the first one's report of the model.

        Args:
            ranks: None for one on every GPU.
            groups: into which they are divided.
            prefill_ranks: ranks of the groups that compute prompts for the others; 0 = each computes its own.
            check: raises an error if the model can't be served; called, in a thread, unless the ranks are adopted.

        Raises:
            ClusterError: the first failure of the start, which ends it.
            EpslotsError: that of ``check``.
        """
        self._display.stage("reserving places")
        self._spawn(self._backend.keep_lease)
        ranks = await self._backend.open(ranks)
        self._mark("places reserved")
        survivors = self._backend.survivors
        if check is not None and not survivors:
            await asyncio.to_thread(check)
        self.groups.divide(ranks, groups, prefill_ranks)
        self.groups.resize(ranks)
        for number, group in enumerate(self.groups):
            bundles = self.groups.bundles_of(number, ranks)
            group.require(len(survivors.intersection(bundles)) or len(bundles))
        self._spawn(self._watch_health)
        self._spawn(self.pool.keep_backend)
        self._spawn(lambda: log_gaps(self.groups, self.pool, self.router, self._changes))
        self._display.stage("starting workers")
        await self.pool.start(ranks, adopting=bool(survivors))
        for group in self.groups:
            group.require(1)
        self._display.close()
        loaded = self.groups.members[0].loaded
        assert loaded is not None
        return loaded

    def submit(self, choices: Sequence[tuple[Request, Caller]], stop: Sequence[str]) -> None:
        """Take the choices of one checked prompt, with the strings that end their texts."""
        if self.failure is not None or self._closing is not None:
            for _, caller in choices:
                caller.fail(self.failure or ClusterError(CLOSED))
            return
        self.router.submit(choices, stop)
        self._changes.notify()

    async def scale(self, ranks: int | None, groups: int | None) -> None:
        """Change the number of ranks and groups; returns when that many serve (``Scaling.scale``).

        Raises:
            ConfigError: the bundles can't be divided so.
            ClusterError: there is no room for them, or they don't come up; the others go on.
        """
        await self._scaling.scale(ranks, groups)

    async def reports(
        self, layers: tuple[int, ...] | None = None, group: int | None = None
    ) -> list[tuple[Worker, RankReport]]:
        """The reports of all ranks, but for ranks that are lost meanwhile.

        Args:
            layers: numbers of the MoE layers whose slots the first rank's report is to have; all ranks of its group know the
                same of them. None = all layers, in every report.
            group: only of this group's ranks.
        """
        asked: list[tuple[Worker, int]] = []
        for worker in self.groups.members if group is None else self.groups[group].members:
            self._reports_asked += 1
            self._reports[self._reports_asked] = None
            self.workers.send(worker, GetReport(self._reports_asked, () if asked and layers is not None else layers))
            asked.append((worker, self._reports_asked))
        self._changes.notify()
        try:
            await self._changes.wait_for(
                lambda: all(self._reports[number] is not None or worker.state is WorkerState.LOST for worker, number in asked)
            )
        finally:  # also if the caller gave up: else the health of an idle cluster would be watched for ever
            found = [(worker, self._reports.pop(number)) for worker, number in asked]
        return [(worker, report) for worker, report in found if report is not None]

    async def close(self, *, leave_ranks: bool = False) -> None:
        """End everything; unfinished requests fail. After an interrupt, call it again to wait for the rest.

        Args:
            leave_ranks: to the next driver.
        """
        if self._closing is None:
            self.pool.stop()
            leave_ranks |= isinstance(self.failure, Superseded)  # they are another's
            self._closing = asyncio.create_task(self._close(leave_ranks))
        await asyncio.shield(self._closing)

    async def _close(self, leave_ranks: bool) -> None:
        self.router.pause()
        self.router.fail(self.failure or ClusterError(DETACHED if leave_ranks else CLOSED))
        workers = [] if leave_ranks else list(self.workers)
        loaded = [worker for worker in workers if worker.state in (WorkerState.READY, WorkerState.MEMBER)]
        for worker in loaded:
            self.workers.send(worker, Stop())
        await self._changes.wait_for(
            lambda: all(worker.stopped or worker.state is WorkerState.LOST for worker in loaded), self._deadlines.stop_s
        )
        await self._thread.cancel_all()
        for worker in workers:
            worker.handle.kill()
        await self._backend.close(leave_ranks=leave_ranks)
        self._display.close()

    # Events of the workers.

    async def _listen(self, worker: Worker) -> None:
        """Have a new worker load the model, or adopt one; and take its events until it is lost."""
        self._mark("workers started")
        try:
            if worker.handle.adopted:
                await worker.handle.command(encode(Adopt()))
            else:
                neighbours = await self._backend.neighbours(worker.bundle)
                ranks = len(self.groups.bundles_of(worker.group, self.pool.size))
                load = msgspec.structs.replace(self._load, neighbours=neighbours, ranks=ranks)
                await worker.handle.command(encode(load))
            while True:
                for event in decode_events(await worker.handle.events()):
                    self._take(worker, event)
        except Superseded as error:
            self._give_up(error)
            self.workers.lose(worker, error, retire=True)
        except (WorkerDied, ClusterError) as error:
            self.workers.lose(worker, error)

    def _take(self, worker: Worker, event: Event) -> None:
        """Hand an event to the part that it concerns: frequent ones first, which wake no coroutine."""
        match event:
            case Outputs(outputs):
                worker.served = True
                self.groups[worker.group].forget_breaks()
                self.router.take(worker, outputs)
            case HandedOver() | HandOverContact() | PromptProgress():
                self.router.take_hand_over(worker, event)
            case Asleep(epoch, step):
                self.groups[worker.group].router.fell_asleep(worker, epoch, step)
            case WakesOthers(epoch):
                self.groups[worker.group].router.wake_others(epoch)
            case Contact():
                self.groups[worker.group].pass_on(event)
            case LoadReport() | GroupState() | PlacementRejected():
                if self.controllers:
                    self.controllers[worker.group].take(worker, event)
            case _:
                self._take_change(worker, event)
                self._changes.notify()

    def _take_change(self, worker: Worker, event: Event) -> None:
        """Note a change of a worker's state.

        Raises:
            RankFailed: the worker's own failure.
        """
        match event:
            case LoadProgress(title, done, total):
                self._display.progress(worker.bundle, title, done, total)
            case Loaded():
                worker.loaded, worker.state = event, WorkerState.READY
                self._mark("model loaded")
            case Adopted(loaded, epoch, grouped):
                worker.loaded, worker.state = loaded, WorkerState.READY
                worker.formed = epoch if grouped else -1
                self.groups[worker.group].follow(epoch, grouped=grouped)
                self._mark("ranks adopted")
            case Formed(epoch):
                worker.formed = epoch
            case Broken(epoch, cause, stood) if worker.state is WorkerState.MEMBER:
                group = self.groups[worker.group]
                if epoch == group.epoch:
                    group.break_up(f"{worker.name} reports: {cause}", in_step=stood)
            case Failed():
                raise worker.failure(event)
            case RankReport(number=number) if number in self._reports:  # else its caller gave up
                self._reports[number] = event
            case RankStopped():
                worker.stopped = True

    # Changes of the group, and the end.

    def _take_loss(self, worker: Worker, was_member: bool, retire: bool) -> None:
        """A worker was lost: break its group up, and requeue its requests."""
        cause = worker.cause
        if was_member:
            self.groups[worker.group].lose_member(f"{worker.name} is lost: {cause}")
        requeued = self.router.lose(worker, blame=not retire, cause=str(cause))
        if self.pool.started and not retire and self._closing is None:
            message = cause if isinstance(cause, RankFailed) else f"{worker.name} is lost: {cause}"
            notes = "".join(f"\n{note}" for note in getattr(cause, "__notes__", ()))
            logger.warning("%s%s%s", message, f"; its {requeued} requests return to the queue" if requeued else "", notes)

    def _make_group(self, number: int) -> WorkerGroup:
        """A further group, and its controller client."""
        config = self._load.config
        group = WorkerGroup(
            GroupWorkers(self.workers, number),
            self.router.open_group(),
            epochs=self._epochs,
            role=self.groups.role_of(number),
            kv_tokens=None if config.exchanges_memory else config.planned_tokens,
            costs=self._costs,
            deadlines=self._deadlines,
            placement=self._placement,
            on_formed=lambda: self._take_formed_group(number),
        )
        if self._load.window_steps:
            frozen = any(other.frozen for other in self.controllers)
            client = ControllerClient(partial(self._controller.start, number), group, self.workers.send, frozen=frozen)
            self.controllers.append(client)
            self._controller_tasks.append(self._spawn(client.keep_controller))
        return group

    def _end_group(self, group: WorkerGroup) -> None:
        """The last group is no more."""
        self.router.close_group(group.router)
        if self.controllers:
            self.controllers.pop().fail(ClusterError("its group was ended"))
            self._controller_tasks.pop().cancel()

    def _take_formed_group(self, number: int) -> None:
        """A group has formed."""
        self._mark(_LAST_STAGE)
        group = self.groups[number]
        self.pool.mark_grouped(group.members)
        if self.pool.started:
            group.require(1)
        if self.controllers:
            self.controllers[number].begin()

    def _give_up(self, error: ClusterError) -> None:
        """End all requests and calls with an error: the cluster can't go on."""
        self.failure = self.failure or error
        if isinstance(error, Superseded):
            self.pool.stop()  # the ranks are another's
        self.router.pause()
        self.router.fail(self.failure)
        self.groups.stop()
        self.pool.fail(self.failure)
        for client in self.controllers:
            client.fail(self.failure)
        self._changes.notify()

    # In the background.

    def _spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Run a coroutine in the background. A ClusterError of it ends the cluster; another exception is a bug."""

        async def guarded() -> None:
            try:
                await function()
            except ClusterError as error:
                self._give_up(error)

        return self._thread.spawn(guarded())

    async def _watch_health(self) -> None:
        """Check the workers' health while a request, a report or a group is waited for, but not in an idle cluster."""
        while True:
            await self._changes.wait_for(lambda: bool(self.router.unfinished or self._reports) or not self.groups.formed)
            await asyncio.sleep(self._deadlines.silence_s / 2)  # more often would tell no more
            await self.workers.check_health(list(self.workers), self._deadlines.silence_s)

    def _mark(self, stage: str) -> None:
        """Note the end of a stage of the start."""
        if _LAST_STAGE not in self.timeline:
            self.timeline[stage] = time.monotonic() - self._began_s
