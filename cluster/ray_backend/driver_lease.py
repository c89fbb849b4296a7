"""``DriverLease``: this process's claim to the ranks of a named cluster. The decisions are in ``cluster/lasting/lease.py``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from cluster.errors import ClusterError, Superseded
from cluster.lasting import ray_registry
from cluster.lasting.lease import BEAT_S, HELD_S, RELEASED, Claim, Holder, LeaseRegistry, LeaseWatch, Sight
from cluster.ray_backend.calls import ask

logger = logging.getLogger("epslots.cluster")

_LOOK_EVERY_S = 0.3


@dataclass(frozen=True)
class _Deed:
    """The end of a rank or a placement group; it waits until the lease is certainly this driver's."""

    id: str
    effect: Callable[[], None]


class DriverLease:
    """One driver's lease. For the supervisor's thread.

    Args:
        name: of the cluster.
        orphan_s: seconds that ranks wait for the next driver.
        clock: seconds, from any origin.

    Attributes:
        term: of the newest claim; 0 before the first.
    """

    def __init__(
        self,
        name: str,
        orphan_s: float,
        registry: LeaseRegistry = ray_registry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._orphan_s, self._registry, self._clock = name, orphan_s, registry, clock
        self.term = 0
        self._claim: Claim | None = None
        """The newest; None if there is none, or if it was lost with all of Ray."""
        self._beats = 0
        self._beaten_s = 0.0
        self._lost = ""
        """Why the lease is another's, if so."""
        self._news = asyncio.Event()
        self._ends = False
        """No driver can adopt the ranks any more."""
        self._beating = asyncio.Lock()
        self._waiting: list[_Deed] = []
        self._doing: asyncio.Task[None] | None = None

    async def wait_until_free(self) -> Sight:
        """Wait until no other driver holds the lease; returns the newest claim.

        Raises:
            ClusterError: another driver lives.
        """
        watch = LeaseWatch()
        while True:
            sight = await ask(lambda: self._registry.look(self._name))
            match watch.see(self._clock(), sight):
                case Holder.GONE:
                    return sight
                case Holder.LIVES:
                    assert sight.claim is not None
                    raise ClusterError(
                        f"the cluster {self._name!r} has a driver, which lives ({sight.claim.where}): send requests to that "
                        f"one, or end it first, or give another name"
                    )
            await asyncio.sleep(_LOOK_EVERY_S)

    async def claim(self, after: int, where: str, worker: str) -> bool:
        """Claim the term after this one; returns False if another process was first.

        Args:
            where: this process, for people.
            worker: Ray's id of it.
        """
        claim = Claim(max(after, self.term) + 1, where, worker, self._orphan_s)
        if not await ask(self._registry.put_claim, self._name, claim):
            return False
        self._claim, self.term = claim, claim.term
        await self._beat()
        return True

    def forget(self) -> None:
        """Ray was lost, and the claim with it, and all ranks."""
        self._claim = None
        self._waiting.clear()

    async def keep(self) -> NoReturn:
        """Beat once a second.

        Raises:
            Superseded: another driver has taken over.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._news.wait()
            if not self._lost:
                with suppress(ClusterError):  # the head may be away for a while
                    await self._beat()
            if self._lost:
                raise Superseded(self._lost)

    async def _beat(self) -> None:
        """Look at the newest claim; if it is this process's, show that it lives, and carry out the waiting ends.

        The order keeps a process from harm that is paused anywhere in between: see ``lease.py``.
        """
        async with self._beating:
            began_s, claim = self._clock(), self._claim
            if claim is None:
                return
            self._beats += 1
            deeds, self._waiting = self._waiting, []
            try:
                for deed in deeds:
                    await ask(self._registry.doom, self._name, deed.id)
                sight = await ask(lambda: self._registry.look(self._name, at_holder=False))
                if claim is not self._claim:
                    return
                if sight.claim != claim:
                    by = "another process" if sight.claim is None else sight.claim.where
                    whose = f"the ranks of the cluster {self._name!r} are another driver's now ({by})"
                    self.lose(f"{whose}; this one has left them to it")
                    return
                await ask(self._registry.put_beat, self._name, self.term, self._beats.to_bytes(8, "big"))
            except ClusterError:
                self._waiting = deeds + self._waiting
                raise
            self._beaten_s = began_s
            for deed in deeds:
                deed.effect()

    def lose(self, reason: str = "") -> None:
        """The lease is another driver's: a rank or the registry says so."""
        self._lost = self._lost or reason or f"another driver has adopted the ranks of the cluster {self._name!r}"
        self._waiting.clear()
        self._news.set()

    @property
    def held(self) -> bool:
        """Whether no other driver can be there now."""
        return self._claim is not None and not self._lost and self._clock() - self._beaten_s < HELD_S

    def guard(self, id: str, effect: Callable[[], None]) -> None:
        """End a rank or a placement group soon, if it is certainly this driver's; never if it isn't.

        A process that stood still for long may not end ranks for the deadlines that have passed meanwhile. Without an answer
        from Ray's head, it is tried again with the next beat.

        Args:
            id: of the rank or the group, by which the next driver knows that it is ended.
            effect: ends it.
        """
        if self._ends:
            effect()
        elif not self._lost:
            self._waiting.append(_Deed(id, effect))
            if self._doing is None or self._doing.done():
                self._doing = asyncio.get_running_loop().create_task(self._do())

    async def _do(self) -> None:
        with suppress(ClusterError):
            while self._waiting and self._claim is not None and not self._lost:
                await self._beat()

    async def confirm(self) -> bool:
        """Make sure, as far as possible, that the lease is this driver's; returns whether it is."""
        if not self._lost:
            with suppress(ClusterError):
                await self._beat()
        return self.held

    async def release(self) -> None:
        """Leave the ranks to the next driver, which needn't wait; this one has no effect on them any more."""
        with suppress(ClusterError):
            await ask(self._registry.put_beat, self._name, self.term, RELEASED)
        self.lose("the ranks were left to the next driver")

    async def end(self) -> bool:
        """Have no driver adopt the ranks any more, which are to end; returns False if one was faster."""
        assert self._claim is not None
        claim = msgspec.structs.replace(self._claim, term=self.term + 1, ends=True)
        async with self._beating:
            ends = True
            with suppress(ClusterError):
                ends = await ask(self._registry.put_claim, self._name, claim)
            self._ends = ends
        return ends
