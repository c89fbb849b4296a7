"""Calls of Ray that ask the cluster's head, each with a thread and a deadline. Without a head none returns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from cluster.errors import ClusterError

ANSWER_S = 15.0
CALL_THREAD = "epslots-ray-call"
"""Name of the threads that make these calls."""

_MOST_LATE = 16
_late: set[Future[Any]] = set()
"""Calls whose deadline has passed; changed only by ``add`` and ``discard``, which are atomic."""

Value = TypeVar("Value")


@contextmanager
def refusals() -> Iterator[None]:
    """Turn every error of Ray into a ClusterError: Ray documents no list of those that it raises while it ends."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        raise ClusterError(f"Ray refuses: {type(error).__name__}: {error}") from error


async def ask(function: Callable[..., Value], *arguments: object, deadline_s: float = ANSWER_S) -> Value:
    """The result of a call.

    Raises:
        ClusterError: Ray doesn't answer in time, or raises an error; or the call itself raises a ClusterError.
    """
    answer = begin(function, *arguments)
    try:
        async with asyncio.timeout(deadline_s):
            return await asyncio.wrap_future(answer)
    except TimeoutError:
        _late.add(answer)
        answer.add_done_callback(_late.discard)
        raise ClusterError(f"Ray did not answer within {deadline_s:g} s; its head may be gone") from None


def begin(function: Callable[..., Value], *arguments: object) -> Future[Value]:
    """Start a call in a thread of its own, which doesn't keep the process from ending.

    Raises:
        ClusterError: many calls are stuck already.
    """
    if len(_late) >= _MOST_LATE:
        raise ClusterError(f"Ray does not answer: {len(_late)} calls wait for its head, which may be gone")
    answer: Future[Value] = Future()
    answer.set_running_or_notify_cancel()  # a caller that gives up doesn't cancel it

    def call() -> None:
        try:
            with refusals():
                answer.set_result(function(*arguments))
        except ClusterError as error:
            answer.set_exception(error)

    threading.Thread(target=call, name=CALL_THREAD, daemon=True).start()
    return answer
