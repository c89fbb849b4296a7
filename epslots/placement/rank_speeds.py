"""``RankSpeeds``: how fast each rank computes, learned from the time that its work took. The controller calls it.

Work is what a usual rank would need for it, by the measured costs, so that a rank with more pairs, or with more pairs an
expert, isn't taken for a faster one. Speeds are relative, and change only if they clearly have: placements follow them.

Pure. Legend of shape suffixes: R ranks.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import FloatArray, IntArray
from epslots.load_window import LoadWindow
from epslots.planner.cost_model import Costs

USUAL = 1000
"""The speed of a usual rank."""
_MEMORY = 0.9  # a window's weight over the next one's
_LEAST_NS = 5e7  # computing, before a rank's speed is known: less is mostly noise
_CHANGED = 1.25  # a smaller change is taken for noise
_MOST = 16.0  # times that a rank is faster, or slower, than the usual one


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
        self._work_R, self._taken_R = np.zeros(ranks), np.zeros(ranks)  # of late
        self._seen_R = np.zeros(ranks)  # taken since the beginning

    def learn(self, work_ns_R: FloatArray, taken_ns_R: FloatArray) -> bool:
        """Learn from one window of all ranks; returns whether a speed has changed.

        Args:
            work_ns_R: float64, nanoseconds that a usual rank would compute for each rank's work, 0 or more.
            taken_ns_R: float64, nanoseconds that it took; 0 where that isn't known.
        """
        known_R = (taken_ns_R > 0) & (work_ns_R > 0)  # calls take time without work, too
        self._work_R = np.where(known_R, _MEMORY * self._work_R + work_ns_R, self._work_R)
        self._taken_R = np.where(known_R, _MEMORY * self._taken_R + taken_ns_R, self._taken_R)
        self._seen_R += np.where(known_R, taken_ns_R, 0)
        measured_R = (self._seen_R >= _LEAST_NS) & (self._work_R > 0)
        if not measured_R.any():
            return False
        rate_R = self._work_R[measured_R] / self._taken_R[measured_R]
        found_R = np.clip(rate_R / np.median(rate_R), 1 / _MOST, _MOST) * USUAL
        ratio_R = found_R / self.speed_R[measured_R]
        if ratio_R.max() <= _CHANGED and ratio_R.min() >= 1 / _CHANGED:
            return False
        self.speed_R = self.speed_R.copy()
        self.speed_R[measured_R] = np.maximum(1, np.rint(found_R)).astype(np.int64)
        return True
