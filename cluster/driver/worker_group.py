"""The ranks that are one model now: a process group of their own, which is formed anew whenever somebody is lost or comes.

    whenever a member is lost or says that the group is broken, or somebody is ready:
    roll call -> next epoch, of all who answered -> Form to each -> each publishes a Contact, which all get -> all say
    Formed -> requests flow again

There is one way to change the group, whatever the reason. Ranks that are told to form the next epoch leave the last one
at once; the step that breaks is made again afterwards, and their requests stay where they are.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from cluster.driver.backend import Backend, WorkerDied
from cluster.driver.loop_thread import Pulse
from cluster.driver.request_router import RequestRouter
from cluster.driver.retries import Pace, Retries
from cluster.driver.scheduler import RankLoad
from cluster.driver.workers import Deadlines, LiveWorker, WorkerState
from cluster.errors import ClusterError
from cluster.messages.rank import Command, Contact, Contacts, Form, Ping, decode_answer, encode
from epslots.loading import LOAD_DEADLINE_S
from epslots.placement.placement import unpack
from epslots.planner.cost_model import Costs

logger = logging.getLogger("epslots.cluster")

MOST_FAILURES = 5  # in a row
_SECOND_LOOK_S = 0.1
_PACE = Pace(first_s=0.2, most_s=5.0)
_SECRET_BYTES = 16
_TOGETHER_S = 0.01  # how long a rank's contact waits for others': R messages are sent in place of R x R


class GroupCallbacks(Protocol):
    """Whoever has the workers."""

    failure: ClusterError | None

    def send(self, worker: Hashable, command: Command) -> None:
        """Send a command in the background, in order."""

    def lose(self, worker: LiveWorker, cause: WorkerDied | ClusterError) -> None:
        """Give a worker up."""

    def give_up(self, error: ClusterError) -> None:
        """Nothing can be served any more."""

    def stands(self) -> None:
        """The group has formed."""


class WorkerGroup:
    """Keeps the group formed. Of the supervisor's thread.

    Args:
        workers: all that there are, by seat; changed by the crew.
        placement: what the first group begins with.

    Attributes:
        placement: what ranks begin with that have all just started; ranks that have served carry theirs over themselves.
        epoch: number of the group; -1 before the first.
        formed: whether it stands.
        serving: how many ranks do; for any thread.
        stood: whether a group has ever formed.
        least: how many ranks must be there before a group is formed.
        breaks: groups in a row that broke without a token, and without a rank lost; set to 0 when either comes.
    """

    def __init__(
        self,
        crew: GroupCallbacks,
        workers: Mapping[int, LiveWorker],
        fleet: Backend,
        dispatcher: RequestRouter,
        *,
        kv_tokens: int,
        costs: Costs | None,
        deadlines: Deadlines,
        pulse: Pulse,
        placement: bytes | None,
    ) -> None:
        self._crew, self._workers, self._fleet, self._dispatcher = crew, workers, fleet, dispatcher
        self._kv_tokens, self._costs, self._deadlines, self._pulse = kv_tokens, costs, deadlines, pulse
        self.placement = placement
        self.epoch = -1
        self.formed = False
        self.stood = False
        self.serving = 0
        self.least = 1
        self.breaks = 0
        self._broken_by: str | None = None
        """What broke the group, since it last began to form; and whether it had formed."""
        self._broken_in_step = False
        self._contacts: dict[str, bytes] = {}
        """Published in this epoch, and not yet passed on."""

    @property
    def members(self) -> list[LiveWorker]:
        """The ranks of the current epoch, in order."""
        members = [worker for worker in self._workers.values() if worker.state is WorkerState.MEMBER]
        return sorted(members, key=lambda worker: worker.rank)

    def break_up(self, cause: str, *, stood: bool = False) -> None:
        """The group is broken, or can't form. ``stood``: in a step."""
        self.serving = len(self.members)
        self.formed = False
        if self._broken_by is None:
            self._broken_by = cause
            self._broken_in_step = stood
            self.breaks += stood
        self._dispatcher.pause()
        self._pulse.beat()

    def _candidates(self) -> list[LiveWorker]:
        """Who could be in the next epoch: those of this one first."""
        return self.members + [worker for worker in self._workers.values() if worker.state is WorkerState.READY]

    def _should_form(self) -> bool:
        candidates = self._candidates()
        if self.formed and len(candidates) == len(self.members):
            return False
        return len(candidates) >= self.least

    async def keep_formed(self) -> None:
        """Form a group whenever the last is broken or somebody is ready.

        At the start, ranks that can't form one end it. Later the reason may pass, as a full disk does or a network's trouble.
        """
        retries = Retries(_PACE, self._deadlines.give_up_s)
        while self._crew.failure is None:
            await self._pulse.until(self._should_form)
            if self.breaks > 1:
                logger.warning("the group broke %d times without a token; the last time: %s", self.breaks, self._broken_by)
            if self.breaks >= MOST_FAILURES:
                self._crew.give_up(ClusterError(f"the group broke {self.breaks} times without a token: {self._broken_by}"))
                return
            await self.roll_call(self._candidates(), self._deadlines.roll_call_s)
            if not self._should_form():
                continue
            cause = await self._form()
            if cause is None:
                retries.reset()
                continue
            verdict = retries.failed(time.monotonic())
            if verdict.give_up or (retries.failures == MOST_FAILURES and not self.stood):
                places = ", ".join(sorted(worker.handle.where for worker in self._candidates()))
                self._crew.give_up(
                    ClusterError(
                        f"the ranks could not form a group, {retries.failures} times in a row; the last time: {cause}. They "
                        f"must reach each other over TCP, on any port: see firewalls and addresses of {places or 'all nodes'}"
                    )
                )
            elif self.stood:
                if verdict.tell and retries.failures > 1:
                    logger.warning("the ranks can't form a group (failures in a row: %d): %s", retries.failures, cause)
                await asyncio.sleep(verdict.wait_s)

    async def _form(self) -> str | None:
        """Form the next epoch, of all candidates; returns what went wrong, if anything did."""
        logger.debug("forming epoch %d after: %s", self.epoch + 1, self._broken_by)
        members = self._candidates()
        self.epoch += 1
        self.formed, self._broken_by, self._broken_in_step = False, None, False
        self._dispatcher.begin(self.epoch)
        self._contacts = {}
        epoch, deadlines, secret = self.epoch, self._deadlines, secrets.token_bytes(_SECRET_BYTES)
        fresh = all(worker.state is WorkerState.READY for worker in members)
        placement = self._first_placement(len(members)) if fresh or not self.stood else None
        for rank, worker in enumerate(members):
            worker.rank, worker.state = rank, WorkerState.MEMBER
            form = Form(
                epoch=epoch,
                rank=rank,
                size=len(members),
                secret=secret,
                form_s=deadlines.form_s,
                deadline_s=deadlines.operation_s,
                fresh=fresh,
                costs=self._costs,
                placement=placement,
            )
            self._crew.send(worker, form)
        in_time = await self._pulse.until(
            lambda: self._broken_by is not None or all(worker.formed == epoch for worker in members),
            LOAD_DEADLINE_S if fresh else 3 * deadlines.form_s + deadlines.operation_s,
        )
        if not in_time:
            for worker in members:
                if worker.formed != epoch:
                    self._crew.lose(worker, WorkerDied("it neither joined the group nor said why"))
        if self._broken_by is not None:
            if self._broken_in_step:
                return None  # it had formed, and broke for another reason
            self._drop_newcomers(members, self._broken_by)
            if self.stood:
                self.placement = None  # it may be the reason; it is only a hint
            return self._broken_by
        self.formed = self.stood = True
        self.serving = len(members)
        logger.info("epoch %d: %d ranks serve", epoch, len(members))
        rooms: dict[Hashable, RankLoad] = {
            w: RankLoad(self._kv_tokens, w.loaded.batches) for w in members if w.loaded is not None
        }
        self._dispatcher.serve(rooms)
        self._crew.stands()
        self._pulse.beat()
        return None

    def _first_placement(self, ranks: int) -> bytes | None:
        """What these ranks begin with; None for experts as they are dealt.

        If all ranks are replaced at once, that is the placement that the last group followed, where it is for as many.
        """
        if self.placement is None or (self.stood and unpack(self.placement).ranks != ranks):
            return None
        return self.placement

    def pass_on(self, contact: Contact) -> None:
        """A rank has published where it listens: all ranks of its epoch get to know it."""
        if contact.epoch != self.epoch:
            return
        if not self._contacts:
            asyncio.get_running_loop().call_later(_TOGETHER_S, self._send_contacts)
        self._contacts[contact.key] = contact.value

    def _send_contacts(self) -> None:
        contacts, self._contacts = self._contacts, {}
        for worker in self.members if contacts else ():
            self._crew.send(worker, Contacts(self.epoch, contacts))

    def _drop_newcomers(self, members: Sequence[LiveWorker], cause: str) -> None:
        """A group didn't form though nobody is lost: if some of it stood together before, the others are the likely reason."""
        newcomers = [worker for worker in members if worker.formed < 0]
        if len(newcomers) < len(members) and all(worker.state is WorkerState.MEMBER for worker in members):
            for worker in newcomers:
                self._crew.lose(worker, WorkerDied(f"the group could not form with it: {cause}"))

    async def roll_call(self, workers: Sequence[LiveWorker], deadline_s: float) -> None:
        """Ask for a sign of life, and lose those that don't give it."""

        async def ask(worker: LiveWorker) -> None:
            asking = asyncio.ensure_future(worker.handle.command(encode(Ping())))
            try:
                await asyncio.wait({asking}, timeout=deadline_s)
                if not asking.done():  # maybe this process stood still, and the answer waits here
                    await asyncio.wait({asking}, timeout=_SECOND_LOOK_S)
                if not asking.done():
                    raise WorkerDied(f"it did not answer within {deadline_s:g} s")
                if not decode_answer(asking.result()).going:  # why, it is about to say
                    await self._pulse.until(lambda: worker.state is WorkerState.LOST, deadline_s)
                    raise WorkerDied("it has ended its work")
            except WorkerDied as error:
                self._crew.lose(worker, error)
            finally:
                asking.cancel()

        await asyncio.gather(*map(ask, workers))
