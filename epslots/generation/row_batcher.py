"""The batcher for models whose requests are kept in rows: many requests in one step, by the model's cache classes.

    batcher = RowBatcher(model, kv_tokens=4096, max_requests=16)
    batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            ...

``row_admission.py`` gives rows to requests, ``row_plan.py`` decides which of them make a batch, ``row_cache.py`` keeps them,
and ``isolation.py`` repeats a failed batch in parts. A batch is kept until it is computed: after a lost peer, ``step``
repeats it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from epslots.config import EngineConfig, check_count
from epslots.device_copy import to_device
from epslots.errors import DoesNotFitError, StepFailed
from epslots.generation.absorbed_attention import AbsorbedAttention
from epslots.generation.batcher import Batcher, NotFiniteError, check_servable, describe_failure
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout
from epslots.generation.cache_tensors import tensors_of
from epslots.generation.captured_decoding import CapturedDecoding
from epslots.generation.cell_memory import CellMemory
from epslots.generation.chunk_balance import NO_LOAD, StepLoad
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import Usage
from epslots.generation.isolation import Isolation
from epslots.generation.next_token import choose, prompt_logprobs
from epslots.generation.row_admission import RowAdmission, RunningRow
from epslots.generation.row_attention import RowByRow
from epslots.generation.row_cache import RowCache, StepOfRows
from epslots.generation.row_plan import RowBatch, RowState, decodes, following_prompt_tokens, next_batch
from epslots.generation.row_support import RowSupport, row_support
from epslots.generation.row_tracker import RowTracker
from epslots.generation.single_queries import SingleQueries
from epslots.generation.slot_exchange import SlotExchange, exchange_sizes, open_cells
from epslots.generation.static_step import StaticStep
from epslots.generation.tracked_request import NO_TOKEN, NextToken, PromptState, TrackedRequest
from epslots.models.captured_sizes import span_of

logger = logging.getLogger(__name__)


class RowBatcher(Batcher):
    """Many requests in one batch, each a row of the model's own cache.

    Requests wait, in the order of priority and arrival, while rows or tokens are short. When the running ones outgrow the
    cache, the last of them in that order is given up, and computed again from its tokens when there is room.

    Attributes:
        cache: the rows.
        admission: the requests that run, and those that wait.
    """

    def __init__(self, model: PreTrainedModel, *, clock: Callable[[], float] = time.perf_counter, **settings: Any) -> None:
        """Allocate the cache, by fields of ``EngineConfig``.

        Args:
            model: with a language-model head.
            clock: seconds, by which batches are timed for ``step_target_ms``.
            settings: fields of ``EngineConfig``.

        Raises:
            ConfigError: a number is less than one.
            DoesNotFitError: the cache exceeds the device's free memory.
            UnsupportedModelError: the model has no language-model head, or its layers can't be kept apart by rows.
        """
        check_servable(model)
        config = self._config = EngineConfig(**settings)
        sizes = exchange_sizes(model) if config.exchanges_memory else None
        capacity = config.planned_tokens if sizes is None else sizes.most_tokens
        check_count("kv_tokens", capacity)
        super().__init__(model, capacity, config.max_requests)
        self._clock = clock
        self._support: RowSupport = row_support(model)
        self._latents = AbsorbedAttention(model)
        self._single_queries = SingleQueries(model)
        self._by_row = RowByRow(self._support.modules, self._support.rotaries, model.device)
        memory = None if sizes is None else open_cells(model, sizes)
        self.cache = self._open_cache(memory)
        target_s = None if config.step_target_ms is None else config.step_target_ms / 1000
        self.chunk_size = ChunkSize(config.max_batch_tokens, target_s)
        self._takes = inspect.signature(model.forward).parameters
        in_rows = self._support.capture_obstacle(tensors_of(model))
        self._captured = CapturedDecoding[StaticStep](model, self._call, config, in_rows)
        exchange = None if memory is None else SlotExchange(model, memory, self.cache.cells)
        self.admission = RowAdmission(self.cache, config, self._support, self._counters, exchange)
        self._isolation: Isolation[RunningRow] | None = None
        """Of the batch under way; None between batches."""
        self._batch: RowBatch | None = None
        self._next_prompt_tokens = 0
        """Tokens of the next batch of prompts after this one."""
        self._prompt_was_last = False
        self._order = RowTracker()

    @property
    def shares_prefixes(self) -> bool:
        return self.admission.shares_prefixes

    def _open_cache(self, memory: CellMemory | None) -> RowCache:
        config, support = self._config, self._support
        try:
            return RowCache(
                self._model,
                tensors_of(self._model),
                kv_tokens=self.capacity,
                max_requests=config.max_requests,
                in_flight=config.step_tokens(support.whole_prompts),
                by_row=support.by_row,
                slots=memory,
            )
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch's on the CPU is a RuntimeError
                raise
            raise DoesNotFitError(
                f"a cache of {self.capacity:,} tokens and {config.max_requests} requests doesn't fit on "
                f"{self._model.device}: {error}"
            ) from error

    def _queue(self, entry: TrackedRequest) -> None:
        self.admission.queue(entry)

    def _withdraw(self, entry: TrackedRequest) -> None:
        if not self.admission.withdraw(entry) and self._isolation is None:
            self.admission.leave(entry)  # else when the prepared batch is made

    def prepare(self, balanced: int | None = None) -> bool:
        self._queue_prepared()
        if self._isolation is None:
            self.admission.restart_outgrown()
            self.admission.exchange_memory(self.chunk_size, self.prompt_token_s)
            self.admission.admit()
            planned = self._plan(balanced)
            if planned is not None:
                self._batch, active = planned, self.admission.active
                # In the order of their places: states of neighbours are written at once.
                self._isolation = Isolation(sorted((active[i] for i in planned.rows), key=lambda each: each.row.number))
            else:
                self._captured.give_back()  # the model may be used otherwise now
        return self._isolation is not None

    @property
    def waits_for_room(self) -> bool:
        return self.admission.waits_for_room

    def _plan(self, balanced: int | None) -> RowBatch | None:
        """The next batch, with room for its tokens: where the cache is full, the last rows are given up.

        Experts cede slots first. In a group these come with the next step, so they are asked for a step ahead. Where that
        wasn't foreseen, the rank makes the step without a batch.
        """
        while active := self.admission.active:
            states = [self._state(running) for running in active]
            room = self.chunk_size.prompt_tokens(sum(map(decodes, states)), balanced)
            planned = next_batch(states, room, prompt_was_last=self._prompt_was_last, together=self._support.together)
            assert planned is not None, "every active row has a token left to compute"
            needed = len(planned.rows) * planned.width
            if self.admission.make_room(needed, rows=0, grow=True):
                most, together = self._config.max_batch_tokens, self._support.together
                self._next_prompt_tokens = following_prompt_tokens(states, planned, most, together=together)
                self.admission.foresee(needed + max(self._next_prompt_tokens, len(active)))
                return planned
            if self.admission.waits_for_room:
                return None
            self.admission.preempt(self.admission.running[-1])  # the first alone always fits
        return None

    @property
    def load(self) -> StepLoad:
        if self._isolation is None or self._batch is None:
            return NO_LOAD
        return StepLoad(len(self._isolation.part) * self._batch.width, self._next_prompt_tokens)

    def _state(self, running: RunningRow) -> RowState:
        entry, support = running.entry, self._support
        first = 0
        if support.replays:  # a moved request's own tokens come one by one, as they did the first time
            first, limit = entry.prompt_length, support.restart
            if limit is not None and first <= limit < entry.length:
                first = limit + 1  # as many as were there when it was computed anew
        elif support.whole_prompts:
            first = entry.length
        most = self._config.max_requests if entry.prompt_rows(running.row.length, entry.prompt_length) else 0
        computed = running.row.length
        return RowState(entry.length, computed, first=first, most=most, stop=running.stop, last=running.last)

    def _image_of(self, entry: TrackedRequest) -> CacheImage | None:
        return self.admission.image_of(entry, lambda: self._isolation is None)

    def prompts(self) -> list[PromptState]:
        return self.admission.prompts()

    def reserve(self, id: str, layout: CacheLayout) -> CacheImage | None:
        return None if self._isolation is not None else self.admission.reserve(id, layout)

    def release(self, id: str) -> None:
        self.admission.release(id)

    def release_all(self) -> None:
        for id in list(self.admission.reserved):
            self.admission.release(id)

    def step(self) -> None:
        isolation, planned = self._isolation, self._batch
        assert isolation is not None and planned is not None, "prepare() comes first"
        part, width = isolation.part, planned.width
        began = self._clock()
        try:
            with self._plain_outputs.off():
                chosen = self._make_captured(part)
                if chosen is None:
                    chosen = self._make(part, width)
        except Exception as failure:
            self._order = RowTracker()  # only some layers have seen the failed batch's rows
            found = self._split_or_raise(isolation, failure)
            if found is not None and found[0].entry.reason is None:
                logger.warning("request %r ends: %s", found[0].entry.request.id, found[1])
                found[0].entry.end("error", found[1])
            self._finish_part(isolation)
            if isinstance(failure, StepFailed):
                raise
            return
        isolation.passed()
        self._breaks = 0
        self._count_step(planned, part, None if isolation.split else self._clock() - began)
        for deliver in chosen:
            deliver()
        self._finish_part(isolation)

    def _count_step(self, planned: RowBatch, part: Sequence[RunningRow], seconds: float | None) -> None:
        """Count a batch that was committed."""
        starts = [(running.row.length - planned.width, running.entry.request) for running in part]
        self._counters.steps += 1
        for running in part:
            running.last = self._counters.steps
        self._captured.count_in(self._counters)
        self._counters.prompt_tokens += sum(max(0, min(planned.width, len(r.prompt) - start)) for start, r in starts)
        if seconds is not None:
            self.admission.count_step(seconds)
            computed = len(part) * planned.width
            self.chunk_size.observe(*((0, computed) if planned.decodes else (computed, 0)), seconds)
            self._time_prompt(0 if planned.decodes else computed, seconds)

    def _finish_part(self, isolation: Isolation[RunningRow]) -> None:
        if isolation.done:
            assert self._batch is not None
            self._prompt_was_last = not self._batch.decodes
            self._isolation = self._batch = None
            for running in [running for running in self.admission.running if running.entry.reason]:
                self.admission.leave(running.entry)

    def _make(self, part: Sequence[RunningRow], width: int) -> list[Callable[[], None]]:
        """Make a batch; returns calls that enter its tokens, for after the commit."""
        self._captured.give_back()
        rows = [running.row for running in part]
        previous = self._order.next([(running.entry.request.id, width) for running in part])
        wanted, is_last = self._prompt_rows(part[0], width)
        with self._following(previous), self.cache.step(rows, width) as step:
            logits_BLV = self._forward(part, width, step, wanted, is_last=is_last)
            if is_last:
                chosen = self._choose(part, width, logits_BLV, wanted)
                step.commit()
                return chosen
        self._order = RowTracker()  # these tokens come again
        return self._prompt_logprobs(part[0], logits_BLV, wanted)

    def _make_captured(self, part: Sequence[RunningRow]) -> list[Callable[[], None]] | None:
        """Make a batch by a captured step; None where it can't be captured, or while prompts are to be computed."""
        assert self._batch is not None
        active = self.admission.active
        longest = 1 + max(one.row.length for one in part)
        if not self._batch.decodes or len(part) < len(active) or not self._captured.takes(len(part), longest):
            return None
        rows, tokens = [one.row for one in part], [one.entry.ids(one.row.length, one.row.length + 1)[0] for one in part]
        size = self._captured.padded(len(rows)), span_of(longest)
        logits_BLV = self._captured.logits(size, partial(StaticStep, self.cache, *size), lambda step: step.begin(rows, tokens))
        if logits_BLV is None:
            return None
        chosen = self._choose(part, 1, logits_BLV[: len(rows)], range(0))
        self._captured.keep_states()
        self.cache.take(rows, 1)
        self._order = RowTracker()  # the predictor has seen no row
        return chosen

    def _forward(
        self, part: Sequence[RunningRow], width: int, step: StepOfRows, wanted: range, *, is_last: bool
    ) -> torch.Tensor:
        """Logits [B, L, V]: of wanted positions, which one row has; and of each row's last, unless its tokens come again."""
        ids = [running.entry.ids(running.row.length, running.row.length + width) for running in part]
        inputs = {
            "input_ids": to_device(np.array(ids, np.int64), self.cache.device),
            "position_ids": step.position_ids,
            "attention_mask": step.attention_mask,
            "past_key_values": step.cache,
        }
        if not wanted:
            return self._call(inputs)
        places = [position - part[0].row.length for position in wanted]
        if is_last and places[-1] != width - 1:
            places.append(width - 1)
        return self._call(inputs, keep=to_device(np.array(places, np.int64), self.cache.device))

    @torch.no_grad()
    def _call(self, inputs: Mapping[str, Any], keep: int | torch.Tensor = 1) -> torch.Tensor:
        """Run the model; returns the logits of each row's last ``keep`` tokens, or of those places in it, [B, L, V]."""
        given = {**inputs, "use_cache": True, "logits_to_keep": keep}
        with self._by_row.active(), self._latents.active(), self._single_queries.active():
            found = self._model(**{name: value for name, value in given.items() if name in self._takes}, return_dict=True)
        logits: torch.Tensor = found.logits
        if isinstance(keep, int):
            return logits[:, -keep:]
        return logits if "logits_to_keep" in self._takes else logits[:, keep]

    def _choose(
        self, part: Sequence[RunningRow], width: int, logits_BLV: torch.Tensor, wanted: range
    ) -> list[Callable[[], None]]:
        """Choose tokens, and compute log-probabilities; returns calls that enter them, for after the commit."""
        deliver = self._prompt_logprobs(part[0], logits_BLV, wanted)
        chosen = [i for i, running in enumerate(part) if running.left == width]
        if chosen:
            entries = [part[i].entry for i in chosen]
            last_NV = logits_BLV[:, -1] if len(chosen) == len(part) else logits_BLV[chosen, -1]
            for entry, choice in zip(entries, choose(last_NV.float(), entries).read(), strict=True):
                deliver.append(partial(self._take, entry, choice))
        return deliver

    @staticmethod
    def _prompt_logprobs(running: RunningRow, logits_BLV: torch.Tensor, wanted: range) -> list[Callable[[], None]]:
        """The call that enters a prompt's log-probabilities, from the first of these logits."""
        entry = running.entry
        if not wanted or entry.reason is not None:
            return []
        following = entry.request.prompt[wanted.start + 1 : wanted.stop + 1]
        found = prompt_logprobs(logits_BLV[0, : len(wanted)].float(), following, entry.request.prompt_logprobs or 0)
        return [partial(entry.add_prompt_logprobs, wanted, found)]

    def _prompt_rows(self, running: RunningRow, width: int) -> tuple[range, bool]:
        """Positions whose log-probabilities a step of one row gives, and whether the prompt's are complete then.

        A prompt that has to be computed whole may want more logits than are planned: it is computed again for the others.
        """
        wanted = running.entry.prompt_rows(running.row.length, running.row.length + width)
        most = self._config.max_requests
        return wanted[:most], len(wanted) <= most - (running.left == width)  # the next token's logits are a row, too

    def _take(self, entry: TrackedRequest, choice: NextToken) -> None:
        """Enter a request's next token; one without a token ends, and no other row has met its numbers."""
        if entry.reason is not None:
            return  # cancelled since the batch was prepared
        if choice.token == NO_TOKEN:
            entry.end("error", describe_failure(NotFiniteError(), self._model.dtype))
        else:
            entry.append(choice)

    def _usage(self) -> Usage:
        used = sum(running.row.length for running in self.admission.running)  # cells that several share count for each
        running, exchange = len(self.admission.running), self.admission.exchange
        tokens, ceded = (self.capacity, 0) if exchange is None else (exchange.tokens, exchange.ceded_slots)
        return Usage(running, min(used, tokens), tokens, self.capacity, ceded)

    def close(self) -> None:
        self.grammars.close()
        self._isolation = self._batch = None
        self._captured.close()
        self.admission.close()
        del self.admission, self._captured, self.cache
