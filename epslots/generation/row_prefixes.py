"""Prompts that begin alike: the row with whose tokens a new request can begin."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from epslots.generation.row_cache import Row
from epslots.generation.tracked_request import TrackedRequest

LEAST_SHARED_TOKENS = 16
"""A shorter common beginning of two prompts isn't worth a pass that ends there."""


@dataclass(eq=False)
class RunningRow:
    """A request that has a row."""

    entry: TrackedRequest
    row: Row
    stop: int = 0
    """A length at which another request is to continue from this row."""

    @property
    def turn(self) -> tuple[int, int]:
        return self.entry.turn

    @property
    def left(self) -> int:
        return self.entry.length - self.row.length


def shared_beginning(
    entry: TrackedRequest, running: Collection[RunningRow], kept: Collection[RunningRow], *, states: bool
) -> tuple[RunningRow | None, int]:
    """The row that a new request can begin with, and the tokens that they share; (None, 0) without one.

    Args:
        running: rows of requests that go on.
        kept: rows of requests that have ended.
        states: whether rows keep states, which are of one length: the row's present one, or one that it hasn't reached.
    """
    if entry.prompt_rows(0, entry.prompt_length):
        return None, 0  # the logits of all of its prompt are needed
    beginning = entry.ids(0, LEAST_SHARED_TOKENS)
    own = entry.ids(0, entry.length - 1)  # the last token's logits are needed
    best: tuple[RunningRow | None, int] = (None, 0)
    for one in (*running, *kept):
        if one.entry.ids(0, LEAST_SHARED_TOKENS) != beginning:
            continue
        shared = _common(own, one.entry.ids(0, len(own)))
        if one in kept:
            shared = min(shared, one.row.length)  # it doesn't go on
        if states and shared < one.row.length:
            continue
        if shared >= LEAST_SHARED_TOKENS and shared > best[1]:
            best = one, shared
    return best


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count
    differs = np.array(one[:count]) != np.array(other[:count])
    return int(differs.argmax())
