"""``SharedController``: the one controller process of a cluster, which plans for each of its groups.

The client of each group watches it and may end it, as when the group itself is ended: the others then start another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.driver.backend import Backend, ControllerHandle
from cluster.messages.controller import address


class GroupController:
    """A group's ``ControllerHandle``, whose process all groups share."""

    def __init__(self, shared: ControllerHandle, group: int, on_killed: Callable[[], None]) -> None:
        self._shared, self._group, self._on_killed = shared, group, on_killed

    @property
    def where(self) -> str:
        """Node and process, for people."""
        return self._shared.where

    async def call(self, message: bytes) -> bytes:
        """Send an order of this group; returns the reply.

        Raises:
            WorkerDied: the process is gone.
        """
        return await self._shared.call(address(self._group, message))

    def kill(self) -> None:
        """End the process, for all groups: each of them then starts, or finds, the next one."""
        self._on_killed()
        self._shared.kill()


class SharedController:
    """Starts the controller's process when a group needs one and there is none. For the supervisor's thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._starting = asyncio.Lock()
        self._there: ControllerHandle | None = None

    async def start(self, group: int) -> GroupController:
        """The controller, for a group.

        Raises:
            WorkerDied, ClusterError: it couldn't be started.
        """
        async with self._starting:
            if self._there is None:
                self._there = await self._backend.start_controller()
            there = self._there

        def killed() -> None:
            if self._there is there:
                self._there = None

        return GroupController(there, group, killed)
