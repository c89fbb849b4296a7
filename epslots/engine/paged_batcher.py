"""What one rank does to advance its requests: one forward pass of the model at a time, and no thread.

    batcher = batcher_for(model, kv_tokens=4096)
    batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            ...

The life of a request: ``add`` checks it; it waits until there is room; its prompt is computed, over several steps if it is
long; one token a step follows; a stop token or ``max_new_tokens`` ends it. ``outputs`` hands out what came of it, once.

A step is prepared first, so that ranks in lock-step can tell each other whether they have one. From then on it stands: if a
peer is lost, nothing of it counts, and the next ``step`` does the same again. If its forward pass fails for another reason, or
gives logits that are no numbers, the next steps repeat it with fewer requests (``isolation.py``), until those that fail by
themselves have ended with an error. The others make the step as if nothing was.

There are two batchers. ``PagedBatcher`` advances many requests in one pass, by transformers' paged KV cache and its scheduler.
``SequentialBatcher`` (sequential_batcher.py) advances one request at a time, with the model's own cache, and so serves
every model. What they share is in request_books.py.
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
from epslots.config import DEFAULT_BATCH_TOKENS
from epslots.engine.isolation import Isolation
from epslots.engine.paged_cache import (
    WindowBackup,
    check_tokens,
    discard,
    lay_out,
    open_processor,
    paging_obstacle,
    show_cut_prompts,
)
from epslots.engine.paged_invariance import PackedAttention, Span, invariance_obstacle
from epslots.engine.request_books import NotFiniteError, RequestBooks, TrackedRequest, check_positive, check_servable
from epslots.engine.requests import Batcher
from epslots.engine.row_tracker import RowTracker
from epslots.engine.sampling import GREEDY, Sampling
from epslots.engine.sequential_batcher import SequentialBatcher
from epslots.engine.token_choice import NO_TOKEN, next_tokens
from epslots.errors import StepFailed, UnsupportedModelError
from epslots.models.batch_invariance import is_batch_invariant

logger = logging.getLogger(__name__)


def batcher_for(model: PreTrainedModel, *, kv_tokens: int, max_batch_tokens: int = DEFAULT_BATCH_TOKENS) -> Batcher:
    """The best batcher for a model, decided by its configuration and class.

    Args:
        model: with a language model's head; text goes in, whatever else it could take.
        kv_tokens: tokens of KV cache, rounded up to whole pages.
        max_batch_tokens: of one step; longer prompts take several. A ``SequentialBatcher`` takes a prompt in one.

    Raises:
        ConfigError: a number is less than one.
        DoesNotFitError: the KV cache exceeds the device's free memory.
        UnsupportedModelError: the model has no language-model head.
    """
    check_servable(model)
    obstacle = paging_obstacle(model) or invariance_obstacle(model)
    if obstacle is None:
        logger.info("%s: requests are batched, with %d tokens of paged KV cache", type(model).__name__, kv_tokens)
        return PagedBatcher(model, kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
    logger.info("%s: requests run one at a time, because %s", type(model).__name__, obstacle)
    return SequentialBatcher(model, kv_tokens=kv_tokens)


class PagedBatcher(RequestBooks):
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
            UnsupportedModelError: the model can't keep its requests in pages, or has no language-model head.
        """
        check_servable(model)
        check_positive(kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
        if obstacle := paging_obstacle(model) or invariance_obstacle(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} can't be served from pages: {obstacle}; use SequentialBatcher"
            )
        self._implementation = model.config._attn_implementation
        self._manager, self._processor = open_processor(model, kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
        self._attention = PackedAttention(model, self._processor) if is_batch_invariant(model) else None
        self._choice = self._processor.model_runner._sample = _Choice()
        check_tokens(self._processor.inputs_and_outputs, self._choice.check)
        super().__init__(model, infer_max_single_request_tokens(self._processor.cache))
        # transformers knows a request by a number, so that an id can be used again; and by the tokens it was handed over with.
        self._numbers = itertools.count()
        self._running: dict[str, tuple[TrackedRequest, int]] = {}
        # Requests that wait until all that run are done; see ``_start_over``.
        self._held: list[TrackedRequest] = []
        # Of the batch under way; None if none is.
        self._isolation: Isolation[FutureRequestState] | None = None
        self._windows: WindowBackup | None = None
        # The part of it that the next forward pass computes; None if it is to be laid out.
        self._part: list[FutureRequestState] | None = None
        self._order = RowTracker()
        self._follows_T: IntArray | None = None

    def _enter(self, entry: TrackedRequest) -> None:
        if self._held:
            self._held.append(entry)
        else:
            self._hand_over(entry)

    def _hand_over(self, entry: TrackedRequest) -> None:
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

    def _leave(self, entry: TrackedRequest) -> None:
        if entry in self._held:
            self._held.remove(entry)
            return
        (number,) = [number for number, (running, _) in self._running.items() if running is entry]
        del self._running[number]
        self._manager.cancel_request(number)
        # After giving up a request's pages, the scheduler admits none until one has finished; its own cancelling forgets that.
        self._processor.scheduler.block_new_requests = False

    def prepare(self) -> bool:
        if self._isolation is None:
            if self._held and not self._running:
                held, self._held = self._held, []
                for entry in held:
                    self._hand_over(entry)
            # Also without work: cancelled requests give their pages back here.
            if self._schedule():
                batch = self._processor.inputs_and_outputs.requests_in_batch
                self._isolation = Isolation(batch)
                self._windows = WindowBackup(self._processor)
                self._take(batch)
        elif self._part is None:
            lay_out(self._processor, self._isolation.part)
            self._take(self._isolation.part)
        return self._isolation is not None

    def _take(self, part: list[FutureRequestState]) -> None:
        """Make the requests that are laid out the next forward pass's."""
        self._part = part
        runs = [self._running.get(future.state.request_id) for future in part if future.has_new_token]
        tokenless = show_cut_prompts(self._processor.inputs_and_outputs)
        self._choice.prepare([None if run is None else run[0] for run in runs], tokenless)
        self._follows_T = self._order.next([(future.state.request_id, future.query_length) for future in part])
        if self._attention is not None:  # the position is that after the batch
            self._attention.prepare([Span(future.query_length, future.state.position_offset) for future in part])

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
        part, isolation, windows = self._part, self._isolation, self._windows
        assert part is not None and isolation is not None and windows is not None, "prepare() comes first"
        windows.restore(part)
        try:
            with self._following(self._follows_T), self._plain_outputs.off():
                self._processor._generation_step(self._model)
            self._processor.update_batch()
        except Exception as failure:
            self._isolate(isolation, failure)
            self._turn_to_next(isolation)
            if isinstance(failure, StepFailed):
                raise
            return
        isolation.passed()
        self._breaks = 0
        self._turn_to_next(isolation)
        results = self._manager.output_router.output_queue
        while not results.empty():
            self._count(results.get())

    def _turn_to_next(self, isolation: Isolation[FutureRequestState]) -> None:
        """The part under way is over: the next one is laid out, or the next batch scheduled."""
        self._part = None
        if isolation.done:
            self._isolation = self._windows = None

    def _isolate(self, isolation: Isolation[FutureRequestState], failure: Exception) -> None:
        """Split the part that failed, and end its request if that failed by itself; raises what isn't a request's fault."""
        found = self._split_or_raise(isolation, failure)
        self._order = RowTracker()  # of what the step before was, some layers know and others don't
        if found is None:
            return
        guilty, error = found
        number = guilty.state.request_id
        discard(self._processor, number)
        if number in self._running:  # else it was cancelled meanwhile
            entry, _ = self._running.pop(number)
            logger.warning("request %r ends: %s", entry.request.id, error)
            entry.end("error", error)

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
        self._manager = self._processor = self._isolation = self._windows = self._part = None
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

    def prepare(self, entries: Sequence[TrackedRequest | None], tokenless: int) -> None:
        """Take note of the batch's requests that get a token, in the batch's order; None = one that was cancelled.

        Args:
            tokenless: rows behind theirs of which no token is used, but which must be numbers all the same.
        """
        self._samplings = [GREEDY if entry is None else entry.request.sampling for entry in entries]
        self._positions = [0 if entry is None else entry.length for entry in entries]
        self._samplings += [GREEDY] * tokenless
        self._positions += [0] * tokenless

    def __call__(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """scores [1, rows, V] to output_ids [1, any]: row i belongs to the i-th request that gets a token."""
        chosen = next_tokens(scores[0, : len(self._samplings)], self._samplings, self._positions)
        output_ids[0, : len(chosen)].copy_(chosen)

    def check(self, tokens: list[int]) -> None:
        """Raises NotFiniteError if one of these rows has no token."""
        if NO_TOKEN in tokens[: len(self._samplings)]:
            raise NotFiniteError
