"""A backend of threads: real ranks with real models in this process, joined by the fake transport, that die on command.

backend = FakeBackend()
with Cluster(folder, ranks=2, backend=backend, ...) as cluster:
    backend.at(bundle=1, operation=40, do="crash")   # at its 40th exchange from now
    backend.controller_at(order=3, do="hang")      # at its third order from now

Faults that nothing but a deadline reveals ("freeze", "hang") need the fixture ``clock_loops``: its time is skipped.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn

import pytest
import torch

import cluster.rank.rank_loop
from cluster.controller.controller import Controller, FindForecast
from cluster.controller.group_controllers import GroupControllers
from cluster.driver.backend import WorkerDied
from cluster.errors import ClusterError
from cluster.messages.controller import Order, decode_addressed, decode_order
from cluster.messages.hand_over import ConnectionOrder
from cluster.messages.rank import Form
from cluster.rank.contact_store import ContactStore
from cluster.rank.hand_over_threads import connect
from cluster.rank.rank_loop import RankLoop
from epslots.errors import PeerLost
from epslots.transport.local_transport import LocalHub, LocalTransport
from epslots.transport.pair_connection import PairConnection
from tests.support.clock_loop import ClockLoop
from tests.support.rank_helpers import PATIENCE_S

Fault = Literal["crash", "vanish", "freeze", "raise"]
"""crash: the process dies and that is known at once; vanish: without notice; freeze: it stops; raise: an error of its own."""


ControllerFault = Literal["crash", "hang", "stall", "garbage", "bug"]
"""crash: it dies with the order; hang: it never answers, and the time for that passes; stall: as hang, and it doesn't pass;
garbage: it answers nonsense; bug: it raises."""


def skip_until(loop: asyncio.AbstractEventLoop, over: Callable[[], bool]) -> None:
    """Skip the time in which a supervisor waits for a fault to show."""
    assert isinstance(loop, ClockLoop), "the fixture clock_loops is needed"
    loop.skip_until(over)


class _Killed(BaseException):
    """Ends a dead worker's thread."""


# transformers' loading changes globals, and two at once would leave them changed: a load in this process holds it.
LOADING = threading.Lock()


