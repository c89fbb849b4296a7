"""Prompt tokens of each rank of a group in a step.

They are chosen so that few ranks wait for much longer chunks. Pure decisions.

    limit = balanced_chunk(waiting_R)        # all ranks of a group find the same
    size.prompt_tokens(decoding, limit)      # chunk_size.py: not less than is worth a step

A step of a group lasts as long as its longest chunk. While some ranks have long prompts and others short ones, the long ones
are computed in chunks that are a little longer than the short ones: these end sooner, and no token waits for idle ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

MOST_SKEW = 1.25
"""The longest chunk of a step over the mean of those ranks that have prompts."""


class StepLoad(NamedTuple):
    """One rank's tokens.

    Attributes:
        tokens: that it computes in a step.
        waiting: tokens of its prompts that it could compute next.
    """

    tokens: int
    waiting: int


NO_LOAD = StepLoad(0, 0)


def balanced_chunk(waiting_R: Sequence[int]) -> int | None:
    """The longest chunk that isn't more than ``MOST_SKEW`` times the mean; None = every length is balanced.

    Args:
        waiting_R: tokens of each rank's prompts. Those without any don't count: they would wait for chunks of any length.
    """
    waiting = sorted(tokens for tokens in waiting_R if tokens > 0)
    ranks, sums = len(waiting), list(accumulate(waiting))
    # Chunks of one length, or as long as the prompt: the longer, the further is the mean behind.
    for shorter in range(ranks, 0, -1):
        chunk, longer = waiting[shorter - 1], ranks - shorter
        if MOST_SKEW * (sums[shorter - 1] + longer * chunk) >= ranks * chunk:
            # A chunk of this length is balanced; the longest that is has sums + longer x chunk = ranks x chunk / skew.
            return int(sums[shorter - 1] / (ranks / MOST_SKEW - longer)) if longer else None
    return None
