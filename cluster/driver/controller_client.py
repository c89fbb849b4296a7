"""The driver's side of the controller: keeps one alive, tells it what the ranks measure, and takes its decisions to them.

Everything here runs in the supervisor's thread, beside it: nothing that requests wait for waits for this. Whatever happens to
a controller, the ranks keep the placement that they have, and another is hired:

    hire -> the group's survey, by a rank (``Attach``) -> windows, one order at a time -> lost -> hire again, later and later

What ranks measure is never queued without bound: while the controller is busy, windows of two numbers wait at most, and later
ones are dropped, on all ranks alike.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

import msgspec

from cluster.driver.backend import Backend, ControllerHandle, WorkerDied
from cluster.driver.loop_thread import Pulse
from cluster.driver.workers import LiveWorker
from cluster.errors import ClusterError
from cluster.messages.controller import (
    Attach,
    Explain,
    Explanation,
    Freeze,
    LoadReport,
    LoadReports,
    Order,
    Rebalance,
    Reply,
    decode_reply,
    encode,
)
from cluster.messages.placement import GetResidency, Residency, SetPlacement, WindowReport
from cluster.messages.rank import Command

logger = logging.getLogger("epslots.cluster")

ABSENT = "absent"
ANSWER_S = 60.0
"""In which a controller answers. Planning for a thousand ranks takes about one."""
_BACKOFF_S = 1.0  # before the second attempt; doubled each time
_MOST_BACKOFF_S = 30.0
_MOST_FAILURES = 3  # in a row, until whoever asks something is told that there is no controller
_MOST_WAITING = 2  # windows, by number


class RankCalls(Protocol):
    """The group, as far as it is needed here."""

    epoch: int
    formed: bool
    placement: bytes | None
    """What they begin with if all of them are replaced."""

    @property
    def members(self) -> list[LiveWorker]:
        """Its ranks, in order."""


@dataclass(frozen=True)
class ControllerStats:
    """The controller, as the driver knows it.

    Attributes:
        state: what it was about when it last answered: "waiting" for a group, "watching" windows, "moving" to a placement,
            "frozen"; "absent" while there is none.
        where: node and process; empty while there is none.
        placement: version of the newest placement.
        hired: how many there have been.
        windows_dropped: messages with windows that were given up by the driver, because the controller was busy or absent.
        refused: placements that a rank could not follow.
    """

    state: str
    where: str
    placement: int
    hired: int
    windows_dropped: int
    refused: int


@dataclass(eq=False)
class _Question:
    """An order that somebody waits for."""

    order: Order
    answer: asyncio.Future[Reply]


class ControllerClient:
    """Has a controller steer the ranks.

    Args:
        ranks: the group.
        send: sends a command to a rank, in the background and in order.

    Attributes:
        frozen: whether the controller is to publish nothing by itself.
    """

    def __init__(self, fleet: Backend, ranks: RankCalls, send: Callable[[Hashable, Command], None]) -> None:
        self._fleet, self._ranks, self._send = fleet, ranks, send
        self._pulse = Pulse()
        self._controller: ControllerHandle | None = None
        self._state = ABSENT
        self._newest = -1
        """Highest version of a placement that was seen. It outlives controllers, as the ranks' own do."""
        self._offered: SetPlacement | None = None
        """The last that the group's ranks were told."""
        self._hired = self._failures = 0
        self._told = -1
        """The group that the controller was told of."""
        self._questions: deque[_Question] = deque()
        self._waiting: dict[int, list[LoadReport]] = {}
        self._dropped = self._dropped_before = self._refused = 0
        self._surveys = 0
        self._surveyed: Residency | None = None
        self.frozen = False

    # What the supervisor tells, and asks. None of it waits.

    def begin(self) -> None:
        """The group stands, maybe with other ranks."""
        self._waiting.clear()
        self._offered = None
        self._pulse.beat()

    def hear(self, worker: LiveWorker, windowed: WindowReport) -> None:
        """A rank has told of a window."""
        ranks = self._ranks
        if windowed.group != ranks.epoch or not ranks.formed:
            return
        if self._controller is None or (windowed.number not in self._waiting and len(self._waiting) == _MOST_WAITING):
            self._dropped += 1
            return
        heard = self._waiting.setdefault(windowed.number, [])
        if len(heard) < len(ranks.members):
            heard.append(LoadReport(worker.rank, windowed.number, windowed.window))
        self._pulse.beat()

    def stand(self, surveyed: Residency) -> None:
        """A rank has told how things stand."""
        if surveyed.number == self._surveys:
            self._surveyed = surveyed
            self._pulse.beat()

    def refuse(self, worker: LiveWorker, cause: str) -> None:
        """A rank can't follow a placement."""
        self._refused += 1
        logger.warning("%s does not follow a placement: %s", worker.name, cause)
        # The controller believes that it is followed: it is told anew how things stand.
        self._offered, self._told = None, -1
        self._pulse.beat()

    def fail(self, error: ClusterError) -> None:
        """Whoever has asked something is told that there will be no answer."""
        questions, self._questions = self._questions, deque()
        for question in questions:
            if not question.answer.done():
                question.answer.set_exception(error)

    def stats(self) -> ControllerStats:
        """What is known of the controller now."""
        there = self._controller
        return ControllerStats(
            state=self._state,
            where="" if there is None else there.where,
            placement=self._newest,
            hired=self._hired,
            windows_dropped=self._dropped,
            refused=self._refused,
        )

    # What users ask.

    async def explain(self) -> Explanation:
        """Why the placement is what it is.

        Raises:
            ClusterError: there is no controller, and none could be had.
        """
        return _explanation(await self._ask(Explain()))

    async def rebalance(self) -> Explanation:
        """Plan now; returns what came of it, when the ranks were told.

        Raises:
            ClusterError: there is no controller, and none could be had.
        """
        return _explanation(await self._ask(Rebalance()))

    async def freeze(self, frozen: bool) -> None:
        """From the return on nothing is published unasked; or it is again. A controller that is hired later knows."""
        self.frozen = frozen
        if self._controller is not None:
            with suppress(ClusterError):
                await self._ask(Freeze(frozen))

    async def _ask(self, order: Order) -> Reply:
        question = _Question(order, asyncio.get_running_loop().create_future())
        self._questions.append(question)
        self._pulse.beat()
        try:
            return await question.answer
        finally:
            if question in self._questions:
                self._questions.remove(question)

    # The controller.

    async def keep_steered(self) -> None:
        """Have a controller, for ever."""
        while True:
            await self._pulse.until(lambda: self._ranks.formed)
            cause = await self._hire_and_serve()
            self._failures += 1
            self._controller, self._state, self._told = None, ABSENT, -1
            self._waiting.clear()
            if self._failures.bit_count() == 1:  # it may go on for days
                logger.warning(
                    "the controller: %s. The ranks keep their placement; another is hired (failures in a row: %d)",
                    cause,
                    self._failures,
                )
            if self._failures >= _MOST_FAILURES:
                self.fail(ClusterError(f"there is no controller, {self._failures} times in a row; the last time: {cause}"))
            if self._failures > 1:
                doublings = min(self._failures - 2, 10)
                await asyncio.sleep(min(_MOST_BACKOFF_S, _BACKOFF_S * 2**doublings))

    async def _hire_and_serve(self) -> str:
        """One controller, from its beginning to its end; returns why it ended. No error in here ends anything else."""
        handle = None
        try:
            handle = await self._fleet.hire_controller()
            self._hired += 1
            self._controller = handle
            await self._serve(handle)
        except (WorkerDied, ClusterError) as error:
            return str(error) if handle is None else f"{handle.where} is lost: {error}"
        except msgspec.MsgspecError as error:
            return f"what it answers can't be read: {error}"
        except Exception as error:
            logger.exception("a bug in the controller client")
            return f"a bug: {error!r}"
        finally:
            if handle is not None:
                handle.kill()

    async def _serve(self, handle: ControllerHandle) -> NoReturn:
        """Give a controller one order after the other."""
        while True:
            await self._pulse.until(lambda: self._ranks.formed and bool(self._must_meet() or self._questions or self._waiting))
            if self._must_meet():
                await self._meet(handle)
            elif self._questions:
                question = self._questions[0]
                reply = await self._call(handle, question.order)
                if question in self._questions:  # else nobody waits for it any more
                    self._questions.remove(question)
                    if not question.answer.done():  # given up, and about to say so
                        question.answer.set_result(reply)
            else:
                waiting, self._waiting = self._waiting, {}
                dropped, self._dropped_before = self._dropped - self._dropped_before, self._dropped
                windows = tuple(heard for windows in waiting.values() for heard in windows)
                reply = await self._call(handle, LoadReports(self._told, windows, dropped))
                if reply.windows:  # a complete one: it has planned, and lives
                    self._failures = 0

    def _must_meet(self) -> bool:
        return self._told != self._ranks.epoch

    async def _meet(self, handle: ControllerHandle) -> None:
        """Introduce the group: a rank is asked how things stand, because a placement may be carried over, or on its way."""
        epoch = self._ranks.epoch
        self._surveys += 1
        self._surveyed = None
        self._send(self._ranks.members[0], GetResidency(self._surveys))
        await self._pulse.until(lambda: self._surveyed is not None or self._ranks.epoch != epoch or not self._ranks.formed)
        surveyed = self._surveyed
        if surveyed is None or surveyed.group != self._ranks.epoch:
            return
        self._ranks.placement = surveyed.placement
        offered = None if self._offered is None else self._offered.placement
        await self._call(
            handle, Attach(survey=surveyed, offered=offered, published=self._newest, frozen=self.frozen), meets=epoch
        )

    async def _call(self, handle: ControllerHandle, order: Order, *, meets: int | None = None) -> Reply:
        """An order's answer; what it decides is taken to the ranks."""
        try:
            async with asyncio.timeout(ANSWER_S):
                reply = decode_reply(await handle.call(encode(order)))
        except TimeoutError:
            raise WorkerDied(f"it did not answer within {ANSWER_S:g} s") from None
        self._told = self._told if meets is None else meets
        self._state = str(reply.state)
        if reply.place is not None:
            self._relay(reply.place)
        self._newest = max(self._newest, reply.placement)
        return reply

    def _relay(self, place: SetPlacement) -> None:
        """Tell all ranks. One that has been lost meanwhile, or a group that breaks, is told of by the next survey."""
        if place.version <= self._newest:
            raise ClusterError(f"it published placement {place.version} after {self._newest}")
        if place.group != self._ranks.epoch or not self._ranks.formed:
            return
        logger.info("placement %d is published", place.version)
        self._offered = place
        self._ranks.placement = place.placement
        for worker in self._ranks.members:
            self._send(worker, place)


def _explanation(reply: Reply) -> Explanation:
    if reply.explanation is None:
        raise ClusterError("the controller did not explain itself")
    return reply.explanation
