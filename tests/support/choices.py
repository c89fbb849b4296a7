"""Rows of logits for requests without a batcher, and a grammar that is easily followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.generation.next_token import choose
from epslots.generation.requests import Request
from epslots.generation.sampling import Sampling
from epslots.generation.tracked_request import TrackedRequest


class RequestAt(TrackedRequest):
    """A request whose next token has any position."""

    def __init__(self, sampling: Sampling, position: int, logprobs: int | None = None) -> None:
        super().__init__(Request("at", (0,), 1, sampling=sampling, logprobs=logprobs))
        self.position = position

    @property
    def length(self) -> int:
        return self.position


def next_tokens(logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
    """The token that each row's sampling chooses at its position."""
    entries = [RequestAt(sampling, position) for sampling, position in zip(samplings, positions, strict=True)]
    return torch.tensor([choice.token for choice in choose(logits, entries).read()])


def bits_of(tokens: Sequence[int] | set[int], vocabulary: int) -> NDArray[np.int32]:
    """A mask of tokens as ``GrammarProgress.allowed`` returns it."""
    words = np.zeros(-(-vocabulary // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words.view(np.int32)


class FakeGrammar:
    """Texts of ``length`` tokens, of which token i is congruent to i modulo ``modulus``.

    Args:
        stops: allowed behind the text; without any, it ends by itself.
    """

    error: str | None = None

    def __init__(self, vocabulary: int, *, modulus: int = 3, length: int = 5, stops: Sequence[int] = ()) -> None:
        self.vocabulary, self.modulus, self.length, self.stops = vocabulary, modulus, length, stops
        self.text: list[int] = []

    @property
    def finished(self) -> bool:
        return len(self.text) == self.length and not self.stops

    def next_tokens(self) -> set[int]:
        if len(self.text) == self.length:
            return set(self.stops)
        return set(range(len(self.text) % self.modulus, self.vocabulary, self.modulus)) - set(self.stops)

    def allowed(self) -> NDArray[np.int32]:
        return bits_of(self.next_tokens(), self.vocabulary)

    def accept(self, token: int) -> None:
        assert token in self.next_tokens(), f"{token} leaves the grammar after {self.text}"
        assert token not in self.stops, f"{token} is no part of the text"
        self.text.append(token)


class ReadyGrammars:
    """A ``GrammarQueue`` whose states need no compiling.

    Args:
        make: the state of a request's grammar at the beginning of its text.
    """

    def __init__(self, make: Callable[[Request], FakeGrammar]) -> None:
        self._make = make
        self._ready: list[tuple[Any, FakeGrammar]] = []

    def put(self, item: Any, request: Request) -> None:
        state = self._make(request)
        for token in request.prompt[len(request.prompt) - request.resumed :]:
            state.accept(token)
        self._ready.append((item, state))

    def take(self) -> list[tuple[Any, FakeGrammar]]:
        ready, self._ready = self._ready, []
        return ready

    def __len__(self) -> int:
        return len(self._ready)

    def close(self) -> None:
        self._ready.clear()
