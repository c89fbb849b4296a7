"""Continuous batches out of a trace: which of its tokens are computed together in a step.

A *lane* is a place in a batch: it takes a sequence, one token a step, and the next sequence when that is done.

Pure. Legend of shape suffixes: S steps, B lanes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from epslots.arrays import IntArray

# The fraction of the golden section: multiples of it fill the unit interval evenly, however many there are.
_GOLDEN = 0.6180339887498949


def deal_once(starts: IntArray, tokens: int, lanes: int) -> IntArray:
    """Every token of a trace once, int64 [S, B]: the trace's row in each lane and step, -1 = the lane has run out of work.

    Args:
        starts: each sequence's first row.
        tokens: rows of the trace.
        lanes: at least 1.
    """
    lengths = np.diff(np.append(starts, tokens))
    free = [(0, lane) for lane in range(lanes)]  # (step at which it is free, lane), a heap as it stands
    begins = np.empty((len(starts), 2), np.int64)
    for number, length in enumerate(lengths.tolist()):
        step, lane = heapq.heappop(free)
        begins[number] = step, lane
        heapq.heappush(free, (step + length, lane))
    row_SB = np.full((max(step for step, _ in free), lanes), -1)
    for (step, lane), start, length in zip(begins.tolist(), starts.tolist(), lengths.tolist(), strict=True):
        row_SB[step : step + length, lane] = np.arange(start, start + length)
    return row_SB


def read_on(starts: IntArray, tokens: int, lanes: int) -> Iterator[IntArray]:
    """Steps without end, int64 [B] each, every lane busy in all: the trace is read round and round.

    Sequences go in their order to whichever lane is free, so that what changes along the trace changes along the steps. A lane
    enters its first sequence somewhere amid it, as if all had been going on for a while.

    Arguments as ``deal_once``; the trace has at least one token.
    """
    lengths = np.diff(np.append(starts, tokens))
    number_B = np.arange(lanes) % len(starts)
    entered = (np.arange(lanes) * _GOLDEN) % 1
    row_B = starts[number_B] + (lengths[number_B] * entered).astype(np.int64)
    drawn = lanes
    while True:
        yield row_B.copy()
        row_B += 1
        free = np.flatnonzero(row_B == (starts + lengths)[number_B])
        if len(free):
            number_B[free] = (drawn + np.arange(len(free))) % len(starts)
            row_B[free] = starts[number_B[free]]
            drawn += len(free)
