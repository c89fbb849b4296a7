"""``Arrival``: a request of a simulated cluster, and those of a workload (``simulation/load.py``). Pure.

Nothing is computed from a simulated prompt but its length and the prompts that begin alike. Its routing is a stretch of a
recorded trace: the request's token at position p chooses the experts of row ``first_row + p``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from epslots.arrays import IntArray
from epslots.generation.requests import Request
from epslots.simulation.load import Workload

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


def arrivals_of(workload: Workload, starts: IntArray) -> Iterator[Arrival]:
    """The requests in the order of their arrival, the same ones every time.

    Args:
        starts: first rows of the trace's sequences, int64 [N]; requests take them in turn.
    """
    random = np.random.default_rng(0)
    count, at_s = workload.requests, 0.0
    prompt_N = random.integers(*workload.prompt_tokens, count, endpoint=True).tolist()
    new_N = random.integers(*workload.new_tokens, count, endpoint=True).tolist()
    shared_N = random.integers(0, workload.shared_prompts, count).tolist()
    first_N = starts[random.integers(0, len(starts), count)].tolist()
    wait_N = random.exponential(1 / workload.rate, count).tolist()
    drawn = zip(prompt_N, new_N, shared_N, first_N, wait_N, strict=True)
    for number, (prompt, new, shared, first, wait) in enumerate(drawn):
        at_s += wait
        own = _FIRST_OWN_TOKEN + number
        tokens = (shared,) * workload.shared_tokens + (own,) * (prompt - workload.shared_tokens)
        yield Arrival(at_s, Request(str(number), tokens, new), first)
