"""The batcher for models whose requests can be kept in pages: many requests in one forward pass, without a thread.

    batcher = batcher_for(model, kv_tokens=4096)
    batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            ...

A step is prepared first, so that ranks in lock-step can tell each other whether they have one. Then it stands until it is
made: after a lost peer the next ``step`` repeats it, after another failure the next steps repeat it in parts (isolation.py).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import FutureRequestState

from epslots.arrays import IntArray
from epslots.config import EngineConfig
from epslots.errors import StepFailed, UnsupportedModelError
from epslots.generation.batcher import Batcher, NotFiniteError, TrackedRequest, check_positive, check_servable
from epslots.generation.isolation import Isolation
from epslots.generation.paged_cache import open_processor, paging_obstacle
from epslots.generation.paged_invariance import PackedAttention, Span, invariance_obstacle
from epslots.generation.repeatable_step import WindowBackup, check_tokens, discard, prepare_part, show_cut_prompts
from epslots.generation.row_tracker import RowTracker
from epslots.generation.sampling import GREEDY, Sampling
from epslots.generation.sequential_batcher import SequentialBatcher
from epslots.generation.token_choice import NO_TOKEN, next_tokens
from epslots.models.batch_invariance import is_batch_invariant

logger = logging.getLogger(__name__)


def batcher_for(model: PreTrainedModel, **settings: Any) -> Batcher:
    """The best batcher for a model, decided by its configuration and class.

    Args:
        model: with a language-model head; only its text input is used.
        settings: fields of ``EngineConfig``. A ``SequentialBatcher`` takes a prompt in one step.

    Raises:
        ConfigError: a number is less than one.
        DoesNotFitError: the KV cache exceeds the device's free memory.
        UnsupportedModelError: the model has no language-model head.
    """
    config = EngineConfig(**settings)
    check_servable(model)
    obstacle = paging_obstacle(model) or invariance_obstacle(model)
    if obstacle is None:
        logger.info("%s: requests are batched, with %d tokens of paged KV cache", type(model).__name__, config.kv_tokens)
        return PagedBatcher(model, **settings)
    logger.info("%s: requests run one at a time, because %s", type(model).__name__, obstacle)
    return SequentialBatcher(model, kv_tokens=config.kv_tokens)


class PagedBatcher(Batcher):
    """Many requests in one forward pass, with keys and values in pages of one cache.

    Requests wait while the cache is full. When the running ones outgrow it, transformers frees the newest one's pages, and
    computes them again from its prompt and tokens when there is room. Full pages of finished requests stay until their room is
    needed, for prompts that begin alike.

    While it is open, a model with eager attention can't be used otherwise.
    """

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        """Allocate the cache, by fields of ``EngineConfig``.

        Raises:
            ConfigError: a number is less than one.
            DoesNotFitError: the KV cache exceeds the device's free memory.
            UnsupportedModelError: the model can't keep its requests in pages, or has no language-model head.
        """
        check_servable(model)
        config = EngineConfig(**settings)
        check_positive(kv_tokens=config.kv_tokens)
        if obstacle := paging_obstacle(model) or invariance_obstacle(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} can't be served from pages: {obstacle}; use SequentialBatcher"
            )
        self._implementation = model.config._attn_implementation
        self._manager, self._processor = open_processor(
            model, kv_tokens=config.kv_tokens, max_batch_tokens=config.max_batch_tokens
        )
        self._attention = PackedAttention(model, self._processor) if is_batch_invariant(model) else None
        self._choice = self._processor.model_runner._sample = _TokenChoice()
        check_tokens(self._processor.inputs_and_outputs, self._choice.check)
        super().__init__(model, infer_max_single_request_tokens(self._processor.cache))
        # By transformers' id of a request, a number, so that our ids can be used again: the request, and its tokens when it
        # was queued there.
        self._numbers = itertools.count()
        self._running: dict[str, tuple[TrackedRequest, int]] = {}
        # Requests that wait until all running ones are done; see ``_start_over``.
        self._held: list[TrackedRequest] = []
        # Of the batch under way; None between batches.
        self._isolation: Isolation[FutureRequestState] | None = None
        self._windows: WindowBackup | None = None
        # The part of it that the next forward pass computes; None if it has to be prepared.
        self._part: list[FutureRequestState] | None = None
        self._order = RowTracker()
        self._previous_T: IntArray | None = None

    def _queue(self, entry: TrackedRequest) -> None:
        if self._held:
            self._held.append(entry)
        else:
            self._submit(entry)

    def _submit(self, entry: TrackedRequest) -> None:
        """Queue a request in transformers, to continue after its tokens so far."""
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

    def _withdraw(self, entry: TrackedRequest) -> None:
        if entry in self._held:
            self._held.remove(entry)
            return
        (number,) = [number for number, (running, _) in self._running.items() if running is entry]
        del self._running[number]
        self._manager.cancel_request(number)
        # After freeing a request's pages, the scheduler admits none until one has finished; its own cancelling forgets that.
        self._processor.scheduler.block_new_requests = False

    def prepare(self) -> bool:
        self._queue_prepared()
        if self._isolation is None:
            if self._held and not self._running:
                held, self._held = self._held, []
                for entry in held:
                    self._submit(entry)
            # Also without work: cancelled requests free their pages here.
            if self._schedule():
                batch = self._processor.inputs_and_outputs.requests_in_batch
                self._isolation = Isolation(batch)
                self._windows = WindowBackup(self._processor)
                self._set_part(batch)
        elif self._part is None:
            prepare_part(self._processor, self._isolation.part)
            self._set_part(self._isolation.part)
        return self._isolation is not None

    def _set_part(self, part: list[FutureRequestState]) -> None:
        """Make these prepared requests the next forward pass's."""
        self._part = part
        runs = [self._running.get(future.state.request_id) for future in part if future.has_new_token]
        tokenless = show_cut_prompts(self._processor.inputs_and_outputs)
        self._choice.prepare([None if run is None else run[0] for run in runs], tokenless)
        self._previous_T = self._order.next([(future.state.request_id, future.query_length) for future in part])
        if self._attention is not None:  # the position is the one after the batch
            self._attention.prepare([Span(future.query_length, future.state.position_offset) for future in part])

    def _schedule(self) -> bool:
        try:
            scheduled: bool = self._processor.prepare_next_batch()
        except RuntimeError as error:
            if "no requests can be offloaded" not in str(error):
                raise
            scheduled = False
        if not scheduled and self._open():
            self._start_over()
            scheduled = self._processor.prepare_next_batch()
            assert scheduled, "a lone request always fits"
        return scheduled

    def _start_over(self) -> None:
        """Empty the cache and start again with the oldest request alone; the others follow when it is done.

        Where layers of several kinds share the cache, freed pages may be scattered so that none is left of the size that one
        kind needs, even for a last running request that fits an empty cache.
        """
        assert not self._held, "a lone request always fits"
        self._processor.reset()
        self._running.clear()
        first, *self._held = self._open()
        self._submit(first)

    def step(self) -> None:
        part, isolation, windows = self._part, self._isolation, self._windows
        assert part is not None and isolation is not None and windows is not None, "prepare() comes first"
        windows.restore(part)
        try:
            with self._following(self._previous_T), self._plain_outputs.off():
                self._processor._generation_step(self._model)
            self._processor.update_batch()
        except Exception as failure:
            self._isolate(isolation, failure)
            self._finish_part(isolation)
            if isinstance(failure, StepFailed):
                raise
            return
        isolation.passed()
        self._breaks = 0
        self._finish_part(isolation)
        results = self._manager.output_router.output_queue
        while not results.empty():
            self._count(results.get())

    def _finish_part(self, isolation: Isolation[FutureRequestState]) -> None:
        """Finish the part under way: the next one is prepared, or the next batch scheduled."""
        self._part = None
        if isolation.done:
            self._isolation = self._windows = None

    def _isolate(self, isolation: Isolation[FutureRequestState], failure: Exception) -> None:
        """Split the failed part, and end its request if that failed alone; raises errors that no request causes."""
        found = self._split_or_raise(isolation, failure)
        self._order = RowTracker()  # only some layers have seen the failed step's rows
        if found is None:
            return
        faulty, error = found
        number = faulty.state.request_id
        discard(self._processor, number)
        if number in self._running:  # else it has been cancelled
            entry, _ = self._running.pop(number)
            logger.warning("request %r ends: %s", entry.request.id, error)
            entry.end("error", error)

    def _count(self, result: Any) -> None:
        """Enter transformers' result of a request; it repeats all tokens since the request was queued there."""
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
        self.grammars.close()
        self._manager.destroy()
        self._manager = self._processor = self._isolation = self._windows = self._part = None
        if self._model.config._attn_implementation != self._implementation:
            self._model.set_attn_implementation(self._implementation)


