"""``TrackedRequest``: a request of a batcher with its results, and ``NextToken``: its next token.

A step chooses tokens (next_token.py) and changes no request. When it is committed, ``append`` and ``add_prompt_logprobs``
enter its results; until then it can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import FloatArray, IntArray
from epslots.generation.cache_image import CacheImage
from epslots.generation.requests import Reason, Request, TokenLogprobs
from epslots.generation.token_counts import TokenCounts

NO_TOKEN = -1


class PromptState(NamedTuple):
    """A prompt that is being computed.

    Attributes:
        id: of its request.
        computed: tokens that the cache holds.
        left: tokens that are to come.
        assignment: of its request.
    """

    id: str
    computed: int
    left: int
    assignment: int = 0


@dataclass(frozen=True)
class NextToken:
    """The next token of a request.

    Attributes:
        token: -1 (``NO_TOKEN``) where logits are NaN or infinite, or the grammar allows no token.
        logprobs: if the request asked for them.
    """

    token: int
    logprobs: TokenLogprobs | None = None


class GrammarProgress(Protocol):
    """How far a text has come in its grammar; ``grammar.GrammarState`` is one."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and no token may follow but a stop token."""

    @property
    def error(self) -> str | None:
        """Why the text can't be continued, although it isn't complete."""

    def allowed(self) -> NDArray[np.int32]:
        """The tokens that may come next, the stop tokens among them where the text may end: int32 [ceil(V / 32)].

        Bit ``t % 32`` of word ``t // 32`` stands for token t. At least one is set. A call may find that the text is finished,
        or can't be continued: the next token is no part of it then.
        """

    def accept(self, token: int) -> object:
        """Add a token to the text: no stop token."""


