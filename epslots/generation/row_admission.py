"""Which requests of a ``RowBatcher`` have rows, and which wait: admission, shared beginnings, preemption, hand-overs.

Requests wait, in the order of priority and arrival, while rows or tokens are short. A prompt that begins like another one
continues from a copy of its row; so rows of finished requests are kept until their room is needed. A row is *held* while its
cache is handed over to another rank, and *reserved* for a request that comes from one. ``row_plan.py`` decides which of the
active rows make a batch. With ``kv_tokens="auto"`` there is room in slots of experts, too (``slot_exchange.py``).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from epslots.arrays import IntArray
from epslots.config import EngineConfig
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout, sequence_digest
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import EngineCounters
from epslots.generation.row_cache import Row, RowCache
from epslots.generation.row_images import growing_image, image_of_row, room_for_row
from epslots.generation.row_support import RowSupport
from epslots.generation.slot_exchange import SlotExchange
from epslots.generation.tracked_request import PromptState, TrackedRequest

LEAST_SHARED_TOKENS = 16
"""A shorter common beginning of two prompts isn't worth a batch that ends there."""


@dataclass(eq=False)
class RunningRow:
    """A request that has a row.

    Attributes:
        stop: a length at which another request is to continue from this row; 0 = none.
        last: number of the batch that it was in last; 0 = none.
    """

    entry: TrackedRequest
    row: Row
    stop: int = 0
    last: int = 0

    @property
    def turn(self) -> tuple[int, int]:
        return self.entry.turn

    @property
    def left(self) -> int:
        return self.entry.length - self.row.length


