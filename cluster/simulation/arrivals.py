"""``Arrival``: a request of a simulated cluster; ``Workload``: how many come, how long they are, what they share. Pure.

Nothing is computed from a simulated prompt but its length and the prompts that begin alike. Its routing is a stretch of a
recorded trace: the request's token at position p chooses the experts of row ``first_row + p``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.generation.requests import Request

_MOST_TOKENS = 10**6
# Tokens of beginnings that prompts share are below, each prompt's own are above.
_FIRST_OWN_TOKEN = 2**32


@dataclass(frozen=True)
class Arrival:
    """A request that arrives.

    Attributes:
        at_s: when, in simulated seconds.
        request: as a cluster gets it. It ends after ``max_new_tokens``.
        first_row: the trace's row of its first token.
    """

    at_s: float
    request: Request
    first_row: int


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at random (a Poisson process), whatever the cluster can take.

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
            if not 0 < getattr(self, name) < _FIRST_OWN_TOKEN:
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

    def arrivals(self, starts: IntArray, seed: int = 0) -> Iterator[Arrival]:
        """The requests in the order of their arrival, the same ones for a seed.

        Args:
            starts: first rows of the trace's sequences, int64 [N]; requests take them in turn.
        """
        random = np.random.default_rng(seed)
        count, at_s = self.requests, 0.0
        prompt_N = random.integers(*self.prompt_tokens, count, endpoint=True).tolist()
        new_N = random.integers(*self.new_tokens, count, endpoint=True).tolist()
        shared_N = random.integers(0, self.shared_prompts, count).tolist()
        first_N = starts[random.integers(0, len(starts), count)].tolist()
        wait_N = random.exponential(1 / self.rate, count).tolist()
        drawn = zip(prompt_N, new_N, shared_N, first_N, wait_N, strict=True)
        for number, (prompt, new, shared, first, wait) in enumerate(drawn):
            at_s += wait
            own = _FIRST_OWN_TOKEN + number
            tokens = (shared,) * self.shared_tokens + (own,) * (prompt - self.shared_tokens)
            yield Arrival(at_s, Request(str(number), tokens, new), first)
