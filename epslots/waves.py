"""The plan of one layer on one rank: what is computed when, what is fetched into which slot, and what gives way.

Pure: integer arrays in, integer arrays out. A layer owns a *window* of ``quota`` neighbouring slots; positions here count
from the window's start. With at least as many slots as needed experts the plan is one wave. With fewer, the layer runs in
waves, and once an expert is computed its slot may serve the next one.

In a plan of several waves every expert that the policy scores highest should still be resident at the end, or a single
long prompt would empty the cache of what decoding lives on. So the slots of the highest-scored residents are *anchored*,
and the misses pass through the other, *rotating* slots in order of rising score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.eviction import IntArray

# At least one in so many slots rotates, so that anchoring can't stretch a layer into a wave per expert.
ROTATING_SHARE = 4


@dataclass(frozen=True)
class Wave:
    """One pass over part of a layer's experts. ``fetch_*`` arrays run in parallel, in the order of fetching.

    Attributes:
        experts: int64 [n], the experts computed in this wave, hits first.
        positions: int64 [n], where in the window each of them is.
        fetch_experts: int64 [m], the experts to fetch before this wave computes.
        fetch_positions: int64 [m], where each goes.
        evicted: int64 [m], the expert that each displaces, -1 for an empty slot.
    """

    experts: IntArray
    positions: IntArray
    fetch_experts: IntArray
    fetch_positions: IntArray
    evicted: IntArray


def plan_waves(
    counts_E: IntArray, position_E: NDArray[np.integer], expert_Q: NDArray[np.integer], score_E: IntArray
) -> tuple[Wave, ...]:
    """Plan one layer's step.

    Args:
        counts_E: int [experts], tokens routed to each expert; an expert is needed where this is positive.
        position_E: int [experts], the window position that holds each expert, -1 = absent.
        expert_Q: int [quota], the expert in each position, -1 = empty; the inverse of ``position_E``.
        score_E: int64 [experts], the eviction policy's scores; higher is kept longer.

    Returns:
        Waves in order. Every needed expert is computed in exactly one of them, none is evicted before that, and only
        positions inside the window are used. No waves when nothing is needed.
    """
    needed_E = counts_E > 0
    resident_E = position_E >= 0
    hits = np.flatnonzero(needed_E & resident_E)
    misses = np.flatnonzero(needed_E & ~resident_E)
    hit_positions = position_E[hits].astype(np.int64)
    if not len(misses):
        nothing = misses
        return (Wave(hits, hit_positions, nothing, nothing, nothing),) if len(hits) else ()

    quota = len(expert_Q)
    several = len(hits) + len(misses) > quota
    occupant_Q = expert_Q.astype(np.int64)
    if several:
        rotating_Q = _rotating(occupant_Q, misses, score_E)
        misses = misses[np.argsort(score_E[misses], kind="stable")]
    else:
        rotating_Q = np.ones(quota, bool)
    # What the first wave computes can't give way to it; later waves may use every rotating position.
    busy_Q = np.zeros(quota, bool)
    busy_Q[hit_positions] = True

    waves = []
    computed, computed_positions = hits, hit_positions
    while len(misses) or len(computed):
        open_positions = np.flatnonzero(rotating_Q & ~busy_Q)
        occupants = occupant_Q[open_positions]
        # Empty positions first, then the lowest score, ties by expert id: never by where an expert happens to lie.
        first = np.lexsort((occupants, np.where(occupants < 0, np.iinfo(np.int64).min, score_E[occupants])))
        targets = open_positions[first][: len(misses)]
        fetched, misses = misses[: len(targets)], misses[len(targets) :]
        waves.append(
            Wave(
                np.concatenate([computed, fetched]),
                np.concatenate([computed_positions, targets]),
                fetched,
                targets,
                occupant_Q[targets],
            )
        )
        occupant_Q[targets] = fetched
        busy_Q[:] = False
        computed = computed_positions = misses[:0]
    return tuple(waves)


def _rotating(occupant_Q: IntArray, misses: IntArray, score_E: IntArray) -> NDArray[np.bool_]:
    """Positions that misses pass through: all but those of residents among the ``quota`` highest scores."""
    quota = len(occupant_Q)
    filled = np.flatnonzero(occupant_Q >= 0)
    candidates = np.concatenate([occupant_Q[filled], misses])
    best = np.lexsort((candidates, -score_E[candidates]))[:quota]
    anchored = filled[best[best < len(filled)]]  # in order of falling score
    rotating_least = max(1, quota // ROTATING_SHARE)
    rotating_Q = np.ones(quota, bool)
    rotating_Q[anchored[: quota - rotating_least]] = False
    return rotating_Q
