"""One rank's way through one layer's step: what is computed when, and what is fetched into which slot.

Pure: integer arrays in, integer arrays out. Which experts give way is decided (``residency.py``); here they get a position and
a turn. A layer owns a *window* of ``quota`` neighbouring slots; positions count from the window's start.

    slots for all       every fetch begins at once. Over a link that carries them meanwhile, what is there is computed first,
                        and what is fetched as it lands, the experts with most tokens first
    fewer slots         misses pass through some of the slots in turn. Over such a link they have two halves: one is computed
                        while the other is filled
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.eviction import IntArray
from epslots.residency import BoolArray

# A wave of its own for each fetch would cost more than it hides when there are many.
MOST_LANDINGS = 4


@dataclass(frozen=True)
class Wave:
    """One pass over part of a layer's experts. ``fetch_*`` arrays run in parallel, in the order of fetching.

    Attributes:
        experts: int64 [n], the experts computed in this wave, hits first.
        positions: int64 [n], where in the window each of them is.
        fetch_experts: int64 [m], the experts to fetch before this wave computes.
        fetch_positions: int64 [m], where each goes.
        evicted: int64 [m], the expert that each displaces, -1 for an empty slot.
        after: waves that must have been computed before these fetches may begin: they need what gives way.
    """

    experts: IntArray
    positions: IntArray
    fetch_experts: IntArray
    fetch_positions: IntArray
    evicted: IntArray
    after: int = 0


_NOTHING = np.zeros(0, np.int64)
NO_WAVE = Wave(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)


def plan_waves(
    counts_E: IntArray,
    position_E: NDArray[np.integer],
    expert_Q: NDArray[np.integer],
    score_E: IntArray,
    evicted_E: BoolArray,
    *,
    concurrent: bool = False,
    flying_E: BoolArray | None = None,
    first_E: BoolArray | None = None,
) -> tuple[Wave, ...]:
    """Plan one rank's part of a layer's step.

    Args:
        counts_E: int64 [experts], pairs that this rank computes.
        position_E: int [experts], the window position that holds each expert, -1 = absent.
        expert_Q: int [quota], the expert in each position, -1 = empty; the inverse of ``position_E``.
        score_E: int64 [experts], the eviction policy's scores.
        evicted_E: what gives way, as ``residency.settle`` decided for these arguments.
        concurrent: whether fetches take place while something is computed.
        flying_E: residents whose fetch is still under way.
        first_E: missing experts that are there at once (copies from peers). There must be slots for all then.

    Returns:
        Waves in order. Every needed expert is computed in exactly one of them, none is evicted before that, and only
        positions inside the window are used. ``after`` never falls. No waves when nothing is needed.
    """
    needed_E = counts_E > 0
    here_E = needed_E & (position_E >= 0)
    misses = np.flatnonzero(needed_E & ~here_E)
    late = _NOTHING if flying_E is None else np.flatnonzero(here_E & flying_E)
    hits = np.flatnonzero(here_E if flying_E is None else here_E & ~flying_E)
    if not len(misses):
        return tuple(_resident(experts, position_E) for experts in (hits, late) if len(experts))

    # Misses go through these positions in turn: empty ones first, then by their occupants' rising score.
    going = np.flatnonzero(evicted_E)
    going = going[np.argsort(score_E[going], kind="stable")]
    fits = int(np.count_nonzero(needed_E)) <= len(expert_Q)
    if fits:
        misses = misses[np.argsort(-counts_E[misses], kind="stable")]
    else:
        misses = misses[np.argsort(score_E[misses], kind="stable")]
        going = np.concatenate([going[~needed_E[going]], going[needed_E[going]]])  # what the first waves compute goes last
    turn = np.concatenate([np.flatnonzero(expert_Q < 0), position_E[going]])

    sooner = 0  # misses that are computed together with the hits
    if not concurrent:
        sooner, step = (len(misses), 1) if fits else (len(turn) - int(np.count_nonzero(needed_E[going])), len(turn))
    elif not fits:
        step = max(1, len(turn) // 2)
    else:
        if first_E is not None:
            misses = np.concatenate([misses[first_E[misses]], misses[~first_E[misses]]])
            sooner = int(np.count_nonzero(first_E[misses]))
        step = max(1, -(-(len(misses) - sooner) // MOST_LANDINGS))
    return _in_turn(hits, late, misses, (sooner, step), position_E, expert_Q, turn)


def _resident(experts: IntArray, position_E: NDArray[np.integer]) -> Wave:
    return Wave(experts, position_E[experts].astype(np.int64), _NOTHING, _NOTHING, _NOTHING)


def _in_turn(
    hits: IntArray,
    late: IntArray,
    misses: IntArray,
    sizes: tuple[int, int],
    position_E: NDArray[np.integer],
    expert_Q: NDArray[np.integer],
    turn: IntArray,
) -> tuple[Wave, ...]:
    """Waves of hits, of what is late, and of misses: so many of them with the hits, then so many at a time."""
    sooner, step = sizes
    waves: list[Wave] = []
    occupant_Q = expert_Q.astype(np.int64)
    ready_Q = np.zeros(len(expert_Q), np.int64)  # waves that must have been computed before a position gives way
    done = after = 0
    for residents, count in ((hits, sooner), (late, 0), *((_NOTHING, step) for _ in range(sooner, len(misses), step))):
        fetched = misses[done : done + count]
        if not len(residents) and not len(fetched):
            continue
        targets = turn[(done + np.arange(len(fetched))) % len(turn)]
        after = max(after, int(ready_Q[targets].max(initial=0)))
        positions = np.concatenate([position_E[residents], targets]).astype(np.int64)
        waves.append(Wave(np.concatenate([residents, fetched]), positions, fetched, targets, occupant_Q[targets], after))
        occupant_Q[targets] = fetched
        ready_Q[positions] = len(waves)
        done += len(fetched)
    return tuple(waves)
