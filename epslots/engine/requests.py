"""The records between an engine and its batchers: requests and outputs; and ``Batcher``, the interface of all batchers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from epslots.engine.sampling import GREEDY, Sampling
from epslots.errors import ConfigError

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


class Batcher(Protocol):
    """Advances requests, one forward pass at a time. Not for use by several threads at once."""

    capacity: int
    """Tokens that one request may keep: its prompt, and all new tokens but the last."""

    def add(self, request: Request) -> None:
        """Queue a request; the next ``prepare`` may take it into a step.

        Raises:
            ConfigError: the prompt is empty, has ids outside of the vocabulary or exceeds the cache together with
                ``max_new_tokens``; ``max_new_tokens`` is less than one; the id is taken.
        """

    def cancel(self, id: str) -> None:
        """End a request; its tokens until now are still returned. A finished or unknown id is no error.

        A prepared step is still run, without effect on the request.
        """

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""

    def prepare(self) -> bool:
        """Put together the next step's batch; False if there is nothing to do.

        Until ``step`` has returned, further calls change nothing and return True.
        """

    def step(self) -> None:
        """Run the model once, over the prepared batch.

        A failure of the model raises nothing: the next steps repeat the batch in parts, and a request that fails alone ends
        with reason "error". The same applies to logits that are NaN or infinite.

        Raises:
            PeerLost: nothing of the step counts; another call repeats it.
            StepFailed: this rank's failure broke the group; nothing of the step counts.
            Exception: an error that no request causes: of files, settings or the device.
        """

    def outputs(self) -> list[Output]:
        """The results since the last call: at most one output for each request, in the order of ``add``."""

    def unfinished(self) -> list[tuple[Request, tuple[int, ...]]]:
        """Every request whose end was not returned, with its returned tokens: enough for another batcher to continue."""

    def close(self) -> None:
        """Free the cache, and leave the model as it was. Afterwards only ``unfinished`` may be called."""
