"""The holder of an expert that a rank copies it from. One rule for the fetches of a step and for migrations.

The next possible source in cyclic order from the target is taken, on the target's own node if there is one: so several copies
of one expert spread over its holders.

Pure. Legend of shape suffixes: R ranks, N nodes, E experts of the layer, F fetches.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled, inlined


@inlined
def enter_nearest(possible_R: BoolArray, node_R: IntArray, nearest_N: IntArray, source_R: IntArray) -> None:
    """Enter the source of each rank that is no source itself; -1 = none.

    Args:
        possible_R: ranks that can be copied from.
        nearest_N: memory to work in.
    """
    ranks = len(possible_R)
    nearest, nearest_N[:] = -1, -1  # walking down twice: the last possible source that was passed, in all and per node
    for number in range(2 * ranks - 1, -1, -1):
        rank = number - ranks if number >= ranks else number
        on_node = nearest_N[node_R[rank]]
        source_R[rank] = on_node if on_node >= 0 else nearest
        if possible_R[rank]:
            nearest = nearest_N[node_R[rank]] = rank


def nearest_sources(keeps_RE: BoolArray, ranks: IntArray, experts: IntArray, node_R: IntArray | None) -> IntArray:
    """The rank to copy each expert from, int64 [F], -1 = none.

    Args:
        keeps_RE: the copies that stay where they are meanwhile.
        ranks, experts: target and expert of each fetch; the target has no copy.
        node_R: the node of each rank, if there are several.
    """
    node_R = np.zeros(len(keeps_RE), np.int64) if node_R is None else np.ascontiguousarray(node_R, np.int64)
    source_F = np.empty(len(ranks), np.int64)
    _nearest_sources(np.ascontiguousarray(keeps_RE), ranks, experts, node_R, source_F)
    return source_F


@compiled("void(b1[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def _nearest_sources(keeps_RE: BoolArray, ranks: IntArray, experts: IntArray, node_R: IntArray, source_F: IntArray) -> None:
    possible_R, source_R = np.empty(len(node_R), np.bool_), np.empty(len(node_R), np.int64)
    nearest_N = np.empty(node_R.max() + 1, np.int64)
    for fetch in range(len(ranks)):
        for rank in range(len(node_R)):
            possible_R[rank] = keeps_RE[rank, experts[fetch]]
        enter_nearest(possible_R, node_R, nearest_N, source_R)
        source_F[fetch] = source_R[ranks[fetch]]
