"""The batcher over rows: every model whose layers keep something, in the cache classes of its own.

    batcher = RowBatcher(model, kv_tokens=4096, max_requests=16)
    batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            ...

``row_plan.py`` decides which rows make a forward pass, ``row_cache.py`` keeps them, ``isolation.py`` repeats a failed pass in
parts. A pass stands until it is made: after a lost peer the next ``step`` repeats it.
"""

from __future__ import annotations

import inspect
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from epslots.config import EngineConfig
from epslots.device_copy import to_device
from epslots.errors import DoesNotFitError, StepFailed
from epslots.generation.absorbed_attention import AbsorbedAttention
from epslots.generation.batcher import Batcher, NotFiniteError, check_positive, check_servable, describe_failure
from epslots.generation.cache_tensors import tensors_of
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import Usage
from epslots.generation.isolation import Isolation
from epslots.generation.next_token import choose, prompt_logprobs
from epslots.generation.row_attention import RowByRow
from epslots.generation.row_cache import Row, RowCache, StepOfRows
from epslots.generation.row_plan import RowBatch, RowState, decodes, next_batch
from epslots.generation.row_support import RowSupport, row_support
from epslots.generation.row_tracker import RowTracker
from epslots.generation.tracked_request import NO_TOKEN, NextToken, TrackedRequest

logger = logging.getLogger(__name__)

LEAST_SHARED_TOKENS = 16
"""A shorter common beginning of two prompts isn't worth a pass that ends there."""


@dataclass(eq=False)
class _RunningRow:
    """A request that has a row."""

    entry: TrackedRequest
    row: Row
    stop: int = 0
    """A length at which another request is to continue from this row."""

    @property
    def turn(self) -> tuple[int, int]:
        return self.entry.turn

    @property
    def left(self) -> int:
        return self.entry.length - self.row.length