class _TokenChoice:
    """Replaces transformers' choice of tokens by that of each request in the prepared batch.

    It is fixed when the batch is prepared: a repeated step chooses the same again, and so does one with a cancelled request.
    """

    def __init__(self) -> None:
        self._samplings: list[Sampling] = []
        self._positions: list[int] = []

    def prepare(self, entries: Sequence[TrackedRequest | None], tokenless: int) -> None:
        """Set the batch's requests that get a token, in the batch's order; None = a cancelled one.

        Args:
            entries: these requests.
            tokenless: rows behind theirs that get no token, but must be finite.
        """
        self._samplings = [GREEDY if entry is None else entry.request.sampling for entry in entries]
        self._positions = [0 if entry is None else entry.length for entry in entries]
        self._samplings += [GREEDY] * tokenless
        self._positions += [0] * tokenless

    def __call__(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Choose a token for each row; row i belongs to the i-th request that gets a token.

        Args:
            scores: [1, rows, V].
            output_ids: int64 [1, any], its first entries are set.
        """
        chosen = next_tokens(scores[0, : len(self._samplings)], self._samplings, self._positions)
        output_ids[0, : len(chosen)].copy_(chosen)

    def check(self, tokens: list[int]) -> None:
        """Raise NotFiniteError if one of these rows has no token."""
        if NO_TOKEN in tokens[: len(self._samplings)]:
            raise NotFiniteError
