"""Computing, admission and preemption in steps over pages: no request waits for ever, and none is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import BlockLedger
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from epslots.generation.page_scheduler import SCHEDULER, PageScheduler, reads_of
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Request
from tests.support import zoo
from tests.support.batches import (
    Collected,
    ModelFree,
    StepClock,
    finish,
    generated,
    pages_are_free,
    prompt_of,
    requests_of,
)

PAGE = 16


class Watched:
    """A batcher without its model, whose every step is held to the rules."""

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        self.batcher = PagedBatcher(model, **settings)
        self.scheduler = self.batcher.processor.scheduler
        self.steps: list[list[tuple[str, int]]] = []
        """The requests of each step, by our ids, with their tokens."""
        self.order: list[str] = []
        """Requests in the order of their ends."""
        ModelFree(self.batcher, self._watch)

    def add(self, request: Request) -> None:
        self.batcher.add(request)

    def step(self) -> bool:
        deciding = [s.request_id for s in self.scheduler.active_requests.values() if s.status == RequestStatus.DECODING]
        preempted = self.batcher.stats().preempted
        if not self.batcher.prepare():
            self._take()
            return False
        batch = self.batcher.processor.inputs_and_outputs.requests_in_batch
        numbers = [entry.state.request_id for entry in batch]
        if preempted == self.batcher.stats().preempted:
            stays = set(deciding) & set(self.scheduler.active_requests)
            assert stays <= set(numbers) or self._is_full(), "decoding waits for nothing but room"
        self.batcher.step()
        self._take()
        return True

    def _take(self) -> None:
        self.order += [output.id for output in self.batcher.outputs() if output.finished]

    def run(self, steps: int = 100_000) -> Watched:
        for _ in range(steps):
            if not self.step():
                break
        return self

    def _is_full(self) -> bool:
        cache = self.batcher.processor.cache
        reads = sum(state.current_len() for state in self.scheduler.active_requests.values())
        return cache.pool.num_free_sectors == 0 or reads >= cache.max_tokens_read

    def _watch(self, batch: list[FutureRequestState]) -> None:
        scheduler, running = self.scheduler, self.batcher._running
        numbers = [int(entry.state.request_id) for entry in batch]
        active, waiting = [int(n) for n in scheduler.active_requests], [int(n) for n in scheduler.waiting_requests_order]
        cache = self.batcher.processor.cache
        assert sum(entry.query_length for entry in batch) <= cache.max_batch_tokens
        before = [reads_of(cache, entry.state.current_len() - entry.query_length) for entry in batch]
        assert sum(before) <= cache.max_tokens_read, "what is read by indices has room"
        assert len(active) <= self.batcher.max_requests
        assert set(numbers) <= set(active)
        alike = len({self._turn(number)[0] for number in active + waiting}) == 1
        assert min(numbers, key=self._turn) == min(active, key=self._turn), "the first one advances"
        assert not alike or not waiting or max(active) < min(waiting), "none has passed another"
        assert waiting == sorted(waiting, key=self._turn)
        assert sorted(waiting) == sorted(map(int, scheduler.waiting_requests))
        prompts = [int(e.state.request_id) for e in batch if e.state.position_offset <= len(e.state.initial_tokens)]
        decoding = sorted(set(numbers) - set(prompts), key=self._turn)
        assert numbers[: len(decoding)] == decoding, "decoding first"
        assert not alike or numbers[len(decoding) :] == sorted(prompts), "then the oldest"
        self._check_pages()
        self.steps.append(
            [(running[str(n)][0].request.id, e.query_length) for n, e in zip(numbers, batch, strict=True) if str(n) in running]
        )

    def _turn(self, number: int) -> tuple[int, int]:
        return self.scheduler.priority_of(str(number)), number

    def _check_pages(self) -> None:
        """Each page is free, unused, or of running requests, as often as it is referred to."""
        cache = self.batcher.processor.cache
        free_sectors = set(cache.pool.free_sectors)
        for allocator in cache.cache_allocators.values():
            ledger, tables = allocator.ledger, list(allocator.block_table.values())
            assert allocator.block_table.keys() <= self.scheduler.active_requests.keys()
            free = [block for tree in cache.pool._free_blocks[allocator.index].trees.values() for block in tree]
            used = [block for table in tables for block in table]
            kept = list(ledger.cached_blocks)
            assert len({*free, *used, *kept}) == len(free) + len(set(used)) + len(kept)
            assert not any(block // allocator.blocks_per_sector in free_sectors for block in (*free, *used, *kept))
            assert {b: used.count(b) for b in used if used.count(b) > 1} == ledger.shared_ref_counts
            assert {hash_: block for block, hash_ in ledger.block_to_hash.items()} == ledger.hash_to_block
            assert set(ledger.block_to_hash) <= {*used, *kept}


@st.composite
def traffic(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, Request, int | None]]]:
    """Settings; and requests with the step at which each comes, and that at which it is cancelled. Some begin alike."""
    sizes = {
        "kv_tokens": draw(st.sampled_from([48, 64, 96, 160])),
        "max_requests": draw(st.sampled_from([1, 2, 3, 8])),
        "max_batch_tokens": draw(st.sampled_from([1, 3, 8, 40, 512])),
    }
    begins, found = [prompt_of(40, seed=s) for s in (1, 2)], []
    for number in range(draw(st.integers(1, 12))):
        shared = draw(st.integers(0, 40))
        prompt = begins[draw(st.integers(0, 1))][:shared] + prompt_of(draw(st.integers(1, 8)), seed=number)
        prompt = prompt[: sizes["kv_tokens"] - 1]
        new = draw(st.integers(1, sizes["kv_tokens"] - len(prompt) + 1))
        at = draw(st.integers(0, 60))
        ends = draw(st.none() | st.integers(at, at + 60))
        scored = draw(st.sampled_from([None, None, None, 0]))
        priority = draw(st.sampled_from([0, 0, 0, -1, 2]))
        found.append((at, Request(str(number), prompt, new, prompt_logprobs=scored, priority=priority), ends))
    return sizes, sorted(found, key=lambda each: each[0])


@settings(max_examples=30, deadline=None)
@given(case=traffic(), name=st.sampled_from(["mixtral", "gpt_oss"]), shares=st.booleans())
def test_every_request_ends_whatever_comes_meanwhile(
    case: tuple[dict[str, int], list[tuple[int, Request, int | None]]],
    name: str,
    shares: bool,
    built: Callable[[str], PreTrainedModel],
):
    sizes, requests = case
    watched = Watched(built(name), prefix_cache=shares, **sizes)
    tokens: dict[str, int] = {}
    for step in count():
        for at, request, ends in requests:
            if at == step:
                watched.add(request)
            if ends == step and at <= step:
                watched.batcher.cancel(request.id)
        made = watched.step()
        if not made and step > 120:
            break
        assert step < 20_000, "no end"
    assert sorted(watched.order, key=int) == sorted((request.id for _, request, _ in requests), key=int)
    for batch in watched.steps:
        for id, computed in batch:
            tokens[id] = tokens.get(id, 0) + computed
    stats = watched.batcher.stats()
    for _, request, ends in requests:
        if ends is None and stats.preempted == stats.reused_tokens == 0:
            assert tokens[request.id] == len(request.prompt) + request.max_new_tokens - 1, "each token is computed once"
    assert stats.running == stats.waiting == stats.kv_used == 0
    assert stats.reused_tokens == 0 or (shares and name == "mixtral")
    assert pages_are_free(watched.batcher)
    watched.batcher.close()


def test_small_requests_never_pass_a_large_one_for_ever(built: Callable[[str], PreTrainedModel]):
    """There are always small ones that would fit beside the running ones, where the large one doesn't."""
    watched = Watched(built("mixtral"), kv_tokens=128, max_requests=8, prefix_cache=False)
    small = (Request(f"small{number}", prompt_of(20, seed=number), 12) for number in count())
    for _ in range(4):
        watched.add(next(small))
    watched.run(3)
    watched.add(Request("large", prompt_of(100), 20))
    for _ in range(60):
        watched.add(next(small))
        assert watched.step()
        if "large" in watched.order:
            break
    assert "large" in watched.order
    assert set(watched.order[: watched.order.index("large")]) <= {f"small{number}" for number in range(4)}
    watched.batcher.close()


