"""The driver's handles of Ray actors: a rank's worker, and the controller."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any

import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cluster.actor_process import ActorProcess
from cluster.driver.backend import WorkerDied
from cluster.errors import Superseded
from cluster.lasting.descriptions import SUPERSEDED, RankDescription, with_term
from cluster.ray_backend.driver_lease import DriverLease

_CONTROL, _EVENTS = "control", "events"  # concurrency groups of Ray
_MOST_DRIVERS = 4  # at a time: all but the last are paused, and each holds a thread in which Ray waits for its answer
CONCURRENCY_GROUPS = {_CONTROL: 1, _EVENTS: _MOST_DRIVERS}
"""Threads of each."""
RAY_ERRORS = (RayError, RuntimeError, AttributeError, ConnectionError)
"""Errors of a call: RayError, or any of the others while another thread disconnects Ray."""
_RAY_ENDED = "its Ray has ended"
_COLORS = re.compile(r"\x1b\[\d+m")


class RayActorHandle:
    """One actor, used from one asyncio loop.

    Args:
        options: of Ray, for every call but ``events``.

    Attributes:
        process: the actor's process, once it is up.
    """

    def __init__(self, actor: ActorHandle, **options: object) -> None:
        self.process: ActorProcess | None = None
        self._actor: ActorHandle | None = actor
        self._options = options
        self._asked: set[asyncio.Future[bytes]] = set()
        """Answers that are awaited."""

    async def wait_until_up(self, deadline_s: float) -> None:
        """Wait for the process to start.

        Raises:
            WorkerDied: it didn't in time, or ended.
        """
        try:
            async with asyncio.timeout(deadline_s):
                message = await self._ask("process")
        except TimeoutError:
            raise WorkerDied(f"its process didn't come up within {deadline_s:g} s") from None
        self.process = msgspec.msgpack.decode(message, type=ActorProcess)

    @property
    def where(self) -> str:
        return "a process that is being started" if self.process is None else str(self.process)

    async def _ask(self, method: str, *arguments: bytes) -> bytes:
        """The answer of one of the actor's methods.

        Raises:
            WorkerDied: there is none.
        """
        actor = self._actor_there()
        try:
            asked = asyncio.ensure_future(getattr(actor, method).options(**self._options).remote(*arguments))
            self._asked.add(asked)
            try:
                return await asked
            finally:
                self._asked.discard(asked)
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if self._actor is not None or asker is None or asker.cancelling():
                raise
            raise WorkerDied(_RAY_ENDED) from None  # by ``forget``

    def _actor_there(self) -> ActorHandle:
        if self._actor is None:
            raise WorkerDied(_RAY_ENDED)
        return self._actor

    def kill(self) -> None:
        """End the process soon. Ray gives one that doesn't react five seconds, and then sends SIGKILL."""
        if self._actor is not None:
            with suppress(Exception):  # the actor, or all of Ray, may be gone
                if ray.is_initialized():  # or Ray would be started for it
                    ray.kill(self._actor)

    def forget(self) -> None:
        """Drop the actor, because its Ray is gone. A Ray that is gone must not be asked, and never answers earlier calls."""
        self._actor = None
        for asked in self._asked:
            asked.cancel()


class RayWorkerHandle(RayActorHandle):
    """A rank's worker (``WorkerActor``).

    Args:
        lease: of the driver; None for a worker that ends with it.
        name: by which Ray knows a worker that outlives its driver.
        adopted: the last driver started it; also an attribute.
    """

    def __init__(
        self, bundle: int, actor: ActorHandle, lease: DriverLease | None = None, name: str = "", *, adopted: bool = False
    ) -> None:
        super().__init__(actor, concurrency_group=_CONTROL)
        self.bundle, self.name = bundle, name
        self.adopted = adopted
        self._lease = lease
        self._events: Any = None

    @property
    def _term(self) -> int:
        return 0 if self._lease is None else self._lease.term

    async def describe(self) -> RankDescription:
        """The worker's state, under any driver.

        Raises:
            WorkerDied: there is no answer.
        """
        return msgspec.msgpack.decode(await self._ask("describe"), type=RankDescription)

    async def command(self, message: bytes) -> bytes:
        return self._checked(await self._ask("command", with_term(self._term, message)))

    def _checked(self, answer: bytes) -> bytes:
        if answer == SUPERSEDED and self._lease is not None:
            self._lease.lose()
            raise Superseded("another driver has adopted this rank")
        return answer

    def kill(self, *, unused: bool = False) -> None:
        """End the process soon; with a lease only if the worker is certainly this driver's.

        Args:
            unused: no order to load was sent, so that no driver adopts it.
        """
        if self._lease is None or unused:
            super().kill()
        else:
            self._lease.guard(self.name, super().kill)

    async def events(self) -> bytes:
        actor = self._actor_there()
        try:
            if self._events is None:
                # One streaming call for a worker's whole life: a third cheaper than a call for each batch.
                calling = actor.events.options(num_returns="streaming", concurrency_group=_EVENTS)
                self._events = calling.remote(with_term(self._term, b""))
            return self._checked(await (await anext(self._events)))
        except StopAsyncIteration:
            raise WorkerDied("its events have ended") from None
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error


class RayControllerHandle(RayActorHandle):
    """The controller (``ControllerActor``)."""

    async def call(self, message: bytes) -> bytes:
        return await self._ask("call", message)


def reason_of(error: Exception) -> str:
    """The reason for the end of an actor: the part of Ray's text that says it."""
    text = _COLORS.sub("", str(error))
    if getattr(error, "_actor_init_failed", False) or isinstance(error, RayTaskError):
        lines = text.rstrip().splitlines()
        code = [number for number, line in enumerate(lines) if line.startswith(" ")]  # of the traceback
        return "\n".join(lines[code[-1] + 1 if code else 0 :])
    _, because, cause = text.partition("is dead because ")
    cause = cause if because else text
    if "its node has died" in cause:
        return "its node is gone"
    if "connection error code 2" in cause:
        return "its process has ended: it was killed, maybe for lack of memory, or crashed"
    return cause.rpartition("Worker exit detail: ")[2].strip().partition("\n")[0].partition(". ")[0]
