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


def route(counts_RU: IntArray, computed_RU: IntArray, rank: int, node_R: IntArray | None = None) -> Route:
    """The part of ``rank`` in an assignment.

    Args:
        counts_RU: pairs of each rank's own tokens.
        computed_RU: pairs that each rank computes; columns add up to the same.
        node_R: the node of each rank, if there are several.
    """
    own_O, computed_C = np.flatnonzero(counts_RU[rank]), np.flatnonzero(computed_RU[rank])

    own_RO, lines, near = _lines(counts_RU[:, own_O], computed_RU[:, own_O], node_R)
    send_DO, send_start_DO = lines.from_rank(rank)
    if near is not None:
        send_DO, send_start_DO = near.on_node_of(rank, near.lines.from_rank(rank), (send_DO, send_start_DO))
    send_DO[rank], send_start_DO[rank] = own_RO[rank], 0

    own_RC, lines, near = _lines(counts_RU[:, computed_C], computed_RU[:, computed_C], node_R)
    receive_SC, receive_start_SC = lines.to_rank(rank)
    if near is not None:
        receive_SC, receive_start_SC = near.on_node_of(rank, near.lines.to_rank(rank), (receive_SC, receive_start_SC))
    receive_SC[rank], receive_start_SC[rank] = own_RC[rank], 0
    return Route(own_O, send_DO, send_start_DO, computed_C, receive_SC, receive_start_SC)


@dataclass(frozen=True)
class _Lines:
    """Two lines of pairs for each expert; stretches by rank, int64 [R, X].

    Attributes:
        start_RX: where a rank's stretch begins among its pairs of the expert.
        left_RX, left_begin_RX: pairs of its tokens, and where they begin on their line.
        wanted_RX, wanted_begin_RX: pairs that it computes for others, and where they begin on theirs.
    """

    start_RX: IntArray
    left_RX: IntArray
    left_begin_RX: IntArray
    wanted_RX: IntArray
    wanted_begin_RX: IntArray

    def from_rank(self, rank: int) -> tuple[IntArray, IntArray]:
        """What the rank sends to each, and where that begins."""
        left, begin = self.left_RX[rank], self.left_begin_RX[rank]
        sent_RX = _overlap(begin, left, self.wanted_begin_RX, self.wanted_RX)
        return sent_RX, self.start_RX[rank] + np.minimum(np.maximum(self.wanted_begin_RX - begin, 0), left)

    def to_rank(self, rank: int) -> tuple[IntArray, IntArray]:
        """What the rank receives from each, and where that begins among the source's pairs."""
        begin = self.wanted_begin_RX[rank]
        received_RX = _overlap(self.left_begin_RX, self.left_RX, begin, self.wanted_RX[rank])
        return received_RX, self.start_RX + np.minimum(np.maximum(begin - self.left_begin_RX, 0), self.left_RX)


@dataclass(frozen=True)
class _Near:
    """The lines of each node; two ranks of one node meet there and nowhere else."""

    node_R: IntArray
    lines: _Lines

    def on_node_of(
        self, rank: int, near: tuple[IntArray, IntArray], far: tuple[IntArray, IntArray]
    ) -> tuple[IntArray, IntArray]:
        same_R1 = (self.node_R == self.node_R[rank])[:, None]
        return np.where(same_R1, near[0], far[0]), np.where(same_R1, near[1], far[1])


def _lines(counts_RX: IntArray, computed_RX: IntArray, node_R: IntArray | None) -> tuple[IntArray, _Lines, _Near | None]:
    """Each rank's pairs that stay, the lines for the rest, and those of the nodes if there are several."""
    own_RX = np.minimum(counts_RX, computed_RX)
    left_RX, wanted_RX = counts_RX - own_RX, computed_RX - own_RX
    if node_R is None:
        lines = _Lines(own_RX, left_RX, left_RX.cumsum(0) - left_RX, wanted_RX, wanted_RX.cumsum(0) - wanted_RX)
        return own_RX, lines, None
    near_left_RX, left_begin_RX, near_wanted_RX, wanted_begin_RX = _within_nodes(left_RX, wanted_RX, node_R)
    near = _Near(node_R, _Lines(own_RX, near_left_RX, left_begin_RX, near_wanted_RX, wanted_begin_RX))
    left_RX, wanted_RX = left_RX - near_left_RX, wanted_RX - near_wanted_RX
    begins = left_RX.cumsum(0) - left_RX, wanted_RX.cumsum(0) - wanted_RX
    return own_RX, _Lines(own_RX + near_left_RX, left_RX, begins[0], wanted_RX, begins[1]), near


def _within_nodes(left_RX: IntArray, wanted_RX: IntArray, node_R: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """The part of both that is matched within the ranks' nodes, and where each begins on its node's line."""
    order = np.argsort(node_R, kind="stable")
    first_N = np.flatnonzero(np.diff(node_R[order], prepend=node_R[order[0]] - 1))
    number_R = np.repeat(np.arange(len(first_N)), np.diff(first_N, append=len(node_R)))

    def begins(length_RX: IntArray) -> IntArray:
        begin_RX = np.empty_like(length_RX)
        running = length_RX[order].cumsum(0) - length_RX[order]
        begin_RX[order] = running - running[first_N][number_R]
        return begin_RX

    def total(length_RX: IntArray) -> IntArray:
        whole: IntArray = np.add.reduceat(length_RX[order], first_N)
        return whole

    matched_RX = np.empty_like(left_RX)
    matched_RX[order] = np.minimum(total(left_RX), total(wanted_RX))[number_R]
    left_begin_RX, wanted_begin_RX = begins(left_RX), begins(wanted_RX)
    near_left_RX = np.clip(matched_RX - left_begin_RX, 0, left_RX)
    near_wanted_RX = np.clip(matched_RX - wanted_begin_RX, 0, wanted_RX)
    return near_left_RX, left_begin_RX, near_wanted_RX, wanted_begin_RX


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
