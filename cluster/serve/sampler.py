"""``Sampler``: an answer that takes a while, asked for only while it is looked at, and not too often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from epslots.errors import EpslotsError

FRESH_S = 0.9
"""A little less than the live page's second: each of its looks finds new numbers."""
ANSWER_S = 2.0
logger = logging.getLogger("epslots.serve")
Answer = TypeVar("Answer")


class Sampler(Generic[Answer]):
    """Asks in a thread, because every rank answers at the end of its step. For one loop; callers share an answer.

    Args:
        ask: returns the answer; may wait.
        fresh_s: seconds in which an answer counts as new.

    Attributes:
        latest: the last answer; None before the first.
        latest_s: when it came, by ``time.monotonic``.
    """

    def __init__(self, ask: Callable[[], Answer], *, fresh_s: float = FRESH_S) -> None:
        self._ask, self._fresh_s = ask, fresh_s
        self._thread = ThreadPoolExecutor(1, "epslots-sampler")
        self._asking: asyncio.Future[Answer] | None = None
        self._asked_s = float("-inf")
        self.latest: Answer | None = None
        self.latest_s = float("-inf")

    async def sample(self, answer_s: float = ANSWER_S) -> Answer | None:
        """The answer, new if it comes in time; None before the first.

        Args:
            answer_s: seconds to wait for it.
        """
        self.refresh()
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=answer_s)
        return self.latest

    def refresh(self) -> None:
        """Ask, unless the answer is new or awaited already; ``latest`` has it when it comes."""
        if self._asking is None and time.monotonic() - self._asked_s >= self._fresh_s:
            self._asked_s = time.monotonic()
            self._asking = asyncio.get_running_loop().run_in_executor(self._thread, self._ask)
            self._asking.add_done_callback(self._take)

    @property
    def age_s(self) -> float | None:
        """Seconds since the last answer came; None before the first."""
        return None if self.latest is None else time.monotonic() - self.latest_s

    def _take(self, asked: asyncio.Future[Answer]) -> None:
        self._asking = None
        if asked.cancelled():
            return
        error = asked.exception()
        if error is None:
            self.latest, self.latest_s = asked.result(), time.monotonic()
        elif not isinstance(error, EpslotsError):
            logger.error("the cluster can't be asked", exc_info=error)

    def close(self) -> None:
        """Ask no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
