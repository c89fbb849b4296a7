"""An asyncio loop in a thread of its own, and the ways in from other threads and between its coroutines."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

logger = logging.getLogger("epslots.cluster")

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines; its thread starts at once and ends with ``end``."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def begin(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """From another thread: have a coroutine run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Future[Result]) -> Result:
        """From another thread: wait for the result of what was begun. If the waiting is interrupted, it is cancelled."""
        try:
            return work.result()
        except BaseException:
            work.cancel()
            raise

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """From another thread: run a coroutine, and wait for its result."""
        return self.wait(self.begin(work))

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """From another thread: have a function called, soon."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def spawn(self, work: Coroutine[Any, Any, object], on_bug: Callable[[BaseException], None]) -> asyncio.Task[Any]:
        """From the loop's thread: run a coroutine beside. What it raises is a bug, and told."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a bug in %s", task.get_coro(), exc_info=error)
                on_bug(error)

        task.add_done_callback(done)
        return task

    async def cancel_all(self) -> None:
        """Cancel what was spawned, and wait until it has ended."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end(self) -> None:
        """From another thread: end the thread. Twice is once."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


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
