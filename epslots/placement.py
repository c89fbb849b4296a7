"""Where experts should live: a hint to the caches, never a rule (any rank can compute any expert).

Pure: integer arrays in, integer arrays out. Legend of shape suffixes: R ranks, E experts of the layer.
"""

from __future__ import annotations

import numpy as np

from epslots.eviction import IntArray


def default_homes(num_experts: int, quota_R: IntArray, layer: int) -> IntArray:
    """The home rank of each expert when nothing is known of the traffic, int64 [E].

    Ranks get neighbouring experts in proportion to their slots. With more ranks than experts, or numbers that don't divide,
    some ranks get one less; which ones goes round from layer to layer.
    """
    ranks = len(quota_R)
    turned = (np.arange(ranks) + layer) % ranks
    ends = quota_R[turned].cumsum()
    middle = (2 * np.arange(num_experts) + 1) * int(ends[-1])
    homes: IntArray = turned[np.searchsorted(2 * num_experts * ends, middle, side="right")]
    return homes