class RowBatcher(Batcher):
    """Many requests in one forward pass, each a row of the model's own cache.

    Requests wait, in the order of priority and arrival, while rows or tokens are short. When the running ones outgrow the
    cache, the last of them in that order is given up, and computed again from its tokens when there is room. Rows of finished
    requests stay until their room is needed, for prompts that begin alike.
    """

    def __init__(self, model: PreTrainedModel, *, clock: Callable[[], float] = time.perf_counter, **settings: Any) -> None:
        """Allocate the cache, by fields of ``EngineConfig``.

        Args:
            model: with a language-model head.
            clock: seconds, by which passes are timed for ``step_target_ms``.
            settings: fields of ``EngineConfig``.

        Raises:
            ConfigError: a number is less than one.
            DoesNotFitError: the cache exceeds the device's free memory.
            UnsupportedModelError: the model has no language-model head, or its layers can't be kept apart by rows.
        """
        check_servable(model)
        config = self._config = EngineConfig(**settings)
        check_positive(kv_tokens=config.kv_tokens)
        super().__init__(model, config.kv_tokens, config.max_requests)
        self._clock = clock
        self._support: RowSupport = row_support(model)
        self._latents = AbsorbedAttention(model)
        self._by_row = RowByRow(self._support.modules, self._support.rotaries, model.device)
        self._cache = self._open_cache()
        target_s = None if config.step_target_ms is None else config.step_target_ms / 1000
        self._chunk = ChunkSize(config.max_batch_tokens, target_s)
        self._takes = inspect.signature(model.forward).parameters
        self._waiting: list[TrackedRequest] = []
        self._running: list[_RunningRow] = []
        """Both are in the order of turns."""
        self._isolation: Isolation[_RunningRow] | None = None
        """Of the pass under way; None between passes."""
        self._batch: RowBatch | None = None
        self._kept: deque[_RunningRow] = deque()
        """Rows of requests that have ended, for prompts that begin alike; the longest unused first."""
        self._prompt_was_last = False
        self._order = RowTracker()

    @property
    def shares_prefixes(self) -> bool:
        return self._config.prefix_cache and self._support.shares_prefixes

    def _open_cache(self) -> RowCache:
        config, support = self._config, self._support
        try:
            return RowCache(
                self._model,
                tensors_of(self._model),
                kv_tokens=config.kv_tokens,
                max_requests=config.max_requests,
                in_flight=config.step_tokens(support.whole_prompts),
                by_row=support.by_row,
            )
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch's on the CPU is a RuntimeError
                raise
            raise DoesNotFitError(
                f"a cache of {config.kv_tokens:,} tokens and {config.max_requests} requests doesn't fit on "
                f"{self._model.device}: {error}"
            ) from error

    def _queue(self, entry: TrackedRequest) -> None:
        insort(self._waiting, entry, key=_turn)

    def _withdraw(self, entry: TrackedRequest) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
        elif self._isolation is None:
            self._leave(entry)  # else when the prepared pass is made

    def _leave(self, entry: TrackedRequest) -> None:
        """Free the row of a request that has ended. If others may begin with it, it is kept until its room is needed."""
        (running,) = [running for running in self._running if running.entry is entry]
        self._running.remove(running)
        if self.shares_prefixes and entry.reason != "error" and running.row.length:
            self._kept.append(running)
        else:
            self._cache.close(running.row)

    def _make_room(self, tokens: int, rows: int) -> bool:
        """Give up kept rows until so many rows, and cells for so many tokens, are free; whether they are."""
        while self._kept and (self._cache.free_rows < rows or self._cache.free_tokens < tokens):
            self._cache.close(self._kept.popleft().row)
        return self._cache.free_rows >= rows and self._cache.free_tokens >= tokens

    # Admission.

    def prepare(self) -> bool:
        self._queue_prepared()
        if self._isolation is None:
            self._restart_outgrown()
            self._admit()
            planned = self._plan()
            if planned is not None:
                self._batch = planned
                self._isolation = Isolation([self._running[i] for i in planned.rows])
        return self._isolation is not None

    def _restart_outgrown(self) -> None:
        """Empty the rows of sequences that have to be computed anew, because the angles of their tokens have changed."""
        limit = self._support.restart
        if limit is None:
            return
        for running in self._running:
            if 0 < running.row.length <= limit < running.entry.length:
                self._cache.close(running.row)
                running.row = self._cache.open()

    def _admit(self) -> None:
        """Give rows to waiting requests, in order, as far as rows and tokens suffice."""
        held: list[TrackedRequest] = []
        while self._waiting and len(self._running) < self._config.max_requests:
            entry = self._waiting.pop(0)
            source, shared = self._shared_beginning(entry)
            if source is not None and source.row.length < shared:
                source.stop = min(source.stop, shared) if source.stop > source.row.length else shared
                held.append(entry)  # it goes on from there, soon
                continue
            if source is not None and source in self._kept:
                self._kept.remove(source)
                self._kept.append(source)  # the last to be given up
            # Every running row needs room for a token, or none of them could go on.
            needed = self._uncomputed() + entry.length - shared + len(self._running) + 1
            if not self._make_room(needed, rows=1) and self._running:
                held.append(entry)
                break
            if source is not None and source not in self._kept and source not in self._running:
                self._queue(entry)  # the source had to be given up
                continue
            row = self._cache.open() if source is None else self._cache.copy(source.row, shared)
            self._counters.reused_tokens += shared
            insort(self._running, _RunningRow(entry, row), key=_turn)
        for entry in held:
            self._queue(entry)

    def _uncomputed(self) -> int:
        """Tokens of running requests' prompts that have no cell yet."""
        return sum(running.left for running in self._running)

    def _shared_beginning(self, entry: TrackedRequest) -> tuple[_RunningRow | None, int]:
        """The running request whose row a new one can begin with, and the tokens that they share; (None, 0) without one."""
        if not self.shares_prefixes:
            return None, 0
        if entry.prompt_rows(0, entry.prompt_length):
            return None, 0  # the logits of all of its prompt are needed
        beginning = entry.ids(0, LEAST_SHARED_TOKENS)
        own = entry.ids(0, entry.length - 1)  # the last token's logits are needed
        best: tuple[_RunningRow | None, int] = (None, 0)
        for running in (*self._running, *self._kept):
            if running.entry.ids(0, LEAST_SHARED_TOKENS) != beginning:
                continue
            shared = _common(own, running.entry.ids(0, len(own)))
            if running in self._kept:
                shared = min(shared, running.row.length)  # it doesn't go on
            # A state is of one length: the row's present one, or one that it hasn't reached.
            if self._cache.keeps_states and shared < running.row.length:
                continue
            if shared >= LEAST_SHARED_TOKENS and shared > best[1]:
                best = running, shared
        return best

    def _plan(self) -> RowBatch | None:
        """The next pass, with room for its tokens: where the cache is full, the last rows are given up."""
        while self._running:
            states = [self._state(running) for running in self._running]
            room = self._chunk.prompt_tokens(sum(map(decodes, states)))
            planned = next_batch(states, room, prompt_was_last=self._prompt_was_last, together=self._support.together)
            assert planned is not None, "every running row has a token left to compute"
            if self._make_room(len(planned.rows) * planned.width, rows=0):
                return planned
            self._preempt(self._running[-1])  # the first alone always fits
        return None

    def _state(self, running: _RunningRow) -> RowState:
        entry, support = running.entry, self._support
        first = 0
        if support.replays:  # a moved request's own tokens come one by one, as they did the first time
            first, limit = entry.prompt_length, support.restart
            if limit is not None and first <= limit < entry.length:
                first = limit + 1  # as many as were there when it was computed anew
        elif support.whole_prompts:
            first = entry.length
        most = self._config.max_requests if entry.prompt_rows(running.row.length, entry.prompt_length) else 0
        return RowState(known=entry.length, computed=running.row.length, first=first, most=most, stop=running.stop)

    def _preempt(self, running: _RunningRow) -> None:
        """Give up a row; its request waits again."""
        self._running.remove(running)
        self._cache.close(running.row)
        self._queue(running.entry)
        self._counters.preempted += 1

    # The forward pass.

    def step(self) -> None:
        isolation, planned = self._isolation, self._batch
        assert isolation is not None and planned is not None, "prepare() comes first"
        part, width = isolation.part, planned.width
        rows = [running.row for running in part]
        began = self._clock()
        try:
            previous = self._order.next([(running.entry.request.id, width) for running in part])
            with self._following(previous), self._plain_outputs.off(), self._cache.step(rows, width) as step:
                logits_BLV = self._forward(part, width, step)
                chosen = self._choose(part, width, logits_BLV)
                step.commit()
        except Exception as failure:
            self._order = RowTracker()  # only some layers have seen the failed pass's rows
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

    def _count_step(self, planned: RowBatch, part: Sequence[_RunningRow], seconds: float | None) -> None:
        """Count a pass that was committed."""
        starts = [(running.row.length - planned.width, running.entry.request) for running in part]
        self._counters.steps += 1
        self._counters.prompt_tokens += sum(max(0, min(planned.width, len(r.prompt) - start)) for start, r in starts)
        if seconds is not None:
            computed = len(part) * planned.width
            self._chunk.observe(*((0, computed) if planned.decodes else (computed, 0)), seconds)

    def _finish_part(self, isolation: Isolation[_RunningRow]) -> None:
        if isolation.done:
            assert self._batch is not None
            self._prompt_was_last = not self._batch.decodes
            self._isolation = self._batch = None
            for running in [running for running in self._running if running.entry.reason]:
                self._leave(running.entry)

    @torch.no_grad()
    def _forward(self, part: Sequence[_RunningRow], width: int, step: StepOfRows) -> torch.Tensor:
        """Logits of the last tokens of each row, [B, L, V]: of all new ones if their log-probabilities are asked for."""
        device = self._model.device
        ids = [running.entry.ids(running.row.length, running.row.length + width) for running in part]
        keep = width if self._prompt_rows(part[0], width) else 1
        inputs = {
            "input_ids": to_device(np.array(ids, np.int64), device),
            "position_ids": step.position_ids,
            "attention_mask": step.attention_mask,
            "past_key_values": step.cache,
            "use_cache": True,
            "logits_to_keep": keep,
        }
        with ExitStack() as stack:
            stack.enter_context(self._by_row.active())
            stack.enter_context(self._latents.active())
            found = self._model(**{name: value for name, value in inputs.items() if name in self._takes}, return_dict=True)
        logits: torch.Tensor = found.logits[:, -keep:]
        return logits

    def _choose(self, part: Sequence[_RunningRow], width: int, logits_BLV: torch.Tensor) -> list[Callable[[], None]]:
        """Choose tokens, and compute log-probabilities; returns calls that enter them, for after the commit."""
        deliver: list[Callable[[], None]] = []
        if rows := self._prompt_rows(part[0], width):
            entry, start = part[0].entry, part[0].row.length
            following = entry.request.prompt[rows.start + 1 : rows.stop + 1]
            logits = logits_BLV[0, rows.start - start : rows.stop - start].float()
            found = prompt_logprobs(logits, following, entry.request.prompt_logprobs or 0)
            if entry.reason is None:
                deliver.append(partial(entry.add_prompt_logprobs, rows, found))
        chosen = [i for i, running in enumerate(part) if running.left == width]
        if chosen:
            entries = [part[i].entry for i in chosen]
            last_NV = logits_BLV[:, -1] if len(chosen) == len(part) else logits_BLV[chosen, -1]
            for entry, choice in zip(entries, choose(last_NV.float(), entries).read(), strict=True):
                deliver.append(partial(self._take, entry, choice))
        return deliver

    @staticmethod
    def _prompt_rows(running: _RunningRow, width: int) -> range:
        """Positions of a pass whose log-probabilities are asked for; it has one row then."""
        return running.entry.prompt_rows(running.row.length, running.row.length + width)

    def _take(self, entry: TrackedRequest, choice: NextToken) -> None:
        """Enter a request's next token; one without a token ends, and no other row has met its numbers."""
        if entry.reason is not None:
            return  # cancelled since the pass was prepared
        if choice.token == NO_TOKEN:
            entry.end("error", describe_failure(NotFiniteError(), self._model.dtype))
        else:
            entry.append(choice)

    def _usage(self) -> Usage:
        used = sum(running.row.length for running in self._running)  # cells that several share count for each
        return Usage(len(self._running), min(used, self._config.kv_tokens), self._config.kv_tokens)

    def close(self) -> None:
        self.grammars.close()
        self._waiting.clear()
        self._running.clear()
        self._kept.clear()
        self._isolation = self._batch = None
        del self._cache


def _turn(waiting: TrackedRequest | _RunningRow) -> tuple[int, int]:
    return waiting.turn


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count
    differs = np.array(one[:count]) != np.array(other[:count])
    return int(differs.argmax())
