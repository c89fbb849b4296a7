"""``ControllerClient``: the driver's side of the controller, for one group. Keeps one alive, and carries its messages.

It runs in the supervisor's thread, and no request waits for it. While there is no controller, the ranks keep their placement:

    start a controller -> the group's state, from a rank -> ``Attach`` -> load reports, one order at a time -> lost -> start
    another, with growing pauses

Load reports are never queued without bound: while the controller is busy, those of at most two windows wait, and later windows
are dropped, on all ranks alike.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

import msgspec

from cluster.driver.backend import ControllerHandle, WorkerDied
from cluster.driver.loop_thread import Notifier
from cluster.driver.workers import Worker
from cluster.errors import ClusterError
from cluster.messages.controller import (
    Attach,
    Explain,
    Explanation,
    Freeze,
    Learn,
    Order,
    Rebalance,
    Reply,
    decode_reply,
    encode,
)
from cluster.messages.placement import GetGroupState, GroupState, LoadReport, PlacementRejected, SetPlacement
from cluster.messages.rank import Command
from epslots.rank_groups import Role

logger = logging.getLogger("epslots.cluster")

ABSENT = "absent"
ANSWER_S = 60.0
"""Deadline of a reply. Planning for a thousand ranks takes about one second."""
_BACKOFF_S = 1.0  # before the second attempt; doubled each time
_MOST_BACKOFF_S = 30.0
_MOST_FAILURES = 3  # in a row, until callers get an error instead of a wait
_MOST_WAITING = 2  # windows


class Ranks(Protocol):
    """The group, as far as the controller client uses it."""

    epoch: int
    formed: bool
    role: Role

    @property
    def members(self) -> list[Worker]:
        """Its ranks, in order."""

    def keep_placement(self, placement: bytes) -> None:
        """Begin with this placement if all ranks are replaced at once."""

    def learn_speeds(self, speeds: Sequence[int]) -> None:
        """Give the ranks requests by these speeds, in the order of their numbers; 1000 = usual."""


@dataclass(frozen=True)
class ControllerStats:
    """The controller, as the driver knows it.

    Attributes:
        state: in its last reply: "waiting" for a group, "watching" the load, "moving" to a placement, or "frozen"; "absent"
            while there is no controller.
        where: node and process; empty while there is no controller.
        placement: version of the newest placement.
        started: number of controllers that were started so far.
        windows_dropped: load reports that the driver dropped, because the controller was busy or absent.
        placements_rejected: placements that a rank rejected.
    """

    state: str
    where: str
    placement: int
    started: int
    windows_dropped: int
    placements_rejected: int


@dataclass(eq=False)
class _OpenOrder:
    """An order whose reply a caller waits for."""

    order: Order
    answer: asyncio.Future[Reply]


class ControllerClient:
    """Keeps a controller that plans the ranks' placement.

    Args:
        start: starts the controller, or finds it.
        ranks: the group.
        send: sends a command to a rank, in the background and in order.
        frozen: the controller is to publish nothing unasked; also an attribute.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[ControllerHandle]],
        ranks: Ranks,
        send: Callable[[Hashable, Command], None],
        *,
        frozen: bool = False,
    ) -> None:
        self._start, self._ranks, self._send = start, ranks, send
        self._changes = Notifier()
        self._controller: ControllerHandle | None = None
        self._state = ABSENT
        self._newest = -1
        """Highest version of a placement that was seen. It outlives controllers, as the ranks' placement does."""
        self._offered: SetPlacement | None = None
        """The last placement that was sent to the group's ranks."""
        self._started = self._failures = 0
        self._attached = -1
        """Epoch of the group that the controller serves."""
        self._orders: deque[_OpenOrder] = deque()
        self._waiting: dict[int, list[LoadReport]] = {}
        """Load reports for the controller, by the window's number."""
        self._dropped = self._dropped_before = self._rejected = 0
        self._states_asked = 0
        self._group_state: GroupState | None = None
        """The answer to the last ``GetGroupState``, once it is there."""
        self.frozen = frozen

    # Calls of the supervisor. None of them waits.

    def begin(self) -> None:
        """The group has formed, maybe with other ranks."""
        self._waiting.clear()
        self._offered = None
        self._changes.notify()

    def take(self, worker: Worker, event: LoadReport | GroupState | PlacementRejected) -> None:
        """Take a rank's event."""
        match event:
            case LoadReport():
                self.take_report(event)
            case GroupState():
                self.take_group_state(event)
            case PlacementRejected(cause):
                self.take_rejection(worker, cause)

    def take_report(self, report: LoadReport) -> None:
        """Queue a rank's load report for the controller, or drop it."""
        if report.epoch != self._ranks.epoch or not self._ranks.formed:
            return
        if self._controller is None or (report.number not in self._waiting and len(self._waiting) == _MOST_WAITING):
            self._dropped += 1
            return
        reports = self._waiting.setdefault(report.number, [])
        if len(reports) < len(self._ranks.members):
            reports.append(report)
        self._changes.notify()

    def take_group_state(self, state: GroupState) -> None:
        """Take a rank's answer to the last ``GetGroupState``."""
        if state.number == self._states_asked:
            self._group_state = state
            self._changes.notify()

    def take_rejection(self, worker: Worker, cause: str) -> None:
        """Attach the group anew after a rank's rejection: the controller believes that its placement is followed."""
        self._rejected += 1
        logger.warning("%s does not follow a placement: %s", worker.name, cause)
        self._offered, self._attached = None, -1
        self._changes.notify()

    def fail(self, error: ClusterError) -> None:
        """Raise an error in all calls that wait for a reply."""
        orders, self._orders = self._orders, deque()
        for asked in orders:
            if not asked.answer.done():
                asked.answer.set_exception(error)

    def stats(self) -> ControllerStats:
        """The present state and counters."""
        return ControllerStats(
            state=self._state,
            where="" if self._controller is None else self._controller.where,
            placement=self._newest,
            started=self._started,
            windows_dropped=self._dropped,
            placements_rejected=self._rejected,
        )

    # Calls of users.

    async def explain(self) -> Explanation:
        """The controller's explanation of the present placement.

        Raises:
            ClusterError: there is no controller, and none could be started.
        """
        return _explanation(await self._ask(Explain()))

    async def rebalance(self) -> Explanation:
        """Plan now; returns the explanation when the ranks were sent the placement, if there is a better one.

        Raises:
            ClusterError: there is no controller, and none could be started.
        """
        return _explanation(await self._ask(Rebalance()))

    async def freeze(self, frozen: bool) -> None:
        """Have this and later controllers publish nothing unasked from the return on, or allow it again."""
        self.frozen = frozen
        if self._controller is not None:
            with suppress(ClusterError):
                await self._ask(Freeze(frozen))

    async def _ask(self, order: Order) -> Reply:
        asked = _OpenOrder(order, asyncio.get_running_loop().create_future())
        self._orders.append(asked)
        self._changes.notify()
        try:
            return await asked.answer
        finally:
            if asked in self._orders:
                self._orders.remove(asked)

    # The controller.

    async def keep_controller(self) -> None:
        """Start a controller, and another one whenever it is lost; never returns."""
        while True:
            await self._changes.wait_for(lambda: self._ranks.formed)
            cause = await self._start_and_serve()
            self._failures += 1
            self._controller, self._state, self._attached = None, ABSENT, -1
            self._waiting.clear()
            if self._failures.bit_count() == 1:  # it may go on for days
                logger.warning(
                    "the controller: %s. The ranks keep their placement; another is started (failures in a row: %d)",
                    cause,
                    self._failures,
                )
            if self._failures >= _MOST_FAILURES:
                self.fail(ClusterError(f"there is no controller, {self._failures} times in a row; the last time: {cause}"))
            if self._failures > 1:
                doublings = min(self._failures - 2, 10)
                await asyncio.sleep(min(_MOST_BACKOFF_S, _BACKOFF_S * 2**doublings))

    async def _start_and_serve(self) -> str:
        """Run one controller from its start to its end; returns the reason of its end. No error leaves this."""
        handle = None
        try:
            handle = await self._start()
            self._started += 1
            self._controller = handle
            await self._serve(handle)
        except (WorkerDied, ClusterError) as error:
            return str(error) if handle is None else f"{handle.where} is lost: {error}"
        except msgspec.MsgspecError as error:
            return f"its reply can't be read: {error}"
        except Exception as error:
            logger.exception("a bug in the controller client")
            return f"a bug: {error!r}"
        finally:
            if handle is not None:
                handle.kill()

    async def _serve(self, handle: ControllerHandle) -> NoReturn:
        """Send a controller one order after the other: first ``Attach``, then users' orders, then load reports."""
        while True:
            await self._changes.wait_for(
                lambda: self._ranks.formed and bool(self._must_attach() or self._orders or self._waiting)
            )
            if self._must_attach():
                await self._attach(handle)
            elif self._orders:
                await self._answer(handle, self._orders[0])
            else:
                await self._send_reports(handle)

    def _must_attach(self) -> bool:
        return self._attached != self._ranks.epoch

    async def _attach(self, handle: ControllerHandle) -> None:
        """Attach the group, with its state from one of its ranks: a placement may be carried over, or on its way."""
        epoch = self._ranks.epoch
        self._states_asked += 1
        self._group_state = None
        self._send(self._ranks.members[0], GetGroupState(self._states_asked))
        await self._changes.wait_for(
            lambda: self._group_state is not None or self._ranks.epoch != epoch or not self._ranks.formed
        )
        state = self._group_state
        if state is None or state.epoch != self._ranks.epoch:
            return
        self._ranks.keep_placement(state.placement)
        offered = None if self._offered is None else self._offered.placement
        order = Attach(group=state, offered=offered, published=self._newest, frozen=self.frozen, role=self._ranks.role)
        await self._call(handle, order, attaches=epoch)

    async def _answer(self, handle: ControllerHandle, asked: _OpenOrder) -> None:
        reply = await self._call(handle, asked.order)
        if asked in self._orders:  # else its caller gave up
            self._orders.remove(asked)
            if not asked.answer.done():  # its caller is giving up just now
                asked.answer.set_result(reply)

    async def _send_reports(self, handle: ControllerHandle) -> None:
        waiting, self._waiting = self._waiting, {}
        dropped, self._dropped_before = self._dropped - self._dropped_before, self._dropped
        reply = await self._call(handle, Learn(tuple(report for reports in waiting.values() for report in reports), dropped))
        if reply.windows:  # the controller has learned from a complete window, and lives
            self._failures = 0

    async def _call(self, handle: ControllerHandle, order: Order, *, attaches: int | None = None) -> Reply:
        """The reply to an order; its placement is sent to the ranks. ``attaches``: the epoch that ``Attach`` is about."""
        try:
            async with asyncio.timeout(ANSWER_S):
                reply = decode_reply(await handle.call(encode(order)))
        except TimeoutError:
            raise WorkerDied(f"it did not answer within {ANSWER_S:g} s") from None
        self._attached = self._attached if attaches is None else attaches
        self._state = str(reply.state)
        if reply.set_placement is not None:
            self._publish(reply.set_placement)
        self._newest = max(self._newest, reply.version)
        if reply.speeds and self._attached == self._ranks.epoch and self._ranks.formed:
            self._ranks.learn_speeds(reply.speeds)
        return reply

    def _publish(self, place: SetPlacement) -> None:
        """Send a placement to all ranks. If one is lost meanwhile, or the group breaks, the next ``Attach`` has its state."""
        if place.version <= self._newest:
            raise ClusterError(f"it published placement {place.version} after {self._newest}")
        if place.epoch != self._ranks.epoch or not self._ranks.formed:
            return
        logger.info("placement %d is published", place.version)
        self._offered = place
        self._ranks.keep_placement(place.placement)
        for worker in self._ranks.members:
            self._send(worker, place)


def _explanation(reply: Reply) -> Explanation:
    if reply.explanation is None:
        raise ClusterError("the controller's reply has no explanation")
    return reply.explanation
