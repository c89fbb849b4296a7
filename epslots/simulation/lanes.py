"""Continuous batches from a routing trace: the tokens that are computed together in each step.

A *lane* is a place in a batch: it computes a sequence, one token a step, and takes the next sequence when that is done.

Pure. Legend of shape suffixes: S steps, B lanes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from epslots.arrays import IntArray

# The golden ratio - 1: any number of multiples of it fill the unit interval evenly.
_GOLDEN = 0.6180339887498949


def deal_once(starts: IntArray, tokens: int, lanes: int) -> IntArray:
    """Every token of a trace once, int64 [S, B]. The trace's row in each step and lane, -1 = the lane is idle.

    Args:
        starts: each sequence's first row.
        tokens: rows of the trace.
        lanes: at least 1.
    """
    lengths = np.diff(np.append(starts, tokens))
    free = [(0, lane) for lane in range(lanes)]  # (step at which it is free, lane): a valid heap
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
    """Endless steps that read the trace again and again, int64 [B] each: the trace's row in each lane, never idle.

    Free lanes take the sequences in their order, so that traffic changes over the steps as it does over the trace. Lanes start
    within their first sequences, as if the batch had been running for a while.

    Args:
        starts: each sequence's first row.
        tokens: rows of the trace, at least 1.
        lanes: at least 1.
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
