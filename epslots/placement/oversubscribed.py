"""Homes and wanted copies of layers with fewer slots than experts. ``planner.propose`` calls these functions.

Most experts pass through the slots on demand, and a step waits for the rank that takes longest to fetch and compute. So homes
are chosen so that the ranks' expected times are equal: compute of experts that stay resident anyhow, compute and fetches of
all others. The former (used in at least half of the steps) are wanted at home; a quarter of a rank's slots is left to its
cache.

Pure. Legend of shape suffixes: L layers, R ranks, E experts.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.placement.from_scratch import level
from epslots.planner.cost_model import Costs

# An expert that is used in this share of the steps stays resident under any policy.
RESIDENT_SHARE = 0.5
# One slot in so many is left to the cache, and at least one.
CACHE_SHARE = 4
# Swaps of homes in one proposal, for each layer.
_MOST_SWAPS = 8


def expert_times(tokens_LE: IntArray, uses_LE: IntArray, steps: int, costs: Costs) -> FloatArray:
    """Nanoseconds that each expert costs its home in a window, float64 [L, E]: compute, and the fetches of its misses.

    Args:
        tokens_LE, uses_LE: pairs of each expert, and steps that use it.
        steps: of the window.
    """
    rate_LE = np.minimum(uses_LE / max(1, steps), 1.0)
    misses_LE = np.where(rate_LE >= RESIDENT_SHARE, 0.0, uses_LE * (1 - rate_LE))
    fetching_LE = misses_LE * float(costs.host_fetch)
    result: FloatArray = tokens_LE * float(costs.pair_compute) + uses_LE * float(costs.expert_compute) + fetching_LE
    return result


def level_homes(home_LE: IntArray, own_LE: BoolArray, time_LE: FloatArray, speed_R: FloatArray) -> IntArray:
    """Homes that level the ranks' times, few of them changed, int64 [L, E].

    Args:
        home_LE: homes so far.
        own_LE: bool, the experts that each layer has.
        time_LE: nanoseconds of each expert.
        speed_R: relative compute speeds.
    """
    layers = len(home_LE)
    ranks = len(speed_R)
    at_home_LRE = (home_LE[:, None] == np.arange(ranks)[:, None]) & own_LE[:, None]
    columns = int(at_home_LRE.sum(2).max()) + _MOST_SWAPS
    layer, rank, expert = np.nonzero(at_home_LRE)
    number = at_home_LRE.cumsum(2)[layer, rank, expert] - 1
    expert_LRQ = np.full((layers, ranks, columns), -1)
    expert_LRQ[layer, rank, number] = expert
    level(expert_LRQ, np.where(own_LE, time_LE, 0.0), speed_R, _MOST_SWAPS)
    found_LE = home_LE.copy()
    layer, rank, number = np.nonzero(expert_LRQ >= 0)
    found_LE[layer, expert_LRQ[layer, rank, number]] = rank
    return found_LE


def wanted_at_home(home_LE: IntArray, own_LE: BoolArray, rate_LE: FloatArray, quota_LR: IntArray) -> BoolArray:
    """The wanted copies, bool [L, R, E]. Each rank's most used experts among those at home, as far as they fit.

    Args:
        rate_LE: the share of the steps that use each expert.
        quota_LR: slots of each layer on each rank.
    """
    ranks = quota_LR.shape[1]
    at_home_LRE = (home_LE[:, None] == np.arange(ranks)[:, None]) & own_LE[:, None]
    hot_LRE = at_home_LRE & (rate_LE >= RESIDENT_SHARE)[:, None]
    order_LE = np.argsort(-rate_LE, axis=1, kind="stable")
    room_LR = np.maximum(quota_LR - np.maximum(1, quota_LR // CACHE_SHARE), 0)
    sorted_LRE = np.take_along_axis(hot_LRE, order_LE[:, None], 2)
    fits_LRE = sorted_LRE & (sorted_LRE.cumsum(2) <= room_LR[:, :, None])
    wanted_LRE = np.zeros_like(hot_LRE)
    np.put_along_axis(wanted_LRE, order_LE[:, None], fits_LRE, 2)
    return wanted_LRE


def rank_times(home_LE: IntArray, own_LE: BoolArray, time_LE: FloatArray, speed_R: FloatArray) -> FloatArray:
    """Nanoseconds of each rank in a window, float64 [L, R]."""
    at_home_LRE = (home_LE[:, None] == np.arange(len(speed_R))[:, None]) & own_LE[:, None]
    result: FloatArray = (at_home_LRE @ time_LE[:, :, None])[:, :, 0] / speed_R
    return result
