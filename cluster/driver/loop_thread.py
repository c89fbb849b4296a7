"""An asyncio loop in a thread of its own. How other threads call into it, and how its coroutines wait for each other."""

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

Value = TypeVar("Value")


class LoopThread:
    """Runs coroutines. The thread starts at once, and ends with ``end``."""

    def __init__(self, name: str) -> None:
        self._on_bug: Callable[[BaseException], None] = lambda error: None
        self._pid = os.getpid()
        self._loop = new_event_loop()
        self._loop.set_exception_handler(self._handle)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._entry = threading.Lock()
        """Held to call into the loop, so that no call comes after the end."""
        self._ended = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def report_bugs(self, on_bug: Callable[[BaseException], None]) -> None:
        """Call ``on_bug`` in the thread with each exception that a callback or spawned coroutine raises and no caller gets."""
        self._on_bug = on_bug

    @property
    def ended(self) -> bool:
        """Whether ``end`` was called."""
        return self._ended

    @property
    def forked(self) -> bool:
        """Whether this process is a forked child, which has no such thread, and locks in any state."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse to go on in a forked child, where every wait would last for ever.

        Raises:
            ClusterError: this is a forked child.
        """
        if self.forked:
            raise ClusterError(FORKED)

    def begin(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        """From another thread: start a coroutine.

        Raises:
            ClusterError: the thread has ended, or this is a forked child.
        """

        async def tracked() -> Value:
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

    def wait(self, work: Future[Value]) -> Value:
        """From another thread: the result of a coroutine that ``begin`` started. An interrupted wait cancels it.

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

    def call(self, work: Coroutine[Any, Any, Value]) -> Value:
        """From another thread: run a coroutine, and return its result."""
        return self.wait(self.begin(work))

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """From another thread: call a function soon, in order.

        Raises:
            ClusterError: the thread has ended, or this is a forked child.
        """
        self.check_process()
        with self._entry:
            if self._ended:
                raise ClusterError(CLOSED)
            self._loop.call_soon_threadsafe(function, *arguments)

    def hint(self, function: Callable[..., object], *arguments: object) -> None:
        """From anywhere, finalizers included: call a function soon. Does nothing after the end or in a forked child.

        It takes no lock, because garbage is collected while any lock may be held.
        """
        if not self.forked:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function, *arguments)

    def flush(self) -> None:
        """From another thread: wait until all earlier calls of ``tell`` and ``hint`` were carried out.

        Raises:
            ClusterError: the thread has ended, or this is a forked child.
        """
        self.call(asyncio.sleep(0))

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """From the loop's thread: run a coroutine in the background. An exception of it is a bug (``report_bugs``)."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a bug in %s", task.get_coro(), exc_info=error)
                self._on_bug(error)

        task.add_done_callback(done)
        return task

    async def cancel_all(self) -> None:
        """Cancel all spawned coroutines, and wait until they have ended."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end(self) -> None:
        """From another thread: end the thread after all earlier calls. A second call does nothing."""
        with self._entry:
            if self._ended:
                return
            self._ended = True
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        """Cancel the calls that still wait, and stop the loop."""
        waiting = list(self._calls)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(0)  # calls that have ended just now tell their callers first
        self._loop.stop()

    def _handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report exceptions of callbacks; asyncio would only log them."""
        loop.default_exception_handler(context)
        if "handle" in context and context.get("exception") is not None:  # of a callback
            self._on_bug(context["exception"])


class Notifier:
    """Wakes coroutines that wait for conditions, as ``threading.Condition`` wakes threads. For one loop's thread."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        """Have all waiting coroutines look at their conditions again."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until a condition holds; returns False if it doesn't in time."""
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