def test_the_newest_gives_way_and_keeps_its_place(built: Callable[[str], PreTrainedModel]):
    watched = Watched(built("mixtral"), kv_tokens=64, max_requests=3, prefix_cache=False)
    for id in ("first", "second", "third"):
        watched.add(Request(id, prompt_of(10), 40))
    watched.run(3)
    watched.add(Request("fourth", prompt_of(10), 3))
    while not watched.batcher.stats().preempted:
        watched.step()
    assert [id for id, _ in watched.steps[-1]] == ["first", "second"]
    assert watched.scheduler.waiting_requests_order[0] == "2", "the third, before the fourth"
    watched.run()
    assert watched.order == ["first", "second", "third", "fourth"] or watched.order == ["first", "second", "fourth", "third"]
    watched.batcher.close()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_no_more_than_max_requests_run(name: str, built: Callable[[str], PreTrainedModel]):
    model = zoo.ZOO[name].build()
    requests = requests_of(((20, 9), (3, 4), (30, 8), (17, 12), (40, 6), (9, 5)))
    expected = {request.id: generated(model, request) for request in requests}
    batcher = PagedBatcher(model, kv_tokens=512, max_requests=2)
    assert batcher.max_requests == 2
    for request in requests:
        batcher.add(request)
    assert (batcher.stats().running, batcher.stats().waiting) == (0, 6)
    collected, most, ends = Collected(batcher), 0, []
    while batcher.prepare():
        most = max(most, len(batcher.processor.inputs_and_outputs.requests_in_batch))
        assert batcher.stats().running + batcher.stats().waiting == 6 - len(ends)
        batcher.step()
        ends += [output.id for output in collected.take() if output.finished]
    assert collected.tokens == expected
    assert most == 2
    assert ends[:2] == ["r1", "r0"]
    batcher.close()


