"""``RankSpeeds``: how fast each rank computes, learned from the time that its work took. The controller calls it.

Work is what a usual rank would need for it, by the measured costs, so that a rank with more pairs, or with more pairs an
expert, isn't taken for a faster one. A call takes time besides, also with little work: ``taken = (work + calls x fixed) /
speed``. The fixed part isn't known, only its bounds: 0, and about the shortest calls with work that any rank had of late; one
without work returns at once, and tells nothing of it. So windows bound each speed from both sides: closely where a rank had
much work, hardly where it was nearly idle. A speed changes only as far as it has to, and only if it clearly has: placements
follow it.

Pure. Legend of shape suffixes: R ranks, B cases of the fixed part.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.load_window import LoadWindow
from epslots.planner.cost_model import Costs

USUAL = 1000
"""The speed of a usual rank."""
_MEMORY = 0.9  # a window's weight over the next one's
_LEAST_NS = 5e7  # computing, before a rank's speed is known: less is mostly noise
_CHANGED = 1.25  # a smaller change is taken for noise
_MOST = 16.0  # times that a rank is faster, or slower, than the usual one
_MOST_CALL_NS = 200_000.0  # fixed part of a call, before a shorter one was seen
_CALLS_VARY = 2.0  # times that a call's fixed part may be longer than that of the shortest
_CALLS_GROW = 1.01  # a window's shortest call over the next one's, until one as short comes again


def work_ns(window: LoadWindow, costs: Costs) -> float:
    """Nanoseconds that a usual rank would compute for the pairs and experts that a rank computed in a window."""
    pairs = int(np.frombuffer(window.tokens, "<i8").sum()) - sum(window.pairs_sent) + sum(window.pairs_received)
    return max(0, pairs) * costs.pair_compute + (sum(window.hits) + sum(window.misses)) * costs.expert_compute


def busy_calls(window: LoadWindow) -> int:
    """Calls of a window in which the rank had pairs to compute, at most. Each of them computed an expert, or several."""
    return sum(min(window.steps, hits + misses) for hits, misses in zip(window.hits, window.misses, strict=True))


class RankSpeeds:
    """The speeds of one group's ranks.

    Attributes:
        speed_R: int64, ``USUAL`` for a usual rank, and for one whose speed isn't known.
    """

    def __init__(self, ranks: int) -> None:
        self.speed_R: IntArray = np.full(ranks, USUAL)
        self._work_R, self._taken_R, self._calls_R, self._busy_R = (np.zeros(ranks) for _ in range(4))  # of late
        self._seen_R = np.zeros(ranks)  # taken since the beginning
        self._shortest_ns = _MOST_CALL_NS
        """The shortest mean call with work of a window, as a usual rank would have made it."""

    def learn(self, work_ns_R: FloatArray, taken_ns_R: FloatArray, calls: int, busy_calls_R: IntArray) -> bool:
        """Learn from one window of all ranks; returns whether a speed has changed.

        Args:
            work_ns_R: float64, nanoseconds that a usual rank would compute for each rank's work, 0 or more.
            taken_ns_R: float64, nanoseconds that it took; 0 where that isn't known.
            calls: of each rank, 1 or more; those without work are calls, too.
            busy_calls_R: int64, those with work, at most.
        """
        known_R = (taken_ns_R > 0) & (work_ns_R > 0)
        if known_R.any():
            call_ns_R = taken_ns_R * self.speed_R / USUAL / np.maximum(busy_calls_R, 1)
            self._shortest_ns = min(_CALLS_GROW * self._shortest_ns, _MOST_CALL_NS, float(call_ns_R[known_R].min()))
        self._work_R = np.where(known_R, _MEMORY * self._work_R + work_ns_R, self._work_R)
        self._taken_R = np.where(known_R, _MEMORY * self._taken_R + taken_ns_R, self._taken_R)
        self._calls_R = np.where(known_R, _MEMORY * self._calls_R + calls, self._calls_R)
        self._busy_R = np.where(known_R, _MEMORY * self._busy_R + busy_calls_R, self._busy_R)
        self._seen_R += np.where(known_R, taken_ns_R, 0)
        measured_R = (self._seen_R >= _LEAST_NS) & (self._work_R > 0)
        if not measured_R.any():
            return False
        least_R, most_R = self._bounds(measured_R)
        found_R = np.clip(self.speed_R[measured_R], least_R, most_R)
        ratio_R = found_R / self.speed_R[measured_R]
        if ratio_R.max() <= _CHANGED and ratio_R.min() >= 1 / _CHANGED:
            return False
        self.speed_R = self.speed_R.copy()
        self.speed_R[measured_R] = np.maximum(1, np.rint(found_R)).astype(np.int64)
        return True

    def _bounds(self, measured_R: BoolArray) -> tuple[FloatArray, FloatArray]:
        """The least and the greatest speed of each measured rank.

        Over three cases: no call has a fixed part, those with work have the longest, or all calls have the longest.
        """
        calls_BR = np.stack([np.zeros(len(measured_R)), self._busy_R, self._calls_R])[:, measured_R]
        needed_BR = self._work_R[measured_R] + min(_CALLS_VARY * self._shortest_ns, _MOST_CALL_NS) * calls_BR
        rate_BR = needed_BR / self._taken_R[measured_R]
        speed_BR = np.clip(rate_BR / np.median(rate_BR, axis=1, keepdims=True), 1 / _MOST, _MOST) * USUAL
        return speed_BR.min(0), speed_BR.max(0)
