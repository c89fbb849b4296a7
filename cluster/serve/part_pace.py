"""``PartPace``: when streams get their next parts. Pure decisions; ``bridge.py`` waits accordingly."""

from __future__ import annotations

_EACH_S = 0.001
"""A part of a stream costs the service's one thread about 0.1 ms of processor time, however many tokens it has: with so much
time for each, parts take a tenth of that thread. Many streams get larger parts then, and not more of them."""
_MOST_S = 0.1
"""The longest that a token waits for that."""


class PartPace:
    """Spaces out the deliveries of parts, by the number of streams that got one."""

    def __init__(self) -> None:
        self._due_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next delivery; 0 = now."""
        return max(0.0, self._due_s - now_s)

    def delivered(self, now_s: float, streams: int) -> None:
        """Note that so many streams have got a part."""
        self._due_s = now_s + min(_MOST_S, streams * _EACH_S)
