"""``RankSpeeds``: how fast each rank computes, learned from the time that its work took. The controller calls it.

Work is what a usual rank would need for it, by the measured costs, so that a rank with more pairs, or with more pairs an
expert, isn't taken for a faster one. A call takes time besides, whatever it computes: ``taken = (work + calls x fixed) /
speed``. The fixed part isn't known, only its bounds: 0, and about the shortest calls that any rank had. So windows bound each
speed from both sides: closely where a rank had much work, hardly where it was nearly idle. A speed changes only as far as it
has to, and only if it clearly has: placements follow it.

Pure. Legend of shape suffixes: R ranks, B bounds of the fixed part.
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


def work_ns(window: LoadWindow, costs: Costs) -> float:
    """Nanoseconds that a usual rank would compute for the pairs and experts that a rank computed in a window."""
    pairs = int(np.frombuffer(window.tokens, "<i8").sum()) - sum(window.pairs_sent) + sum(window.pairs_received)
    return max(0, pairs) * costs.pair_compute + (sum(window.hits) + sum(window.misses)) * costs.expert_compute


class RankSpeeds:
    """The speeds of one group's ranks.

    Attributes:
        speed_R: int64, ``USUAL`` for a usual rank, and for one whose speed isn't known.
    """

    def __init__(self, ranks: int) -> None:
        self.speed_R: IntArray = np.full(ranks, USUAL)
        self._work_R, self._taken_R, self._calls_R = (np.zeros(ranks) for _ in range(3))  # of late
        self._seen_R = np.zeros(ranks)  # taken since the beginning
        self._shortest_ns = _MOST_CALL_NS
        """The shortest mean call of a window, as a usual rank would have made it."""

    def learn(self, work_ns_R: FloatArray, taken_ns_R: FloatArray, calls: int) -> bool:
        """Learn from one window of all ranks; returns whether a speed has changed.

        Args:
            work_ns_R: float64, nanoseconds that a usual rank would compute for each rank's work, 0 or more.
            taken_ns_R: float64, nanoseconds that it took; 0 where that isn't known.
            calls: in which each rank computed, 1 or more; those without work are calls, too.
        """
        if (timed_R := taken_ns_R > 0).any():
            usual_ns_R = taken_ns_R * self.speed_R / USUAL / calls
            self._shortest_ns = min(self._shortest_ns, float(usual_ns_R[timed_R].min()))
        known_R = timed_R & (work_ns_R > 0)
        self._work_R = np.where(known_R, _MEMORY * self._work_R + work_ns_R, self._work_R)
        self._taken_R = np.where(known_R, _MEMORY * self._taken_R + taken_ns_R, self._taken_R)
        self._calls_R = np.where(known_R, _MEMORY * self._calls_R + calls, self._calls_R)
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
        """The least and the greatest speed of each measured rank: by calls without and with the longest fixed part."""
        fixed_B = np.array([0.0, min(_CALLS_VARY * self._shortest_ns, _MOST_CALL_NS)])
        needed_BR = self._work_R[measured_R] + fixed_B[:, None] * self._calls_R[measured_R]
        rate_BR = needed_BR / self._taken_R[measured_R]
        speed_BR = np.clip(rate_BR / np.median(rate_BR, axis=1, keepdims=True), 1 / _MOST, _MOST) * USUAL
        return speed_BR.min(0), speed_BR.max(0)
