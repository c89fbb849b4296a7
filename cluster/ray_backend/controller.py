"""The controller on Ray, as the driver holds it."""

from __future__ import annotations

import asyncio

import msgspec
from ray.actor import ActorHandle

from cluster.driver.backend import WorkerDied
from cluster.ray_backend.worker import RAY_ERRORS, kill, reason_of


class RayController:
    """One actor. It is used from one asyncio loop."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor: ActorHandle | None = actor
        self._place = ""

    async def greet(self, deadline_s: float) -> None:
        """Wait until it is up.

        Raises:
            WorkerDied: it isn't, in time.
        """
        assert self._actor is not None, "it is greeted once, at first"
        try:
            async with asyncio.timeout(deadline_s):
                hello = await self._actor.hello.remote()
        except TimeoutError:
            raise WorkerDied(f"its process didn't come up within {deadline_s:g} s") from None
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error
        host, pid = msgspec.msgpack.decode(hello, type=tuple[str, int])
        self._place = f"node {host}, pid {pid}"

    @property
    def where(self) -> str:
        return self._place

    async def call(self, message: bytes) -> bytes:
        if self._actor is None:
            raise WorkerDied("its Ray has ended")
        try:
            return await self._actor.call.remote(message)
        except RAY_ERRORS as error:
            raise WorkerDied(reason_of(error)) from error

    def kill(self) -> None:
        if self._actor is not None:
            kill(self._actor)

    def forget(self) -> None:
        """Its Ray is gone, and the actor with it: Ray must not be asked about it any more."""
        self._actor = None