@pytest.fixture
def one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads load one after the other."""
    load = cluster.rank.rank_loop.load_alone

    def locked(*arguments: Any, **settings: Any) -> Any:
        with LOADING:
            return load(*arguments, **settings)

    monkeypatch.setattr(cluster.rank.rank_loop, "load_alone", locked)


class _Transport(LocalTransport):
    """Counts the exchanges, and fails where it is told to."""

    def __init__(self, hub: LocalHub, rank: int, worker: FakeWorker) -> None:
        super().__init__(hub, rank)
        self._worker = worker

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        self._worker.before_exchange(self.hub)
        return super().all_gather(mine)


class WatchedConnection:
    """A real connection of a hand-over, whose every message and piece may meet with something.

    Attributes:
        messages: sent and received at this end until now.
    """

    def __init__(self, connection: PairConnection, worker: FakeWorker, source: bool, backend: FakeBackend) -> None:
        self.inner, self.worker, self.source, self.messages = connection, worker, source, 0
        self._backend = backend
        self.abort = connection.abort

    def __getattr__(self, name: str) -> Any:
        self.messages += 1
        self._backend.on_connection(self)
        return getattr(self.inner, name)


class FakeWorker:
    """A thread as a process."""

    def __init__(self, backend: FakeBackend, bundle: int) -> None:
        self.bundle = bundle
        self.adopted = False
        self.term = 0
        self.number = backend.started
        self.dead = False
        self.loop = RankLoop(self._form, connect=self._connect)
        self._backend = backend
        self._asyncio = asyncio.get_running_loop()
        self._batches: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._running = threading.Event()
        self._running.set()
        self._fault: tuple[int, Fault] | None = None
        self._exchanges = 0
        self.loop.start()
        threading.Thread(target=self._pump, daemon=True).start()

    @property
    def where(self) -> str:
        return f"node fake, worker {self.number}"

    @property
    def frozen(self) -> bool:
        return not self._running.is_set()

    async def command(self, message: bytes) -> bytes:
        if self.dead:
            raise WorkerDied("it was killed")
        if self.frozen:
            await asyncio.Event().wait()
        return self.loop.command(message)

    async def events(self) -> bytes:
        batches = self._batches
        batch = await batches.get()
        if batch is None:
            batches.put_nowait(None)
            raise WorkerDied("it was killed")
        return batch

    def kill(self) -> None:
        self._die(known=True)

    def take_over(self, term: int) -> None:
        """Serve another driver, on the running loop."""
        self.term = term  # before the last driver's wait ends: it then looks whose the worker is
        self._tell(None)
        self._asyncio, self._batches = asyncio.get_running_loop(), asyncio.Queue()
        self.loop.begin_term(term)

    def at(self, operation: int, do: Fault) -> None:
        self._fault = self._exchanges + operation, do

    def thaw(self) -> None:
        """Let a frozen worker go on."""
        self._running.set()

    def before_exchange(self, hub: LocalHub) -> None:
        """In the stepping thread, before each exchange."""
        self._exchanges += 1
        if self._fault is not None and self._exchanges >= self._fault[0]:
            do, self._fault = self._fault[1], None
            self._backend.faults_done.append((self.bundle, do))
            match do:
                case "crash" | "vanish":
                    self._die(known=do == "crash")
                case "freeze":
                    self._running.clear()
                    skip_until(self._asyncio, lambda: self.dead)
                case "raise":
                    raise ValueError("a bug, says the test")
        self._running.wait()
        if self.dead:
            hub.break_off("a rank's connections are closed")
            raise _Killed

    def _die(self, *, known: bool) -> None:
        self.dead = True
        self._running.set()
        self.loop.hand_overs.abort_all("a rank's connections are closed", end=True)
        self.loop._commands.put(_Bomb())  # type: ignore[arg-type]  # wakes the stepping thread, if it sleeps
        if self.loop._transport is not None:
            self.loop._transport.abort("a rank's connections are closed")
        if known:
            self._tell(None)

    def _form(self, form: Form, device: torch.device, _contacts: ContactStore) -> LocalTransport:
        assert device.type == "cpu"
        if self.dead:
            raise _Killed
        if self._backend.refuse_forming:
            raise PeerLost(self._backend.refuse_forming.pop())
        if self.bundle in self._backend.unreachable:
            raise PeerLost("no rank is there, says the test")
        return _Transport(self._backend.hub(form), form.rank, self)

    def _connect(self, order: ConnectionOrder, contacts: ContactStore, *, source: bool) -> PairConnection:
        if self.dead:
            raise PeerLost("it was killed")
        return WatchedConnection(connect(order, contacts, source=source), self, source, self._backend)

    def _pump(self) -> None:
        """Hand events over to asyncio, in batches that come late, one rank's later than another's; a dead one's are lost."""
        while True:
            with self.loop._news:
                self.loop._news.wait_for(lambda: self.dead, 0.04 if self.bundle % 2 else 0.01)
            batch = self.loop.events(self.term)
            if self.dead:
                return
            if batch is not None:
                self._tell(batch)

    def _tell(self, batch: bytes | None) -> None:
        with suppress(RuntimeError):  # the driver's loop is closed
            self._asyncio.call_soon_threadsafe(self._batches.put_nowait, batch)


class FakeController:
    """A controller without a process. It answers when asyncio is at it, and never in the middle of a caller's step."""

    def __init__(self, backend: FakeBackend) -> None:
        self.dead = False
        self._controllers = GroupControllers(backend.make_controller)
        self.number = backend.controllers_started
        self._backend = backend
        self._ended = asyncio.Event()

    @property
    def controller(self) -> Controller:
        """The first group's."""
        return self._controllers.by_group[0]

    @property
    def where(self) -> str:
        return f"node fake, controller {self.number}"

    async def call(self, message: bytes) -> bytes:
        await asyncio.sleep(0)  # as a message would: the caller goes on first
        fault = self._backend.controller_fault()
        if fault == "crash":
            self.kill()
        elif fault in ("hang", "stall"):
            if fault == "hang":
                skip_until(asyncio.get_running_loop(), lambda: self.dead)
            await self._ended.wait()
        elif fault == "garbage":
            return b"\xc1"
        elif fault == "bug":
            raise WorkerDied("ValueError: a bug, says the test")
        if self.dead:
            raise WorkerDied("it was killed")
        self._backend.orders.append(decode_order(decode_addressed(message)[1]))
        return self._controllers.answer(message)

    def kill(self) -> None:
        self.dead = True
        self._ended.set()


class _Bomb:
    """A command that isn't one."""

    def __getattribute__(self, name: str) -> Any:
        raise _Killed


