"""From the cluster's threads to asyncio. One reader takes all choices of an API request, without a thread of its own.

A reader keeps no queue. New tokens wait in the generation, which holds a request's tokens anyway, and as many as the
request may have; a reader that is late finds them as one larger portion.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from cluster.serve.errors import ApiError, unavailable
from cluster.serve.part_pace import PartPace
from epslots.errors import EpslotsError
from epslots.generation.portions import Portion


class Poll(Protocol):
    """One choice's continuation, without waiting: ``StreamReader`` of ``Generation.poll``."""

    def __next__(self) -> Portion | None: ...
    @property
    def close(self) -> Callable[[], object]: ...


class PolledGeneration(Protocol):
    """One choice of a prompt that is being continued."""

    def poll(self, on_news: Callable[[bool], None], *, special_tokens: bool = False, whole: bool = False) -> Poll: ...


class ClientLeft(Exception):
    """The client isn't there any more."""


class NewsRelay:
    """Wakes readers in an asyncio loop's thread for other threads: at once for all news that come together.

    Args:
        loop: the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waited_for: dict[Callable[[], None], None] = {}
        self._others: dict[Callable[[], None], None] = {}
        self._pace = PartPace()

    def tell(self, wake: Callable[[], None], waited_for: bool) -> None:
        """From any thread: have a function called, once.

        Args:
            waited_for: soon; else when the pace of streams' parts allows it.
        """
        due, deliver = (self._waited_for, self._deliver) if waited_for else (self._others, self._deliver_at_pace)
        with self._lock:
            first = not due
            due[wake] = None
        if first:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(deliver)

    def _deliver(self) -> None:
        with self._lock:
            due, self._waited_for = self._waited_for, {}
        for wake in due:
            wake()

    def _deliver_at_pace(self) -> None:
        if (wait_s := self._pace.wait_s(self._loop.time())) > 0:
            self._loop.call_later(wait_s, self._deliver_at_pace)
            return
        with self._lock:
            due, self._others = self._others, {}
        self._pace.delivered(self._loop.time(), len(due))
        for wake in due:
            wake()


class _Alarms:
    """Two timers of a reader that cost nothing while news come: the one for silence looks at the clock when it rings.

    Args:
        keepalive_s: seconds of silence after which ``on_silence`` is called; None = never.
        ends_s: on the loop's clock, when ``on_end`` is called; None = never.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        keepalive_s: float | None,
        on_silence: Callable[[], None],
        ends_s: float | None,
        on_end: Callable[[], None],
    ) -> None:
        self._loop, self._keepalive_s, self._on_silence = loop, keepalive_s, on_silence
        self._heard_s = loop.time()
        self._end = None if ends_s is None else loop.call_at(ends_s, on_end)
        self._silence = None if keepalive_s is None else loop.call_later(keepalive_s, self._look)

    def heard(self, now_s: float) -> None:
        """There was news."""
        self._heard_s = now_s

    def _look(self) -> None:
        assert self._keepalive_s is not None
        now_s = self._loop.time()
        if now_s - self._heard_s >= self._keepalive_s:
            self._heard_s = now_s
            self._on_silence()
        self._silence = self._loop.call_at(self._heard_s + self._keepalive_s, self._look)

    def stop(self) -> None:
        """Ring no more."""
        for timer in (self._end, self._silence):
            if timer is not None:
                timer.cancel()


class ChoiceReader:
    """Reads the choices of one API request, in the order of their news.

    Args:
        relay: of this loop.
        generations: the choices.
        special_tokens: texts have special tokens, too.
        whole: no portion is read before the end: choices bring their first one, and then the rest as one.
        timeout_s: seconds from now in which all must be done; None = any.
    """

    def __init__(
        self,
        relay: NewsRelay,
        generations: Sequence[PolledGeneration],
        *,
        special_tokens: bool = False,
        whole: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends_s = None if timeout_s is None else self._loop.time() + timeout_s
        self._timeout_s = timeout_s
        self._news = asyncio.Event()
        self._news.set()  # what came before this reader
        self._quiet = False
        """Whether a keep-alive is due."""
        self._end: Exception | None = None
        on_news = partial(relay.tell, self._news.set)
        self._polls: dict[int, Poll] = {
            number: generation.poll(on_news, special_tokens=special_tokens, whole=whole)
            for number, generation in enumerate(generations)
        }

    async def portions(self, keepalive_s: float | None = None) -> AsyncIterator[list[tuple[int, Portion]]]:
        """The new portions, until all choices are done: pairs of a choice and its next portion.

        Args:
            keepalive_s: seconds without news after which an empty list is returned.

        Raises (the iterator):
            ClientLeft: after ``leave``.
            ApiError: after ``fail``; or the request took too long, or was cancelled elsewhere.
            ClusterError: the cluster can't go on, or the request failed.
        """
        alarms = _Alarms(self._loop, keepalive_s, self._keep_alive, self._ends_s, self._time_out)
        try:
            while self._polls:
                await self._news.wait()
                self._news.clear()
                if self._end is not None:
                    raise self._end
                found = [(choice, portion) for choice in list(self._polls) for portion in self._take(choice)]
                if found or self._quiet:
                    self._quiet = False
                    alarms.heard(self._loop.time())
                    yield found
        finally:
            alarms.stop()
            self.close()

    @property
    def done(self) -> bool:
        """Whether no portion follows those that were returned."""
        return not self._polls

    def _take(self, choice: int) -> list[Portion]:
        """A choice's new portions; an error that follows them ends the reading after them."""
        poll, found = self._polls[choice], []
        try:
            while (portion := next(poll)) is not None:
                if portion.reason is None:
                    found.append(portion)
                elif portion.reason in ("stop", "length"):
                    found.append(portion)
                    self._polls.pop(choice).close()
                    break
                else:  # an error follows
                    found.append(replace(portion, reason=None))
        except StopIteration:  # somebody cancelled the request, and not through this reader
            self.fail(unavailable("the request was cancelled"))
        except EpslotsError as error:
            self.fail(error)
        return found

    def _keep_alive(self) -> None:
        self._quiet = True
        self._news.set()

    def _time_out(self) -> None:
        self.fail(ApiError(504, f"the request took more than {self._timeout_s:g} s", code="timeout"))

    def leave(self) -> None:
        """The client has left."""
        self.fail(ClientLeft())

    def fail(self, error: Exception) -> None:
        """End the reading with an error; the first one counts."""
        self._end = self._end or error
        self._news.set()

    def close(self) -> None:
        """Cancel the choices that aren't done."""
        for poll in self._polls.values():
            poll.close()
        self._polls.clear()
