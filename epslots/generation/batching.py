"""What one rank does to advance its requests: one forward pass of the model at a time, and no thread.

    batcher = batcher_for(model, kv_tokens=4096)
    batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            ...

The life of a request: ``add`` checks it; it waits until there is room; its prompt is computed, over several steps if it is
long; one token a step follows; a stop token or ``max_new_tokens`` ends it. ``outputs`` hands out what came of it, once.

A step is prepared first, so that ranks in lock-step can tell each other whether they have one. From then on it stands: if its
forward pass raises, because a peer was lost say, nothing of it counts, and the next ``step`` does the same again.

There are two batchers. ``PagedBatcher`` advances many requests in one pass, by transformers' paged KV cache and its scheduler.
``SequentialBatcher`` advances one request at a time, with the model's own cache, and so serves every model.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from epslots.device_copy import to_device
from epslots.errors import ConfigError, UnsupportedModelError
from epslots.generation.paged_attention import WindowBackup, open_processor, paging_obstacle
from epslots.generation.paged_invariance import PackedAttention, Span, invariance_obstacle
from epslots.generation.requests import Batcher, Output, Reason, Request
from epslots.generation.sampling import Sampling
from epslots.generation.token_choice import next_tokens
from epslots.models.batch_invariance import is_batch_invariant
from epslots.prediction.row_order import RowOrder
from epslots.runtime import predictor_of
from epslots.step.eviction import IntArray

logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 512


def batcher_for(model: PreTrainedModel, *, kv_tokens: int, max_batch_tokens: int = DEFAULT_BATCH_TOKENS) -> Batcher:
    """The best batcher for a model, decided by its configuration and class.

    Args:
        model: with a language model's head; text goes in, whatever else it could take.
        kv_tokens: tokens of KV cache, rounded up to whole pages.
        max_batch_tokens: of one step; longer prompts take several. A ``SequentialBatcher`` takes a prompt in one.

    Raises:
        ConfigError: a number is less than one.
        DoesNotFitError: the KV cache exceeds the device's free memory.
    """
    obstacle = paging_obstacle(model) or invariance_obstacle(model)
    if obstacle is None:
        logger.info("%s: requests are batched, with %d tokens of paged KV cache", type(model).__name__, kv_tokens)
        return PagedBatcher(model, kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
    logger.info("%s: requests run one at a time, because %s", type(model).__name__, obstacle)
    return SequentialBatcher(model, kv_tokens=kv_tokens)


@dataclass(eq=False)
class _Entry:
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


class _Requests(ABC):
    """The books of a batcher: its requests from ``add`` until their end was handed out."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.capacity = capacity
        self._model = model
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._entries: dict[str, _Entry] = {}

    @abstractmethod
    def _enter(self, entry: _Entry) -> None:
        """Take up a new request."""

    @abstractmethod
    def _leave(self, entry: _Entry) -> None:
        """Give up a request that has just been cancelled."""

    def add(self, request: Request) -> None:
        self._check(request)
        entry = self._entries[request.id] = _Entry(request)
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

    def _open(self) -> list[_Entry]:
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
        """Inside, what the model looks ahead by knows which row precedes each one: ``Predictor.follow``."""
        predictor = predictor_of(self._model)
        if predictor is None or row_T is None:
            yield
            return
        predictor.follow(to_device(row_T, self._model.device))
        try:
            yield
        finally:
            predictor.follow(None)

    def unfinished(self) -> list[tuple[Request, tuple[int, ...]]]:
        alive = [entry for entry in self._entries.values() if entry.reason not in ("cancelled", "error")]
        return [(entry.request, tuple(entry.tokens[: entry.delivered])) for entry in alive]


