"""A load on a simulated cluster: the ``Workload``, and the ``LoadFigures`` under it. Pure.

``cluster/simulation`` serves the one and measures the others; ``epslots simulate`` makes and prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from epslots.errors import ConfigError
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.simulate import RecordedTraffic, TimeStats

_MOST_TOKENS = 10**6
_MOST_REQUESTS = 10**7


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at random (a Poisson process), even faster than the cluster can serve them.

    Attributes:
        rate: requests a second.
        requests: their number.
        prompt_tokens, new_tokens: the least and the most of a request; drawn evenly.
        shared_tokens: of each prompt's beginning that other prompts have, too; at most ``prompt_tokens``.
        shared_prompts: different beginnings.
    """

    rate: float
    requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    shared_tokens: int = 0
    shared_prompts: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1e9:
            raise ConfigError(f"rate={self.rate!r}; allowed: requests a second, more than 0, less than 1e9")
        for name in ("requests", "shared_prompts"):
            if not 0 < getattr(self, name) < _MOST_REQUESTS:
                raise ConfigError(f"{name}={getattr(self, name)}; allowed: 1 or more")
        for name in ("prompt_tokens", "new_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most <= _MOST_TOKENS:
                raise ConfigError(f"{name}={least}-{most}; allowed: from 1 to {_MOST_TOKENS:,}, the least first")
        if not 0 <= self.shared_tokens <= self.prompt_tokens[0]:
            raise ConfigError(
                f"shared_tokens={self.shared_tokens}; allowed: 0 to the shortest prompt's {self.prompt_tokens[0]}"
            )

    @property
    def most_tokens(self) -> int:
        """Tokens that the longest request keeps in a cache: its last one is never computed with."""
        return self.prompt_tokens[1] + self.new_tokens[1] - 1


class LoadFigures(msgspec.Struct, frozen=True):
    """A simulated cluster under a load. Times are those of the requests in the middle, as their readers see them.

    Attributes:
        rate: requests a second that arrived.
        requests: that were measured.
        ttft_ms: from a request's arrival to its first token.
        tpot_ms: from a request's first token to its last, for each token after the first.
        gap_ms: between two tokens of a text on its rank; hand-overs apart.
        hand_over_ms: of a hand-over, in which its text stands still; None without one.
        tokens_per_s: new tokens of all requests, while the measured ones came.
        reused: share of the prompts' tokens that weren't computed, because a rank's cache held them.
        hand_overs, failed_hand_overs, hand_over_bytes: over the whole simulation.
        preempted: times that a request gave up its place in a cache.
        step_skew: tokens of a step's busiest rank over the mean of those that have some, over all steps; by role.
        step_ms: mean of a group's steps, by role.
        hit_rate: hits per use of an expert.
        placements: that the controller has published.
        kept_up: the measured requests left as fast as they came: their number at the end wasn't growing.
    """

    rate: float
    requests: int
    ttft_ms: TimeStats
    tpot_ms: TimeStats
    gap_ms: TimeStats
    hand_over_ms: TimeStats | None
    tokens_per_s: float
    reused: float
    hand_overs: int
    failed_hand_overs: int
    hand_over_bytes: int
    preempted: int
    step_skew: dict[str, float]
    step_ms: dict[str, float]
    hit_rate: float
    placements: int
    kept_up: bool


class SimulateLoad(Protocol):
    """Simulates a cluster under a load."""

    def __call__(
        self, cluster: GroupedCluster, traffic: RecordedTraffic, workload: Workload, advance: Callable[[int], object]
    ) -> LoadFigures:
        """The figures.

        Args:
            traffic: the routing of tokens.
            advance: called with 1 for each request that arrives.

        Raises:
            ConfigError: a setting is out of range, or a request is too long for a rank's cache.
        """
