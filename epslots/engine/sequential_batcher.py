"""One request at a time, with the model's own cache: the batcher that serves every model."""

from __future__ import annotations

import inspect
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from epslots.engine.isolation import Isolation
from epslots.engine.positions import depends_on_length, forget_length
from epslots.engine.request_books import NotFiniteError, RequestBooks, TrackedRequest, check_positive, check_servable
from epslots.engine.token_choice import NO_TOKEN, next_tokens
from epslots.errors import StepFailed

logger = logging.getLogger(__name__)


class _Kept(NamedTuple):
    """What the model keeps of a request: arguments of its next forward pass, and the tokens that they hold."""

    entry: TrackedRequest
    arguments: dict[str, Any]
    tokens: int


class SequentialBatcher(RequestBooks):
    """One request at a time, as ``generate`` would do it: the prompt in one step, then a token a step.

    For models whose layers keep a recurrent state, or anything else that doesn't fit into pages. Such a state can't be taken
    back when a forward pass stops halfway. So the cache is dropped then, and the next step computes it again from the prompt
    and the tokens so far. Where angles depend on a sequence's length, even that would be another result: the tokens so far
    follow one by one, as they did the first time.
    """

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int) -> None:
        """Take a model.

        Raises:
            ConfigError: ``kv_tokens`` is less than one.
            UnsupportedModelError: the model has no language-model head.
        """
        check_servable(model)
        check_positive(kv_tokens=kv_tokens)
        super().__init__(model, kv_tokens)
        self._isolation: Isolation[TrackedRequest] | None = None
        self._kept: _Kept | None = None
        self._rotaries = depends_on_length(model)

    def _enter(self, entry: TrackedRequest) -> None:
        pass  # It waits among the open ones.

    def _leave(self, entry: TrackedRequest) -> None:
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
        self._kept = None  # What a forward pass that raises leaves behind is of no use.
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
        if entry.reason is not None or length == entry.length:
            self._isolation = None  # Else the step that failed is yet to come: a second failure there is the request's own.
        if entry.reason is None and length == entry.length:
            entry.append(token)
        if entry.reason is None:
            self._kept = _Kept(entry, arguments, length)

    def _length_after(self, entry: TrackedRequest, kept: _Kept | None) -> int:
        """Tokens that the model keeps after the next step."""
        if kept is not None:
            return kept.tokens + 1
        return len(entry.request.prompt) - entry.request.resumed if self._rotaries else entry.length

    @torch.no_grad()
    def _forward(self, entry: TrackedRequest, kept: _Kept | None, length: int) -> tuple[int, dict[str, Any]]:
        """The token after the first ``length``, and what the model keeps: over the last alone if it kept something before."""
        model = self._model
        ids = torch.tensor([[*entry.request.prompt, *entry.tokens][:length]], device=model.device)
        if kept is None:
            forget_length(self._rotaries, model)
        arguments = self._keep_nothing(ids) if kept is None else kept.arguments
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if kept is None else 1, is_first_iteration=kept is None, **arguments
        )
        outputs = model(**inputs, return_dict=True)
        (token,) = next_tokens(outputs.logits[:, -1].float(), [entry.request.sampling], [length]).tolist()
        if token == NO_TOKEN:
            raise NotFiniteError
        return token, model._update_model_kwargs_for_generation(outputs, arguments)

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
        self._isolation = self._kept = None