class FakeBackend:
    """Threads as processes. ``room`` is the number of bundles that there could be; controllers are made as told."""

    def __init__(
        self,
        room: int = 8,
        make_controller: Callable[[FindForecast], Controller] = lambda forecast: Controller(lambda: 0.0, forecast=forecast),
    ) -> None:
        self.room = room
        self.make_controller = make_controller
        self.controllers: list[FakeController] = []
        self.controllers_started = 0
        self.refuse_controllers: list[str] = []
        """Why the next starts of a controller fail."""
        self.orders: list[Order] = []
        """That controllers have answered."""
        self._controller_faults: list[ControllerFault | None] = []
        self.started = 0
        self.unreachable: set[int] = set()
        """Bundles whose workers meet no other rank."""
        self.refuse: dict[int, list[str]] = defaultdict(list)
        """For a bundle, why the next starts fail."""
        self.refuse_forming: list[str] = []
        """Why the next workers that form a group can't."""
        self.refuse_reopening: list[str] = []
        """Why the next attempts to reopen it fail."""
        self.reopened: list[int] = []
        """With how many bundles."""
        self._losses: asyncio.Queue[str] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.workers: dict[int, FakeWorker] = {}
        self.faults_done: list[tuple[int, Fault]] = []
        self.on_connection: Callable[[WatchedConnection], None] = lambda _: None
        """Called before each message of a hand-over, in its thread."""
        self.bundles = 0
        self.closed = False
        self._all: list[FakeWorker] = []
        self._hubs: dict[int, LocalHub] = {}
        self._lock = threading.Lock()

    def hub(self, form: Form) -> LocalHub:
        with self._lock:
            if form.epoch not in self._hubs:
                self._hubs[form.epoch] = LocalHub(form.size, epoch=form.epoch, deadline_s=PATIENCE_S)
            return self._hubs[form.epoch]

    def at(self, bundle: int, operation: int, do: Fault) -> None:
        """Have the worker that is on a bundle now fail at an exchange, counted from here."""
        self.workers[bundle].at(operation, do)

    def controller_at(self, order: int, do: ControllerFault) -> None:
        """Have the controller fail at an order, counted from here, of any controller."""
        self._controller_faults += [None] * (order - 1 - len(self._controller_faults)) + [do]

    def controller_fault(self) -> ControllerFault | None:
        return self._controller_faults.pop(0) if self._controller_faults else None

    async def start_controller(self) -> FakeController:
        self.controllers_started += 1
        if self.refuse_controllers:
            raise WorkerDied(self.refuse_controllers.pop(0))
        self.controllers.append(FakeController(self))
        return self.controllers[-1]

    @property
    def survivors(self) -> frozenset[int]:
        return frozenset()

    async def keep_lease(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("it is never set")

    async def open(self, ranks: int | None) -> int:
        self._loop = asyncio.get_running_loop()
        await self.resize(ranks or 1)
        return self.bundles

    async def resize(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        if ranks > self.room:
            raise ClusterError(f"{ranks} ranks need {ranks} bundles, and there are {self.room}")
        self.bundles, self.dealt = ranks, list(group_of)

    async def start_worker(self, bundle: int) -> FakeWorker:
        assert bundle < self.bundles
        self.started += 1
        if self.refuse[bundle]:
            raise WorkerDied(self.refuse[bundle].pop(0))
        self.workers[bundle] = FakeWorker(self, bundle)
        self._all.append(self.workers[bundle])
        return self.workers[bundle]

    async def neighbours(self, bundle: int) -> int:
        return self.bundles

    def lose(self, reason: str) -> None:
        """End all workers, controllers and bundles at once."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._losses.put_nowait, reason)

    async def lost(self) -> str:
        reason = await self._losses.get()
        self.bundles = 0
        for worker in self.workers.values():
            worker._die(known=False)
        for controller in self.controllers:
            controller.kill()
        return reason

    async def reopen(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        assert self.bundles == 0
        if self.refuse_reopening:
            raise ClusterError(self.refuse_reopening.pop(0))
        self.reopened.append(ranks)
        await self.resize(ranks)

    async def close(self, *, leave_ranks: bool = False) -> None:
        """No thread is left, and so none that loads while the next test does."""
        self.closed = True
        for worker in self._all:
            worker.kill()
            worker.loop._thread.join(PATIENCE_S)
