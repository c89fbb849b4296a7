"""``QueueRoom``: how many requests may wait or run at once; ``HeldPlaces``: places of requests that are yet to be made."""

from __future__ import annotations

import threading
from collections import deque


class QueueRoom:
    """Places for requests. A prompt's choices get their places together or none; waiting callers in the order of asking.

    For any thread, but not for finalizers: it takes a lock.

    Args:
        places: requests that may wait or run at once.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._free = places
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def free(self) -> int:
        """Places that are free now."""
        return self._free

    def take(self, count: int, *, wait: bool) -> bool:
        """Take places; returns whether there were as many. Callers that wait come first.

        Args:
            count: at most ``places``.
            wait: until there are.
        """
        assert 0 < count <= self.places
        with self._changed:
            if not wait:
                return not self._waiting and self._take(count)
            this_call = object()
            self._waiting.append(this_call)
            try:
                return self._changed.wait_for(lambda: self._waiting[0] is this_call and self._take(count))
            finally:
                self._waiting.remove(this_call)
                self._changed.notify_all()

    def hold(self, count: int) -> HeldPlaces | None:
        """Places for a caller that doesn't have its requests yet; None if there aren't as many now."""
        return HeldPlaces(self, count) if self.take(count, wait=False) else None

    def _take(self, count: int) -> bool:
        if count > self._free:
            return False
        self._free -= count
        return True

    def give(self, count: int = 1) -> None:
        """Give places back."""
        with self._changed:
            self._free += count
            assert self._free <= self.places
            self._changed.notify_all()


class HeldPlaces:
    """Places that one caller has taken, and that its requests then use. For any thread.

    A used place goes back to the room when its request is done; the others go back with ``close``.

    Args:
        room: the places are its.
        count: of them.
    """

    def __init__(self, room: QueueRoom, count: int) -> None:
        self._room, self._unused = room, count
        self._lock = threading.Lock()

    def use(self, count: int) -> bool:
        """Use some; returns whether as many are left."""
        with self._lock:
            if count > self._unused:
                return False
            self._unused -= count
            return True

    def close(self) -> None:
        """Give the unused ones back. A second call does nothing."""
        with self._lock:
            unused, self._unused = self._unused, 0
        self._room.give(unused)
