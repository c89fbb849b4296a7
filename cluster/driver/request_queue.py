"""``RequestQueue``: requests that wait for a rank, in the order of their turns, in two lines. Pure.

Where groups have roles, a short prompt may be computed where it decodes, and doesn't wait behind long ones for another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush

from cluster.driver.scheduled_request import ScheduledRequest


class WaitingLine:
    """Some of the waiting requests; the first one is found in log(requests)."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], ScheduledRequest]] = []
        """By turns; requests that wait no more, since they were ended, are still in it."""
        self._waiting: set[ScheduledRequest] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        return iter(self._waiting)

    def add(self, entry: ScheduledRequest) -> None:
        """A request waits from now on."""
        if len(self._heap) > 2 * len(self._waiting) + 64:  # of those that were ended
            self._heap = [(waiting.turn, waiting) for waiting in self._waiting]
            heapify(self._heap)
        heappush(self._heap, (entry.turn, entry))
        self._waiting.add(entry)

    def discard(self, entry: ScheduledRequest) -> None:
        """A request waits no more."""
        self._waiting.discard(entry)

    def first(self) -> ScheduledRequest | None:
        """The request whose turn it is; None if none waits."""
        while self._heap:
            if (entry := self._heap[0][1]) in self._waiting:
                return entry
            heappop(self._heap)
        return None


class RequestQueue:
    """All waiting requests.

    Args:
        is_short: whether a request's prompt may be computed where it decodes.
    """

    def __init__(self, is_short: Callable[[ScheduledRequest], bool]) -> None:
        self._is_short = is_short
        self._short, self._long = WaitingLine(), WaitingLine()

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        yield from self._short
        yield from self._long

    def add(self, entry: ScheduledRequest) -> None:
        """A request waits from now on, in one of the lines for good."""
        (self._short if self._is_short(entry) else self._long).add(entry)

    def discard(self, entry: ScheduledRequest) -> None:
        """A request waits no more."""
        self._short.discard(entry)
        self._long.discard(entry)

    def lines(self) -> list[WaitingLine]:
        """The lines in which requests wait."""
        return [line for line in (self._short, self._long) if len(line)]

    def divide(self) -> None:
        """Judge all anew: the ranks that decode have come."""
        waiting = list(self)
        self.clear()
        for entry in waiting:
            self.add(entry)

    def clear(self) -> None:
        """Drop all waiting requests."""
        self._short, self._long = WaitingLine(), WaitingLine()


def next_in_turn(lines: Iterable[WaitingLine]) -> tuple[WaitingLine, ScheduledRequest] | None:
    """The next request in turn of some lines, and its line; None if none waits."""
    firsts = [(line, entry) for line in lines if (entry := line.first()) is not None]
    return min(firsts, key=lambda found: found[1].turn, default=None)
