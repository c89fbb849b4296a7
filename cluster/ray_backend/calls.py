"""Ray's calls that ask the cluster's head. Without one they never return: each has a thread of its own, and a deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from cluster.errors import ClusterError

ANSWER_S = 15.0
CALL = "epslots-ray-call"
"""Name of the threads that wait for Ray."""

_MOST_LATE = 16
_late: set[Future[Any]] = set()
"""Calls that nobody waits for any more; changed by ``add`` and ``discard`` alone, which are atomic."""

Result = TypeVar("Result")


@contextmanager
def refusals() -> Iterator[None]:
    """Whatever Ray raises as an error of ours: which kinds there are when it is about to end, it doesn't say."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        raise ClusterError(f"Ray refuses: {type(error).__name__}: {error}") from error


async def ask(function: Callable[..., Result], *arguments: object, deadline_s: float = ANSWER_S) -> Result:
    """The result of a call.

    Raises:
        ClusterError: Ray doesn't answer in time, or refuses; or an error of ours that the call raises.
    """
    answer = begin(function, *arguments)
    try:
        async with asyncio.timeout(deadline_s):
            return await asyncio.wrap_future(answer)
    except TimeoutError:
        _late.add(answer)
        answer.add_done_callback(_late.discard)
        raise ClusterError(f"Ray did not answer within {deadline_s:g} s; its head may be gone") from None


def begin(function: Callable[..., Result], *arguments: object) -> Future[Result]:
    """Begin a call in a thread of its own, which doesn't keep the process from ending.

    Raises:
        ClusterError: so many calls are stuck that another would be too.
    """
    if len(_late) >= _MOST_LATE:
        raise ClusterError(f"Ray does not answer: {len(_late)} calls wait for its head, which may be gone")
    answer: Future[Result] = Future()
    answer.set_running_or_notify_cancel()  # a caller that gives up doesn't cancel it

    def call() -> None:
        try:
            with refusals():
                answer.set_result(function(*arguments))
        except ClusterError as error:
            answer.set_exception(error)

    threading.Thread(target=call, name=CALL, daemon=True).start()
    return answer
