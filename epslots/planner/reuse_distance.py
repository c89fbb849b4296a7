"""Stack distances of expert uses, and the miss-ratio curves over slots that follow from them.

An expert's *stack distance* is the number of experts with a higher score when it is used. A cache of s slots holds the s
highest, so uses of a distance below s hit, and one pass over a trace gives the misses for every number of slots (Mattson et
al., IBM Systems Journal 1970). By LRU's scores the curve is exact, as long as no step uses more experts than there are slots;
by another policy's scores it is close. Scores are exact at any time, so measuring one layer a step samples uses without bias.
(SHARDS, Waldspurger et al., FAST 2015, samples the cached items instead, to save keeping times of use.)

``telemetry.py`` and the simulator count distances; ``placement/slot_quotas.py`` deals slots by them.

Pure. Legend of shape suffixes: L layers, E experts of the layer, D = E + 1 stack distances (E: never used before).
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.compiled import compiled


def stack_distances(last_use_E: IntArray, used_E: BoolArray, score_E: IntArray | None = None) -> IntArray:
    """The stack distance of each use in one step of one layer, int64 [uses], by expert id.

    It is 0 to E - 1: the number of experts above the used one; or E if that was never used before. Experts of the last step
    stand above all others, because they had slots at any score; the others are ordered by score, ties by expert id, as
    policies evict.

    Args:
        last_use_E: the step of each expert's last use before this one, 0 = never (``UseHistory.last_use``).
        used_E: the experts that the step uses.
        score_E: the policy's scores before this step; LRU's, if not given.
    """
    distances = np.empty(np.count_nonzero(used_E), np.int64)
    _stack_distances(last_use_E, used_E, last_use_E if score_E is None else score_E, distances)
    return distances


@compiled("void(int64[::1], b1[::1], int64[::1], int64[::1])")
def _stack_distances(last_use_E: IntArray, used_E: BoolArray, score_E: IntArray, distances: IntArray) -> None:
    experts, place = len(last_use_E), 0
    last = last_use_E.max() if experts else 0
    for used in range(experts):
        if not used_E[used]:
            continue
        above = 0
        for expert in range(experts):
            if (last_use_E[expert] == last) != (last_use_E[used] == last):
                above += last_use_E[expert] == last
            else:
                above += score_E[expert] > score_E[used] or (score_E[expert] == score_E[used] and expert > used)
        distances[place] = above if last_use_E[used] else experts
        place += 1


def count_distances(histogram_D: IntArray, distances: IntArray) -> None:
    """Count a step's distances in a layer's histogram, in place.

    Args:
        histogram_D: int64 [E + 1] of a layer with E experts; or longer, where the rest stays untouched.
        distances: int64 [uses], of ``stack_distances``.
    """
    counts = np.bincount(distances)
    histogram_D[: len(counts)] += counts


def misses_by_slots(histogram_D: IntArray) -> IntArray:
    """Misses with 0, 1, .. E slots, int64 [E + 1]: all uses with 0 slots, first uses only with E."""
    misses: IntArray = histogram_D[::-1].cumsum()[::-1]
    return misses


def miss_ratio_curve(histogram_D: IntArray) -> FloatArray:
    """Misses per use with 0, 1, .. E slots, float [E + 1]; zeros where nothing was used."""
    misses = misses_by_slots(histogram_D)
    ratios: FloatArray = misses / max(1, int(misses[0]))
    return ratios


def percentile(histogram_D: IntArray, share: float) -> int:
    """The smallest distance that a share (0 to 1) of the uses doesn't exceed; 0 where nothing was used."""
    running = histogram_D.cumsum()
    return int(running.searchsorted(share * running[-1]))
