"""The requests of a step over pages: which compute, are admitted, are preempted. Bookkeeping; no tensor is touched.

transformers' own schedulers may let a request wait for ever while others come. Smaller prompts pass one that finds no room, a
request that gives up its pages goes behind all that wait, and the one that needs a page gives up its own, the oldest too. In
``PageScheduler`` requests have turns, by priority and then by arrival. The first one always advances, and every request
becomes the first one, unless better priorities keep coming. The rules are vLLM's (``v1/core/sched/scheduler.py``), the third
SGLang's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from epslots.generation.chunk_balance import StepLoad
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import EngineCounters

SCHEDULER = "epslots"
"""Name of ``PageScheduler`` in transformers' configurations."""


@dataclass
class _StepBatch:
    """The requests of one step.

    Attributes:
        cache: whose pages they read.
        read_budget: tokens that they may read together; pages that several share count for each.
        entries: by id, in the order of their tokens.
        reads: tokens that they read.
        indexed: how many of them no kernel can read in place.
        prompt_rows: rows of logits beside one for each request.
    """

    cache: PagedAttentionCache
    read_budget: int
    entries: dict[str, FutureRequestState] = field(default_factory=dict)
    reads: int = 0
    indexed: int = 0
    prompt_rows: int = 0

    @property
    def in_place(self) -> bool:
        """Whether flash attention's kernel reads the pages in place. Without it, they are read by indices."""
        return self.cache.max_blocks_per_request > 0 and not self.indexed

    def takes(self, state: RequestState, tokens: int) -> bool:
        """Whether the request's pages can be read beside the others'."""
        in_place = self.in_place and not self._is_indexed(state, tokens)
        return in_place or self.reads + reads_of(self.cache, state.current_len()) <= self.read_budget

    def add(self, state: RequestState, tokens: int) -> None:
        has_new_token = not state.remaining_prefill_tokens
        complete = self.cache.count_new_complete_blocks(state, tokens)
        self.entries[state.request_id] = FutureRequestState(state, has_new_token, complete, tokens)
        self._count(state, tokens, 1)

    def remove(self, request_id: str) -> None:
        if (entry := self.entries.pop(request_id, None)) is not None:
            self._count(entry.state, entry.query_length, -1)

    def _count(self, state: RequestState, tokens: int, sign: int) -> None:
        self.reads += sign * reads_of(self.cache, state.current_len())
        self.indexed += sign * self._is_indexed(state, tokens)

    def _is_indexed(self, state: RequestState, tokens: int) -> bool:
        return bool(tokens > 1 or state.current_len() >= self.cache.max_decode_fast_path_length)


def is_prompt(future: FutureRequestState) -> bool:
    """Whether a prepared request computes its prompt: past that, it decodes. Its position is the one after the batch."""
    return bool(future.state.position_offset <= len(future.state.initial_tokens))


def reads_of(cache: PagedAttentionCache, length: int) -> int:
    """Tokens that a request of this length reads from the cache in a step."""
    return length if cache.read_cache_limit is None else min(length, int(cache.read_cache_limit))