class RowAdmission:
    """Gives the rows of a cache to requests.

    Args:
        cache: the rows, and cells for their tokens.
        support: the abilities of the model's layers.
        counters: of the batcher.
        exchange: of memory with the experts; None = the cache's size is fixed.

    Attributes:
        exchange: as given.
        shares_prefixes: whether prompts that begin alike share their rows.
        running: requests with rows, in the order of turns.
        kept: rows of requests that have ended, for prompts that begin alike; the longest unused first.
        reserved: rows, with their images, of requests that are yet to come, by id.
    """

    def __init__(
        self,
        cache: RowCache,
        config: EngineConfig,
        support: RowSupport,
        counters: EngineCounters,
        exchange: SlotExchange | None = None,
    ) -> None:
        self._cache, self._config, self._support, self._counters = cache, config, support, counters
        self.exchange = exchange
        self.shares_prefixes = config.prefix_cache and support.shares_prefixes
        self._waiting: list[TrackedRequest] = []  # in the order of turns
        self.running: list[RunningRow] = []
        self.kept: deque[RunningRow] = deque()
        self.reserved: dict[str, tuple[Row, CacheImage]] = {}

    @property
    def active(self) -> list[RunningRow]:
        """The running rows that make steps."""
        return [running for running in self.running if not running.entry.held]

    def queue(self, entry: TrackedRequest) -> None:
        """Let a request wait for a row; one whose row is reserved runs at once."""
        row, image = self.reserved.pop(entry.request.id, (None, None))
        if row is None or image is None:
            insort(self._waiting, entry, key=_turn)
            return
        image.end()
        if image.whole and row.length < entry.length and image.layout.sequence == sequence_digest(entry.ids(0, row.length)):
            self._counters.reused_tokens += row.length
            insort(self.running, RunningRow(entry, row), key=_turn)
        else:
            self._cache.close(row)
            insort(self._waiting, entry, key=_turn)

    def image_of(self, entry: TrackedRequest, steps_stand: Callable[[], bool]) -> CacheImage | None:
        """The image of a request's row, for ``Batcher.hold``; ``steps_stand``: whether no step has to be repeated."""
        running = next((running for running in self.running if running.entry is entry), None)
        if running is None or not running.row.length or not steps_stand():
            return None
        if running.left == 1 and (entry.tokens or self._cache.keeps_objects):
            return image_of_row(self._cache, running.row, entry.ids(0, running.row.length))
        if self._cache.keeps_objects:
            return None
        return growing_image(self._cache, running.row, entry.ids(0, entry.length), steps_stand)

    def prompts(self) -> list[PromptState]:
        """For ``Batcher.prompts``."""
        if self._cache.keeps_objects:
            return []
        begun = [running for running in self.running if running.row.length and running.left > 1]
        return [running.entry.prompt_state(running.row.length, running.left) for running in begun]

    def reserve(self, id: str, layout: CacheLayout) -> CacheImage | None:
        """A row for the tokens of a request that comes from another rank. None if there is no room beside the others."""
        assert id not in self.reserved
        needed = self._uncomputed() + layout.tokens + len(self.running) + len(self.reserved) + 1
        if not self.make_room(needed, rows=1, grow=True):
            return None
        row, image = room_for_row(self._cache, layout)
        self.reserved[id] = row, image
        return image

    def release(self, id: str) -> None:
        """Give up a reserved row; does nothing if there is none."""
        row, image = self.reserved.pop(id, (None, None))
        if row is not None and image is not None:
            image.end()
            self._cache.close(row)

    def withdraw(self, entry: TrackedRequest) -> bool:
        """Forget a request that waits; returns whether it does."""
        if entry not in self._waiting:
            return False
        self._waiting.remove(entry)
        return True

    def leave(self, entry: TrackedRequest) -> None:
        """Free the row of a request that has ended. If others may begin with it, it is kept until its room is needed."""
        (running,) = [running for running in self.running if running.entry is entry]
        self.running.remove(running)
        if self.shares_prefixes and entry.reason != "error" and running.row.length:
            self.kept.append(running)
        else:
            self._cache.close(running.row)

    def make_room(self, tokens: int, rows: int, *, grow: bool = False) -> bool:
        """Give up kept rows until so many rows, and cells for so many tokens, are free; whether they are.

        Args:
            grow: let experts cede slots where that isn't enough. In a group they come later.
        """
        while self.kept and (self._cache.free_rows < rows or self._cache.free_tokens < tokens):
            self._cache.close(self.kept.popleft().row)
        if self._cache.free_rows < rows:
            return False
        return self._cache.free_tokens >= tokens or (grow and self.exchange is not None and self.exchange.grow(tokens))

    def foresee(self, tokens: int) -> None:
        """Running requests need cells for so many tokens by the end of the next step."""
        if self.exchange is not None:
            self.make_room(tokens, rows=0, grow=True)

    @property
    def waits_for_room(self) -> bool:
        """Whether slots were asked for that come with the group's next step."""
        return self.exchange is not None and self.exchange.asked

    def exchange_memory(self, step: ChunkSize, token_s: float) -> None:
        """Use the cells of slots that were ceded since the last step. At the end of a window, decide about others.

        Args:
            step: knows the time of a step.
            token_s: seconds of a prompt's token.
        """
        exchange = self.exchange
        if exchange is None:
            return
        exchange.follow()
        if not self.running:
            self.count_step(0.0)  # other ranks of the group may have work, and use this one's experts
        if not exchange.due:
            return
        kept = self._cache.cells.held - self._cache.cells.held_by(self._needed_rows())
        change = exchange.decide(fixed_s=step.fixed_s, kept=kept, reused=self._counters.reused_tokens, token_s=token_s)
        if change < 0:
            if any(exchange.is_in_the_way(row, change) for row in self._needed_rows()):
                return  # perhaps for long: kept rows stay meanwhile
            for kept_row in [kept for kept in self.kept if exchange.is_in_the_way(kept.row.number, change)]:
                self.kept.remove(kept_row)
                self._cache.close(kept_row.row)
        exchange.change(change)

    def count_step(self, seconds: float) -> None:
        """Count a step for the exchange."""
        if self.exchange is not None:
            # Each running row needs one cell more in its next step.
            held = self._cache.cells.held_by(self._needed_rows()) + len(self.running)
            self.exchange.count(seconds=seconds, running=len(self.running), held=held)

    def _needed_rows(self) -> list[int]:
        """The numbers of the rows that run, or are reserved."""
        return [running.row.number for running in self.running] + [row.number for row, _ in self.reserved.values()]

    def close(self) -> None:
        """Free all rows; slots that hold cells go back to the experts."""
        rows = [each.row for each in (*self.running, *self.kept)] + [row for row, _ in self.reserved.values()]
        for row in rows:
            self._cache.close(row)
        if self.exchange is not None:
            self.exchange.close()

    def restart_outgrown(self) -> None:
        """Empty the rows of sequences that have to be computed anew, because the angles of their tokens have changed."""
        limit = self._support.restart
        if limit is None:
            return
        for running in self.running:
            if 0 < running.row.length <= limit < running.entry.length:
                running.entry.resume()
                self._cache.close(running.row)
                running.row = self._cache.open()

    def admit(self) -> None:
        """Give rows to waiting requests, in order, as far as rows and tokens suffice."""
        held: list[TrackedRequest] = []
        while self._waiting and len(self.running) < self._config.max_requests:
            entry = self._waiting.pop(0)
            source, shared = self._shared_beginning(entry)
            if source is not None and source.row.length < shared:
                source.stop = min(source.stop, shared) if source.stop > source.row.length else shared
                held.append(entry)  # it goes on from there, soon
                continue
            row = self._row_for(entry, source, shared)
            if row is None:
                held.append(entry)
                break
            self._counters.reused_tokens += shared
            insort(self.running, RunningRow(entry, row), key=_turn)
        for entry in held:
            self.queue(entry)

    def _row_for(self, entry: TrackedRequest, source: RunningRow | None, shared: int) -> Row | None:
        """A row with the first ``shared`` tokens of the source's; None if the request has to wait for room."""
        # Every running row needs room for a token, or none of them could go on.
        needed = self._uncomputed() + entry.length - shared + len(self.running) + len(self.reserved) + 1
        others = bool(self.running or self.reserved)
        if source is None or source not in self.kept:
            if not self.make_room(needed, rows=1) and others:
                self._note_waiting(needed)
                return None
            return self._cache.open() if source is None else self._cache.copy(source.row, shared)
        self.kept.remove(source)
        row = None
        if self.make_room(needed, rows=1):
            row = self._cache.copy(source.row, shared)
        else:  # where there is no room for both, it takes the place of the one that it continues
            self._cache.cut(source.row, shared)
            if self._cache.free_tokens >= needed or not others:
                return source.row
        self.kept.append(source)  # the last to be given up
        if row is None:
            self._note_waiting(needed)
        return row

    def _note_waiting(self, tokens: int) -> None:
        """A request, with others behind it, waits for free cells; for a row, too, if none is free."""
        if self.exchange is not None and self._cache.free_rows:
            # Rows that are kept are given up for others.
            free = self._config.max_requests - len(self.running) - len(self.reserved)
            others = self._waiting[: max(0, free - 1)]
            self.exchange.note_waiting(tokens, others=len(others), their_tokens=sum(each.length + 1 for each in others))

    def _uncomputed(self) -> int:
        """Tokens of running requests' prompts that have no cell yet."""
        return sum(running.left for running in self.running)

    def _shared_beginning(self, entry: TrackedRequest) -> tuple[RunningRow | None, int]:
        """The running request whose row a new one can begin with, and the tokens that they share; (None, 0) without one."""
        if not self.shares_prefixes:
            return None, 0
        if entry.prompt_rows(0, entry.prompt_length):
            return None, 0  # the logits of all of its prompt are needed
        beginning = entry.ids(0, LEAST_SHARED_TOKENS)
        own_T = np.concatenate([entry.prompt_T, np.array(entry.tokens, np.int64)])[:-1]  # the last token's logits are needed
        best: tuple[RunningRow | None, int] = (None, 0)
        for running in (*self.running, *self.kept):
            if running.entry.ids(0, LEAST_SHARED_TOKENS) != beginning:
                continue
            shared = _common(own_T, running.entry)
            if running in self.kept or running.turn > entry.turn:
                shared = min(shared, running.row.length)  # it doesn't go on, or not before this one
            # A state is of one length: the row's present one, or one that it hasn't reached.
            if self._cache.keeps_states and shared < running.row.length:
                continue
            if shared >= LEAST_SHARED_TOKENS and shared > best[1]:
                best = running, shared
        return best

    def preempt(self, running: RunningRow) -> None:
        """Give up a row; its request waits again."""
        self.running.remove(running)
        running.entry.resume()
        self._cache.close(running.row)
        self.queue(running.entry)
        self._counters.preempted += 1


def _turn(waiting: TrackedRequest | RunningRow) -> tuple[int, int]:
    return waiting.turn


def _common(own_T: IntArray, other: TrackedRequest) -> int:
    """Length of the common beginning. Arrays: it is asked for each running row, in every step in which a request waits."""
    shared = _alike(own_T, other.prompt_T)
    if shared < len(other.prompt_T):
        return shared
    rest_T = own_T[shared:]
    return shared + _alike(rest_T, np.array(other.tokens[: len(rest_T)], np.int64))


def _alike(one_T: IntArray, other_T: IntArray) -> int:
    """Length of the common beginning of two arrays."""
    count = min(len(one_T), len(other_T))
    differs_T = one_T[:count] != other_T[:count]
    return int(differs_T.argmax()) if differs_T.any() else count
