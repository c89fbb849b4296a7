"""Shared by the benches of groups: streams with the times of their tokens, their prompts, and a larger random model."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from cluster.api import Cluster
from epslots.bench.models import random_checkpoint, random_config
from epslots.example import example_model

_PATIENCE_S = 120.0


@contextmanager
def models() -> Iterator[dict[str, Path]]:
    """The models of the bench, by name. The shipped one, and a random one whose experts are 20 times as large."""
    larger = random_config(layers=4, hidden=384, experts=32, top_k=4, width=256, heads=6)
    with random_checkpoint(larger, torch.bfloat16) as folder:
        yield {"shipped": example_model(), "random": folder}


def token_ids(count: int, seed: int) -> list[int]:
    """A prompt without meaning, and without a beginning that others have."""
    return random.Random(seed).choices(range(1000, 2000), k=count)


class WatchedStream:
    """A stream whose tokens' times are noted, by a thread of its own.

    Attributes:
        generation: the stream.
        times: seconds (``time.perf_counter``) and number of tokens of each arrival.
    """

    def __init__(self, cluster: Cluster, prompt: Sequence[int], new_tokens: int) -> None:
        self.generation = cluster.submit(prompt, max_new_tokens=new_tokens, stop_tokens=())
        self.times: list[tuple[float, int]] = []
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for portion in self.generation.portions():
            with self._arrived:
                if portion.tokens:
                    self.times.append((time.perf_counter(), len(portion.tokens)))
                self._arrived.notify_all()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_for(self, arrivals: int) -> None:
        """Wait for so many arrivals.

        Raises:
            TimeoutError: they don't come.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.times) >= arrivals, _PATIENCE_S):
                raise TimeoutError(f"{arrivals} arrivals of tokens did not come within {_PATIENCE_S:g} s")

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for its end."""
        self._thread.join(timeout_s)

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between arrivals, of those gaps that lie in part between two times."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.times) if later > begin and earlier < end]

    def token_seconds(self, begin: float = 0.0) -> list[float]:
        """Seconds of each token that arrives after ``begin``; tokens that come together share their time."""
        found: list[float] = []
        for (earlier, _), (later, tokens) in pairwise(self.times):
            if earlier < begin:
                continue
            found += [(later - earlier) / tokens] * tokens
        return found


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99))
