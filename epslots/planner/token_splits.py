"""Which pairs go where: one rank's part of an assignment.

Pure. An assignment says how many pairs of each expert every rank computes, not whose. Own pairs stay at home as far as they
can; what is left over lies on one line in the order of the source ranks, what is still wanted on another in the order of the
computing ranks, and where two stretches overlap, so many pairs travel. With several nodes each has two such lines of its own,
and only what is left on these is matched between nodes. Both ends work this out from the same integers, so
that no rank ever tells another what it will send.

Legend of shape suffixes: R ranks, D destinations and S sources (ranks too), U experts of the layer with tokens, O those of
this rank's own tokens, C those that it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import IntArray
from epslots.compiled import compiled


@dataclass(frozen=True)
class TokenSplits:
    """What one rank sends and receives, itself included; all int64.

    Attributes:
        own_columns_O: the columns of the experts that its tokens chose.
        send_DO: pairs of its own tokens that each rank computes for it.
        send_start_DO: where these begin among its own pairs of the expert.
        computed_C: the columns of the experts that it computes.
        receive_SC: pairs that it computes for each rank.
        receive_start_SC: where these begin among that rank's pairs of the expert.
    """

    own_columns_O: IntArray
    send_DO: IntArray
    send_start_DO: IntArray
    computed_C: IntArray
    receive_SC: IntArray
    receive_start_SC: IntArray


def token_splits(counts_RU: IntArray, computed_RU: IntArray, rank: int, node_R: IntArray | None = None) -> TokenSplits:
    """The part of ``rank`` in an assignment.

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
    _overlaps(counts_RU, computed_RU, rank, node_R, own_columns_O, True, send_DO, send_start_DO)
    receive_SC, receive_start_SC = np.empty((ranks, len(computed_C)), np.int64), np.empty((ranks, len(computed_C)), np.int64)
    _overlaps(counts_RU, computed_RU, rank, node_R, computed_C, False, receive_SC, receive_start_SC)
    return TokenSplits(own_columns_O, send_DO, send_start_DO, computed_C, receive_SC, receive_start_SC)


@compiled("void(int64[:, ::1], int64[:, ::1], int64, int64[::1], int64[::1], b1, int64[:, ::1], int64[:, ::1])")
def _overlaps(
    counts_RU: IntArray,
    computed_RU: IntArray,
    rank: int,
    node_R: IntArray,
    columns_X: IntArray,
    giving: bool,
    pairs_RX: IntArray,
    start_RX: IntArray,
) -> None:
    """How much of the rank's stretches overlaps that of every other, and where that begins among its source's pairs.

    A rank has four stretches: on the line of what is left over and on that of what is wanted (its side), each in part on its
    node's own line and the rest on the one between nodes.
    """
    ranks = len(counts_RU)
    nodes = 0
    for node in node_R:
        nodes = max(nodes, node + 1)
    begin_22R, length_22R = np.zeros((2, 2, ranks), np.int64), np.zeros((2, 2, ranks), np.int64)  # side, whether far
    whole_2N, end_2N, far_end_2 = np.zeros((2, nodes), np.int64), np.zeros((2, nodes), np.int64), np.zeros(2, np.int64)
    for place, column in enumerate(columns_X):
        whole_2N[:], end_2N[:], far_end_2[:] = 0, 0, 0
        for other, node in enumerate(node_R):
            more = counts_RU[other, column] - computed_RU[other, column]
            whole_2N[0, node] += max(more, 0)
            whole_2N[1, node] += max(-more, 0)
        for other, node in enumerate(node_R):
            matched = min(whole_2N[0, node], whole_2N[1, node])
            more = counts_RU[other, column] - computed_RU[other, column]
            for side in range(2):
                length = max(-more if side else more, 0)
                near = min(max(matched - end_2N[side, node], 0), length)
                begin_22R[side, 0, other], begin_22R[side, 1, other] = end_2N[side, node], far_end_2[side]
                length_22R[side, 0, other], length_22R[side, 1, other] = near, length - near
                end_2N[side, node] += length
                far_end_2[side] += length - near
        for other in range(ranks):
            source, target = (rank, other) if giving else (other, rank)
            own = min(counts_RU[source, column], computed_RU[source, column])
            if other == rank:
                pairs_RX[other, place], start_RX[other, place] = own, 0
                continue
            far = 0 if node_R[other] == node_R[rank] else 1
            left, wanted = begin_22R[0, far, source], begin_22R[1, far, target]
            left_end, wanted_end = left + length_22R[0, far, source], wanted + length_22R[1, far, target]
            pairs_RX[other, place] = max(min(left_end, wanted_end) - max(left, wanted), 0)
            before = own + far * length_22R[0, 0, source]
            start_RX[other, place] = before + min(max(wanted - left, 0), left_end - left)


def runs(begin: IntArray, length: IntArray) -> IntArray:
    """The numbers ``begin[i], ..., begin[i] + length[i] - 1`` of all runs, one after another, int64 [sum of lengths]."""
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
