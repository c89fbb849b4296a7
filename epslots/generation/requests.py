"""The records between an engine's user and its batcher: a request, and its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from epslots.errors import ConfigError
from epslots.generation.sampling import GREEDY, Sampling

Reason = Literal["length", "stop", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    id: str
    """Its name in outputs; unique among the unfinished requests of a batcher."""
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the output; the one that does is its last."""
    sampling: Sampling = GREEDY
    """How its tokens are chosen; the same on every rank and in every batch."""
    resumed: int = 0
    """Tokens at the end of the prompt that the request generated before it was moved: see ``after``."""

    def __post_init__(self) -> None:
        for name, kind in (("prompt", tuple), ("stop_tokens", frozenset)):
            given = getattr(self, name)
            tokens = None if isinstance(given, str | bytes) or not isinstance(given, Iterable) else kind(given)
            if tokens is None or not all(isinstance(token, int) for token in tokens):
                raise ConfigError(f"request {self.id!r}: {name}={given!r}; allowed: token ids, ints from a tokenizer")
            object.__setattr__(self, name, tokens)
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"request {self.id!r}: sampling={self.sampling!r}; allowed: a Sampling")
        if self.resumed and not 0 <= self.resumed < len(self.prompt):
            raise ConfigError(f"request {self.id!r}: resumed={self.resumed}; allowed: 0 to all of the prompt but a token")

    def after(self, tokens: Iterable[int]) -> Request:
        """The request that continues this one after its new tokens ``tokens``.

        They count as prompt, so the coming tokens keep their positions, and with them their random numbers.
        """
        new = tuple(tokens)
        left = self.max_new_tokens - len(new)
        return replace(self, prompt=self.prompt + new, max_new_tokens=left, resumed=self.resumed + len(new))


@dataclass(frozen=True)
class Output:
    """A request's new tokens since its last output, and its end."""

    id: str
    tokens: tuple[int, ...]
    finished: bool = False
    reason: Reason | None = None
    """Why it finished."""
    error: str | None = None
    """The failure in words, if ``reason`` is "error"."""