@dataclass(eq=False)
class TrackedRequest:
    """A request and its results."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each of ``tokens``, if the request asked for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt, but for those that ``outputs`` has returned."""
    delivered: int = 0
    """Tokens that ``outputs`` has returned."""
    reason: Reason | None = None
    error: str | None = None
    grammar_state: GrammarProgress | None = None
    """Of the text so far, if the request has a grammar; None until it is compiled."""
    number: int = 0
    """In the order of arrival."""
    image: CacheImage | None = None
    """Of its cache, while that is read for a hand-over, or was."""

    def __post_init__(self) -> None:
        self._prompt_logprobs_known = self.request.prompt_logprobs_delivered
        self._counts: TokenCounts | None = None
        self._counted = 0
        """The first of ``tokens`` that ``_counts`` lacks."""

    @property
    def turn(self) -> tuple[int, int]:
        """Its place among all requests. The lowest is served first; the highest gives up its place in the cache first."""
        return self.request.priority, self.number

    @property
    def held(self) -> bool:
        """Whether it makes no step, because its cache is being handed over.

        A request whose prompt isn't complete goes on until it is.
        """
        return self.image is not None and not self.image.gone and self.length > self.image.layout.tokens

    def resume(self) -> None:
        """Let its cache be read no longer; a no-op if it isn't."""
        if self.image is not None:
            self.image.end()
            self.image = None

    def prompt_state(self, computed: int, left: int) -> PromptState:
        """How far its prompt is computed."""
        return PromptState(self.request.id, computed, left, self.request.assignment)

    @property
    def waits_for_grammar(self) -> bool:
        return self.request.grammar is not None and self.grammar_state is None

    @property
    def length(self) -> int:
        """Tokens of the whole sequence: the position of its next token."""
        return len(self.request.prompt) + len(self.tokens)

    def ids(self, start: int, end: int) -> list[int]:
        """The tokens of the sequence from a position up to another one."""
        count = len(self.request.prompt)
        if start >= count:
            return self.tokens[start - count : end - count]
        return [*self.request.prompt[start:end], *self.tokens[: max(0, end - count)]]

    @cached_property
    def prompt_T(self) -> IntArray:
        """The tokens of the prompt, int64 [T]."""
        return np.array(self.request.prompt, np.int64)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, without the text that the request generated before it was moved."""
        return len(self.request.prompt) - self.request.resumed

    @property
    def text_length(self) -> int:
        """Tokens of the text so far, those before it was moved included."""
        return self.length - self.prompt_length

    # --- edits of the next token's logits ---

    @property
    def allowed(self) -> Any:
        """The tokens that the grammar allows next, as ``GrammarProgress.allowed`` returns them; None without a grammar."""
        return None if self.grammar_state is None else self.grammar_state.allowed()

    @property
    def counts(self) -> TokenCounts:
        """The tokens that penalties apply to; those of the prompt, if a penalty does."""
        if self._counts is None:
            prompt, start = self.request.prompt, self.prompt_length
            before = prompt[:start] if self.request.sampling.repetition_penalty != 1 else ()
            self._counts = TokenCounts(before, prompt[start:])
        for token in self.tokens[self._counted :]:
            self._counts.add(token)
        self._counted = len(self.tokens)
        return self._counts

    @cached_property
    def bias_2B(self) -> FloatArray:
        """float64 [2, B]: the tokens of ``logit_bias``, and their numbers."""
        return np.array(self.request.sampling.logit_bias, np.float64).reshape(-1, 2).T

    # --- results ---

    def prompt_rows(self, start: int, end: int) -> range:
        """Positions whose logits give a log-probability of the prompt that was asked for and is missing.

        The logits of position i are those of the token at i + 1, so the first token has none. They are missing once, also if
        the prompt is computed again.

        Args:
            start: the first position of a chunk.
            end: the position after it.
        """
        if self.request.prompt_logprobs is None:
            return range(start, start)
        first = max(start, self._prompt_logprobs_known)
        return range(first, max(first, min(end, self.prompt_length - 1)))

    def add_prompt_logprobs(self, rows: range, found: Sequence[TokenLogprobs]) -> None:
        """Enter log-probabilities of the prompt; those that are known already are ignored.

        Args:
            rows: from ``prompt_rows``.
            found: of the token behind each of them (``next_token.prompt_logprobs``).
        """
        if not rows:
            return
        known = self._prompt_logprobs_known - rows.start
        assert known >= 0, "a prompt is computed in order, and one with missing log-probabilities shares no prefix"
        new = found[known:]
        self.prompt_logprobs += new
        self._prompt_logprobs_known += len(new)

    def append(self, choice: NextToken) -> None:
        """Add the next token, and end the request if it is its last.

        A stop token before ``min_tokens`` ends it, too: it is chosen where no other token is left.
        """
        request, token, grammar = self.request, choice.token, self.grammar_state
        assert token != NO_TOKEN, "a step without a token isn't committed"
        stops = token in request.stop_tokens
        if grammar is not None and (grammar.error is not None or not stops):
            if self._ended_by(grammar):
                return
            grammar.accept(token)
        self.tokens.append(token)
        if choice.logprobs is not None:
            self.logprobs.append(choice.logprobs)
        if stops:
            self.end("stop")
        elif grammar is not None and self._ended_by(grammar):
            pass
        elif len(self.tokens) == request.max_new_tokens:
            self.end("length")

    def _ended_by(self, grammar: GrammarProgress) -> bool:
        if grammar.error is not None:
            self.end("error", grammar.error)
        elif grammar.finished:
            self.end("stop")
        return self.reason is not None

    def end(self, reason: Reason, error: str | None = None) -> None:
        self.reason, self.error = reason, error
        self.resume()

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The log-probabilities of the prompt since the last call."""
        taken, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return taken

    @property
    def as_delivered(self) -> Request:
        """The request without what ``outputs`` has returned of its prompt's log-probabilities."""
        new = self._prompt_logprobs_known - self.request.prompt_logprobs_delivered - len(self.prompt_logprobs)
        return self.request.after((), new)
