"""What stays in the slots: the rule by which a layer's residents change in a step, for all ranks at once.

Pure: integer arrays in, integer arrays out. Every rank applies the rule to every rank's slots, so that all know at any time
who holds what without ever telling each other. It says which experts are resident after the step; ``waves.py`` gets there.

Legend of shape suffixes: R ranks, E experts of the layer, Q slots of its window on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.eviction import IntArray

BoolArray = NDArray[np.bool_]

# At least one in so many slots rotates, so that anchoring can't stretch a layer into a wave per expert.
ROTATING_SHARE = 4


@dataclass(frozen=True)
class Change:
    """How a layer's residents change in one step.

    Attributes:
        evicted_RE: the residents that give way. With fewer slots than needed experts they may be needed ones: those are
            computed first.
        after_RE: the residents when the step is done.
    """

    evicted_RE: BoolArray
    after_RE: BoolArray


def settle(
    holds_RE: BoolArray, needed_RE: BoolArray, quota_R: IntArray, score_E: IntArray, spare_RE: BoolArray | None = None
) -> Change:
    """The residents after a step in which each rank computes the experts it needs.

    With a slot for every needed expert, what isn't needed gives way: empty slots first, then spare copies, then the lowest
    score, ties by expert id; never by where an expert happens to lie. With fewer, the layer runs in waves, and once an
    expert is computed its slot may serve the next. Then the residents among the ``quota`` highest scores are *anchored*, or a
    single long prompt would empty the cache of what decoding lives on; the misses pass through the other, *rotating* slots in
    order of rising score, and the last of them stay.

    Args:
        holds_RE: who holds what.
        needed_RE: what each rank computes in this step.
        quota_R: slots of each rank, from 1 to E. No rank holds more.
        score_E: the eviction policy's scores; higher is kept longer.
        spare_RE: copies that give way before any other, such as replicas.
    """
    order = np.argsort(score_E, kind="stable")
    holds, needed = holds_RE[:, order], needed_RE[:, order]
    missing = needed & ~holds
    misses_R, filled_R = missing.sum(1), holds.sum(1)
    several_R = needed.sum(1) > quota_R
    taken_R = misses_R  # slots that fetches go to
    if several_R.any():
        candidates = holds | missing
        anchored = holds & (_from_the_top(candidates) <= quota_R[:, None])
        rotating_R = np.maximum(quota_R - anchored.sum(1), np.maximum(1, quota_R // ROTATING_SHARE))
        taken_R = np.where(several_R, np.minimum(misses_R, rotating_R), misses_R)
    may_go = holds & (several_R[:, None] | ~needed)
    turn = may_go.cumsum(1)
    if spare_RE is not None:
        spare = spare_RE[:, order] & may_go
        spare_turn = spare.cumsum(1)
        turn = np.where(spare, spare_turn, spare_turn[:, -1:] + turn - spare_turn)
    evicted = may_go & (turn <= (filled_R + taken_R - quota_R)[:, None])
    after = (holds & ~evicted) | (missing & (_from_the_top(missing) <= taken_R[:, None]))
    change = Change(np.empty_like(holds_RE), np.empty_like(holds_RE))
    change.evicted_RE[:, order] = evicted
    change.after_RE[:, order] = after
    return change


def spare_copies(holds_RE: BoolArray, home_E: IntArray, wanted_RE: BoolArray | None = None) -> BoolArray:
    """The copies that nobody misses: of each expert all but the one at home, or the first if there is none at home; and but
    those that the placement wants, if given.
    """
    experts = np.arange(len(home_E))
    keeper_E = np.where(holds_RE[home_E, experts], home_E, holds_RE.argmax(0))
    spare_RE: BoolArray = holds_RE & (keeper_E != np.arange(len(holds_RE))[:, None])
    return spare_RE if wanted_RE is None else spare_RE & ~wanted_RE


def _from_the_top(mask: BoolArray) -> IntArray:
    """Each true entry's number in its row, counted from the right, from 1."""
    running = mask.cumsum(1)
    return running[:, -1:] - running + 1