class PagedBatcher(_Requests):
    """Many requests in one forward pass, their keys and values in pages of one cache of fixed size.

    Requests wait while the cache is full. When those that run outgrow it, transformers gives up the newest one's pages, and
    computes them again from its prompt and tokens when there is room. Full pages of requests that are done stay until their
    room is needed, for prompts that begin alike.

    While it is open, a model with eager attention can't be used otherwise.
    """

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int, max_batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        """Allocate the cache.

        Raises:
            ConfigError: a number is less than one.
            DoesNotFitError: the KV cache exceeds the device's free memory.
            UnsupportedModelError: the model can't keep its requests in pages.
        """
        _check_positive(kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
        if obstacle := paging_obstacle(model) or invariance_obstacle(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} can't be served from pages: {obstacle}; use SequentialBatcher"
            )
        self._implementation = model.config._attn_implementation
        self._manager, self._processor = open_processor(model, kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
        self._attention = PackedAttention(model, self._processor) if is_batch_invariant(model) else None
        self._choice = self._processor.model_runner._sample = _Choice()
        super().__init__(model, infer_max_single_request_tokens(self._processor.cache))
        # transformers knows a request by a number, so that an id can be used again; and by the tokens it was handed over with.
        self._numbers = itertools.count()
        self._running: dict[str, tuple[_Entry, int]] = {}
        # Requests that wait until all that run are done; see ``_start_over``.
        self._held: list[_Entry] = []
        # Of the prepared batch; None if none is.
        self._windows: WindowBackup | None = None
        self._order = RowOrder()
        self._follows_T: IntArray | None = None

    def _enter(self, entry: _Entry) -> None:
        if self._held:
            self._held.append(entry)
        else:
            self._hand_over(entry)

    def _hand_over(self, entry: _Entry) -> None:
        """Queue a request in transformers, to go on after the tokens it has."""
        rest = entry.request.after(entry.tokens)
        number = str(next(self._numbers))
        self._running[number] = (entry, len(entry.tokens))
        self._manager.add_request(
            list(rest.prompt),
            request_id=number,
            max_new_tokens=rest.max_new_tokens,
            eos_token_id=sorted(rest.stop_tokens),
            streaming=True,
        )

    def _leave(self, entry: _Entry) -> None:
        if entry in self._held:
            self._held.remove(entry)
            return
        (number,) = [number for number, (running, _) in self._running.items() if running is entry]
        del self._running[number]
        self._manager.cancel_request(number)
        # After giving up a request's pages, the scheduler admits none until one has finished; its own cancelling forgets that.
        self._processor.scheduler.block_new_requests = False

    def prepare(self) -> bool:
        if self._windows is None:
            if self._held and not self._running:
                held, self._held = self._held, []
                for entry in held:
                    self._hand_over(entry)
            # Also without work: cancelled requests give their pages back here.
            if self._schedule():
                batch = self._processor.inputs_and_outputs.requests_in_batch
                self._choice.prepare([self._running[future.state.request_id][0] for future in batch if future.has_new_token])
                self._follows_T = self._order.next([(future.state.request_id, future.query_length) for future in batch])
                if self._attention is not None:  # the position is that after the batch
                    self._attention.prepare([Span(future.query_length, future.state.position_offset) for future in batch])
                self._windows = WindowBackup(self._processor)
        return self._windows is not None

    def _schedule(self) -> bool:
        try:
            scheduled: bool = self._processor.prepare_next_batch()
        except RuntimeError as error:
            if "no requests can be offloaded" not in str(error):
                raise
            scheduled = False
        if not scheduled and self.has_work:
            self._start_over()
            scheduled = self._processor.prepare_next_batch()
            assert scheduled, "a lone request always fits"
        return scheduled

    def _start_over(self) -> None:
        """Empty the cache and begin again with the oldest request alone; the others follow when it is done.

        Where layers of several kinds share the cache, freed pages may be scattered so that none is left of the size that one
        kind needs, even for a last running request that fits an empty cache.
        """
        assert not self._held, "a lone request always fits"
        self._processor.reset()
        self._running.clear()
        first, *self._held = self._open()
        self._hand_over(first)

    def step(self) -> None:
        assert self._windows is not None, "prepare() comes first"
        self._windows.restore()
        with self._following(self._follows_T):
            self._processor._generation_step(self._model)
        self._processor.update_batch()
        self._windows = None
        results = self._manager.output_router.output_queue
        while not results.empty():
            self._count(results.get())

    def _count(self, result: Any) -> None:
        """Count what transformers says of a request; it repeats all tokens since the request was handed over."""
        if result.request_id not in self._running:
            return  # cancelled since the step was prepared
        entry, before = self._running[result.request_id]
        for token in result.generated_tokens[len(entry.tokens) - before :]:
            entry.append(token)
        if result.error is not None:
            entry.end("error", result.error)
        assert result.is_finished() == (entry.reason is not None), "transformers and we agree on a request's end"
        if entry.reason:
            del self._running[result.request_id]

    def close(self) -> None:
        self._manager.destroy()
        self._manager = self._processor = self._windows = None
        if self._model.config._attn_implementation != self._implementation:
            self._model.set_attn_implementation(self._implementation)


class _Choice:
    """In place of transformers' choice of tokens: that of each request in the prepared batch.

    Settled when the batch is prepared: a step that is repeated chooses the same again, and so does one from which a request
    was cancelled.
    """

    def __init__(self) -> None:
        self._samplings: list[Sampling] = []
        self._positions: list[int] = []

    def prepare(self, entries: Sequence[_Entry]) -> None:
        """Take note of the batch's requests that get a token, in the batch's order."""
        self._samplings = [entry.request.sampling for entry in entries]
        self._positions = [entry.length for entry in entries]

    def __call__(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """scores [1, rows, V] to output_ids [1, any]: row i belongs to the i-th request that gets a token.

        Rows beyond those, and what is chosen for them, mean nothing.
        """
        chosen = next_tokens(scores[0, : len(self._samplings)], self._samplings, self._positions)
        output_ids[0, : len(chosen)].copy_(chosen)


class SequentialBatcher(_Requests):
    """One request at a time, as ``generate`` would do it: the prompt in one step, then a token a step.

    For models whose layers keep a recurrent state, or anything else that doesn't fit into pages. Such a state can't be taken
    back when a forward pass stops halfway. So the cache is dropped then, and the next step computes it again from the prompt
    and the tokens so far.
    """

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int) -> None:
        """Take a model.

        Raises:
            ConfigError: ``kv_tokens`` is less than one.
        """
        _check_positive(kv_tokens=kv_tokens)
        super().__init__(model, kv_tokens)
        self._prepared: _Entry | None = None
        # The request that was advanced last, and what the model keeps of it: arguments of its next forward pass.
        self._kept: tuple[_Entry, dict[str, Any]] | None = None

    def _enter(self, entry: _Entry) -> None:
        pass  # It waits among the open ones.

    def _leave(self, entry: _Entry) -> None:
        if self._kept is not None and self._kept[0] is entry and self._prepared is not entry:
            self._kept = None

    def prepare(self) -> bool:
        if self._prepared is None:
            self._prepared = next(iter(self._open()), None)
        return self._prepared is not None

    def step(self) -> None:
        entry, kept = self._prepared, self._kept
        assert entry is not None, "prepare() comes first"
        assert kept is None or kept[0] is entry, "a request is advanced until it ends"
        self._kept = None  # What a forward pass that raises leaves behind is of no use.
        with self._following(np.arange(entry.length) if kept is None else np.array([-1])):
            token, keeps = self._forward(entry, kept[1] if kept is not None else None)
        self._prepared = None
        if entry.reason is None:
            entry.append(token)
        if entry.reason is None:
            self._kept = (entry, keeps)

    @torch.no_grad()
    def _forward(self, entry: _Entry, keeps: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """The next token, and what the model keeps: over the last token alone if it kept something before."""
        model = self._model
        ids = torch.tensor([[*entry.request.prompt, *entry.tokens]], device=model.device)
        anew = keeps is None
        keeps = self._keep_nothing(ids) if keeps is None else keeps
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if anew else 1, is_first_iteration=anew, **keeps
        )
        outputs = model(**inputs, return_dict=True)
        (token,) = next_tokens(outputs.logits[:, -1].float(), [entry.request.sampling], [entry.length]).tolist()
        return token, model._update_model_kwargs_for_generation(outputs, keeps)

    def _keep_nothing(self, ids: torch.Tensor) -> dict[str, Any]:
        """The arguments of a sequence's first forward pass, with an empty cache of the model's own kind."""
        model = self._model
        keeps: dict[str, Any] = {"use_cache": True}
        if model._supports_logits_to_keep():
            keeps["logits_to_keep"] = 1
        if "position_ids" in inspect.signature(model.forward).parameters:
            keeps["position_ids"] = model._prepare_position_ids_for_generation(ids, {})
        model._prepare_cache_for_generation(GenerationConfig(), keeps, GenerationMode.GREEDY_SEARCH, 1, self.capacity)
        return keeps

    def close(self) -> None:
        self._prepared = self._kept = None


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}={number}: at least 1 is needed")
