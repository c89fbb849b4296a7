"""One rank's way through one layer's step: what is computed when, and what is fetched into which slot.

Pure: integer arrays in, integer arrays out. Which experts give way is decided (``residency.py``); here they get a position and
a turn. A layer owns a *window* of ``quota`` neighbouring slots; positions count from the window's start. With at least as many
slots as needed experts the plan is one wave. With fewer, the layer runs in waves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.eviction import IntArray
from epslots.residency import BoolArray


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


_NOTHING = np.zeros(0, np.int64)
NO_WAVE = Wave(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)


def plan_waves(
    needed_E: BoolArray,
    position_E: NDArray[np.integer],
    expert_Q: NDArray[np.integer],
    score_E: IntArray,
    evicted_E: BoolArray,
) -> tuple[Wave, ...]:
    """Plan one rank's part of a layer's step.

    Args:
        needed_E: the experts that this rank computes.
        position_E: int [experts], the window position that holds each expert, -1 = absent.
        expert_Q: int [quota], the expert in each position, -1 = empty; the inverse of ``position_E``.
        score_E: int64 [experts], the eviction policy's scores.
        evicted_E: what gives way, as ``residency.settle`` decided for these arguments.

    Returns:
        Waves in order. Every needed expert is computed in exactly one of them, none is evicted before that, and only
        positions inside the window are used. No waves when nothing is needed.
    """
    resident_E = position_E >= 0
    hits = np.flatnonzero(needed_E & resident_E)
    misses = np.flatnonzero(needed_E & ~resident_E)
    hit_positions = position_E[hits].astype(np.int64)
    if not len(misses):
        return (Wave(hits, hit_positions, misses, misses, misses),) if len(hits) else ()
    # Misses go through these positions in turn, again and again: empty ones first, then by their occupants' rising score.
    empty = np.flatnonzero(expert_Q < 0)
    going = np.flatnonzero(evicted_E)
    going = going[np.argsort(score_E[going], kind="stable")]
    if len(hits) + len(misses) <= len(expert_Q):
        targets = np.concatenate([empty, position_E[going]])[: len(misses)]
        displaced = np.concatenate([np.full(len(empty), -1), going])[: len(misses)]
        return (Wave(np.concatenate([hits, misses]), np.concatenate([hit_positions, targets]), misses, targets, displaced),)

    misses = misses[np.argsort(score_E[misses], kind="stable")]
    # What the first wave computes can't give way to it.
    busy = needed_E[going]
    turn = np.concatenate([empty, position_E[going[~busy]], position_E[going[busy]]])
    occupant_Q = expert_Q.astype(np.int64)
    waves = []
    computed, computed_positions = hits, hit_positions
    done, room = 0, len(empty) + int(np.count_nonzero(~busy))
    while done < len(misses) or len(computed):
        fetched = misses[done : done + room]
        targets = turn[(done + np.arange(len(fetched))) % len(turn)]
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
        computed = computed_positions = misses[:0]
        done += len(fetched)
        room = len(turn)
    return tuple(waves)
