"""The counters of one engine's requests, and their sums over ranks. Pure.

A batcher counts in its ``EngineCounters``; ``Batcher.stats`` adds the state of its requests. To add a counter, add a field to
``EngineCounters`` and to ``EngineStats``: messages, sums and JSON follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec


@dataclass
class EngineCounters:
    """Counts since an engine was made, which its batcher increases. The fields are those of ``EngineStats``."""

    steps: int = 0
    replayed_steps: int = 0
    crowded_steps: int = 0
    ragged_steps: int = 0
    graph_bytes: int = 0
    failed_captures: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    preempted: int = 0
    step_tokens: int = 0
    longest_tokens: int = 0


class Usage(NamedTuple):
    """The content of an engine's cache now. The fields are those of ``EngineStats``."""

    running: int
    kv_used: int
    kv_tokens: int
    kv_most_tokens: int
    ceded_slots: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's counters since it was made, and its requests now.

    A name in brackets is that of the vLLM metric with the same meaning.

    Attributes:
        steps: forward passes over requests; several parts of a step that failed as a whole count one by one.
        replayed_steps: those of them that were replayed from a CUDA graph.
        crowded_steps: those that would have been, but could need more experts than some layer has slots.
        ragged_steps: those that would have been, but read too many positions: all of a step's requests count as long as the
            longest (``models/captured_sizes.py``).
        graph_bytes: of device memory that capturing CUDA graphs took.
        failed_captures: those that ran out of memory; each is tried again, after more steps each time.
        prompt_tokens: tokens of prompts that were computed, those computed again after a preemption included.
        new_tokens: tokens that were returned (``generation_tokens``).
        reused_tokens: tokens of prompts that weren't computed, because the cache held them (``prefix_cache_hits``).
        preempted: times that a request gave up its place in the cache and was computed again (``num_preemptions``).
        step_tokens: tokens that this rank has computed in the group's steps, of prompts and of texts.
        longest_tokens: those of the rank with most, in steps in which this rank had some: it waited for that one.
        running: requests with a place in the cache (``num_requests_running``).
        waiting: requests without one (``num_requests_waiting``).
        kv_used: tokens that the cache's memory in use has room for; what finished requests left for others is free.
        kv_tokens: tokens that all of the cache has room for; with ``kv_tokens="auto"``, now.
        kv_most_tokens: tokens that it can have room for.
        ceded_slots: slots of all MoE layers that hold a part of it now.
        capture_obstacle: why a rank on a GPU doesn't replay its decoding steps, as a sentence's end; None if it may, and on a
            CPU, which has no graphs. Of several ranks, the first one's.
        whole_obstacle: why it replays them in pieces and not whole, likewise; None if none was replayed in pieces.
    """

    steps: int
    replayed_steps: int
    crowded_steps: int
    ragged_steps: int
    graph_bytes: int
    prompt_tokens: int
    new_tokens: int
    reused_tokens: int
    preempted: int
    running: int
    waiting: int
    kv_used: int
    kv_tokens: int
    kv_most_tokens: int = 0
    ceded_slots: int = 0
    step_tokens: int = 0
    longest_tokens: int = 0
    failed_captures: int = 0
    capture_obstacle: str | None = None
    whole_obstacle: str | None = None

    @property
    def exchanges_memory(self) -> bool:
        """Whether the cache exchanges memory with experts: it may grow, or has grown."""
        return self.ceded_slots > 0 or self.kv_most_tokens > self.kv_tokens

    @property
    def step_skew(self) -> float:
        """Tokens of a step's most loaded rank over the mean of those that have some; of the ranks' sums. 0 = no tokens."""
        return self.longest_tokens / self.step_tokens if self.step_tokens else 0.0

    @property
    def kv_usage(self) -> float:
        """Share of the cache in use (``kv_cache_usage_perc``)."""
        return self.kv_used / self.kv_tokens if self.kv_tokens else 0.0


# Ranks make their steps together.
_LARGEST_OF_RANKS = {"steps"}


def sum_engines(ranks: Sequence[EngineStats]) -> EngineStats:
    """The sums of all ranks' numbers; of ``steps`` the largest. All are zero without a rank."""
    values = {name: [getattr(rank, name) for rank in ranks] for name in EngineStats.__struct_fields__}
    obstacle, of_whole = (next(filter(None, values.pop(name)), None) for name in ("capture_obstacle", "whole_obstacle"))
    sums = {name: max(v, default=0) if name in _LARGEST_OF_RANKS else sum(v) for name, v in values.items()}
    return EngineStats(**sums, capture_obstacle=obstacle, whole_obstacle=of_whole)
