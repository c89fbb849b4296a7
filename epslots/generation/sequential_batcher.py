"""The batcher for all other models: one request at a time, with the model's own cache."""

from __future__ import annotations

import inspect
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from epslots.errors import StepFailed
from epslots.generation.batcher import Batcher, NotFiniteError, TrackedRequest, check_positive, check_servable
from epslots.generation.engine_stats import Usage
from epslots.generation.isolation import Isolation
from epslots.generation.positions import depends_on_length, forget_length
from epslots.generation.token_choice import NO_TOKEN, next_tokens

logger = logging.getLogger(__name__)


class _KeptState(NamedTuple):
    """The model's state of a request: arguments of its next forward pass, and the number of tokens in them."""

    entry: TrackedRequest
    arguments: dict[str, Any]
    tokens: int


class SequentialBatcher(Batcher):
    """One request at a time, the way ``generate`` does it: the prompt in one step, then a token a step.

    For models whose layers keep a recurrent state, or anything else that doesn't fit into pages. Such a state can't be
    restored when a forward pass stops halfway: the cache is dropped, and the next step computes it again from the prompt and
    the tokens so far. Where angles depend on a sequence's length, that would be another result: there the tokens so far follow
    one by one, as they did the first time.
    """

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int) -> None:
        """Serve a model.

        Raises:
            ConfigError: ``kv_tokens`` is less than one.
            UnsupportedModelError: the model has no language-model head.
        """
        check_servable(model)
        check_positive(kv_tokens=kv_tokens)
        super().__init__(model, kv_tokens, max_requests=1)
        self._isolation: Isolation[TrackedRequest] | None = None
        self._kept: _KeptState | None = None
        self._rotaries = depends_on_length(model)

    def _queue(self, entry: TrackedRequest) -> None:
        pass  # it waits among the unfinished ones

    def _withdraw(self, entry: TrackedRequest) -> None:
        if self._kept is not None and self._kept.entry is entry and self._isolation is None:
            self._kept = None

    def prepare(self) -> bool:
        if self._isolation is None and (entry := next(iter(self._open()), None)) is not None:
            self._isolation = Isolation([entry])
        return self._isolation is not None

    def step(self) -> None:
        isolation, kept = self._isolation, self._kept
        assert isolation is not None, "prepare() comes first"
        (entry,) = isolation.part
        assert kept is None or kept.entry is entry, "a request is advanced until it ends"
        self._kept = None  # a forward pass that raises leaves a useless state behind
        length = self._length_after(entry, kept)
        try:
            with self._following(np.arange(length) if kept is None else np.array([-1])), self._plain_outputs.off():
                token, arguments = self._forward(entry, kept, length)
        except Exception as failure:
            found = self._split_or_raise(isolation, failure)
            if found is not None and entry.reason is None:
                logger.warning("request %r ends: %s", entry.request.id, found[1])
                entry.end("error", found[1])
            self._isolation = None if isolation.done else isolation
            if isinstance(failure, StepFailed):
                raise
            return
        self._breaks = 0
        self._counters.steps += 1
        self._counters.prompt_tokens += length if kept is None else 0
        if entry.reason is not None or length == entry.length:
            self._isolation = None  # else the failed step is still to come: a second failure there is the request's own
        if entry.reason is None and length == entry.length:
            entry.append(token)
        if entry.reason is None:
            self._kept = _KeptState(entry, arguments, length)

    def _length_after(self, entry: TrackedRequest, kept: _KeptState | None) -> int:
        """Tokens in the model's state after the next step."""
        if kept is not None:
            return kept.tokens + 1
        return len(entry.request.prompt) - entry.request.resumed if self._rotaries else entry.length

    @torch.no_grad()
    def _forward(self, entry: TrackedRequest, kept: _KeptState | None, length: int) -> tuple[int, dict[str, Any]]:
        """The token after the first ``length``, and the model's new state; computed from the last token alone if there is a
        state.
        """
        model = self._model
        ids = torch.tensor([[*entry.request.prompt, *entry.tokens][:length]], device=model.device)
        if kept is None:
            forget_length(self._rotaries, model)
        arguments = self._empty_cache(ids) if kept is None else kept.arguments
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if kept is None else 1, is_first_iteration=kept is None, **arguments
        )
        outputs = model(**inputs, return_dict=True)
        (token,) = next_tokens(outputs.logits[:, -1].float(), [entry.request.sampling], [length]).tolist()
        if token == NO_TOKEN:
            raise NotFiniteError
        return token, model._update_model_kwargs_for_generation(outputs, arguments)

    def _empty_cache(self, ids: torch.Tensor) -> dict[str, Any]:
        """The arguments of a sequence's first forward pass, with an empty cache."""
        model = self._model
        keeps: dict[str, Any] = {"use_cache": True}
        if model._supports_logits_to_keep():
            keeps["logits_to_keep"] = 1
        if "position_ids" in inspect.signature(model.forward).parameters:
            keeps["position_ids"] = model._prepare_position_ids_for_generation(ids, {})
        model._prepare_cache_for_generation(GenerationConfig(), keeps, GenerationMode.GREEDY_SEARCH, 1, self.capacity)
        return keeps

    def _usage(self) -> Usage:
        kept = 0 if self._kept is None else self._kept.tokens
        return Usage(running=min(kept, 1), kv_used=kept, kv_tokens=self.capacity)

    def close(self) -> None:
        self._isolation = self._kept = None
