"""How soon experts are used again, and what that says about slots: stack distances and miss-ratio curves.

A policy orders a layer's experts by score. An expert's *stack distance* is the number of experts that stand above it when it
is used. A cache of s slots holds the s highest, so uses of a distance below s hit, and one pass over a trace tells the misses
for every number of slots at once (Mattson et al., IBM Systems Journal 1970).

By the time of last use that is the number of other experts used since, and the curve is exactly what an LRU cache misses, as
long as no step uses more experts than it has slots. By the scores of another policy it is close to what that one misses: what
the last step used stands above all else, because it must have had a slot, whatever its score; the rest stands by score. Steps
count as a whole; experts of the same score stand in the order of their ids, in which they are given up (``cache_policy.py``).

Scores are kept anyway and are exact, so measuring some of the steps only, say one layer a step, samples uses without bias.
(SHARDS, Waldspurger et al., FAST 2015, samples *what* is cached instead, to save keeping times of use.)

Pure. Legend of shape suffixes: L layers, E experts of the layer, D = E + 1 stack distances (E: never used before).
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.compiled import compiled


def stack_distances(last_use_E: IntArray, used_E: BoolArray, score_E: IntArray | None = None) -> IntArray:
    """The stack distance of each use in one step of one layer, int64 [uses], by expert id.

    Args:
        last_use_E: the step of each expert's last use before this one, 0 = never (``UseHistory.last_use``).
        used_E: the experts that the step uses.
        score_E: the policy's scores before this step; those of LRU, if not given.

    Returns:
        For each used expert the number of experts that stand above it: 0 to E - 1; or E if it was never used before.
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
    """Enter the distances of a step into a layer's histogram, in place.

    Args:
        histogram_D: int64 [E + 1] of a layer with E experts, or longer (a row of an array over layers): the rest stays.
    """
    counts = np.bincount(distances)
    histogram_D[: len(counts)] += counts


def misses_by_slots(histogram_D: IntArray) -> IntArray:
    """The uses that would have missed with 0, 1, .. E slots, int64 [E + 1]. All with none; with E the first uses alone."""
    misses: IntArray = histogram_D[::-1].cumsum()[::-1]
    return misses


def miss_ratio_curve(histogram_D: IntArray) -> FloatArray:
    """Misses per use with 0, 1, .. E slots, float [E + 1]; zeros where nothing was used."""
    misses = misses_by_slots(histogram_D)
    ratios: FloatArray = misses / max(1, int(misses[0]))
    return ratios


def percentile(histogram_D: IntArray, share: float) -> int:
    """The least distance that ``share`` (0 to 1) of the uses don't exceed; 0 where nothing was used."""
    running = histogram_D.cumsum()
    return int(running.searchsorted(share * running[-1]))
