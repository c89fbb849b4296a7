"""The books of a batcher: its requests from ``add`` until their end was handed out; and which failures are a request's own."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from epslots.arrays import IntArray
from epslots.device_copy import to_device
from epslots.engine.isolation import Isolation
from epslots.engine.plain_outputs import PlainOutputs
from epslots.engine.requests import Output, Reason, Request
from epslots.errors import ConfigError, EpslotsError, StepFailed, UnsupportedModelError
from epslots.runtime import predictor_of

logger = logging.getLogger(__name__)

# Steps in a row that a rank may break its group with before the rank itself is taken to be the reason.
MOST_BREAKS = 3
_ERROR_CHARACTERS = 500  # of an exception's text, in a request's error

T = TypeVar("T")


class NotFiniteError(ArithmeticError):
    """Logits from which a token would be chosen are NaN, or the largest is infinite."""

    def __init__(self) -> None:
        super().__init__("logits are NaN or infinite")


@dataclass(eq=False)
class TrackedRequest:
    """A request and what came of it."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    delivered: int = 0
    """How many of the tokens ``outputs`` handed out."""
    reason: Reason | None = None
    error: str | None = None

    @property
    def length(self) -> int:
        """Of the whole sequence: the position of its next token."""
        return len(self.request.prompt) + len(self.tokens)

    def end(self, reason: Reason, error: str | None = None) -> None:
        self.reason, self.error = reason, error

    def append(self, token: int) -> None:
        """Count a new token, and end the request if it is its last."""
        self.tokens.append(token)
        if token in self.request.stop_tokens:
            self.end("stop")
        elif len(self.tokens) == self.request.max_new_tokens:
            self.end("length")


class RequestBooks(ABC):
    """What all batchers share.

    Raises:
        UnsupportedModelError: the model has no language-model head.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.capacity = capacity
        self._model = model
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._entries: dict[str, TrackedRequest] = {}
        self._plain_outputs = PlainOutputs(model)
        self._breaks = 0
        """Steps in a row with which this rank broke its group."""
        self._said = ""
        """The failure that was logged last."""

    @abstractmethod
    def _enter(self, entry: TrackedRequest) -> None:
        """Take up a new request."""

    @abstractmethod
    def _leave(self, entry: TrackedRequest) -> None:
        """Give up a request that has just been cancelled."""

    def add(self, request: Request) -> None:
        self._check(request)
        entry = self._entries[request.id] = TrackedRequest(request)
        self._enter(entry)

    def _check(self, request: Request) -> None:
        name, prompt = f"request {request.id!r}", request.prompt
        if request.id in self._entries:
            raise ConfigError(f"{name}: this id is taken by a request whose end has not been handed out")
        if not prompt:
            raise ConfigError(f"{name} has an empty prompt; at least one token is needed")
        if (wrong := next((t for t in prompt if not 0 <= t < self._vocabulary), None)) is not None:
            raise ConfigError(f"{name} has token {wrong} in its prompt; allowed: 0 to {self._vocabulary - 1}")
        if request.max_new_tokens < 1:
            raise ConfigError(f"{name} asks for max_new_tokens={request.max_new_tokens}; at least 1 is needed")
        # The last token is handed out and never computed with.
        if (needed := len(prompt) + request.max_new_tokens - 1) > self.capacity:
            raise ConfigError(
                f"{name} needs {needed} tokens of KV cache ({len(prompt)} of prompt, {request.max_new_tokens} new ones less "
                f"the last), but the cache holds {self.capacity}; shorten it or raise kv_tokens"
            )

    def cancel(self, id: str) -> None:
        entry = self._entries.get(id)
        if entry is not None and entry.reason is None:
            entry.end("cancelled")
            self._leave(entry)

    def _open(self) -> list[TrackedRequest]:
        """Requests that go on, oldest first."""
        return [entry for entry in self._entries.values() if entry.reason is None]

    @property
    def has_work(self) -> bool:
        return any(entry.reason is None for entry in self._entries.values())

    def outputs(self) -> list[Output]:
        found = []
        for id, entry in list(self._entries.items()):
            tokens = tuple(entry.tokens[entry.delivered :])
            if tokens or entry.reason:
                found.append(Output(id, tokens, entry.reason is not None, entry.reason, entry.error))
            entry.delivered = len(entry.tokens)
            if entry.reason:
                del self._entries[id]
        return found

    @contextmanager
    def _following(self, row_T: IntArray | None) -> Iterator[None]:
        """Inside, what the model looks ahead by knows which row precedes each one: ``Predictor.set_previous_rows``."""
        predictor = predictor_of(self._model)
        if predictor is None or row_T is None:
            yield
            return
        predictor.set_previous_rows(to_device(row_T, self._model.device))
        try:
            yield
        finally:
            predictor.set_previous_rows(None)

    def unfinished(self) -> list[tuple[Request, tuple[int, ...]]]:
        alive = [entry for entry in self._entries.values() if entry.reason not in ("cancelled", "error")]
        return [(entry.request, tuple(entry.tokens[: entry.delivered])) for entry in alive]

    def _split_or_raise(self, isolation: Isolation[T], failure: Exception) -> tuple[T, str] | None:
        """A part of a batch has failed: split it; returns the request that is guilty, if any, and its error in words.

        Raises:
            Exception: the failure, or its cause, if it is none that requests are isolated for.
        """
        cause, breaks, ours = failure, False, False
        if isinstance(failure, StepFailed):
            assert isinstance(failure.__cause__, Exception)
            cause, breaks = failure.__cause__, True
            self._breaks += 1
            # Memory that ran out says nothing of the rank, wherever that was.
            explained = failure.computing or isinstance(cause, torch.OutOfMemoryError | MemoryError)
            ours = not explained or self._breaks > MOST_BREAKS
        # An error of ours is about ranks, files or settings; after one of a device nothing runs on it any more.
        if ours or isinstance(cause, EpslotsError | torch.AcceleratorError):
            raise cause
        if not isolation.split:
            self._log(cause, len(isolation.part))
        guilty = isolation.failed(singly=breaks)
        return None if guilty is None else (guilty, _in_words(cause, self._model.dtype))

    def _log(self, cause: Exception, requests: int) -> None:
        """Once in a row: a model that fails with every large batch does so in every step."""
        if (said := f"{type(cause).__name__}: {cause}") != self._said:
            self._said = said
            trace = None if isinstance(cause, NotFiniteError) else cause
            logger.warning("a step of %d requests failed and is repeated in parts: %s", requests, said, exc_info=trace)


def _in_words(cause: Exception, dtype: torch.dtype) -> str:
    if isinstance(cause, NotFiniteError):
        return f"its {cause}: a damaged weight, or numbers beyond the range of {dtype}"
    text = str(cause)
    text = text if len(text) <= _ERROR_CHARACTERS else f"{text[:_ERROR_CHARACTERS]} [...]"
    return f"the model's forward pass fails with this request alone: {type(cause).__name__}: {text}"


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a model that gives no logits.

    Raises:
        UnsupportedModelError: it has no language-model head.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head, so it gives no tokens; allowed: a checkpoint whose "
            f"config.json names a ...ForCausalLM or ...ForConditionalGeneration class in 'architectures'"
        )


def check_positive(**numbers: int) -> None:
    """Raises ConfigError for numbers less than one."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}={number}: at least 1 is needed")
