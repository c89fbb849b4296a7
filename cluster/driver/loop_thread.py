"""An asyncio loop in a thread of its own, and the ways in from other threads and between its coroutines."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from asyncio import new_event_loop
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from cluster.errors import ClusterError

logger = logging.getLogger("epslots.cluster")

CLOSED = "the cluster was closed"
FORKED = "this cluster was made before a fork: only the process that made it can use it"

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines; its thread starts at once and ends with ``end``.

    Attributes:
        on_bug: called in the thread with what a callback or a spawned coroutine raised, which nobody else would hear of.
    """

    def __init__(self, name: str) -> None:
        self.on_bug: Callable[[BaseException], None] = lambda error: None
        self._pid = os.getpid()
        self._loop = new_event_loop()
        self._loop.set_exception_handler(self._handle)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._entry = threading.Lock()
        """Nothing comes in after the end."""
        self._ended = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether ``end`` was called."""
        return self._ended

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that has the thread: a fork copies no threads, and locks as they are held."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse to go on in a forked child, where every wait would be for ever.

        Raises:
            ClusterError: this is one.
        """
        if self.forked:
            raise ClusterError(FORKED)

    def begin(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """From another thread: have a coroutine run.

        Raises:
            ClusterError: the thread has ended, or this is a forked child.
        """

        async def tracked() -> Result:
            task = asyncio.current_task()
            assert task is not None
            self._calls.add(task)
            try:
                return await work
            finally:
                self._calls.discard(task)

        if self.forked:
            work.close()
            raise ClusterError(FORKED)
        with self._entry:
            if not self._ended:
                return asyncio.run_coroutine_threadsafe(tracked(), self._loop)
        work.close()
        raise ClusterError(CLOSED)

    def wait(self, work: Future[Result]) -> Result:
        """From another thread: wait for the result of what was begun. If the waiting is interrupted, it is cancelled.

        Raises:
            ClusterError: the thread ends before that.
        """
        try:
            return work.result()
        except CancelledError as error:
            raise ClusterError(CLOSED) from error
        except BaseException:
            work.cancel()
            raise

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """From another thread: run a coroutine, and wait for its result."""
        return self.wait(self.begin(work))

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """From another thread: have a function called, soon.

        Raises:
            ClusterError: the thread has ended, or this is a forked child.
        """
        self.check_process()
        with self._entry:
            if self._ended:
                raise ClusterError(CLOSED)
            self._loop.call_soon_threadsafe(function, *arguments)

    def hint(self, function: Callable[..., object], *arguments: object) -> None:
        """From anywhere, finalizers included: have a function called soon. Nothing happens after the end or in a forked child.

        It takes no lock, because garbage is collected while any lock may be held.
        """
        if not self.forked:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function, *arguments)

    def settle(self) -> None:
        """From another thread: wait until all that came in before has been called.

        Raises:
            ClusterError: the thread has ended, or this is a forked child.
        """
        self.call(asyncio.sleep(0))

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """From the loop's thread: run a coroutine beside. What it raises is a bug, and told."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a bug in %s", task.get_coro(), exc_info=error)
                self.on_bug(error)

        task.add_done_callback(done)
        return task

    async def cancel_all(self) -> None:
        """Cancel what was spawned, and wait until it has ended."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end(self) -> None:
        """From another thread: end the thread, when all that came in before has been called. Twice is once."""
        with self._entry:
            if self._ended:
                return
            self._ended = True
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        """Tell those who still wait, and stop."""
        waiting = list(self._calls)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        self._loop.stop()

    def _handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio would only write to a log."""
        loop.default_exception_handler(context)
        if "handle" in context and context.get("exception") is not None:  # of a callback
            self.on_bug(context["exception"])


class Pulse:
    """Wakes all coroutines that wait for a condition to become true, whoever changes it. Of one loop's thread."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def beat(self) -> None:
        """Something has changed."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait for a condition; whether it became true in time."""
        loop = asyncio.get_running_loop()
        ends = None if timeout_s is None else loop.time() + timeout_s
        while not condition():
            left_s = None if ends is None else ends - loop.time()
            if left_s is not None and left_s <= 0:
                return False
            future: asyncio.Future[None] = loop.create_future()
            self._waiting.append(future)
            await asyncio.wait({future}, timeout=left_s)
        return True
