"""Fault isolation: repeats a failed step in parts of its batch until the requests that fail alone are found. Pure.

    isolation = Isolation(batch)
    while not isolation.done:
        ... run isolation.part, then
        isolation.passed()                # its requests have made their step
        faulty = isolation.failed()       # or: it is split; returns a request that failed alone

A batcher makes one for every batch; a batch that passes as a whole costs nothing. A failed part is halved: one faulty request
of N costs about 2 log2(N) further forward passes, and all others make their step on the way. Where a failure is expensive (a
group of ranks breaks), the requests are run one by one instead: each faulty request then breaks the group once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Isolation(Generic[T]):
    """The parts of one batch that still have to make their step.

    Args:
        batch: at least one request.
    """

    def __init__(self, batch: Sequence[T]) -> None:
        assert batch, "an empty batch is no step"
        self._parts = [list(batch)]
        self._whole = True

    @property
    def done(self) -> bool:
        """Whether every request has made its step, or failed alone."""
        return not self._parts

    @property
    def split(self) -> bool:
        """Whether the batch has failed as a whole."""
        return not self._whole

    @property
    def part(self) -> list[T]:
        """The requests to run next."""
        return self._parts[-1]

    def passed(self) -> None:
        """The part has made its step."""
        self._parts.pop()

    def failed(self, *, singly: bool = False) -> T | None:
        """The part has failed: split it, or return its request if that is faulty.

        A request is faulty when it fails alone, in a second attempt: a batch of one is repeated once.

        Args:
            singly: split into single requests, not into halves.
        """
        part = self._parts.pop()
        if len(part) == 1 and not self._whole:
            return part[0]
        self._whole = False
        size = 1 if singly else -(-len(part) // 2)
        parts = [part[start : start + size] for start in range(0, len(part), size)]
        self._parts += reversed(parts)
        return None
