"""Who is in the cluster: starts a worker on every seat, makes them one group, notices who is lost, and replaces it.

Everything here runs in one thread, on one asyncio loop. What a seat and the group go through:

    seat      hire -> load -> ready ----------> member -> lost -> hire again, later and later if it keeps failing
    group     whenever a member is lost or says that the group is broken, or somebody is ready:
              roll call -> next generation, of all who answered -> Form to each -> all say Formed -> requests flow again

There is one way to change the group, whatever the reason. Ranks that are told to form the next generation leave the last one
at once; the step that breaks is made again afterwards, and their requests stay where they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any

import msgspec

from cluster.dispatcher import Caller, Dispatcher
from cluster.display import StartDisplay
from cluster.errors import ClusterError, RankFailed
from cluster.fleet import Fleet, WorkerDied
from cluster.ledger import Room
from cluster.loop_thread import CLOSED, LoopThread, Pulse
from cluster.messages import (
    Ask,
    Asleep,
    Broken,
    Command,
    Event,
    Failed,
    Form,
    Formed,
    Load,
    Loaded,
    Outputs,
    Ping,
    Progress,
    Report,
    Stop,
    Stopped,
    decode_answer,
    decode_events,
    encode,
)
from cluster.workers import Deadlines, State, Worker
from epslots.costs import Costs
from epslots.loading import LOAD_DEADLINE_S
from epslots.requests import Request

logger = logging.getLogger("epslots.cluster")

MOST_FAILURES = 5  # of one seat in a row, and of forming a group
_BACKOFF_S = 1.0  # before a seat's second attempt; doubled each time
_SECOND_LOOK_S = 0.1

MakeDispatcher = Callable[[Callable[[Hashable, Command], None]], Dispatcher]


class Supervisor:
    """Keeps the cluster going. All methods are for its thread.

    Args:
        fleet: where workers come from.
        load: what each is told to load; ``neighbours`` is filled in.
        make_dispatcher: given the way to send commands.

    Attributes:
        generation: number of the group; -1 before the first.
        failure: why nothing can be served any more, if so.
        serving: how many ranks do; for any thread.
        timeline: seconds from the beginning to the end of each stage of the start, by name.
    """

    def __init__(
        self,
        thread: LoopThread,
        fleet: Fleet,
        load: Load,
        *,
        costs: Costs | None,
        deadlines: Deadlines,
        display: StartDisplay,
        make_dispatcher: MakeDispatcher,
    ) -> None:
        self._thread, self._fleet, self._load, self._costs = thread, fleet, load, costs
        self._deadlines, self._display = deadlines, display
        self.dispatcher = make_dispatcher(self._send)
        self.generation = -1
        self.failure: ClusterError | None = None
        self.serving = 0
        self.timeline: dict[str, float] = {}
        self._began_s = time.monotonic()
        self._wanted = 0
        self._workers: dict[int, Worker] = {}
        self._staffing: dict[int, asyncio.Task[None]] = {}
        self._formed = False
        self._broken_by: str | None = None
        """What broke the group, since it last began to form; and whether it had formed."""
        self._broken_in_step = False
        self._reports: dict[int, Report | None] = {}
        self._asked = 0
        self._breaks = 0
        """Groups in a row that broke without a token."""
        self._started = False
        self._closing: asyncio.Task[None] | None = None
        self._scaling = asyncio.Lock()
        self._pulse = Pulse()
        thread.on_bug = lambda error: self._give_up(ClusterError(f"a bug: {error!r}"))

    # What is asked of it.

    @property
    def members(self) -> list[Worker]:
        """The ranks of the current generation, in order."""
        members = [worker for worker in self._workers.values() if worker.state is State.MEMBER]
        return sorted(members, key=lambda worker: worker.rank)

    async def start(self, ranks: int | None) -> Loaded:
        """Bring up the ranks (None: one on every GPU); returns when they serve, with what the first says of the model.

        Raises:
            ClusterError: they don't come up. The first failure is told, and nothing goes on.
        """
        self._display.stage("reserving places")
        ranks = await self._fleet.open(ranks)
        self._mark("places reserved")
        self._spawn(self._keep_formed())
        self._spawn(self._watch())
        self._display.stage("starting workers")
        await self._staff_up(ranks)
        self._started = True
        self._display.close()
        loaded = self.members[0].loaded
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
            if ranks >= self._wanted:
                await self._fleet.resize(ranks)
                await self._staff_up(ranks)
                return
            self._wanted = ranks
            for seat in [seat for seat in self._staffing if seat >= ranks]:
                self._staffing.pop(seat).cancel()
                if seat in self._workers:
                    self._lose(self._workers[seat], ClusterError("it is no longer needed"), retire=True)
            await self._serving(range(ranks))
            await self._fleet.resize(ranks)

    async def reports(self) -> list[tuple[Worker, Report]]:
        """What every rank has counted; of those that are lost meanwhile, nothing."""
        asked = []
        for worker in self.members:
            self._asked += 1
            self._reports[self._asked] = None
            self._send(worker, Ask(self._asked))
            asked.append((worker, self._asked))
        await self._pulse.until(
            lambda: all(self._reports[number] is not None or worker.state is State.LOST for worker, number in asked)
        )
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
        loaded = [worker for worker in workers if worker.state in (State.READY, State.MEMBER)]
        for worker in loaded:
            self._send(worker, Stop())
        await self._pulse.until(
            lambda: all(worker.stopped or worker.state is State.LOST for worker in loaded), self._deadlines.stop_s
        )
        await self._thread.cancel_all()
        for worker in workers:
            worker.handle.kill()
        await self._fleet.close()
        self._display.close()

    # Seats.

    async def _staff_up(self, ranks: int) -> None:
        """Staff the seats up to ``ranks``; returns when all of them serve, or raises what keeps one from it."""
        self._wanted = ranks
        for seat in range(ranks):
            if seat not in self._staffing:
                self._staffing[seat] = self._spawn(self._staff(seat))
        self._pulse.beat()
        await self._serving(range(ranks))

    async def _serving(self, seats: Sequence[int]) -> None:
        """Wait until these seats serve, and none beyond the wanted ones."""

        def settled() -> bool:
            serving = {worker.seat for worker in self.members}
            given_up = set(seats) - self._staffing.keys()
            return (
                self.failure is not None
                or bool(given_up)
                or (self._formed and serving >= set(seats) and max(serving, default=0) < self._wanted)
            )

        await self._pulse.until(settled)
        if self.failure is not None:
            raise self.failure
        if given_up := sorted(set(seats) - self._staffing.keys()):
            raise ClusterError(f"ranks {given_up} did not come up; the log says why. The others go on")

    async def _staff(self, seat: int) -> None:
        """Keep a worker on a seat, until it has failed too often."""
        failures = 0
        while True:
            worker = None
            try:
                worker = Worker(seat, await self._fleet.hire(seat))
                self._workers[seat] = worker
                self._mark("workers started")
                worker.listening = self._spawn(self._listen(worker))
                await asyncio.wait({worker.listening})
                assert worker.cause is not None, "listening ends with the worker"
                error = worker.cause
            except (WorkerDied, ClusterError) as failure:
                error = failure
            told = error
            if not isinstance(told, ClusterError):
                told = RankFailed(f"{f'rank {seat}' if worker is None else worker.name} could not be started: {error}")
            if self._closing is not None:
                return
            if not self._started:
                self._give_up(told)
                return
            failures = 0 if worker is not None and worker.proven else failures + 1
            if failures == MOST_FAILURES:
                logger.error("%s. That was the %dth failure in a row; its seat is given up", told, failures)
                del self._staffing[seat]
                if not self._staffing:
                    self._give_up(told)
                self._pulse.beat()
                return
            if failures:
                await asyncio.sleep(_BACKOFF_S * 2 ** (failures - 1))

    async def _listen(self, worker: Worker) -> None:
        """Tell a new worker to load, and take its events until it is lost."""
        try:
            neighbours = await self._fleet.neighbours(worker.seat)
            await worker.handle.command(encode(msgspec.structs.replace(self._load, neighbours=neighbours)))
            while True:
                for event in decode_events(await worker.handle.events()):
                    self._take(worker, event)
        except (WorkerDied, ClusterError) as error:
            self._lose(worker, error)

    def _take(self, worker: Worker, event: Event) -> None:
        match event:
            case Outputs(outputs):
                worker.served = True
                self._breaks = 0
                self.dispatcher.take(worker, outputs)
                return  # nobody waits for that here
            case Asleep(generation, step):
                self.dispatcher.fell_asleep(worker, generation, step)
                return
            case Progress(title, done, total):
                self._display.progress(worker.seat, title, done, total)
            case Loaded():
                worker.loaded, worker.state = event, State.READY
                self._mark("model loaded")
            case Formed(generation):
                worker.formed = generation
            case Broken(generation, cause, stood):
                if generation == self.generation:
                    self._break_up(f"{worker.name} says: {cause}", stood=stood)
            case Failed():
                error = RankFailed(f"{worker.name} failed while {event.doing}: {event.kind}: {event.message}")
                if not event.deliberate:
                    error.add_note(event.traceback)
                raise error
            case Report(number=number):
                self._reports[number] = event
            case Stopped():
                worker.stopped = True
        self._pulse.beat()

    def _lose(self, worker: Worker, cause: WorkerDied | ClusterError, *, retire: bool = False) -> None:
        """A worker is gone, or must go. Nothing that it says from now on is heard."""
        if worker.state is State.LOST:
            return
        was_member = worker.state is State.MEMBER
        worker.state, worker.cause = State.LOST, cause
        del self._workers[worker.seat]
        worker.handle.kill()
        if worker.listening is not None and worker.listening is not asyncio.current_task():
            worker.listening.cancel()
        if was_member:
            self._break_up(f"{worker.name} is lost: {cause}")
        moved = self.dispatcher.lose(worker, blame=not retire, cause=str(cause))
        if self._started and not retire and self._closing is None:
            what = cause if isinstance(cause, RankFailed) else f"{worker.name} is lost: {cause}"
            notes = "".join(f"\n{note}" for note in getattr(cause, "__notes__", ()))
            logger.warning("%s%s%s", what, f"; its {moved} requests move" if moved else "", notes)
        self._pulse.beat()

    def _give_up(self, error: ClusterError) -> None:
        """Nothing can be served any more."""
        self.failure = self.failure or error
        self.dispatcher.pause()
        self.dispatcher.fail(self.failure)
        self._pulse.beat()

    # The group.

    def _break_up(self, cause: str, *, stood: bool = False) -> None:
        self.serving = len(self.members)
        self._formed = False
        if self._broken_by is None:
            self._broken_by = cause
            self._broken_in_step = stood
            self._breaks += stood
        self.dispatcher.pause()
        self._pulse.beat()

    def _candidates(self) -> list[Worker]:
        """Who could be in the next generation: those of this one first."""
        return self.members + [worker for worker in self._workers.values() if worker.state is State.READY]

    def _should_form(self) -> bool:
        candidates = self._candidates()
        if self._formed and len(candidates) == len(self.members):
            return False
        # The first group is everybody's; later ones go on without those that will come.
        return len(candidates) >= (1 if self._started else self._wanted)

    async def _keep_formed(self) -> None:
        """Form a group whenever the last is broken or somebody is ready."""
        failures = 0
        while self.failure is None:
            await self._pulse.until(self._should_form)
            if self._breaks > 1:
                logger.warning("the group broke %d times without a token; the last time: %s", self._breaks, self._broken_by)
            if self._breaks >= MOST_FAILURES:
                self._give_up(ClusterError(f"the group broke {self._breaks} times without a token: {self._broken_by}"))
                return
            await self._roll_call(self._candidates(), self._deadlines.roll_call_s)
            if not self._should_form():
                continue
            cause = await self._form()
            failures = 0 if cause is None else failures + 1
            if failures == MOST_FAILURES:
                places = ", ".join(sorted(worker.handle.where for worker in self._candidates()))
                self._give_up(
                    ClusterError(
                        f"the ranks could not form a group, {failures} times in a row; the last time: {cause}. They must "
                        f"reach each other over TCP, on any port: see firewalls and addresses of {places or 'all nodes'}"
                    )
                )

    async def _form(self) -> str | None:
        """Form the next generation, of all candidates; returns what went wrong, if anything did."""
        logger.debug("forming generation %d after: %s", self.generation + 1, self._broken_by)
        try:
            host, port = await self._fleet.rendezvous()
        except (WorkerDied, ClusterError) as error:
            return f"there is no place to meet: {error}"
        if not self._should_form():
            return None
        members = self._candidates()
        self.generation += 1
        self._formed, self._broken_by, self._broken_in_step = False, None, False
        self.dispatcher.begin(self.generation)
        generation, deadlines = self.generation, self._deadlines
        fresh = all(worker.state is State.READY for worker in members)
        for rank, worker in enumerate(members):
            worker.rank, worker.state = rank, State.MEMBER
            form = Form(
                generation=generation,
                rank=rank,
                size=len(members),
                host=host,
                port=port,
                form_s=deadlines.form_s,
                deadline_s=deadlines.operation_s,
                fresh=fresh,
                costs=self._costs,
            )
            self._send(worker, form)
        in_time = await self._pulse.until(
            lambda: self._broken_by is not None or all(worker.formed == generation for worker in members),
            LOAD_DEADLINE_S if fresh else 3 * deadlines.form_s + deadlines.operation_s,
        )
        if not in_time:
            for worker in members:
                if worker.formed != generation:
                    self._lose(worker, WorkerDied("it neither joined the group nor said why"))
        if self._broken_by is not None:
            if self._broken_in_step:
                return None  # it had formed, and broke for another reason
            self._drop_newcomers(members, self._broken_by)
            return self._broken_by
        self._formed = True
        self.serving = len(members)
        logger.info("generation %d: %d ranks serve", generation, len(members))
        self._mark("group formed")
        rooms: dict[Hashable, Room] = {
            w: Room(self._load.kv_tokens, w.loaded.batches) for w in members if w.loaded is not None
        }
        self.dispatcher.serve(rooms)
        self._pulse.beat()
        return None

    def _drop_newcomers(self, members: Sequence[Worker], cause: str) -> None:
        """A group didn't form though nobody is lost: if some of it stood together before, the others are the likely reason."""
        newcomers = [worker for worker in members if worker.formed < 0]
        if len(newcomers) < len(members) and all(worker.state is State.MEMBER for worker in members):
            for worker in newcomers:
                self._lose(worker, WorkerDied(f"the group could not form with it: {cause}"))

    async def _roll_call(self, workers: Sequence[Worker], deadline_s: float) -> None:
        """Ask for a sign of life, and lose those that don't give it."""

        async def ask(worker: Worker) -> None:
            asking = asyncio.ensure_future(worker.handle.command(encode(Ping())))
            await asyncio.wait({asking}, timeout=deadline_s)
            if not asking.done():  # maybe this process stood still, and the answer waits here
                await asyncio.wait({asking}, timeout=_SECOND_LOOK_S)
            try:
                if not asking.done():
                    asking.cancel()
                    raise WorkerDied(f"it did not answer within {deadline_s:g} s")
                if not decode_answer(asking.result()).going:  # why, it is about to say
                    await self._pulse.until(lambda: worker.state is State.LOST, deadline_s)
                    raise WorkerDied("it has ended its work")
            except WorkerDied as error:
                self._lose(worker, error)

        await asyncio.gather(*map(ask, workers))

    async def _watch(self) -> None:
        """While there is something to do, see that everybody answers. An idle cluster is left alone."""
        while True:
            await self._pulse.until(lambda: bool(self.dispatcher.unfinished) or not self._formed)
            await asyncio.sleep(self._deadlines.silence_s / 2)
            await self._roll_call(list(self._workers.values()), self._deadlines.silence_s)

    # Odds and ends.

    def _send(self, worker: Hashable, command: Command) -> None:
        """Send a command in the background; commands arrive in the order of these calls."""
        assert isinstance(worker, Worker)
        self._spawn(self._deliver(worker, encode(command)))

    async def _deliver(self, worker: Worker, message: bytes) -> None:
        try:
            await worker.handle.command(message)
        except WorkerDied as error:
            self._lose(worker, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._thread.spawn(work)

    def _mark(self, stage: str) -> None:
        if not self._started:
            self.timeline[stage] = time.monotonic() - self._began_s
