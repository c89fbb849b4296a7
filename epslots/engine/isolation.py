"""Which requests a failed step is made again with, until the requests that fail by themselves are known.

    isolation = Isolation(batch)
    while not isolation.done:
        ... run isolation.part, then
        isolation.passed()                # its requests have made their step
        guilty = isolation.failed()       # or: it is split; a request that failed by itself comes out

Pure. A batcher makes one for every batch: a batch that passes as a whole is the usual case, and costs nothing. A failed part
is halved, so that one guilty request of N costs about 2 log2(N) further forward passes, and all others make their step on the
way. Where a failure is dear (a group of ranks breaks), the requests are run one by one instead: then each guilty request
breaks it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Isolation(Generic[T]):
    """The parts of one batch that are yet to make their step.

    Args:
        batch: at least one request.
    """

    def __init__(self, batch: Sequence[T]) -> None:
        assert batch, "an empty batch is no step"
        self._parts = [list(batch)]
        self._whole = True

    @property
    def done(self) -> bool:
        """Whether every request has made its step, or failed by itself."""
        return not self._parts

    @property
    def split(self) -> bool:
        """Whether the batch has failed as a whole."""
        return not self._whole

    @property
    def part(self) -> list[T]:
        """The requests that are run next."""
        return self._parts[-1]

    def passed(self) -> None:
        """The part has made its step."""
        self._parts.pop()

    def failed(self, *, singly: bool = False) -> T | None:
        """The part has failed; returns its request if that is guilty.

        A request is guilty when it fails by itself, in a second attempt: a batch of one is repeated once.

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
