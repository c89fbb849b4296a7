"""A worker on Ray, as the driver holds it."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any

import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cluster.driver.backend import WorkerDied
from cluster.rank.worker import WorkerAddress

_CONTROL, _EVENTS = "control", "events"  # concurrency groups of Ray: a thread each
CONCURRENCY_GROUPS = {_CONTROL: 1, _EVENTS: 1}
RAY_ERRORS = (RayError, RuntimeError, AttributeError, ConnectionError)
"""What a call raises: RayError, or any of the others while Ray is being disconnected in another thread."""
_COLORS = re.compile(r"\x1b\[\d+m")


class RayWorker:
    """One actor. It is used from one asyncio loop."""

    def __init__(self, seat: int, actor: ActorHandle) -> None:
        self.seat = seat
        self.hello: WorkerAddress | None = None
        self._actor: ActorHandle | None = actor
        self._hello = actor.hello.options(concurrency_group=_CONTROL)
        self._command = actor.command.options(concurrency_group=_CONTROL)
        self._events: Any = None

    async def greet(self, deadline_s: float) -> None:
        """Wait until it is up.

        Raises:
            WorkerDied: it isn't, in time.
        """
        try:
            async with asyncio.timeout(deadline_s):
                hello = await self._hello.remote()
        except TimeoutError:
            raise WorkerDied(f"its process didn't come up within {deadline_s:g} s") from None
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error
        self.hello = msgspec.msgpack.decode(hello, type=WorkerAddress)

    @property
    def where(self) -> str:
        if self.hello is None:
            return "a process that is being started"
        return f"node {self.hello.host}, pid {self.hello.pid}"

    async def command(self, message: bytes) -> bytes:
        self._check()
        try:
            return await self._command.remote(message)
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error

    async def events(self) -> bytes:
        self._check()
        try:
            if self._events is None:
                assert self._actor is not None
                # One call for all of a worker's life, which yields: a third cheaper than one call each.
                self._events = self._actor.events.options(num_returns="streaming", concurrency_group=_EVENTS).remote()
            return await (await anext(self._events))
        except StopAsyncIteration:
            raise WorkerDied("its events have ended") from None
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error

    def _check(self) -> None:
        if self._actor is None:
            raise WorkerDied("its Ray has ended")

    def kill(self) -> None:
        if self._actor is not None:
            kill(self._actor)

    def forget(self) -> None:
        """Its Ray is gone, and the actor with it: Ray must not be asked about it any more."""
        self._actor = None


def kill(actor: ActorHandle) -> None:
    """End an actor's process soon. Ray gives one that doesn't react five seconds, and then sends SIGKILL."""
    with suppress(Exception):  # the actor, or all of Ray, may be gone
        if ray.is_initialized():  # or Ray would be started for it
            ray.kill(actor)


def reason_of(error: Exception) -> str:
    """Why an actor can't be had any more: what matters of Ray's text."""
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