def test_steps_hold_no_more_tokens_than_are_computed(built: Callable[[str], PreTrainedModel]):
    """With fewer tokens in a step than requests, each running one still gets one."""
    batcher = PagedBatcher(built("mixtral"), kv_tokens=128, max_requests=8, max_batch_tokens=3)
    assert batcher.max_requests == 3
    requests = requests_of(((7, 5), (7, 5), (7, 5), (7, 5)))
    assert finish(batcher, requests).tokens == {r.id: generated(built("mixtral"), r) for r in requests}


def test_decoding_goes_on_beside_a_long_prompt(built: Callable[[str], PreTrainedModel]):
    watched = Watched(built("mixtral"), kv_tokens=1024, max_batch_tokens=40)
    for number in range(8):
        watched.add(Request(f"d{number}", prompt_of(4, seed=number), 60))
    watched.run(2)
    watched.add(Request("prompt", prompt_of(400), 2))
    watched.run(13)
    for batch in watched.steps[2:15]:
        assert dict(batch) == {**{f"d{number}": 1 for number in range(8)}, "prompt": batch[-1][1]}
    assert [batch[-1] for batch in watched.steps[2:14]] == [("prompt", 32)] * 12
    assert watched.steps[14][-1] == ("prompt", 16)
    watched.batcher.close()


@pytest.mark.parametrize("target_ms", [None, 30.0])
def test_prompts_take_the_time_that_a_step_may_take(target_ms: float | None, built: Callable[[str], PreTrainedModel]):
    clock = StepClock()
    batcher = PagedBatcher(built("mixtral"), kv_tokens=4096, step_target_ms=target_ms, clock=clock)
    ModelFree(batcher, lambda batch: clock.step(sum(entry.query_length for entry in batch)))
    for number in range(8):
        batcher.add(Request(f"d{number}", prompt_of(4, seed=number), 200))
    Collected(batcher).run(5)
    for number in range(3):
        batcher.add(Request(f"p{number}", prompt_of(400, seed=10 + number), 2))
    clock.steps.clear()
    collected = Collected(batcher).run(60)
    assert {f"p{number}" for number in range(3)} <= collected.reasons.keys()
    longest = max(clock.steps)
    assert longest == pytest.approx(0.010 + 0.0002 * 512) if target_ms is None else 0.025 < longest < 0.033
    batcher.close()


def test_steps_that_were_repeated_are_not_timed(built: Callable[[str], PreTrainedModel]):
    """Forming a group anew takes seconds; that isn't what a prompt's tokens cost."""
    clock, model = StepClock(), zoo.ZOO["mixtral"].build()
    batcher = PagedBatcher(model, kv_tokens=256, step_target_ms=1.0, clock=clock)
    observed: list[tuple[int, int, float]] = []
    batcher.chunk_size.observe = lambda *step: observed.append(step)  # type: ignore[method-assign]
    batcher.add(Request("a", prompt_of(10), 3))
    assert batcher.prepare()

    def fail(*_: object) -> None:
        clock.now += 5
        raise RuntimeError("once")

    handle = model.model.layers[1].register_forward_hook(fail)
    batcher.step()
    handle.remove()
    Collected(batcher).run()
    assert [(tokens, decoding) for tokens, decoding, _ in observed] == [(0, 1), (0, 1)]
    batcher.close()


