"""A cluster for jobs: no model and no rank, texts that depend on prompt and settings alone, results in an odd order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster.errors import ClusterError
from cluster.generation import Result
from epslots.errors import ConfigError
from epslots.generation.requests import TokenLogprobs
from epslots.generation.settings import read_settings

CAPACITY = 100


class FakeCluster:
    """Takes up to ``width`` prompts at once.

    Args:
        order: seed of the order in which they finish.
        fail_after: results after which it fails.
    """

    def __init__(self, *, order: int = 0, width: int = 4, fail_after: int | None = None) -> None:
        self._random = random.Random(order)
        self._width = width
        self._fail_after = fail_after
        self.asked: list[Mapping[str, Any]] = []
        self.most_waiting = 0

    def generate(self, prompts: Iterable[Mapping[str, Any]], **settings: Any) -> Iterator[Result]:
        waiting: list[Result] = []
        numbered = enumerate(prompts)
        given = 0
        while True:
            while len(waiting) < self._width and (taken := next(numbered, None)):
                self.asked.append(taken[1])
                waiting += answers(*taken, settings)
                self.most_waiting = max(self.most_waiting, len(waiting))
            if not waiting:
                return
            if given == self._fail_after:
                raise ClusterError("all ranks are lost")
            yield waiting.pop(self._random.randrange(len(waiting)))
            given += 1


def answers(index: int, asked: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Result]:
    """The words of a model, once for each choice. With the seed 13, choice 1 fails."""
    own = dict(asked)
    prompt = own.pop("prompt")
    try:
        how = read_settings({**settings, **own})
        if not prompt:
            raise ConfigError("an empty prompt")
        if len(prompt) + how.max_new_tokens > CAPACITY:
            raise ConfigError(f"the prompt has {len(prompt)} tokens, but a rank's cache holds {CAPACITY}")
    except ConfigError as error:
        return [Result(index, asked, (), None, "error", str(error))]
    tokens = tuple(range(len(prompt) % 5 + 1))
    logprobs = tuple(TokenLogprobs(t, -t / 3, ((t, -t / 3),) * (how.logprobs or 0)) for t in tokens)
    results = [
        Result(
            index=index,
            prompt=asked,
            tokens=tokens,
            text=f"{prompt}:{how.temperature:g}" + (f".{choice}" if how.n > 1 else ""),
            reason="length",
            choice=choice,
            choices=how.n,
            logprobs=None if how.logprobs is None else logprobs,
            prompt_logprobs=None if how.prompt_logprobs is None or choice else logprobs[:2],
        )
        for choice in range(how.n)
    ]
    if how.seed == 13 and how.n > 1:
        results[1] = replace(results[1], tokens=(), text="", reason="error", error="NaN, says the fake")
    return results


@contextmanager
def opened(cluster: FakeCluster) -> Iterator[FakeCluster]:
    """A cluster as a job opens it."""
    yield cluster
