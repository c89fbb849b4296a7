"""``Sampler``: the ranks' counters, asked for while somebody looks at them, and at most once a second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cluster.reports import ClusterStats
from epslots.errors import EpslotsError

FRESH_S = 1.0
ANSWER_S = 2.0
logger = logging.getLogger("epslots.serve")


class Sampler:
    """Asks for the counters in a thread, because every rank answers at the end of its step. For one loop.

    Args:
        ask: returns the counters; may wait.
        fresh_s: seconds in which an answer counts as new.
        answer_s: seconds after which the last answer is returned instead.
        clock: seconds.
    """

    def __init__(
        self,
        ask: Callable[[], ClusterStats],
        *,
        fresh_s: float = FRESH_S,
        answer_s: float = ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._fresh_s, self._answer_s, self._clock = ask, fresh_s, answer_s, clock
        self._thread = ThreadPoolExecutor(1, "epslots-sampler")
        self._asking: asyncio.Future[ClusterStats] | None = None
        self._asked_s = float("-inf")
        self.latest: ClusterStats | None = None

    async def sample(self) -> ClusterStats | None:
        """The counters, new if the ranks answer in time; None before their first answer."""
        if self._asking is None and self._clock() - self._asked_s >= self._fresh_s:
            self._asked_s = self._clock()
            self._asking = asyncio.get_running_loop().run_in_executor(self._thread, self._ask)
            self._asking.add_done_callback(self._take)
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=self._answer_s)
        return self.latest

    def _take(self, asked: asyncio.Future[ClusterStats]) -> None:
        self._asking = None
        if asked.cancelled():
            return
        error = asked.exception()
        if error is None:
            self.latest = asked.result()
        elif not isinstance(error, EpslotsError):
            logger.error("the ranks' counters can't be read", exc_info=error)

    def close(self) -> None:
        """Ask no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