def test_prompts_whose_logits_are_wanted_come_in_few_rows(built: Callable[[str], PreTrainedModel]):
    """So many rows of logits are planned for; and pages of others don't have the logits of their tokens."""
    watched = Watched(built("mixtral"), kv_tokens=512, max_requests=4)
    watched.add(Request("plain", prompt_of(64), 1))
    watched.run()
    watched.add(Request("a", prompt_of(64), 1, prompt_logprobs=0))
    watched.add(Request("b", prompt_of(64), 1, prompt_logprobs=2))
    watched.add(Request("c", prompt_of(64), 1))
    watched.steps.clear()
    watched.run()
    for batch in watched.steps:
        assert sum(tokens for id, tokens in batch if id != "c") <= 4
    assert sum(tokens for batch in watched.steps for id, tokens in batch if id != "c") == 128
    assert watched.batcher.stats().reused_tokens == 48, "of c's"
    watched.batcher.close()


def test_a_prompt_takes_half_of_the_rows_others_wait_for(built: Callable[[str], PreTrainedModel]):
    """All rows of logits where none waits; those that are left where fewer wait than half; half where more do."""
    first_steps = []
    for others in (0, 2, 12):
        watched = Watched(built("mixtral"), kv_tokens=512, max_requests=8)
        watched.add(Request("scored", prompt_of(64), 1, prompt_logprobs=0))
        for number in range(others):
            watched.add(Request(str(number), prompt_of(3, seed=number), 1))
        watched.run()
        first_steps.append([tokens for _, tokens in watched.steps[0]])
        assert others or len(watched.steps) == 8
        watched.batcher.close()
    assert first_steps == [[8], [6, 3, 3], [4, 3, 3, 3, 3]]


def test_a_random_order_of_ends_frees_all(built: Callable[[str], PreTrainedModel]):
    """Counters add up over many requests through a small cache."""
    watched, numbers = Watched(built("mixtral"), kv_tokens=160, max_requests=6, max_batch_tokens=64), random.Random(1)
    begins, requests = [prompt_of(48, seed=seed) for seed in range(3)], []
    for number in range(80):
        prompt = numbers.choice(begins)[: numbers.randint(1, 48)] + prompt_of(5, seed=number)
        requests.append(Request(str(number), prompt, numbers.randint(1, 40)))
    for request in requests:
        watched.add(request)
    watched.run()
    stats = watched.batcher.stats()
    assert len(watched.order) == 80
    assert stats.new_tokens == sum(request.max_new_tokens for request in requests)
    assert stats.preempted > 0 and stats.reused_tokens > 0
    assert stats.steps == len(watched.steps)
    computed = sum(tokens for batch in watched.steps for _, tokens in batch)
    decoded = sum(1 for batch in watched.steps for _ in batch) - sum(1 for r in requests)
    assert stats.prompt_tokens <= computed and decoded > 0
    watched.batcher.close()


# --- transformers' internals, one test for each that is used -----------------------------------------------------------------


def test_contract_a_scheduler_is_found_by_its_name(built: Callable[[str], PreTrainedModel]):
    assert SCHEDULER_MAPPING[SCHEDULER] is PageScheduler
    batcher = PagedBatcher(built("mixtral"), kv_tokens=64, max_requests=5)
    processor = batcher.processor
    assert type(processor.scheduler) is PageScheduler
    assert isinstance(processor, ContinuousBatchProcessor)
    assert processor.scheduler.max_requests_per_batch == 5
    assert processor.cb_config.max_requests_per_batch == 5
    assert isinstance(processor.offloading_manager, OffloadingManager)
    assert processor.offloading_manager.scheduler is processor.scheduler
    assert processor.offloading_manager._cpu_pool is None, "preempted requests are computed again"
    assert issubclass(PageScheduler, Scheduler)
    batcher.close()


@pytest.mark.parametrize(("name", "shares"), [("mixtral", True), ("mixtral", False), ("gpt_oss", True)])
def test_contract_pages_are_shared_without_windows(name: str, shares: bool, built: Callable[[str], PreTrainedModel]):
    batcher = PagedBatcher(built(name), kv_tokens=64, prefix_cache=shares)
    cache = batcher.processor.cache
    assert isinstance(cache, PagedAttentionCache)
    assert cache.use_prefix_sharing is (shares and name == "mixtral")
    assert cache.read_cache_limit is None
    assert all(isinstance(allocator.ledger, BlockLedger) for allocator in cache.cache_allocators.values())
    batcher.close()


def test_contract_a_preempted_request_keeps_its_tokens():
    state = RequestState("3", [1, 2, 3], max_new_tokens=5)
    state.generated_tokens = [7, 8]
    again = state.create_equivalent_initial_request()
    assert (again.request_id, again.initial_tokens, again.max_new_tokens) == ("3", [1, 2, 3, 7, 8], 3)
    assert again.remaining_prefill_tokens == again.initial_tokens
    assert again.to_generation_output().generated_tokens == [7, 8]
    assert again.status == RequestStatus.PENDING