class PageScheduler(Scheduler):
    """Schedules requests whose ids are numbers in the order of their arrival. transformers makes it; ``serve`` comes next.

    1. Decoding requests come first, a token each. Then admitted prompts, in turn, up to the tokens that ``ChunkSize`` allows.
    2. Requests are admitted in turn, up to ``max_requests``, when there is room for all admitted prompts and for a further
       page of each request. None overtakes another.
    3. A request whose prompt begins like one that is being computed is admitted when that is done: it finds the pages then.
    4. A request without room for its next tokens gets the pages of the last one in turn. That one waits again, at its place,
       to be computed again from its prompt and its tokens. From then on none is admitted until a request has ended.
    5. Full pages of requests that are gone stay for prompts that begin alike. The longest unused are freed one by one; of one
       request the last pages first, because they are of no use without those before.
    6. A request whose cache is being handed over to another rank is admitted, but makes no step. Pages may be reserved for one
       that comes from another rank: it is admitted when it comes.

    Attributes:
        priority_of: the priority of the request of an id.
        reserved: tokens for which pages are reserved, by the id of the request that is to come.
    """

    def __init__(self, cache: PagedAttentionCache, safety_margin: float | None, max_requests_per_batch: int) -> None:
        super().__init__(cache, safety_margin or 0.0, max_requests_per_batch)
        self._balanced: int | None = None
        self._entries: dict[str, FutureRequestState] = {}
        """The latest step's."""

    def serve(
        self,
        chunk_size: ChunkSize,
        counters: EngineCounters,
        *,
        wants_prompt_logits: Callable[[str], bool],
        priority_of: Callable[[str], int],
        is_held: Callable[[str], bool],
        on_preempted: Callable[[str], None],
    ) -> None:
        """Schedule the requests of a batcher, which knows more of them than transformers does.

        Args:
            chunk_size: decides how many prompt tokens a step has.
            counters: reused tokens and preemptions are counted there.
            wants_prompt_logits: whether the request of an id needs the logits of all its prompt's tokens. It shares no pages,
                and its chunks are small: a step has ``max_requests`` rows of logits, one of them for each other request.
            priority_of: the priority of the request of an id.
            is_held: whether the request of an id makes no step for now.
            on_preempted: called with the id of a request that has given up its pages.
        """
        self._chunk_size, self._counters = chunk_size, counters
        self._wants_prompt_logits, self.priority_of = wants_prompt_logits, priority_of
        self._is_held, self._on_preempted = is_held, on_preempted

    def balance(self, chunk: int | None) -> None:
        """Have chunks of this length from now on, for the sake of other ranks; None = of any."""
        self._balanced = chunk

    def reset(self) -> None:
        """Forget all requests."""
        super().reset()
        self.reserved: dict[str, int] = {}

    @property
    def hands_over(self) -> bool:
        """Whether pages are kept for hand-overs: they will be free without a step, so that waiting for them ends."""
        return bool(self.reserved) or self._held > 0

    def load_of(self, batch: Sequence[FutureRequestState]) -> StepLoad:
        """Tokens of a prepared batch, and of prompts that are computed after it."""
        tokens = sum(future.query_length for future in batch)
        if not any(map(is_prompt, batch)):
            return StepLoad(tokens, 0)  # prompts that wait have found no room, and it isn't known when they will
        admitted = sum(len(state.remaining_prefill_tokens) for state in self.active_requests.values())
        return StepLoad(tokens, admitted + sum(len(state.initial_tokens) for state in self.waiting_requests.values()))

    @property
    def _held(self) -> int:
        return sum(map(self._is_held, self.active_requests))

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """The requests of the next step.

        Args:
            token_budget: tokens that they may compute together.
            cache_budget: tokens that they may read from the cache together.

        Returns:
            The requests, or None if there are some, but no room for a token of any; whether a kernel can read their pages in
            place; the number of tokens to compute; and the number of tokens to read.
        """
        self.cache.pool.try_to_free_sectors()
        batch = _StepBatch(self.cache, cache_budget)
        for state in self._running(RequestStatus.DECODING):
            if not self._is_held(state.request_id):
                self._add(state, 1, batch)
        if self.waiting_requests or len(batch.entries) < len(self.active_requests):
            self._add_prompts(batch, token_budget - len(batch.entries))
        if not batch.entries and self.has_pending_requests():
            return None, False, 0, 0
        self._entries, entries = batch.entries, list(batch.entries.values())
        return entries, batch.in_place, sum(entry.query_length for entry in entries), batch.reads

    def _add_prompts(self, batch: _StepBatch, token_budget: int) -> None:
        left = min(token_budget, self._chunk_size.prompt_tokens(len(batch.entries), self._balanced))
        for state in self._prompts(batch):
            tokens = min(left, len(state.remaining_prefill_tokens))
            if wants_rows := self._wants_prompt_logits(state.request_id):
                tokens = min(tokens, self._rows_for_a_prompt(batch))
            if self._add(state, tokens, batch):
                left -= tokens
                batch.prompt_rows += (tokens - 1) * wants_rows
            if not left:
                return

    def _rows_for_a_prompt(self, batch: _StepBatch) -> int:
        """Rows of logits that a prompt may take: those that running requests leave; if others wait, half of these or more."""
        free = self.max_requests_per_batch - (len(self.active_requests) - 1) - batch.prompt_rows
        return max(-(-free // 2), free - len(self.waiting_requests))

    def _running(self, status: RequestStatus) -> Iterator[RequestState]:
        """Admitted requests of this status, in turn; without those that lose their pages meanwhile."""
        for state in sorted(self.active_requests.values(), key=self._turn):
            if state.status == status and state.request_id in self.active_requests:
                yield state

    def _prompts(self, batch: _StepBatch) -> Iterator[RequestState]:
        """Admitted requests whose prompt isn't computed, in turn; then waiting ones, as they can be admitted."""
        yield from self._running(RequestStatus.PREFILLING)
        while self.waiting_requests_order and len(batch.entries) + self._held == len(self.active_requests):  # all go on
            state = self.waiting_requests[self.waiting_requests_order[0]]
            if not self._admit(state, batch):
                return
            yield state

    def _add(self, state: RequestState, tokens: int, batch: _StepBatch) -> bool:
        """Make a request's next tokens a part of the batch, if there is room for them."""
        if not batch.takes(state, tokens) or not self._allocate(state, tokens, batch):
            return False
        if state.status == RequestStatus.PREFILLING:
            rest = state.remaining_prefill_tokens
            state.tokens_to_process, state.remaining_prefill_tokens = rest[:tokens], rest[tokens:]
            if not state.remaining_prefill_tokens:
                state.status = RequestStatus.DECODING
        batch.add(state, tokens)
        return True

    # Admission.

    def _admit(self, state: RequestState, batch: _StepBatch) -> bool:
        """Admit a waiting request, with the pages that hold its prompt's beginning, if it may run now."""
        prompt, shares = state.initial_tokens, not self._wants_prompt_logits(state.request_id)
        if self.active_requests and (
            self.block_new_requests
            or len(self.active_requests) + len(self.reserved) + batch.prompt_rows >= self.max_requests_per_batch
            or (shares and self._is_being_computed(prompt, batch))
            or not self._can_be_read(prompt, batch)
        ):
            return False
        reused = self.cache.search_prefix_match(state.request_id, prompt) if shares else 0
        state.position_offset, state.remaining_prefill_tokens = reused, prompt[reused:]
        if not self._has_room(state):
            self.finish_request(state.request_id)
            state.position_offset, state.remaining_prefill_tokens = 0, prompt[:]
            return False
        state.status = RequestStatus.PREFILLING
        self.waiting_requests_order.remove(state.request_id)
        self.active_requests[state.request_id] = self.waiting_requests.pop(state.request_id)
        self._counters.reused_tokens += reused
        return True

    def _is_being_computed(self, prompt: list[int], batch: _StepBatch) -> bool:
        """Whether a prompt of the batch is about to complete the next page of this prompt's beginning."""
        if not self.cache.use_prefix_sharing:
            return False
        page = self._page_tokens
        for entry in batch.entries.values():
            other = entry.state
            end = (other.current_len() // page + 1) * page
            # A prompt's last token is always computed: its logits are needed.
            if end < len(prompt) and end <= len(other.initial_tokens) and prompt[:end] == other.initial_tokens[:end]:
                (allocator,) = self.cache.cache_allocators.values()
                return end > page * len(allocator.match_prefix_blocks(prompt))
        return False

    def _can_be_read(self, prompt: list[int], batch: _StepBatch) -> bool:
        """Whether this prompt can be read beside all others when they are computed."""
        lengths = [state.current_len() + len(state.remaining_prefill_tokens) for state in self.active_requests.values()]
        return sum(reads_of(self.cache, length) for length in (*lengths, len(prompt))) <= batch.read_budget

    def _has_room(self, candidate: RequestState) -> bool:
        """Whether all admitted prompts fit together with this one, and a further page of each request."""
        needed = []
        for state in (*self.active_requests.values(), candidate):
            # A request's last new token is never computed with.
            left = len(state.initial_tokens) + int(state.max_new_tokens or 0) - 1 - state.current_len()
            needed.append(self._blocks(state, min(left, len(state.remaining_prefill_tokens) + self._page_tokens)))
        return self.cache.count_storable_requests(needed) == len(needed) or self._evict(needed)

    # Room.

    @property
    def _page_tokens(self) -> int:
        return max(int(allocator.tokens_per_page) for allocator in self.cache.cache_allocators.values())

    def _blocks(self, state: RequestState, tokens: int) -> dict[str, int]:
        """Blocks that a request's next tokens need, by the kind of attention."""
        allocators = self.cache.cache_allocators
        return {n: a.needs_new_blocks(state.request_id, state.current_len(), tokens) for n, a in allocators.items()}

    def _allocate(self, state: RequestState, tokens: int, batch: _StepBatch) -> bool:
        """Allocate pages for a request's next tokens, if need be those of later ones in turn. False if it is the last one."""
        while not self.cache.can_store_request_tokens(state, tokens):
            if self._evict([self._blocks(state, tokens)]):
                continue
            last = max(self.active_requests.values(), key=self._turn)
            if last is state:
                return False
            self._preempt(last)
            batch.remove(last.request_id)
        return True

    def _evict(self, needed: list[dict[str, int]]) -> bool:
        """Free enough blocks of those that ended requests have left, the longest unused first; False if they are too few."""
        if not self.cache.use_prefix_sharing:
            return False
        ((name, allocator),) = self.cache.cache_allocators.items()  # pages are shared where all layers attend to all tokens
        pool, ledger = self.cache.pool, allocator.ledger
        free = pool.count_free_blocks(allocator.index) + pool.num_free_sectors * allocator.blocks_per_sector
        missing = sum(blocks[name] for blocks in needed) - free
        if not 0 < missing <= len(ledger.cached_blocks):
            return False
        evicted = list(islice(ledger.cached_blocks, missing))
        for block in evicted:
            del ledger.cached_blocks[block]
            del ledger.hash_to_block[ledger.block_to_hash.pop(block)]
        pool.free_blocks(allocator.index, evicted)
        return True

    def _preempt(self, state: RequestState) -> None:
        """Take a request's pages away, and let it wait."""
        again = state.create_equivalent_initial_request()
        self.finish_request(state.request_id)
        self.cache.pool.try_to_free_sectors()
        self.add_waiting_request(again)
        self.block_new_requests = True
        self._counters.preempted += 1
        self._on_preempted(state.request_id)

    # Hand-overs.

    def reserve(self, request_id: str, tokens: int) -> bool:
        """Reserve pages for the tokens of a request that is to come. False if there is no room beside the others."""
        state = RequestState(request_id, [0] * tokens, max_new_tokens=self._page_tokens)
        if len(self.active_requests) + len(self.reserved) >= self.max_requests_per_batch:
            return False
        if not self._has_room(state) or not self.cache.can_store_request_tokens(state, tokens):
            return False
        self.reserved[request_id] = tokens
        return True

    def release(self, request_id: str) -> None:
        """Free pages that are reserved. They were perhaps not written, so no other request may share them."""
        del self.reserved[request_id]
        self.cache.free_blocks(request_id, no_cache=True)

    def _admit_reserved(self, state: RequestState) -> None:
        """Admit the request that pages are reserved for: they hold all of its tokens but the last ones."""
        tokens = self.reserved.pop(state.request_id)
        state.position_offset, state.remaining_prefill_tokens = tokens, state.initial_tokens[tokens:]
        state.status = RequestStatus.PREFILLING
        self.active_requests[state.request_id] = state
        self._counters.reused_tokens += tokens

    def finish_request(self, request_id: str) -> None:
        """Free a request's pages, its last ones first. Those that its last step has filled can be shared, too."""
        state = self.active_requests.get(request_id)
        for name, allocator in self.cache.cache_allocators.items():
            if state is not None and state.status == RequestStatus.FINISHED and request_id in allocator.block_table:
                # transformers leaves this out, and with it the prompts of all requests for one token.
                complete = self._entries[request_id].complete_blocks.get(name, 0)
                allocator.mark_complete_blocks(request_id, state.initial_tokens + state.generated_tokens, complete)
            allocator.block_table.get(request_id, []).reverse()
        super().finish_request(request_id)

    def add_waiting_request(self, state: RequestState) -> None:
        """Queue a request, at its place in turn; one with reserved pages is admitted."""
        if state.request_id in self.reserved:
            self._admit_reserved(state)
            return
        super().add_waiting_request(state)
        order: deque[str] = vars(self)["waiting_requests_order"]
        self.waiting_requests_order = deque(sorted(order, key=self._turn_of))

    def _turn_of(self, request_id: str) -> tuple[int, int]:
        return self.priority_of(request_id), int(request_id)

    def _turn(self, state: RequestState) -> tuple[int, int]:
        return self._turn_of(state.request_id)


SCHEDULER_MAPPING[SCHEDULER] = PageScheduler
