"""The driver's side of the controller, without ranks: it is kept alive, told, and obeyed; and no rank waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest

from cluster.controller.controller import Controller, FindForecast
from cluster.driver import controller_client as client_module
from cluster.driver.backend import Backend, WorkerHandle
from cluster.driver.controller_client import ControllerClient
from cluster.driver.shared_controller import SharedController
from cluster.driver.workers import Worker
from cluster.errors import ClusterError
from cluster.messages.controller import Attach, ControllerState, Learn, Order, Rebalance, Reply
from cluster.messages.placement import GetGroupState, LoadReport, SetPlacement
from cluster.messages.rank import Command
from epslots.placement.placement import Placement, pack
from epslots.rank_groups import Role
from tests.support.clock_loop import ClockLoop
from tests.support.controller_helpers import Planner, controller, group_state_of, placement_of, window
from tests.support.fake_backend import ControllerFault, FakeBackend, FakeController

Run = Callable[[Coroutine[Any, Any, None]], None]


class FakeRankCalls:
    """A group of ranks that follow what they are told at once."""

    def __init__(self, count: int = 2) -> None:
        self.epoch = -1
        self.formed = False
        self.role: Role = "mixed"
        self.speeds: list[tuple[int, ...]] = []
        """Those that the controller has told."""
        self.members: list[Worker] = []
        self.followed: Placement = placement_of(count)
        self.answers = True
        """Whether they answer surveys."""
        self.sent: list[tuple[int, Command]] = []
        self.controller_client: ControllerClient = cast(ControllerClient, None)

    def form(self, count: int = 2) -> None:
        self.epoch, self.formed = self.epoch + 1, True
        self.members = [Worker(rank, cast(WorkerHandle, None), rank=rank) for rank in range(count)]
        if count != self.followed.ranks:
            self.followed = placement_of(count, self.followed.version + 1)
        self.controller_client.begin()

    def keep_placement(self, placement: bytes) -> None:
        pass

    def learn_speeds(self, speeds: Sequence[int]) -> None:
        self.speeds.append(tuple(speeds))

    def send(self, worker: Hashable, command: Command) -> None:
        assert isinstance(worker, Worker)
        self.sent.append((worker.rank, command))
        if isinstance(command, GetGroupState) and self.answers:
            surveyed = group_state_of(self.followed, epoch=self.epoch, number=command.number)
            asyncio.get_running_loop().call_soon(self.controller_client.take_group_state, surveyed)

    def tell(self, number: int, *, epoch: int | None = None) -> None:
        """A window of all ranks."""
        message = window(placement=self.followed.version)
        for worker in self.members:
            self.controller_client.take_report(
                LoadReport(self.epoch if epoch is None else epoch, worker.rank, number, message)
            )

    @property
    def places(self) -> list[tuple[int, int]]:
        """Ranks and versions of the placements that were sent."""
        return [(rank, command.version) for rank, command in self.sent if isinstance(command, SetPlacement)]


async def until(condition: Callable[[], Any]) -> None:
    """Let the others run until something holds."""
    while not condition():
        await asyncio.sleep(1e-4)  # not 0: only where nothing else is to be done is time skipped


async def pass_turns(count: int) -> None:
    """Let the others run so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def controlled(
    backend: FakeBackend | None = None, *, formed: bool = True
) -> AsyncIterator[tuple[ControllerClient, FakeRankCalls, FakeBackend]]:
    """A group with a controller client; nothing of it is left afterwards."""
    before = asyncio.all_tasks()
    backend = backend or FakeBackend(make_controller=lambda _: controller(Planner(moves=True)))
    ranks = FakeRankCalls()
    ranks.controller_client = controller_client = ControllerClient(
        partial(SharedController(cast(Backend, backend)).start, 0), ranks, ranks.send
    )
    task = asyncio.create_task(controller_client.keep_controller())
    try:
        if formed:
            ranks.form()
            await until(lambda: any(isinstance(order, Attach) for order in backend.orders))
        yield controller_client, ranks, backend
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.gather(*(asyncio.all_tasks() - before - {asyncio.current_task()}), return_exceptions=True)
    assert all(each.dead for each in backend.controllers)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a coroutine on a ``ClockLoop``, where another controller starts at once."""
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.0)

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=ClockLoop) as runner:
            runner.run(scenario)

    return run


def test_a_controller_is_started_when_a_group_has_formed(run: Run):
    async def scenario() -> None:
        async with controlled(formed=False) as (controller_client, ranks, backend):
            await asyncio.sleep(0)
            assert not backend.controllers
            assert controller_client.stats().state == "absent"
            ranks.form()
            await until(lambda: controller_client.stats().state == ControllerState.WATCHING)
            assert controller_client.stats().where == "node fake, controller 1"
            assert isinstance(backend.orders[0], Attach)

    run(scenario())


def test_what_is_decided_is_taken_to_all_ranks(run: Run):
    async def scenario() -> None:
        async with controlled() as (controller_client, ranks, _):
            ranks.tell(1)
            await until(lambda: ranks.places)
            assert ranks.places == [(0, 1), (1, 1)]
            assert controller_client.stats().placement == 1
            assert controller_client.stats().state == ControllerState.MOVING

    run(scenario())


def test_learned_speeds_reach_the_ranks_requests(run: Run):
    """Those of this epoch alone."""

    async def scenario() -> None:
        async with controlled(FakeBackend(make_controller=lambda _: controller(Planner()))) as (client, ranks, _):
            for rank, seconds in enumerate((0.05, 0.2)):
                one = window(compute_s=(seconds, 0.0, 0.0))
                client.take_report(LoadReport(ranks.epoch, rank, 1, one))
            await until(lambda: ranks.speeds[-1:] == [(1600, 400)])
            ranks.form()
            before = len(ranks.speeds)
            await until(lambda: len(ranks.speeds) > before)
            assert ranks.speeds[before:] == [(1000, 1000)]

    run(scenario())


@pytest.mark.parametrize("fault", ["crash", "hang", "garbage", "bug"])
@pytest.mark.parametrize("order", [1, 2])
def test_one_that_fails_is_replaced_and_versions_grow(
    run: Run, fault: ControllerFault, order: int, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        async with controlled() as (controller_client, ranks, backend):
            ranks.tell(1)
            await until(lambda: ranks.places)
            backend.controller_at(order, fault)
            number = 1
            while len(backend.controllers) == 1:  # the fault comes with one of the next windows
                number += 1
                ranks.tell(number)
                await asyncio.sleep(1e-4)
            await until(lambda: controller_client.stats().state == ControllerState.MOVING)
            met = [order for order in backend.orders if isinstance(order, Attach)][-1]
            assert met.published == 1
            assert met.offered is not None  # the ranks hadn't followed it
            controller_client.begin()  # as if another group had formed
            ranks.form(3)
            await until(lambda: backend.orders[-1] != met and isinstance(backend.orders[-1], Attach))
            ranks.tell(1)
            await until(lambda: len(ranks.places) == 5)
            assert ranks.places[2:] == [(0, 2), (1, 2), (2, 2)]
            assert controller_client.stats().started == 2

    with caplog.at_level(logging.WARNING, logger="epslots.cluster"):
        run(scenario())
    (record,) = [record for record in caplog.records if record.name == "epslots.cluster"]
    assert record.message.startswith("the controller: ")
    assert "another is started" in record.message


def test_starting_a_controller_is_tried_again_and_again(run: Run):
    async def scenario() -> None:
        backend = FakeBackend(make_controller=lambda _: controller(Planner()))
        backend.refuse_controllers = ["no room"] * 3
        async with controlled(backend, formed=False) as (controller_client, ranks, _):
            ranks.form()
            with pytest.raises(ClusterError, match="there is no controller, 3 times in a row; the last time: no room"):
                await controller_client.explain()
            assert (await controller_client.explain()).state is ControllerState.WATCHING
            assert controller_client.stats().started == 1

    run(scenario())


def test_a_planner_that_always_fails_is_tried_later_and_later(run: Run, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    sleep = asyncio.sleep

    async def count(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async def scenario() -> None:
        async with controlled() as (_, ranks, backend):
            monkeypatch.setattr(client_module.asyncio, "sleep", count)
            number = 0
            while len(backend.controllers) < 9:
                backend.controller_at(1, "bug")
                number += 1
                ranks.tell(number)
                await sleep(0.001)

    monkeypatch.setattr(client_module, "_BACKOFF_S", 1.0)
    run(scenario())
    waited = [seconds for seconds in slept if seconds]
    assert waited[:7] == [1, 2, 4, 8, 16, 30, 30]


class Gated(FakeController):
    """Answers when it is let."""

    gate: asyncio.Event

    async def call(self, message: bytes) -> bytes:
        await self.gate.wait()
        return await super().call(message)


class GatedBackend(FakeBackend):
    def __init__(self, make: Callable[[FindForecast], Controller]) -> None:
        super().__init__(make_controller=make)
        self.gate = asyncio.Event()
        self.gate.set()

    async def start_controller(self) -> FakeController:
        self.controllers_started += 1
        there = Gated(self)
        there.gate = self.gate
        self.controllers.append(there)
        return there


def test_while_it_is_busy_windows_are_dropped_on_all_ranks_alike(run: Run):
    async def scenario() -> None:
        backend = GatedBackend(lambda _: controller(Planner()))
        async with controlled(backend) as (controller_client, ranks, _):
            backend.gate.clear()
            ranks.tell(1)
            await until(lambda: not controller_client._waiting)  # the controller is at it
            for number in range(2, 50):
                ranks.tell(number)
            assert sorted(controller_client._waiting) == [2, 3]
            assert all(len(heard) == 2 for heard in controller_client._waiting.values())
            assert controller_client.stats().windows_dropped == 2 * 46
            ranks.tell(2)  # a rank that repeats itself takes no more room
            assert all(len(heard) == 2 for heard in controller_client._waiting.values())
            backend.gate.set()
            await until(lambda: len(backend.orders) == 3)
            last = backend.orders[-1]
            assert isinstance(last, Learn)
            assert [(heard.rank, heard.number) for heard in last.reports] == [(0, 2), (1, 2), (0, 3), (1, 3)]
            assert last.dropped == 92
            found = await controller_client.explain()
            assert (found.windows, found.incomplete, found.dropped) == (3, 0, 92)

    run(scenario())


@pytest.mark.parametrize("turns", range(6))
def test_an_answer_that_meets_the_end_does_not_prevent_it(run: Run, turns: int):
    async def scenario() -> None:
        backend = GatedBackend(lambda _: controller(Planner()))
        async with controlled(backend) as (controller_client, ranks, _):
            backend.gate.clear()
            ranks.tell(1)
            await until(lambda: not controller_client._waiting)
            (client_task,) = [each for each in asyncio.all_tasks() if "keep_controller" in repr(each.get_coro())]
            backend.gate.set()
            await pass_turns(turns)
            client_task.cancel()
            await pass_turns(50)
            ended = client_task.done()
            while not client_task.done():  # or nothing of this would
                client_task.cancel()
                await asyncio.sleep(0)
            assert ended
            raise asyncio.CancelledError  # leaves without a look at a task that was to live

    with pytest.raises(asyncio.CancelledError):
        run(scenario())


def test_without_a_controller_windows_are_dropped(run: Run):
    async def scenario() -> None:
        async with controlled(formed=False) as (controller_client, ranks, backend):
            backend.refuse_controllers = ["no"] * 100_000
            ranks.form()
            await until(lambda: backend.controllers_started > 2000)
            for number in range(1, 20):
                ranks.tell(number)
            assert not controller_client._waiting
            assert controller_client.stats().windows_dropped == 38

    run(scenario())


def test_what_comes_too_late_for_a_group_does_not_reach_the_next(run: Run):
    async def scenario() -> None:
        backend = GatedBackend(lambda _: controller(Planner(moves=True)))
        async with controlled(backend) as (controller_client, ranks, _):
            backend.gate.clear()
            ranks.tell(1)
            await until(lambda: not controller_client._waiting)
            ranks.formed = False
            ranks.form(3)
            ranks.tell(5, epoch=0)  # from a rank that is late
            assert not controller_client._waiting
            backend.gate.set()
            await until(lambda: sum(isinstance(order, Attach) for order in backend.orders) == 2)
            assert not ranks.places
            met = backend.orders[-1]
            assert isinstance(met, Attach)
            assert met.published == 1  # no rank follows it, and its number is never used again
            ranks.tell(1)
            await until(lambda: ranks.places)
            assert ranks.places == [(0, 2), (1, 2), (2, 2)]

    run(scenario())


def test_a_group_that_breaks_before_it_has_said_how_things_stand(run: Run):
    async def scenario() -> None:
        async with controlled(formed=False) as (controller_client, ranks, backend):
            ranks.answers = False
            ranks.form()
            await until(lambda: ranks.sent)
            ranks.formed = False
            ranks.form(3)
            await until(lambda: len(ranks.sent) == 2)
            controller_client.take_group_state(
                group_state_of(placement_of(2), epoch=1, number=1)
            )  # late: an answer to the first
            await pass_turns(10)
            assert not backend.orders
            ranks.answers = True
            controller_client.take_group_state(group_state_of(ranks.followed, epoch=1, number=2))
            await until(lambda: backend.orders)
            met = backend.orders[0]
            assert isinstance(met, Attach)
            assert met.group.epoch == 1
            assert len(met.group.nodes) == 3
            assert (await controller_client.explain()).epoch == 1
            assert len(backend.controllers) == 1

    run(scenario())


def test_frozen_is_kept_across_controllers(run: Run):
    async def scenario() -> None:
        async with controlled() as (controller_client, ranks, backend):
            await controller_client.freeze(True)
            for number in range(1, 4):
                ranks.tell(number)
                await until(lambda: not controller_client._waiting)
            backend.controllers[0].kill()
            ranks.tell(4)
            await until(lambda: len(backend.controllers) == 2 and controller_client.stats().state == ControllerState.FROZEN)
            heard = len(backend.orders)
            ranks.tell(5)
            await until(lambda: len(backend.orders) > heard)
            found = await controller_client.rebalance()
            assert found.placement == 1
            assert ranks.places == [(0, 1), (1, 1)]
            await controller_client.freeze(False)
            assert controller_client.stats().state == ControllerState.MOVING

    run(scenario())


def test_frozen_without_a_controller_is_no_waiting(run: Run):
    async def scenario() -> None:
        async with controlled(formed=False) as (controller_client, ranks, backend):
            await controller_client.freeze(True)
            ranks.form()
            await until(lambda: controller_client.stats().state == ControllerState.FROZEN)
            assert len(backend.orders) == 1

    run(scenario())


def test_what_was_asked_is_answered_by_the_next_controller(run: Run):
    async def scenario() -> None:
        async with controlled() as (controller_client, _, backend):
            backend.controller_at(1, "crash")
            assert (await controller_client.explain()).epoch == 0
            assert len(backend.controllers) == 2

    run(scenario())


def test_an_order_is_given_once(run: Run):
    async def scenario() -> None:
        async with controlled() as (controller_client, _, backend):
            await controller_client.rebalance()
            await controller_client.explain()
            assert sum(isinstance(order, Rebalance) for order in backend.orders) == 1

    run(scenario())


@pytest.mark.parametrize("turns", range(8))
def test_giving_up_as_the_answer_comes_costs_no_controller(run: Run, turns: int):
    async def scenario() -> None:
        backend = GatedBackend(lambda _: controller(Planner()))
        async with controlled(backend) as (controller_client, _, _2):
            backend.gate.clear()
            asking = asyncio.create_task(controller_client.explain())
            await pass_turns(5)
            backend.gate.set()
            await pass_turns(turns)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert (await controller_client.explain()).epoch == 0
            assert len(backend.controllers) == 1

    run(scenario())


def test_an_order_that_nobody_waits_for_any_more_is_forgotten(run: Run):
    async def scenario() -> None:
        backend = GatedBackend(lambda _: controller(Planner()))
        async with controlled(backend) as (controller_client, _, _2):
            backend.gate.clear()
            asking = asyncio.create_task(controller_client.rebalance())
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            backend.gate.set()
            assert (await controller_client.explain()).epoch == 0
            assert sum(isinstance(order, Rebalance) for order in backend.orders) <= 1

    run(scenario())


class Backwards(Controller):
    """Publishes an old version."""

    def answer(self, order: Order) -> Reply:
        reply = super().answer(order)
        if isinstance(order, Learn):
            place = SetPlacement(epoch=0, version=0, placement=pack(placement_of(2)), bytes_per_step=1)
            return Reply(reply.state, reply.version, reply.windows, place)
        return reply


def test_a_version_that_goes_back_is_not_taken_to_the_ranks(run: Run):
    async def scenario() -> None:
        backend = FakeBackend(make_controller=lambda _: Backwards(lambda: 0.0))
        async with controlled(backend) as (_, ranks, _2):
            ranks.tell(1)
            await until(lambda: len(backend.controllers) == 2)
            assert not ranks.places

    run(scenario())


def test_when_nothing_can_be_served_whoever_asks_is_told(run: Run):
    async def scenario() -> None:
        async with controlled(formed=False) as (controller_client, _, _2):
            asking = asyncio.create_task(controller_client.explain())
            await asyncio.sleep(0)
            controller_client.fail(ClusterError("all ranks are lost"))
            with pytest.raises(ClusterError, match="all ranks are lost"):
                await asking

    run(scenario())


def test_what_a_rank_can_not_follow_is_told(run: Run, caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        async with controlled() as (controller_client, ranks, _):
            worker = ranks.members[1]
            worker.handle = cast(WorkerHandle, FakeController(FakeBackend()))
            controller_client.take_rejection(worker, "it is for 3 ranks")
            assert controller_client.stats().placements_rejected == 1

    run(scenario())
    assert "rank 1 (node fake, controller 0) does not follow a placement: it is for 3 ranks" in caplog.text
