"""Requests, what comes of them, and what any batcher does with them: the records between an engine and its batchers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from epslots.engine.sampling import GREEDY, Sampling
from epslots.errors import ConfigError

Reason = Literal["length", "stop", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt to go on from."""

    id: str
    """Its name in outputs; unique among the requests of a batcher that aren't done."""
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the output, and are the last of it."""
    sampling: Sampling = GREEDY
    """How its tokens are chosen; they are the same wherever it runs."""
    resumed: int = 0
    """Tokens at the end of the prompt that an earlier part of the request generated: see ``after``."""

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
        """The request that goes on where this one stopped after the new tokens ``tokens``.

        They count as prompt, so the tokens to come keep their positions, and with them their random numbers.
        """
        done = tuple(tokens)
        return replace(
            self,
            prompt=self.prompt + done,
            max_new_tokens=self.max_new_tokens - len(done),
            resumed=self.resumed + len(done),
        )


@dataclass(frozen=True)
class Output:
    """What came of a request since its last output."""

    id: str
    tokens: tuple[int, ...]
    finished: bool = False
    reason: Reason | None = None
    """Why it finished."""
    error: str | None = None
    """What went wrong, if ``reason`` is "error"."""


class Batcher(Protocol):
    """Advances requests, one forward pass at a time. Not for use by several threads at once."""

    capacity: int
    """Tokens that one request may keep: its prompt and all new tokens but the last."""

    def add(self, request: Request) -> None:
        """Take a request; it is first advanced in a step that is prepared later.

        Raises:
            ConfigError: the prompt is empty, has ids outside of the vocabulary or exceeds the cache together with
                ``max_new_tokens``; ``max_new_tokens`` is less than one; the id is taken.
        """

    def cancel(self, id: str) -> None:
        """Give a request up; what it got until now is handed out. One that is done or unknown is no error.

        A prepared step is still run, without effect on the request.
        """

    @property
    def has_work(self) -> bool:
        """Whether a request isn't done."""

    def prepare(self) -> bool:
        """Put together the next step; False if there is nothing to do.

        Until ``step`` has returned, further calls change nothing and return True.
        """

    def step(self) -> None:
        """Run the model once, over what was prepared.

        If that fails by itself, nothing is raised: the next steps do it again with fewer requests each, and a request that
        fails alone ends with reason "error". The same goes for logits that are NaN or infinite.

        Raises:
            PeerLost: nothing counts, and calling again does the same again.
            StepFailed: as if a peer was lost; it was this rank that broke the group.
            Exception: an error that says nothing of requests: of files, settings or the device.
        """

    def outputs(self) -> list[Output]:
        """What the steps since the last call brought, at most one output for each request, in the order of ``add``."""

    def unfinished(self) -> list[tuple[Request, tuple[int, ...]]]:
        """Every request whose end was not handed out, and the tokens that were: what another batcher needs to go on."""

    def close(self) -> None:
        """Give the cache back, and leave the model as it was. The batcher can't be used afterwards, but for ``unfinished``."""
