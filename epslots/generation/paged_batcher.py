"""The batcher for models whose requests can be kept in pages: many requests in one forward pass, without a thread.

    batcher = PagedBatcher(model, kv_tokens=4096)
    batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            ...

A step is prepared first, so that ranks in lock-step can tell each other whether they have one. Then it is kept until it is
computed: after a lost peer the next ``step`` repeats it, after another failure the next steps repeat it in parts
(isolation.py).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import FutureRequestState

from epslots.arrays import IntArray
from epslots.config import EngineConfig, check_count
from epslots.errors import ConfigError, StepFailed, UnsupportedModelError
from epslots.generation.batcher import Batcher, check_servable
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout
from epslots.generation.captured_decoding import CapturedDecoding
from epslots.generation.chunk_balance import StepLoad
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import Usage
from epslots.generation.isolation import Isolation
from epslots.generation.page_images import image_of_pages
from epslots.generation.page_scheduler import is_prompt
from epslots.generation.paged_cache import open_processor, paging_obstacle
from epslots.generation.paged_decoding import PagedDecoding, in_turn
from epslots.generation.paged_invariance import PackedAttention, Span, invariance_obstacle
from epslots.generation.paged_next_token import PagedNextToken
from epslots.generation.repeatable_step import WindowBackup, discard, prepare_part
from epslots.generation.reserved_pages import ReservedPages
from epslots.generation.row_tracker import RowTracker
from epslots.generation.static_pages import StaticPages
from epslots.generation.tracked_request import PromptState, TrackedRequest
from epslots.models.batch_invariance import is_batch_invariant
from epslots.models.captured_sizes import span_of

logger = logging.getLogger(__name__)


class PagedBatcher(Batcher):
    """Many requests in one forward pass, with keys and values in pages of one cache.

    ``PageScheduler`` decides which requests compute how many tokens in a step, and which wait. Where all layers attend to all
    tokens, prompts that begin alike share full pages, also with requests that are gone (``prefix_cache``).

    While it is open, a model with eager attention can't be used otherwise.

    Attributes:
        processor: transformers', with the scheduler and the cache.
    """

    def __init__(self, model: PreTrainedModel, *, clock: Callable[[], float] = time.perf_counter, **settings: Any) -> None:
        """Allocate the cache, by fields of ``EngineConfig``.

        Args:
            model: with a language-model head.
            clock: seconds, by which steps are timed for ``step_target_ms``.
            settings: fields of ``EngineConfig``.

        Raises:
            ConfigError: a number is less than one.
            DoesNotFitError: the KV cache exceeds the device's free memory.
            UnsupportedModelError: the model can't keep its requests in pages, or has no language-model head.
        """
        check_servable(model)
        config = EngineConfig(**settings)
        if config.exchanges_memory:
            raise ConfigError("kv_tokens='auto': pages don't exchange memory with experts; allowed: cache='rows', or a number")
        check_count("kv_tokens", config.planned_tokens)
        if obstacle := paging_obstacle(model) or invariance_obstacle(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} can't be served from pages: {obstacle}; allowed: cache='rows' or 'auto'"
            )
        self._implementation = model.config._attn_implementation
        self._manager, self.processor = open_processor(model, config)
        self._attention = PackedAttention(self.processor) if is_batch_invariant(model) else None
        self._decoding = PagedDecoding(model, self.processor)
        self._choice = PagedNextToken(self.processor)
        self._captured = CapturedDecoding[StaticPages](model, self._call, config, self._decoding.obstacle)
        # By transformers' id: where each request of the latest captured step has its row.
        self._places: dict[str, int] = {}
        cache, scheduler = self.processor.cache, self.processor.scheduler
        super().__init__(model, infer_max_single_request_tokens(cache), scheduler.max_requests_per_batch)
        target_s = None if config.step_target_ms is None else config.step_target_ms / 1000
        self.chunk_size = ChunkSize(config.max_batch_tokens, target_s)
        scheduler.serve(
            self.chunk_size,
            self._counters,
            wants_prompt_logits=self._wants_prompt_logits,
            priority_of=self._priority_of,
            is_held=lambda number: number in self._running and self._running[number][0].held,
            on_preempted=self._lose_pages,
        )
        self._clock = clock
        # Of the step under way; None when it has failed: its time tells nothing.
        self._began_s: float | None = None
        # By transformers' id of a request, a number, so that our ids can be used again: the request, and its tokens when it
        # was queued there.
        self._ids = itertools.count()
        self._running: dict[str, tuple[TrackedRequest, int]] = {}
        self._reserved = ReservedPages(cache, scheduler)
        # Of the batch under way; None between batches.
        self._isolation: Isolation[FutureRequestState] | None = None
        self._windows: WindowBackup | None = None
        # The part of it that the next forward pass computes; None if it has to be prepared.
        self._part: list[FutureRequestState] | None = None
        self._order = RowTracker()
        self._previous_T: IntArray | None = None

    @property
    def shares_prefixes(self) -> bool:
        return bool(self.processor.cache.use_prefix_sharing)

    def _queue(self, entry: TrackedRequest) -> None:
        """Queue a request in transformers, to continue after its tokens so far."""
        rest = entry.request.after(entry.tokens)
        number = self._reserved.claim(entry) or str(next(self._ids))
        self._running[number] = (entry, len(entry.tokens))
        self._manager.add_request(
            list(rest.prompt),
            request_id=number,
            max_new_tokens=rest.max_new_tokens,
            eos_token_id=sorted(rest.stop_tokens),
            streaming=True,
        )

    def _withdraw(self, entry: TrackedRequest) -> None:
        (number,) = [number for number, (running, _) in self._running.items() if running is entry]
        del self._running[number]
        self._cancel(number)

    def _cancel(self, number: str) -> None:
        """End a request in transformers; the next ``prepare`` frees its pages."""
        self._manager.cancel_request(number)
        # After freeing a request's pages, the scheduler admits none until one has ended; its own cancelling forgets that.
        if number in self.processor.scheduler.active_requests:
            self.processor.scheduler.block_new_requests = False

    def _lose_pages(self, number: str) -> None:
        if number in self._running:
            self._running[number][0].resume()

    def _image_of(self, entry: TrackedRequest) -> CacheImage | None:
        cache, active = self.processor.cache, self.processor.scheduler.active_requests
        number = next((number for number, (running, _) in self._running.items() if running is entry), None)
        if self._isolation is not None or number is None or number not in active or not active[number].current_len():
            return None
        state, length = active[number], entry.length
        if state.current_len() == length - 1 and entry.tokens:
            return image_of_pages(cache, number, entry.ids(0, length - 1))
        # While a step is under way, or has to be repeated, its tokens count already.
        computed: Callable[[], int | None] = lambda: state.current_len() if self._isolation is None else None  # noqa: E731
        return image_of_pages(cache, number, entry.ids(0, length), computed)

    def prompts(self) -> list[PromptState]:
        active, found = self.processor.scheduler.active_requests, []
        for number, (entry, _) in self._running.items() if self._isolation is None else ():
            computed = active[number].current_len() if number in active else 0
            if computed and entry.length - computed > 1:
                found.append(entry.prompt_state(computed, entry.length - computed))
        return found

    def reserve(self, id: str, layout: CacheLayout) -> CacheImage | None:
        return None if self._isolation is not None else self._reserved.reserve(id, layout, str(next(self._ids)))

    def release(self, id: str) -> None:
        self._reserved.release(id)

    def release_all(self) -> None:
        self._reserved.release_all()

    def _wants_prompt_logits(self, number: str) -> bool:
        entry = self._running[number][0] if number in self._running else None
        return entry is not None and bool(entry.prompt_rows(0, entry.prompt_length))

    def _priority_of(self, number: str) -> int:
        return self._running[number][0].request.priority if number in self._running else 0  # it has been cancelled

    def prepare(self, balanced: int | None = None) -> bool:
        self._queue_prepared()
        self.processor.scheduler.balance(balanced)
        if self._isolation is None:
            self._began_s = self._clock()
            # Also without work: cancelled requests free their pages here.
            if self._schedule():
                batch = self.processor.inputs_and_outputs.requests_in_batch
                self._isolation = Isolation(batch)
                self._windows = WindowBackup(self.processor)
                self._set_part(batch)
            else:
                self._captured.give_back()  # the model may be used otherwise now
        elif self._part is None:
            prepare_part(self.processor, self._isolation.part)
            self._set_part(self._isolation.part)
        return self._isolation is not None

    @property
    def load(self) -> StepLoad:
        found: StepLoad = self.processor.scheduler.load_of(self._part or ())
        return found

    def _set_part(self, part: list[FutureRequestState]) -> None:
        """Make these prepared requests the next forward pass's."""
        self._part = part
        runs = [self._running.get(future.state.request_id) for future in part]
        self._choice.prepare(part, [None if run is None else run[0] for run in runs])
        self._previous_T = self._order.next([(future.state.request_id, future.query_length) for future in part])
        if self._attention is not None:  # the position is the one after the batch
            self._attention.prepare([Span(future.query_length, future.state.position_offset) for future in part])

    def _schedule(self) -> bool:
        try:
            scheduled: bool = self.processor.prepare_next_batch()
        except RuntimeError as error:
            if "no requests can be offloaded" not in str(error):
                raise
            scheduled = False
        if not scheduled and self._open() and not self.processor.scheduler.hands_over:
            self._start_over()
            scheduled = self.processor.prepare_next_batch()
            assert scheduled, "a lone request always fits"
        return scheduled

    def _start_over(self) -> None:
        """Empty the cache and start again with the oldest request alone; the others follow when it is done.

        Where layers of several kinds share the cache, freed pages may be scattered so that none is left of the size that one
        kind needs, even for a last running request that fits an empty cache.
        """
        self._counters.preempted += len(self.processor.scheduler.active_requests)
        assert not self._reserved
        for entry, _ in self._running.values():
            entry.resume()
        self.processor.reset()
        self._running.clear()
        for entry in self._open():
            self._queue(entry)
        self.processor.scheduler.block_new_requests = True

    def step(self) -> None:
        part, isolation, windows = self._part, self._isolation, self._windows
        assert part is not None and isolation is not None and windows is not None, "prepare() comes first"
        windows.restore(part)
        try:
            with self._plain_outputs.off():
                if isolation.split or not self._make_captured(part):
                    self._make()
            self.processor.update_batch()
        except Exception as failure:
            self._began_s = None
            self._isolate(isolation, failure)
            self._finish_part(isolation)
            if isinstance(failure, StepFailed):
                raise
            return
        isolation.passed()
        self._breaks = 0
        self._count_step(part)
        self._finish_part(isolation)
        self._choice.commit()
        results = self._manager.output_router.output_queue
        while not results.empty():
            self._enter(results.get())

    def _make(self) -> None:
        """Compute the prepared requests, and choose their tokens."""
        self._captured.give_back()
        with (
            self._following(self._previous_T),
            self._decoding.active(),
            in_turn(self.processor.inputs_and_outputs),
        ):
            self.processor._generation_step(self._model)

    def _make_captured(self, part: list[FutureRequestState]) -> bool:
        """Make the part by a captured step, if all its requests decode; False where it can't be captured."""
        if any(future.query_length > 1 for future in part):
            return False
        lengths = self._decoding.lengths
        longest = max((int(length_R.max()) for length_R in lengths), default=None)
        if not self._captured.takes(len(part), longest):
            return False
        places = self._places_of([future.state.request_id for future in part])
        with in_turn(self.processor.inputs_and_outputs):
            pass  # pages may have been emptied, or windows restored, on transformers' stream
        size = self._captured.padded(len(part)), tuple(span_of(int(length_R.max())) for length_R in lengths)
        logits_1BV = self._captured.logits(
            size, partial(StaticPages, self.processor, self._decoding, *size), lambda step: step.begin(places)
        )
        if logits_1BV is None:
            return False
        self._choice.choose(logits_1BV[0, : len(part)].float())
        self._order = RowTracker()  # the predictor has seen no row
        return True

    def _call(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The logits of every token, [1, B, V]."""
        logits: torch.Tensor = self._model(**inputs).logits
        return logits

    def _places_of(self, numbers: Sequence[str]) -> list[int]:
        """A place for each request, the same as in the captured step before; lowest first."""
        kept = {number: self._places[number] for number in numbers if number in self._places}
        free = iter(sorted(set(range(len(numbers))) - set(kept.values())))
        self._places = {number: kept[number] if number in kept else next(free) for number in numbers}
        return list(self._places.values())

    def _count_step(self, part: list[FutureRequestState]) -> None:
        """Count a forward pass that succeeded."""
        prompts = list(filter(is_prompt, part))
        prompt_tokens = sum(future.query_length for future in prompts)
        self._counters.steps += 1
        self._captured.count_in(self._counters)
        self._counters.prompt_tokens += prompt_tokens
        if self._began_s is not None:
            seconds = self._clock() - self._began_s
            self.chunk_size.observe(prompt_tokens, len(part) - len(prompts), seconds)
            self._time_prompt(prompt_tokens, seconds)

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
        discard(self.processor, number)
        if number in self._running:  # else it has been cancelled
            entry, _ = self._running.pop(number)
            logger.warning("request %r ends: %s", entry.request.id, error)
            entry.end("error", error)

    def _enter(self, result: Any) -> None:
        """Enter transformers' result of a request; it repeats all tokens since the request was queued there."""
        if result.request_id not in self._running:
            return  # cancelled since the step was prepared
        entry, before = self._running[result.request_id]
        if len(result.generated_tokens) > len(entry.tokens) - before:
            entry.append(self._choice.choices[result.request_id])
        if result.error is not None:
            entry.end("error", result.error)
        assert entry.reason or not result.is_finished(), "we know of each end that transformers knows of"
        if entry.reason:
            del self._running[result.request_id]
            if not result.is_finished():  # its grammar has ended it
                self._cancel(result.request_id)

    def _usage(self) -> Usage:
        cache, active = self.processor.cache, self.processor.scheduler.active_requests
        allocators = cache.cache_allocators.values()
        left_for_others = sum(len(allocator.ledger.cached_blocks) * allocator.bytes_per_block for allocator in allocators)
        all_bytes = cache.num_sectors * cache.bytes_per_sector
        used_bytes = all_bytes - int(cache.compute_free_capacity(relative=False)) - left_for_others
        kv_tokens = cache.num_blocks * self.processor.cb_config.page_size
        running = sum(number in self._running for number in active)  # else it has just been cancelled
        return Usage(running, used_bytes * kv_tokens // all_bytes, kv_tokens, kv_tokens)

    def close(self) -> None:
        self.grammars.close()
        self._captured.close()
        self._manager.destroy()
        del self._choice, self._captured, self._decoding, self._reserved  # they hold the cache
        self._manager = self.processor = self._isolation = self._windows = self._part = None
        if self._model.config._attn_implementation != self._implementation:
            self._model.set_attn_implementation(self._implementation)
