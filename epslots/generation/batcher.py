"""``Batcher``: the interface of all batchers, and the part that they share.

It holds the requests from ``add`` until their end is returned, and tells a request's failure from a rank's. ``PagedBatcher``
and ``RowBatcher`` derive from it; ``isolation.py`` decides how a failed step is repeated.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from epslots.arrays import IntArray
from epslots.device_copy import to_device
from epslots.errors import ConfigError, EpslotsError, StepFailed, UnsupportedModelError
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout
from epslots.generation.captured_decoding import CapturedDecoding
from epslots.generation.chunk_balance import StepLoad
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import EngineCounters, EngineStats, Usage
from epslots.generation.grammar import GrammarState
from epslots.generation.grammar_queue import GrammarQueue, compiler_for
from epslots.generation.isolation import Isolation
from epslots.generation.plain_outputs import PlainOutputs
from epslots.generation.request_limits import cached_tokens, foreign_token
from epslots.generation.requests import Output, Request
from epslots.generation.tracked_request import PromptState, TrackedRequest
from epslots.runtime import predictor_of

logger = logging.getLogger(__name__)

# Steps in a row with which a rank may break its group; after more, the fault is the rank's and not a request's.
MAX_BREAKS_IN_A_ROW = 3
_TIMED_TOKENS = 16  # of a step's prompts, at least: its fixed costs would pass for theirs
_TIME_KEPT = 0.8  # weight of earlier steps
_ERROR_CHARACTERS = 500  # of an exception's text, in a request's error

T = TypeVar("T")


class NotFiniteError(ArithmeticError):
    """Logits of a next token are NaN, or the largest is infinite."""

    def __init__(self) -> None:
        super().__init__("logits are NaN or infinite")


class Batcher(ABC):
    """Advances requests, one forward pass at a time. Not for use by several threads at once.

    Args:
        model: the model that is served.
        capacity: tokens that one request may keep: its prompt, and all new tokens but the last.
        max_requests: requests that run at a time; further ones wait.

    Attributes:
        grammars: requests whose grammars are being compiled: they are queued when these are ready.
        prompt_token_s: seconds of a prompt's token, lately; 0 = none was timed.
        chunk_size: decides how many tokens of prompts a step computes.
    """

    chunk_size: ChunkSize
    _captured: CapturedDecoding[Any]

    def __init__(self, model: PreTrainedModel, capacity: int, max_requests: int) -> None:
        self.capacity, self.max_requests = capacity, max_requests
        self.grammars: GrammarQueue[TrackedRequest] = GrammarQueue(lambda: compiler_for(model))
        self._counters = EngineCounters()
        self._model = model
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._entries: dict[str, TrackedRequest] = {}
        self._numbers = itertools.count()
        self._plain_outputs = PlainOutputs(model)
        self.prompt_token_s = 0.0
        self._breaks = 0
        """Steps in a row with which this rank broke its group."""
        self._logged = ""
        """The failure that was logged last."""

    @property
    @abstractmethod
    def shares_prefixes(self) -> bool:
        """Whether the cache of a prompt's tokens is kept for others that begin alike."""

    @abstractmethod
    def _queue(self, entry: TrackedRequest) -> None:
        """Queue a new request."""

    @abstractmethod
    def _withdraw(self, entry: TrackedRequest) -> None:
        """Withdraw a request that has just been cancelled."""

    @abstractmethod
    def prepare(self, balanced: int | None = None) -> bool:
        """Put together the next step's batch; False if there is nothing to do. Until ``step`` has returned, it stays.

        Args:
            balanced: a length of prompts' chunks for the sake of the group's other ranks; None = any.
        """

    @property
    def waits_for_room(self) -> bool:
        """Whether requests wait only for slots that experts cede to the cache in the group's next step."""
        return False

    @property
    @abstractmethod
    def load(self) -> StepLoad:
        """Tokens of the prepared step, and of prompts that wait for a later one."""

    @abstractmethod
    def step(self) -> None:
        """Run the model once, over the prepared batch.

        A failure of the model raises nothing: the next steps repeat the batch in parts, and a request that fails alone ends
        with reason "error". The same applies to logits that are NaN or infinite. A row with such logits isn't repeated: no
        other request's numbers can spoil it.

        Raises:
            PeerLost: nothing of the step counts; another call repeats it.
            StepFailed: this rank's failure broke the group; nothing of the step counts.
            Exception: an error that no request causes: of files, settings or the device.
        """

    @abstractmethod
    def _usage(self) -> Usage:
        """The content of the cache now."""

    @abstractmethod
    def close(self) -> None:
        """Free the cache, and leave the model as it was. Afterwards only ``unfinished`` may be called."""

    def add(self, request: Request) -> None:
        """Queue a request; the next ``prepare`` may take it into a step.

        Raises:
            ConfigError: the prompt is empty, has ids outside of the vocabulary or exceeds the cache together with
                ``max_new_tokens``; ``max_new_tokens`` is less than one, or than ``min_tokens``; ``logit_bias`` has ids outside
                of the vocabulary; the grammar is faulty, or none can be compiled; the id is taken.
        """
        self._check(request)
        entry = self._entries[request.id] = TrackedRequest(request, number=next(self._numbers))
        if request.grammar is None:
            self._queue(entry)
        else:
            self.grammars.put(entry, request)

    def _queue_prepared(self) -> None:
        """Queue the requests whose grammars are ready; the first thing that ``prepare`` does."""
        for entry, state in self.grammars.take():
            if entry.reason is None:  # else it was cancelled meanwhile
                self._begin_grammar(entry, state)
            if entry.reason is None:
                self._queue(entry)
            else:
                self.release(entry.request.id)

    def _begin_grammar(self, entry: TrackedRequest, state: GrammarState | ConfigError) -> None:
        """Enter a request's grammar, which may end it at once."""
        if isinstance(state, ConfigError):
            entry.end("error", str(state))
            return
        entry.grammar_state = state
        if state.error is not None:
            entry.end("error", state.error)
        elif state.finished:
            entry.end("stop")

    def _check(self, request: Request) -> None:
        name, prompt = f"request {request.id!r}", request.prompt
        if request.id in self._entries:
            raise ConfigError(f"{name}: this id is taken by a request whose end has not been returned")
        if not prompt:
            raise ConfigError(f"{name} has an empty prompt; at least one token is needed")
        if wrong := foreign_token(prompt, self._vocabulary):
            raise ConfigError(f"{name}: the prompt has {wrong}")
        if request.max_new_tokens < 1:
            raise ConfigError(f"{name} asks for max_new_tokens={request.max_new_tokens}; at least 1 is needed")
        sampling = request.sampling
        if sampling.min_tokens > (most := request.max_new_tokens + request.resumed):
            raise ConfigError(f"{name} asks for min_tokens={sampling.min_tokens}; allowed: up to max_new_tokens={most}")
        if wrong := foreign_token([token for token, _ in sampling.logit_bias], self._vocabulary):
            raise ConfigError(f"{name}: logit_bias has {wrong}")
        if (needed := cached_tokens(len(prompt), request.max_new_tokens)) > self.capacity:
            raise ConfigError(
                f"{name} needs {needed} tokens of KV cache ({len(prompt)} of prompt, {request.max_new_tokens} new ones less "
                f"the last), but the cache holds {self.capacity}; shorten it or raise kv_tokens"
            )

    def cancel(self, id: str) -> None:
        """End a request; its tokens until now are still returned. A finished or unknown id is no error.

        A prepared step is still run, without effect on the request.
        """
        if (entry := self._entries.get(id)) is not None and entry.reason is None:
            entry.end("cancelled")
            if not entry.waits_for_grammar:
                self._withdraw(entry)

    def forget(self, id: str) -> None:
        """End a request that goes on elsewhere: nothing more of it is returned, and its id is free at once."""
        self.cancel(id)
        self._entries.pop(id, None)

    def cancel_all(self) -> None:
        """End all requests, and give up all reserved places."""
        for id in list(self._entries):
            self.cancel(id)
        self.release_all()

    # --- hand-overs ---

    @abstractmethod
    def _image_of(self, entry: TrackedRequest) -> CacheImage | None:
        """The image of an unfinished request's cache; None if it holds nothing, or a step has to be repeated first."""

    @abstractmethod
    def prompts(self) -> list[PromptState]:
        """Prompts of which a part is computed, and whose caches can be read meanwhile."""

    @abstractmethod
    def reserve(self, id: str, layout: CacheLayout) -> CacheImage | None:
        """Reserve a place for the cache of a request that comes from another rank. The request is added later under this id.

        The request begins there, if the image is complete by then and holds the beginning of its tokens; else with its prompt.

        Returns:
            The place, to be written; None if there is no room now.

        Raises:
            RankMismatchError: the layout is that of another model, or of other settings.
        """

    @abstractmethod
    def release(self, id: str) -> None:
        """Give up a place that is reserved; a no-op if none is."""

    @abstractmethod
    def release_all(self) -> None:
        """Give up all places that are reserved."""

    def hold(self, id: str) -> CacheImage | None:
        """Let a request make no step from its prompt's end on, so that its cache can be read.

        That ends with ``resume``, ``cancel``, or when other requests need its place.

        Returns:
            Its cache; None if it has none yet or none to read before the prompt's end, or if a step must be repeated first.
        """
        if (entry := self._entries.get(id)) is None or entry.reason is not None:
            return None
        if not entry.held:
            entry.resume()
            entry.image = self._image_of(entry)
        return entry.image

    def resume(self, id: str) -> None:
        """Let a request that is held go on here; a no-op if it isn't held."""
        if id in self._entries:
            self._entries[id].resume()

    def _open(self) -> list[TrackedRequest]:
        """Unfinished requests that were queued, oldest first."""
        return [entry for entry in self._entries.values() if entry.reason is None and not entry.waits_for_grammar]

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, and not held."""
        return any(entry.reason is None and not entry.held for entry in self._entries.values())

    def outputs(self) -> list[Output]:
        """The results since the last call: at most one output for each request, in the order of ``add``."""
        found = []
        for id, entry in list(self._entries.items()):
            tokens, logprobs = tuple(entry.tokens[entry.delivered :]), tuple(entry.logprobs[entry.delivered :])
            prompt_logprobs = entry.take_prompt_logprobs()
            self._counters.new_tokens += len(tokens)
            if tokens or prompt_logprobs or entry.reason:
                ended, number = entry.reason is not None, entry.request.assignment
                found.append(Output(id, tokens, ended, entry.reason, entry.error, logprobs, prompt_logprobs, number))
            entry.delivered = len(entry.tokens)
            if entry.reason:
                del self._entries[id]
        return found

    def _time_prompt(self, tokens: int, seconds: float) -> None:
        """Note a step that computed so many tokens of prompts."""
        if tokens >= _TIMED_TOKENS:
            now_s, before_s = seconds / tokens, self.prompt_token_s
            self.prompt_token_s = now_s + _TIME_KEPT * (before_s - now_s) if before_s else now_s

    def count_tokens(self, mine: int, longest: int) -> None:
        """Note a step of the group: this rank's tokens, and those of the rank with most. An idle rank waits for nothing."""
        self._counters.step_tokens += mine
        self._counters.longest_tokens += longest if mine else 0

    def stats(self) -> EngineStats:
        """Counters since the batcher was made, and its requests now."""
        usage = self._usage()
        return EngineStats(
            **asdict(self._counters),
            **usage._asdict(),
            waiting=len(self._open()) - usage.running,
            capture_obstacle=self._captured.reason if self._model.device.type == "cuda" else None,
            whole_obstacle=self._captured.whole_obstacle,
        )

    @contextmanager
    def _following(self, row_T: IntArray | None) -> Iterator[None]:
        """Within the context, the predictor knows the row before each one: ``UsagePredictor.set_previous_rows``."""
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
        """Every request whose end was not returned, with its returned tokens: enough for another batcher to continue.

        A request continues after the log-probabilities of its prompt that were returned.
        """
        alive = [entry for entry in self._entries.values() if entry.reason not in ("cancelled", "error")]
        return [(entry.as_delivered, tuple(entry.tokens[: entry.delivered])) for entry in alive]

    def _split_or_raise(self, isolation: Isolation[T], failure: Exception) -> tuple[T, str] | None:
        """Split a failed part of a batch; returns the faulty request, if one is found, with its error in words.

        Args:
            isolation: of the batch under way.
            failure: of its part.

        Raises:
            Exception: the failure, or its cause, where no request can be the reason.
        """
        cause, breaks_group, rank_is_at_fault = failure, False, False
        if isinstance(failure, StepFailed):
            assert isinstance(failure.__cause__, Exception)
            cause, breaks_group = failure.__cause__, True
            self._breaks += 1
            # Memory may run out at any point: that doesn't put the rank at fault.
            explained = failure.computing or isinstance(cause, torch.OutOfMemoryError | MemoryError)
            rank_is_at_fault = not explained or self._breaks > MAX_BREAKS_IN_A_ROW
        # Errors of epslots are about ranks, files or settings; after an error of a device nothing runs on it any more.
        if rank_is_at_fault or isinstance(cause, EpslotsError | torch.AcceleratorError):
            raise cause
        if not isolation.split:
            self._log(cause, len(isolation.part))
        faulty = isolation.failed(singly=breaks_group)
        return None if faulty is None else (faulty, describe_failure(cause, self._model.dtype))

    def _log(self, cause: Exception, requests: int) -> None:
        """Log a failure once in a row: a model that fails with every large batch does so in every step."""
        if (text := f"{type(cause).__name__}: {cause}") != self._logged:
            self._logged = text
            trace = None if isinstance(cause, NotFiniteError) else cause
            logger.warning("a step of %d requests failed and is repeated in parts: %s", requests, text, exc_info=trace)


def describe_failure(cause: Exception, dtype: torch.dtype) -> str:
    """A failure of one request in words, for its user."""
    if isinstance(cause, NotFiniteError):
        return f"its {cause}: a damaged weight, numbers beyond the range of {dtype}, or a grammar that allows no token"
    text = str(cause)
    text = text if len(text) <= _ERROR_CHARACTERS else f"{text[:_ERROR_CHARACTERS]} [...]"
    return f"the model's forward pass fails with this request alone: {type(cause).__name__}: {text}"


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a model without logits.

    Raises:
        UnsupportedModelError: it has no language-model head.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head, so it gives no tokens; allowed: a checkpoint whose "
            f"config.json names a ...ForCausalLM or ...ForConditionalGeneration class in 'architectures'"
        )
