"""Engines of the benches: random requests, brought to where a measurement begins or served to their ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from epslots.bench.models import release
from epslots.generation.engine import Engine
from epslots.generation.requests import Output, Request


def open_engine(model: PreTrainedModel, **settings: Any) -> Engine:
    """An engine that computes every prompt as a whole: no beginnings are shared."""
    return Engine(model, prefix_cache=False, **settings)


def random_prompt(model: PreTrainedModel, length: int, seed: int) -> tuple[int, ...]:
    """Token ids, the same for the same seed and length."""
    numbers = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, model.config.get_text_config().vocab_size, (length,), generator=numbers).tolist())


def random_requests(model: PreTrainedModel, count: int, length: int, new_tokens: int, seed: int = 0) -> list[Request]:
    """Requests "0", "1" and so on, with different prompts of ``length`` tokens."""
    prompts = [random_prompt(model, length, 10_000 * seed + number) for number in range(count)]
    return [Request(str(number), prompt, new_tokens) for number, prompt in enumerate(prompts)]


def step(engine: Engine) -> list[Output]:
    """A step, and its outputs. Raises AssertionError if a request failed."""
    engine.step()
    outputs = engine.batcher.outputs()
    for output in outputs:
        if output.error is not None:
            raise AssertionError(f"request {output.id} failed: {output.error}")
    return outputs


class Decoding:
    """Requests that decode: their prompts are computed.

    Attributes:
        tokens: new tokens of each request, by its id.
    """

    def __init__(self, engine: Engine, requests: Iterable[Request]) -> None:
        self.tokens: dict[str, list[int]] = {}
        self._engine = engine
        for request in requests:
            engine.batcher.add(request)
            self.tokens[request.id] = []
        while not all(self.tokens.values()):
            self.step()

    def step(self) -> None:
        """A step, in which each request gets a token."""
        for output in step(self._engine):
            self.tokens[output.id] += output.tokens

    def stop(self, keep: int = 0) -> None:
        """End all requests but the first ``keep``."""
        for id in list(self.tokens)[keep:]:
            self._engine.batcher.cancel(id)
            del self.tokens[id]
        self._engine.batcher.outputs()


def close(engines: MutableMapping[Any, Engine]) -> None:
    """Close engines, and free their models' memory, if nothing else holds them."""
    while engines:
        engines.popitem()[1].batcher.close()
    release()


class Served:
    """Requests that an engine served to their ends, one step after the other.

    Attributes:
        tokens: of each request, by its id.
        seconds: taken.
        decoding_s: seconds of each step in which every request got a token that wasn't its first.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        self.decoding_s: list[float] = []
        for request in requests:
            engine.batcher.add(request)
        began = last = time.perf_counter()
        while engine.batcher.has_work:
            outputs = step(engine)
            for output in outputs:
                self.tokens[output.id] += output.tokens
            now = time.perf_counter()
            if len(outputs) == len(requests) and all(len(tokens) > 1 for tokens in self.tokens.values()):
                self.decoding_s.append(now - last)
            last = now
        self.seconds = last - began

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.tokens.values())) / self.seconds
