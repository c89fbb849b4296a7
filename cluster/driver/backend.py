"""``Backend``: the interface to the system that runs the processes: Ray (``ray_backend``), or threads in tests.

bundle       a place for one rank: a GPU, or a CPU slot; numbered from 0
worker       the process on a bundle; after its death, another can be started on the same bundle
controller   a process without a bundle, which plans placements; after its death, another can be started
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, Protocol


class WorkerDied(Exception):
    """A worker's or the controller's process has ended, or is taken for dead. The message says why, if that is known."""


class WorkerHandle(Protocol):
    """One worker's process. Its messages are those of ``messages/rank.py``.

    Attributes:
        adopted: the last driver started it.
    """

    bundle: int
    adopted: bool

    @property
    def where(self) -> str:
        """Node and process, for people: "node 10.0.0.2, pid 4711"."""

    async def command(self, message: bytes) -> bytes:
        """Send a command; returns the answer, which comes at once, even from a busy worker.

        Raises:
            WorkerDied: there is no answer.
            Superseded: the worker obeys another driver now.
        """

    async def events(self) -> bytes:
        """Wait for the next batch of events, without a deadline.

        Raises:
            WorkerDied: there will be none.
            Superseded: the worker obeys another driver now.
        """

    def kill(self) -> None:
        """End the process soon, even if it was stopped, without waiting. A second call does nothing."""


class ControllerHandle(Protocol):
    """The controller's process. Its messages are those of ``messages/controller.py``."""

    @property
    def where(self) -> str:
        """Node and process, for people."""

    async def call(self, message: bytes) -> bytes:
        """Send an order; returns the reply, which may take as long as planning does.

        Raises:
            WorkerDied: there is no reply.
        """

    def kill(self) -> None:
        """End the process soon, even if it was stopped, without waiting. A second call does nothing."""


class Backend(Protocol):
    """Bundles on the nodes of a cluster, and the processes on them."""

    @property
    def survivors(self) -> frozenset[int]:
        """Bundles on which the last driver has left workers, once it is open; ``start_worker`` returns each of them once."""

    async def keep_lease(self) -> NoReturn:
        """Show that this driver lives, until it is closed.

        Raises:
            Superseded: another driver has adopted the workers.
        """

    async def open(self, ranks: int | None) -> int:
        """Reserve the bundles 0 to ``ranks`` - 1; returns their number.

        Args:
            ranks: None for one on every GPU, or a single one if there is no GPU.

        Raises:
            ClusterError: nodes lack devices, or the model, or don't answer; the message says what to do.
        """

    async def resize(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        """Reserve further bundles, or release the last ones, whose workers have ended.

        Args:
            group_of: the group of each bundle, by number: those of one are placed near each other. () = as they were opened.

        Raises:
            ClusterError: nodes lack devices, or the model, or don't answer. The bundles are unchanged.
        """

    async def start_worker(self, bundle: int) -> WorkerHandle:
        """Start a worker on a free bundle; returns when it answers.

        Raises:
            WorkerDied: it didn't come up.
            ClusterError: the bundle's node is gone, and no other has room.
        """

    async def start_controller(self) -> ControllerHandle:
        """Start a controller, without a group; returns when it answers.

        Raises:
            WorkerDied: it didn't come up.
            ClusterError: no node has room for it.
        """

    async def neighbours(self, bundle: int) -> int:
        """The number of bundles on this one's node, itself included: they share the node's RAM."""

    async def lost(self) -> str:
        """Wait until all bundles and processes are lost at once, through no call of ours; returns the reason, for people.

        From then on only ``reopen`` and ``close`` work.
        """

    async def reopen(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        """After ``lost``: wait until bundles can be reserved again, and reserve those from 0 to ``ranks`` - 1.

        Args:
            group_of: the group of each bundle, by number; () = as they were opened.

        Raises:
            ClusterError: that failed; it can be called again.
        """

    async def close(self, *, leave_ranks: bool = False) -> None:
        """End all processes and release all bundles; or leave the workers' to the next driver. Never raises."""
