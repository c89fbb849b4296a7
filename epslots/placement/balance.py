"""The ranks' loads under a placement, and balancedness, the figure by which placements are compared.

Pure. Legend of shape suffixes: L layers, R ranks, E experts.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.placement.placement import Placement

# Rounds of ``live_loads``, at most.
_LEVEL_ROUNDS = 24


def holders(placement: Placement) -> BoolArray:
    """The ranks that a placement lets compute each expert, bool [L, R, E]: its wanted copies; without any, its home."""
    own_LE = np.arange(placement.home_LE.shape[1]) < placement.num_experts_L[:, None]
    only_home_LE = own_LE & ~placement.wanted_LRE.any(1)
    at_home_LRE = placement.home_LE[:, None] == np.arange(placement.ranks)[:, None]
    found: BoolArray = placement.wanted_LRE | (at_home_LRE & only_home_LE[:, None])
    return found


def rank_loads(holds_LRE: BoolArray | IntArray, tokens_LE: IntArray | FloatArray) -> FloatArray:
    """Load of each rank where an expert's pairs are split equally over its copies, float64 [L, R].

    Args:
        holds_LRE: bool, the holders of each expert; or int64, the number of copies that each rank holds.
        tokens_LE: pairs of each expert. Those of an expert without a copy are left out.
    """
    share_LE = tokens_LE / np.maximum(holds_LRE.sum(1), 1)
    loads: FloatArray = np.matmul(holds_LRE.astype(np.float64), share_LE[:, :, None])[:, :, 0]
    return loads


def live_loads(holds_LRE: BoolArray, tokens_LE: IntArray | FloatArray) -> FloatArray:
    """Load of each rank, float64 [L, R], if pairs are split over copies in the best way.

    Dispatch reaches this, because it splits by the loads of the step itself. The split of least sum of squares also has the
    least maximum. It is approached expert by expert: one expert's pairs go to its least loaded holders, while all others stay;
    such rounds converge, since the sum is convex.

    Args:
        holds_LRE: the holders of each expert.
        tokens_LE: pairs of each expert.
    """
    copies_LE = holds_LRE.sum(1)
    loads_LR = rank_loads(holds_LRE & (copies_LE <= 1)[:, None], tokens_LE)
    several = int((copies_LE > 1).sum(1).max(initial=0))
    if not several:
        return loads_LR
    # Replicated experts of each layer, the most loaded first; layers with fewer are padded by experts without pairs.
    order_LM = np.argsort(-np.where(copies_LE > 1, tokens_LE + 1.0, 0.0), axis=1, kind="stable")[:, :several]
    holds_LMR = np.take_along_axis(holds_LRE.swapaxes(1, 2), order_LM[:, :, None], 1)
    pairs_LM = np.take_along_axis(np.where(copies_LE > 1, tokens_LE, 0).astype(np.float64), order_LM, 1)
    poured_LMR = pairs_LM[:, :, None] * holds_LMR / holds_LMR.sum(2, keepdims=True)
    loads_LR = loads_LR + poured_LMR.sum(1)
    for _ in range(_LEVEL_ROUNDS):
        before_LR = loads_LR
        for number in range(several):
            rest_LR = loads_LR - poured_LMR[:, number]
            poured_LMR[:, number] = _pour(rest_LR, holds_LMR[:, number], pairs_LM[:, number])
            loads_LR = rest_LR + poured_LMR[:, number]
        if np.abs(loads_LR - before_LR).max() <= 1e-3 * max(1.0, float(loads_LR.max())):
            break
    return loads_LR


def _pour(rest_LR: FloatArray, holds_LR: BoolArray, pairs_L: FloatArray) -> FloatArray:
    """Pairs for each holder, float64 [L, R], so that receivers end at one load (water-filling)."""
    sorted_LR = np.sort(np.where(holds_LR, rest_LR, np.inf), axis=1)
    held_LR = np.isfinite(sorted_LR)
    filled_LR = np.where(held_LR, sorted_LR, 0.0).cumsum(1)
    surface_LR = (pairs_L[:, None] + filled_LR) / np.maximum(held_LR.cumsum(1), 1)
    # The surface stands over the first n basins for the largest n whose last basin lies below it.
    wet_L = np.maximum((held_LR & (surface_LR > np.where(held_LR, sorted_LR, np.inf))).sum(1), 1)
    surface_L = np.take_along_axis(surface_LR, wet_L[:, None] - 1, 1)
    return np.where(holds_LR, np.maximum(surface_L - rest_LR, 0.0), 0.0)


def balancedness(load_LR: FloatArray | IntArray, speed_R: IntArray | None = None) -> float:
    """Mean load of the ranks / largest load, averaged over layers: 1 = equal loads; so count layers without load.

    Args:
        speed_R: compute speeds, any unit; if given, times are compared.
    """
    time_LR = load_LR if speed_R is None else load_LR * (speed_R.mean() / speed_R)
    most_L = time_LR.max(1)
    level_L = np.where(most_L > 0, load_LR.mean(1) / np.where(most_L > 0, most_L, 1), 1.0)
    return float(level_L.mean())
