"""A request to an engine, and its outputs: the dataclasses between an engine's user and its batcher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from epslots.errors import ConfigError
from epslots.generation.sampling import GREEDY, Sampling

Reason = Literal["length", "stop", "cancelled", "error"]
GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]
MOST_LOGPROBS = 20
"""Alternatives that a request may ask for at each token, as in OpenAI's API."""


@dataclass(frozen=True)
class Grammar:
    """The language that a request's text must belong to.

    Attributes:
        kind: the notation of ``text``: a JSON schema, a regular expression, or a grammar in the style of Lark.
        text: in that notation; empty for "json_object".
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position of a sequence, in nats, by the model's own logits.

    They are the model's: no setting of a ``Sampling`` changes them.

    Attributes:
        token: the token at the position, chosen or given.
        logprob: its own.
        top: the likeliest tokens with theirs, the likeliest first; as many as the request asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
    grammar: Grammar | None = None
    """Tokens that would leave it aren't chosen."""
    logprobs: int | None = None
    """Return the log-probability of each new token, and of this many likeliest ones; None = don't."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens, but for the first."""
    prompt_logprobs_delivered: int = 0
    """Those of the prompt that were delivered before it was moved: the next output begins after these."""
    priority: int = 0
    """Of the requests that wait, those with the lowest number are served first; equal ones in the order of arrival."""
    assignment: int = 0
    """The caller's number, which outputs return: of the request's assignments to ranks, this is the one."""

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
        if not 0 <= (given := self.prompt_logprobs_delivered) <= len(self.prompt):
            raise ConfigError(f"request {self.id!r}: prompt_logprobs_delivered={given}; allowed: 0 to the prompt's length")
        if type(self.priority) is not int:
            raise ConfigError(f"request {self.id!r}: priority={self.priority!r}; allowed: an int")
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None and (type(given) is not int or not 0 <= given <= MOST_LOGPROBS):
                raise ConfigError(f"request {self.id!r}: {name}={given!r}; allowed: None, or 0 to {MOST_LOGPROBS}")

    def after(self, tokens: Iterable[int], prompt_logprobs: int = 0) -> Request:
        """The request that continues this one after what it delivered.

        Its new tokens count as prompt, so the coming ones keep their positions, and with them their random numbers.

        Args:
            tokens: the new tokens that were delivered.
            prompt_logprobs: number of log-probabilities of the prompt that were; all, if a token was.
        """
        new = tuple(tokens)
        return replace(
            self,
            prompt=self.prompt + new,
            max_new_tokens=self.max_new_tokens - len(new),
            resumed=self.resumed + len(new),
            prompt_logprobs=None if new else self.prompt_logprobs,
            prompt_logprobs_delivered=0 if new else self.prompt_logprobs_delivered + prompt_logprobs,
        )


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
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each of ``tokens``, if the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens from the second on, in portions, if the request asked for them."""
    assignment: int = 0
    """That of the request."""
