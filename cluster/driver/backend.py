"""The seam to whatever runs the ranks' processes: Ray (``backend.py``), or threads in tests.

seat         a place for one rank: a GPU, or a CPU slot; numbered from 0
worker       the process on a seat; when it has died, another may be hired for the same seat
controller   a process on no seat, which decides where experts should live; when it has died, another may be hired
"""

from __future__ import annotations

from typing import Protocol


class WorkerDied(Exception):
    """A worker's or the controller's process is gone, as far as can be told; the message says why, if that is known."""


class WorkerHandle(Protocol):
    """One worker's process. It handles messages of ``rank.py``."""

    seat: int

    @property
    def where(self) -> str:
        """Node and process, for people: "node 10.0.0.2, pid 4711"."""

    async def command(self, message: bytes) -> bytes:
        """Send a command, which the worker answers at once whatever it is doing.

        Raises:
            WorkerDied: it never will.
        """

    async def events(self) -> bytes:
        """Wait for what happens next; for ever, if nothing does.

        Raises:
            WorkerDied: nothing will.
        """

    def kill(self) -> None:
        """End the process even if it was stopped; soon, without waiting for it. Twice is once."""


class ControllerHandle(Protocol):
    """The controller's process. It takes the orders of ``controller.py``, one after the other."""

    @property
    def where(self) -> str:
        """Node and process, for people."""

    async def call(self, message: bytes) -> bytes:
        """Give an order; returns what is answered, which may take as long as planning does.

        Raises:
            WorkerDied: there will be no answer.
        """

    def kill(self) -> None:
        """End the process even if it was stopped; soon, without waiting for it. Twice is once."""


class Backend(Protocol):
    """Seats on the nodes of a cluster, and the processes on them."""

    async def open(self, ranks: int | None) -> int:
        """Reserve the seats 0 to ``ranks`` - 1; returns how many.

        Args:
            ranks: None for one on every GPU, or a single one if there is none.

        Raises:
            ClusterError: nodes lack devices, or the model, or don't answer; with what to do about it.
        """

    async def resize(self, ranks: int) -> None:
        """Reserve further seats, or give the last ones back, whose workers are gone.

        Raises:
            ClusterError: as ``open``; the seats are as before.
        """

    async def hire(self, seat: int) -> WorkerHandle:
        """Start a worker on a free seat; returns when it answers.

        Raises:
            WorkerDied: it didn't come up.
            ClusterError: the seat's node is gone, and no other has room.
        """

    async def hire_controller(self) -> ControllerHandle:
        """Start a controller, which knows nothing; returns when it answers. It takes no seat.

        Raises:
            WorkerDied: it didn't come up.
            ClusterError: there is no place for it.
        """

    async def neighbours(self, seat: int) -> int:
        """How many seats the node of this one has, itself included: they share the node's RAM."""

    async def lost(self) -> str:
        """Wait until all workers, the controller and the seats are gone at once, by no act of ours; returns why, for people.

        For ever, if that doesn't happen. From the moment when it returns nothing works but ``reopen`` and ``close``.
        """

    async def reopen(self, ranks: int) -> None:
        """After ``lost``: wait until seats can be had again, and reserve as many, from 0 on.

        Raises:
            ClusterError: that failed; it may be called again.
        """

    async def close(self) -> None:
        """End all processes and give all seats back. Never raises."""
