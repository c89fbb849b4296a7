"""``DriverLease``: this process's claim to the ranks of a named cluster. The decisions are in ``cluster/lasting/lease.py``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import msgspec

from cluster.errors import ClusterError, Superseded
from cluster.lasting import ray_registry
from cluster.lasting.lease import BEAT_S, HELD_S, RELEASED, Claim, Holder, LeaseRegistry, LeaseWatch, Sight
from cluster.ray_backend.calls import ask

logger = logging.getLogger("epslots.cluster")

_LOOK_EVERY_S = 0.3


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
        self._waiting: list[Callable[[], None]] = []

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
        """Ray was lost, and the claim with it."""
        self._claim = None

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
        """Look at the newest claim, and show that this process lives if it is its own."""
        began_s, claim = self._clock(), self._claim
        if claim is None:
            return
        self._beats += 1
        sight = await ask(lambda: self._registry.look(self._name, at_holder=False))
        if claim is not self._claim:
            return
        if sight.claim != claim:
            by = "another process" if sight.claim is None else sight.claim.where
            self.lose(f"the ranks of the cluster {self._name!r} are another driver's now ({by}); this one has left them to it")
            return
        await ask(self._registry.put_beat, self._name, self.term, self._beats.to_bytes(8, "big"))
        self._beaten_s = began_s
        waiting, self._waiting = self._waiting, []
        for effect in waiting:
            effect()

    def lose(self, reason: str = "") -> None:
        """The lease is another driver's: a rank or the registry says so."""
        self._lost = self._lost or reason or f"another driver has adopted the ranks of the cluster {self._name!r}"
        self._waiting.clear()
        self._news.set()

    @property
    def held(self) -> bool:
        """Whether no other driver can be there."""
        return self._claim is not None and not self._lost and self._clock() - self._beaten_s < HELD_S

    def guard(self, effect: Callable[[], None]) -> None:
        """Have an effect on ranks, once it is certain that they are this driver's; never if they aren't.

        A process that stood still for long may not end ranks for the deadlines that have passed meanwhile.
        """
        if self.held:
            effect()
        elif not self._lost:
            self._waiting.append(effect)

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
        with suppress(ClusterError):
            return await ask(self._registry.put_claim, self._name, claim)
        return True
