"""Which pairs go where: one rank's part of an assignment.

Pure. An assignment says how many pairs of each expert every rank computes, not whose. Own pairs stay at home as far as they
can; what is left over lies on one line in the order of the source ranks, what is still wanted on another in the order of the
computing ranks, and where two stretches overlap, so many pairs travel. Both ends work this out from the same integers, so
that no rank ever tells another what it will send.

Legend of shape suffixes: R ranks, D destinations and S sources (ranks too), U experts of the layer with tokens, O those of
this rank's own tokens, C those that it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.eviction import IntArray


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives, itself included; all int64.

    Attributes:
        own_O: the columns of the experts that its tokens chose.
        send_DO: pairs of its own tokens that each rank computes for it.
        send_start_DO: where these begin among its own pairs of the expert.
        computed_C: the columns of the experts that it computes.
        receive_SC: pairs that it computes for each rank.
        receive_start_SC: where these begin among that rank's pairs of the expert.
    """

    own_O: IntArray
    send_DO: IntArray
    send_start_DO: IntArray
    computed_C: IntArray
    receive_SC: IntArray
    receive_start_SC: IntArray


def route(counts_RU: IntArray, computed_RU: IntArray, rank: int) -> Route:
    """The part of ``rank`` in an assignment.

    Args:
        counts_RU: pairs of each rank's own tokens.
        computed_RU: pairs that each rank computes; columns add up to the same.
    """
    own_O, computed_C = np.flatnonzero(counts_RU[rank]), np.flatnonzero(computed_RU[rank])

    own, left, left_begin, wanted, wanted_begin = _lines(counts_RU[:, own_O], computed_RU[:, own_O])
    send_DO = _overlap(left_begin[rank], left[rank], wanted_begin, wanted)
    send_start_DO = own[rank] + np.minimum(np.maximum(wanted_begin - left_begin[rank], 0), left[rank])
    send_DO[rank], send_start_DO[rank] = own[rank], 0

    own, left, left_begin, wanted, wanted_begin = _lines(counts_RU[:, computed_C], computed_RU[:, computed_C])
    receive_SC = _overlap(left_begin, left, wanted_begin[rank], wanted[rank])
    receive_start_SC = own + np.minimum(np.maximum(wanted_begin[rank] - left_begin, 0), left)
    receive_SC[rank], receive_start_SC[rank] = own[rank], 0
    return Route(own_O, send_DO, send_start_DO, computed_C, receive_SC, receive_start_SC)


def _lines(counts_RX: IntArray, computed_RX: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Each rank's pairs that stay, those left over and where they begin on their line, those wanted and where."""
    own_RX = np.minimum(counts_RX, computed_RX)
    left_RX, wanted_RX = counts_RX - own_RX, computed_RX - own_RX
    return own_RX, left_RX, left_RX.cumsum(0) - left_RX, wanted_RX, wanted_RX.cumsum(0) - wanted_RX


def _overlap(begin: IntArray, length: IntArray, other_begin: IntArray, other_length: IntArray) -> IntArray:
    """How much of two stretches on one line is common to both."""
    end = np.minimum(begin + length, other_begin + other_length)
    common: IntArray = np.maximum(end - np.maximum(begin, other_begin), 0)
    return common


def runs(begin: IntArray, length: IntArray) -> IntArray:
    """The numbers ``begin[i], ..., begin[i] + length[i] - 1`` of all runs, one after another, int64 [sum of lengths]."""
    end: IntArray = length.cumsum()
    offset: IntArray = np.repeat(begin - (end - length), length)
    return offset + np.arange(len(offset))
