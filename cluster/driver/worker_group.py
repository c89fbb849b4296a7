"""``WorkerGroup``: ranks that are one model now. A new epoch of the group forms whenever a rank is lost or ready.

    health check -> next epoch, of all workers that answered -> Form to each -> each publishes a Contact, which all get ->
    all report Formed -> requests flow again

The group changes only in this way, for any reason. Ranks that get the next ``Form`` leave the last epoch at once; they
repeat the interrupted step afterwards, and keep their requests.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Hashable, Sequence

from cluster.driver.backend import WorkerDied
from cluster.driver.epochs import Epochs
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.request_router import GroupRouter
from cluster.driver.retries import Pace, Retries
from cluster.driver.workers import Deadlines, GroupWorkers, Worker, WorkerState
from cluster.errors import ClusterError
from cluster.messages.rank import Contact, Contacts, Form
from epslots.config import LOAD_DEADLINE_S
from epslots.placement.placement import unpack
from epslots.planner.cost_model import Costs
from epslots.rank_groups import Role

logger = logging.getLogger("epslots.cluster")

MOST_FAILURES = 5  # in a row
_PACE = Pace(first_s=0.2, most_s=5.0)
_SECRET_BYTES = 16
_TOGETHER_S = 0.01  # a rank's contact waits this long for the others': R messages are sent in place of R x R


class WorkerGroup:
    """Keeps the group formed. For the supervisor's thread.

    Args:
        workers: of this group.
        router: the requests' way to them; paused while the group is broken.
        epochs: numbers of groups, of all of the cluster.
        role: what its ranks serve.
        kv_tokens: tokens that each rank's cache holds; None = as many as one request may have there.
        costs: the costs to plan with; None = measured ones.
        placement: of the first group (``placement.pack``); None = the default one.
        on_formed: called when a group has formed.

    Attributes:
        epoch: number of the group; -1 before the first.
        formed: the group is formed now.
        stood: some group has been formed before.
        serving: number of ranks that serve; any thread may read it.
        role: as given.
        placement: the placement of a group whose ranks have all just started; other ranks carry theirs over.
    """

    def __init__(
        self,
        workers: GroupWorkers,
        router: GroupRouter,
        *,
        epochs: Epochs,
        role: Role,
        kv_tokens: int | None,
        costs: Costs | None,
        deadlines: Deadlines,
        placement: bytes | None,
        on_formed: Callable[[], None],
    ) -> None:
        self._workers, self.router, self._epochs, self._on_formed = workers, router, epochs, on_formed
        self._kv_tokens, self._costs, self._deadlines = kv_tokens, costs, deadlines
        self.placement, self.role = placement, role
        self.epoch = -1
        self.formed = False
        self.stood = False
        self.serving = 0
        self._required = 1
        self._stopped = False
        self._breaks = 0
        """Breaks in a row without a token, and without a lost rank as the reason."""
        self._broken_by: str | None = None
        """Why the group broke, since it last began to form; and whether that was in a step."""
        self._broken_in_step = False
        self._speeds: list[float] = []
        """Of the members, as far as they were learned in this epoch."""
        self._contacts: dict[str, bytes] = {}
        """Published in this epoch, and not yet passed on."""

    @property
    def members(self) -> list[Worker]:
        """The ranks of the current epoch, in order."""
        return self._workers.members

    # Reports of the supervisor and the pool.

    def require(self, ranks: int, *, at_most: bool = False) -> None:
        """Form no group of fewer ranks; ``at_most``: but don't raise the present number."""
        self._required = min(self._required, ranks) if at_most else ranks

    def forget_breaks(self) -> None:
        """Count breaks from 0 again, because the ranks get on."""
        self._breaks = 0

    def break_up(self, cause: str, *, in_step: bool = False) -> None:
        """The group is broken, or can't form."""
        self.serving = len(self.members)
        self.formed = False
        if self._broken_by is None:
            self._broken_by = cause
            self._broken_in_step = in_step
            self._breaks += in_step
        self.router.pause()
        self._workers.changes.notify()

    def lose_member(self, cause: str) -> None:
        """A member is lost: the group is broken, for a known reason."""
        self._breaks = 0
        self.break_up(cause)

    def follow(self, epoch: int, *, grouped: bool) -> None:
        """Go on after the epochs of a rank that was adopted.

        Args:
            epoch: the newest that it knows of.
            grouped: it has been in a group, and brings that one's placement.
        """
        self._epochs.follow(epoch)
        self.epoch = max(self.epoch, epoch)
        self.stood |= grouped

    def keep_placement(self, placement: bytes) -> None:
        """Begin with this placement if all ranks are replaced at once."""
        self.placement = placement

    def learn_speeds(self, speeds: Sequence[int]) -> None:
        """Give the ranks requests by these speeds, in the order of their numbers; 1000 = usual."""
        found = [speed / 1000 for speed in speeds]
        if self.formed and found != self._speeds and len(found) == len(self.members):
            self._speeds = found
            self.router.serve(self._capacities(self.members))

    def _capacities(self, members: Sequence[Worker]) -> dict[Hashable, RankCapacity]:
        return {
            worker: RankCapacity(
                worker.loaded.limits.capacity if self._kv_tokens is None else self._kv_tokens,
                worker.loaded.max_requests,
                worker.loaded.shares_prefixes,
                speed=speed,
                role=self.role,
                machine=worker.loaded.machine,
            )
            for worker, speed in zip(members, self._speeds, strict=True)
            if worker.loaded is not None
        }

    def lose_all(self, cause: WorkerDied) -> None:
        """Lose all workers: they are started anew, and form a group as if it were the first."""
        for worker in self._workers:
            self._workers.lose(worker, cause, retire=True)
        self._breaks, self.stood, self.placement = 0, False, None

    def stop(self) -> None:
        """Form no further group."""
        self._stopped = True
        self._workers.changes.notify()

    # Forming.

    async def keep_formed(self) -> None:
        """Form a group whenever the last is broken or a worker is ready.

        Raises:
            ClusterError: the group breaks again and again without a token, or the ranks can't form one: at the start after
                some attempts, later after ``give_up_s``, because a full disk or a network's trouble may pass.
        """
        retries = Retries(_PACE, self._deadlines.give_up_s)
        while not self._stopped:
            await self._workers.changes.wait_for(lambda: self._stopped or self._should_form())
            if self._stopped:
                return
            if self._breaks > 1:
                logger.warning("the group broke %d times without a token; the last time: %s", self._breaks, self._broken_by)
            if self._breaks >= MOST_FAILURES:
                raise ClusterError(f"the group broke {self._breaks} times without a token: {self._broken_by}")
            await self._workers.check_health(self._workers.candidates, self._deadlines.health_check_s)
            if not self._should_form():
                continue
            cause = await self._form()
            if cause is None:
                retries.reset()
            else:
                await self._wait_to_retry(retries, cause)

    def _should_form(self) -> bool:
        candidates = self._workers.candidates
        if self.formed and len(candidates) == len(self.members):
            return False
        return len(candidates) >= self._required

    async def _wait_to_retry(self, retries: Retries, cause: str) -> None:
        """Wait before the next attempt to form a group.

        Raises:
            ClusterError: there is to be none.
        """
        verdict = retries.failed(time.monotonic())
        if verdict.give_up or (retries.failures == MOST_FAILURES and not self.stood):
            places = ", ".join(sorted(worker.handle.where for worker in self._workers.candidates))
            raise ClusterError(
                f"the ranks could not form a group, {retries.failures} times in a row; the last time: {cause}. They must "
                f"reach each other over TCP, on any port: check firewalls and addresses of {places or 'all nodes'}"
            )
        if self.stood:
            if verdict.tell and retries.failures > 1:
                logger.warning("the ranks can't form a group (failures in a row: %d): %s", retries.failures, cause)
            await asyncio.sleep(verdict.wait_s)

    async def _form(self) -> str | None:
        """Form the next epoch, of all candidates; returns the reason if it failed."""
        logger.debug("forming epoch %d after: %s", self._epochs.newest + 1, self._broken_by)
        members = self._workers.candidates
        self.epoch = self._epochs.next()
        self.formed, self._broken_by, self._broken_in_step = False, None, False
        self._contacts = {}
        self.router.begin(self.epoch)
        fresh = all(worker.state is WorkerState.READY and worker.formed < 0 for worker in members)
        self._send_forms(members, fresh)
        await self._wait_until_formed(members, fresh)
        if self._broken_by is not None:
            if self._broken_in_step:
                return None  # it had formed, and broke for another reason
            self._drop_newcomers(members, self._broken_by)
            if self.stood:
                self.placement = None  # it may be the reason, and is only a hint
            return self._broken_by
        self.formed = self.stood = True
        self.serving = len(members)
        logger.info("epoch %d: %d ranks serve", self.epoch, len(members))
        self._speeds = [1.0] * len(members)
        self.router.serve(self._capacities(members))
        self._on_formed()
        self._workers.changes.notify()
        return None

    def _send_forms(self, members: Sequence[Worker], fresh: bool) -> None:
        placement = self._first_placement(len(members)) if fresh or not self.stood else None
        secret = secrets.token_bytes(_SECRET_BYTES)
        for rank, worker in enumerate(members):
            worker.rank, worker.state = rank, WorkerState.MEMBER
            form = Form(
                epoch=self.epoch,
                rank=rank,
                size=len(members),
                secret=secret,
                form_s=self._deadlines.form_s,
                deadline_s=self._deadlines.operation_s,
                fresh=fresh,
                costs=self._costs,
                placement=placement,
                reports_prompts=self.role == "prefill",
            )
            self._workers.send(worker, form)

    def _first_placement(self, ranks: int) -> bytes | None:
        """The placement of ranks that have all just started; None = the default one.

        If all ranks were replaced at once, it is the one that the last group followed, if that was for as many ranks.
        """
        if self.placement is None or (self.stood and unpack(self.placement).ranks != ranks):
            return None
        return self.placement

    async def _wait_until_formed(self, members: Sequence[Worker], fresh: bool) -> None:
        """Wait until all members report ``Formed``, or the group breaks; lose the members that are too late."""
        epoch = self.epoch
        in_time = await self._workers.changes.wait_for(
            lambda: self._broken_by is not None or all(worker.formed == epoch for worker in members),
            LOAD_DEADLINE_S if fresh else 3 * self._deadlines.form_s + self._deadlines.operation_s,
        )
        if not in_time:
            for worker in members:
                if worker.formed != epoch:
                    self._workers.lose(worker, WorkerDied("it neither joined the group nor reported an error"))

    def _drop_newcomers(self, members: Sequence[Worker], cause: str) -> None:
        """Lose the new members of a group that didn't form though no rank is lost: they are the likely reason."""
        newcomers = [worker for worker in members if worker.formed < 0]
        if len(newcomers) < len(members) and all(worker.state is WorkerState.MEMBER for worker in members):
            for worker in newcomers:
                self._workers.lose(worker, WorkerDied(f"the group could not form with it: {cause}"))

    def pass_on(self, contact: Contact) -> None:
        """Send a rank's contact to all ranks of its epoch, together with the others'."""
        if contact.epoch != self.epoch:
            return
        if not self._contacts:
            asyncio.get_running_loop().call_later(_TOGETHER_S, self._send_contacts)
        self._contacts[contact.key] = contact.value

    def _send_contacts(self) -> None:
        contacts, self._contacts = self._contacts, {}
        for worker in self.members if contacts else ():
            self._workers.send(worker, Contacts(self.epoch, contacts))
