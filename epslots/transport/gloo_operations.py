"""Waiting for gloo's operations, so that a wait can be given up. ``TorchTransport`` waits so on the CPU.

Torch's own waits block until the end or a deadline. A ``GlooOperation`` is waited for in short turns instead, between which
the caller looks whether the transport was broken, and it is left behind if it was.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import torch.distributed as dist

from epslots.transport import background

_LEAST_TIMEOUT_S = 1e-3  # gloo takes a timeout of 0 for its default


def _timeout(seconds: float) -> timedelta:
    return timedelta(seconds=max(seconds, _LEAST_TIMEOUT_S))


class GlooOperation(Protocol):
    """An operation in progress on gloo."""

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end, up to this long; returns whether it has ended. Raises RuntimeError if it failed."""
        ...

    def leave(self) -> None:
        """Give up waiting; it may still be in progress."""
        ...


class CollectiveOperation:
    """A collective; the caller's thread waits for it. A ``GlooOperation``."""

    def __init__(self, work: dist.Work, group: dist.ProcessGroup) -> None:
        self._work, self._group = work, group

    def ends_within(self, seconds: float) -> bool:
        try:
            self._work.wait(_timeout(seconds))
        except RuntimeError:
            if not self._work.is_completed():
                return False
            self._work.wait()  # raises the error of its failure, and nothing if it ended just now
        return True

    def leave(self) -> None:
        if not self._work.is_completed():
            # The thread that drops the last reference to a group waits for all its works: let it be one of no other use.
            background.start(_outlive, self._work, self._group, name="epslots-left")


def _outlive(work: dist.Work, group: dist.ProcessGroup) -> None:
    """Hold on to the group until the work has ended."""
    with suppress(RuntimeError):
        work.wait()


class PointToPointOperation:
    """Sends and receives, which a ``WaitingThread`` waits for. A ``GlooOperation``.

    The caller's own thread can't: a wait for a send or receive that times out has gloo close all connections.
    """

    def __init__(self, works: Sequence[dist.Work], deadline: float) -> None:
        self._works = works
        self._deadline = deadline
        self._ended = threading.Event()
        self._error: RuntimeError | None = None

    def wait(self) -> None:
        """Wait for all of them; called by the waiting thread."""
        try:
            for work in self._works:
                work.wait(_timeout(self._deadline - time.monotonic()))
        except RuntimeError as error:
            self._error = error
        self._ended.set()

    def ends_within(self, seconds: float) -> bool:
        ended = self._ended.wait(seconds)
        if self._error is not None:
            raise self._error
        return ended

    def leave(self) -> None:
        pass  # the waiting thread holds on to all that is needed


class WaitingThread:
    """A thread that waits for sends and receives, one operation after another.

    It ends with the last reference to this object, or after ``end``.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._operations: SimpleQueue[PointToPointOperation | None] = SimpleQueue()
        stop = partial(self._operations.put, None)
        background.start(_wait_for_each, self._operations, group, name="epslots-transfers", stop=stop)
        self.end = weakref.finalize(self, stop)

    def start(self, works: Sequence[dist.Work], deadline: float) -> PointToPointOperation:
        """Wait for these works in the thread, until ``deadline`` on the monotonic clock."""
        operation = PointToPointOperation(works, deadline)
        self._operations.put(operation)
        return operation


def _wait_for_each(queue: SimpleQueue[PointToPointOperation | None], group: dist.ProcessGroup) -> None:
    """Wait for each operation, and hold on to the group meanwhile."""
    while (operation := queue.get()) is not None:
        operation.wait()
        del operation  # its tensors belong to the caller
