"""Send and receive splits: which of its pairs a rank sends to which rank, from an assignment.

An assignment says how many pairs of each expert every rank computes, not whose. As many own pairs as possible stay. Surplus
pairs lie on one line in the order of the source ranks, missing pairs on another in the order of the computing ranks; the
overlap of two stretches is the number of pairs that travel. With several nodes each node has two such lines of its own, and
only the rest is matched between nodes. Both ends compute the same splits from the same integers, without messages.
``LayerPlanner`` calls ``token_splits``; ``token_dispatcher.py`` sends by it.

Pure. Legend of shape suffixes: R ranks, D destinations and S sources (ranks too), U experts of the layer with tokens, O those
of this rank's own tokens, C those that it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import IntArray
from epslots.compiled import compiled


@dataclass(frozen=True)
class TokenSplits:
    """The pairs that one rank sends and receives, itself included; all int64.

    Attributes:
        own_columns_O: the columns of the experts that its tokens chose.
        send_DO: pairs of its own tokens that each rank computes for it.
        send_start_DO: the first of these among its own pairs of the expert.
        computed_C: the columns of the experts that it computes.
        receive_SC: pairs that it computes for each rank.
        receive_start_SC: the first of these among that rank's pairs of the expert.
    """

    own_columns_O: IntArray
    send_DO: IntArray
    send_start_DO: IntArray
    computed_C: IntArray
    receive_SC: IntArray
    receive_start_SC: IntArray


def token_splits(counts_RU: IntArray, computed_RU: IntArray, rank: int, node_R: IntArray | None = None) -> TokenSplits:
    """The splits of ``rank`` in an assignment.

    Args:
        counts_RU: pairs of each rank's own tokens.
        computed_RU: pairs that each rank computes; columns add up to the same.
        node_R: the node of each rank, if there are several.
    """
    counts_RU, computed_RU = np.ascontiguousarray(counts_RU, np.int64), np.ascontiguousarray(computed_RU, np.int64)
    ranks = len(counts_RU)
    node_R = np.zeros(ranks, np.int64) if node_R is None else node_R
    own_columns_O, computed_C = np.flatnonzero(counts_RU[rank]), np.flatnonzero(computed_RU[rank])
    send_DO, send_start_DO = np.empty((ranks, len(own_columns_O)), np.int64), np.empty((ranks, len(own_columns_O)), np.int64)
    _match(counts_RU, computed_RU, rank, node_R, own_columns_O, True, send_DO, send_start_DO)
    receive_SC, receive_start_SC = np.empty((ranks, len(computed_C)), np.int64), np.empty((ranks, len(computed_C)), np.int64)
    _match(counts_RU, computed_RU, rank, node_R, computed_C, False, receive_SC, receive_start_SC)
    return TokenSplits(own_columns_O, send_DO, send_start_DO, computed_C, receive_SC, receive_start_SC)


@compiled("void(int64[:, ::1], int64[:, ::1], int64, int64[::1], int64[::1], b1, int64[:, ::1], int64[:, ::1])")
def _match(
    counts_RU: IntArray,
    computed_RU: IntArray,
    rank: int,
    node_R: IntArray,
    columns_X: IntArray,
    sending: bool,
    pairs_RX: IntArray,
    start_RX: IntArray,
) -> None:
    """Enter the pairs that travel between the rank and every other.

    With their number comes the first of them among the source's pairs of the expert.

    A rank has four stretches: on the line of surplus pairs and on that of missing pairs (its side: 0, 1), each in part on its
    node's own line and in part on the one between nodes (0 = near, 1 = far).
    """
    ranks = len(counts_RU)
    nodes = 0
    for node in node_R:
        nodes = max(nodes, node + 1)
    begin_22R, length_22R = np.zeros((2, 2, ranks), np.int64), np.zeros((2, 2, ranks), np.int64)  # side, near or far
    total_2N, end_2N, far_end_2 = np.zeros((2, nodes), np.int64), np.zeros((2, nodes), np.int64), np.zeros(2, np.int64)
    for place, column in enumerate(columns_X):
        total_2N[:], end_2N[:], far_end_2[:] = 0, 0, 0
        for other, node in enumerate(node_R):
            surplus = counts_RU[other, column] - computed_RU[other, column]
            total_2N[0, node] += max(surplus, 0)
            total_2N[1, node] += max(-surplus, 0)
        for other, node in enumerate(node_R):
            matched = min(total_2N[0, node], total_2N[1, node])
            surplus = counts_RU[other, column] - computed_RU[other, column]
            for side in range(2):
                length = max(-surplus if side else surplus, 0)
                near = min(max(matched - end_2N[side, node], 0), length)
                begin_22R[side, 0, other], begin_22R[side, 1, other] = end_2N[side, node], far_end_2[side]
                length_22R[side, 0, other], length_22R[side, 1, other] = near, length - near
                end_2N[side, node] += length
                far_end_2[side] += length - near
        for other in range(ranks):
            source, target = (rank, other) if sending else (other, rank)
            own = min(counts_RU[source, column], computed_RU[source, column])
            if other == rank:
                pairs_RX[other, place], start_RX[other, place] = own, 0
                continue
            far = 0 if node_R[other] == node_R[rank] else 1
            surplus_begin, missing_begin = begin_22R[0, far, source], begin_22R[1, far, target]
            surplus_length, missing_length = length_22R[0, far, source], length_22R[1, far, target]
            overlap_end = min(surplus_begin + surplus_length, missing_begin + missing_length)
            pairs_RX[other, place] = max(overlap_end - max(surplus_begin, missing_begin), 0)
            before = own + far * length_22R[0, 0, source]
            start_RX[other, place] = before + min(max(missing_begin - surplus_begin, 0), surplus_length)


def runs(begin: IntArray, length: IntArray) -> IntArray:
    """All runs ``begin[i], ..., begin[i] + length[i] - 1``, one after another, int64 [sum of lengths]."""
    return _runs(np.ascontiguousarray(begin), np.ascontiguousarray(length))


@compiled("int64[::1](int64[::1], int64[::1])")
def _runs(begin: IntArray, length: IntArray) -> IntArray:
    total = 0
    for pairs in length:
        total += pairs
    number, place = np.empty(total, np.int64), 0
    for run in range(len(length)):
        for step in range(length[run]):
            number[place] = begin[run] + step
            place += 1
    return number
