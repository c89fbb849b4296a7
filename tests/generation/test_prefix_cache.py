"""Prompts that begin alike share the keys and values of full pages, and nothing else; shared or not, results are the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Request
from epslots.generation.sampling import Sampling
from tests.support import zoo
from tests.support.batches import Collected, drawn, finish, generated, pages_are_free, prompt_of
from tests.support.guilty_requests import Guilt, unused

PAGE = 16
COMMON = prompt_of(50)
"""Three full pages, and two tokens of a fourth."""


def twins(count: int, **changes: Any) -> list[Request]:
    """Requests that differ after the common beginning."""
    return [Request(f"t{n}", COMMON + prompt_of(3, seed=n), 6, **changes) for n in range(count)]


class LogitsError:
    """The largest difference between the logits of new tokens and plain transformers', over the logits' scale."""

    def __init__(self, model: PreTrainedModel, batcher: PagedBatcher) -> None:
        self._model, self._batcher, self._rows = model, batcher, {}  # type: ignore[var-annotated]
        self._handle = model.get_output_embeddings().register_forward_hook(self._take)

    def _take(self, _module: object, _inputs: object, logits: torch.Tensor) -> None:
        if self._batcher._part is None:
            return  # a call of the model itself
        batch = self._batcher.processor.inputs_and_outputs.requests_in_batch
        gets_token = [entry for entry in batch if entry.has_new_token]
        for row, entry in zip(logits[0], gets_token, strict=False):
            request = self._batcher._running[entry.state.request_id][0].request
            self._rows[request, entry.state.position_offset] = row.clone()

    def measure(self, tokens: dict[str, list[int]]) -> float:
        self._handle.remove()
        worst = 0.0
        for request in {request for request, _ in self._rows}:
            ids = torch.tensor([[*request.prompt, *tokens[request.id]]])
            with torch.no_grad():
                logits = self._model(ids, use_cache=False).logits[0]
            for (of, length), row in self._rows.items():
                if of == request:
                    worst = max(worst, float((row - logits[length - 1]).abs().max() / logits.abs().max()))
        return worst


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gemma4", "gpt_oss"])
@pytest.mark.parametrize("shares", [True, False])
def test_shared_or_not_logits_and_tokens_are_the_same(name: str, shares: bool, built: Callable[[str], PreTrainedModel]):
    """One after the other, all at once, in chunks, and again when all are gone. Windows are rings: they aren't shared."""
    model = zoo.ZOO[name].build()
    requests = twins(4)
    expected = {request.id: generated(model, request) for request in requests}
    batcher = PagedBatcher(model, kv_tokens=512, max_batch_tokens=40, prefix_cache=shares)
    error = LogitsError(model, batcher)
    assert finish(batcher, requests[:1]).tokens == {"t0": expected["t0"]}
    assert batcher.stats().reused_tokens == 0
    assert finish(batcher, requests).tokens == expected
    stats = batcher.stats()
    windows = name in ("gemma4", "gpt_oss")
    assert stats.reused_tokens == (0 if windows or not shares else 4 * 3 * PAGE)
    assert stats.prompt_tokens + stats.reused_tokens == 5 * 53
    assert stats.new_tokens == 5 * 6
    assert (stats.running, stats.waiting, stats.kv_used) == (0, 0, 0)
    assert pages_are_free(batcher)
    batcher.close()
    assert error.measure(expected) <= 2e-5


@pytest.mark.parametrize("chunk", [512, 24])
def test_siblings_that_come_together_compute_their_prompt_once(chunk: int, built: Callable[[str], PreTrainedModel]):
    """They draw different tokens: only keys and values are shared."""
    model = built("mixtral")
    siblings = [Request(f"s{n}", COMMON, 8, sampling=Sampling(1.0, seed=n)) for n in range(3)]
    siblings += [Request("greedy", COMMON, 8), Request("hot", COMMON, 8, sampling=Sampling(2.0, top_k=50, seed=9))]
    expected = {request.id: drawn(model, request) for request in siblings}
    assert len({tuple(tokens) for tokens in expected.values()}) == 5
    batcher = PagedBatcher(model, kv_tokens=512, max_batch_tokens=chunk)
    assert finish(batcher, siblings).tokens == expected
    assert batcher.stats().reused_tokens == 4 * 3 * PAGE
    assert batcher.stats().prompt_tokens == 50 + 4 * 2
    batcher.close()


def test_new_tokens_are_a_beginning_for_the_next_turn(built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    first = Request("first", prompt_of(20), 30)
    batcher = PagedBatcher(model, kv_tokens=256)
    answer = finish(batcher, [first]).tokens["first"]
    second = Request("second", (*first.prompt, *answer, *prompt_of(5)), 4)
    assert finish(batcher, [second]).tokens["second"] == generated(model, second)
    assert batcher.stats().reused_tokens == 48, "49 of 50 tokens were computed: the last one wasn't needed"
    batcher.close()


def test_a_prompts_last_token_is_always_computed(built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    request = Request("a", prompt_of(48), 4)
    batcher = PagedBatcher(model, kv_tokens=256)
    for _ in range(2):
        assert finish(batcher, [request]).tokens["a"] == generated(model, request)
    assert batcher.stats().reused_tokens == 32
    batcher.close()


def test_each_model_has_pages_of_its_own(built: Callable[[str], PreTrainedModel]):
    """Two batchers share nothing, not even of the same prompt."""
    request = Request("a", COMMON, 4)
    for name in ("mixtral", "deepseek_v3"):
        batcher = PagedBatcher(built(name), kv_tokens=256)
        assert finish(batcher, [request]).tokens["a"] == generated(built(name), request)
        assert batcher.stats().reused_tokens == 0
        batcher.close()


def test_a_request_that_ends_by_an_error_shares_nothing():
    """Neither what it computed before its error, nor with a sibling that waits for it."""
    model = zoo.ZOO["mixtral"].build()
    sibling = Request("sibling", (*prompt_of(48), 30), 6)
    expected = generated(model, sibling)
    token = unused([sibling], {"sibling": expected})
    # The error comes in its third step.
    guilty = Request("guilty", (*prompt_of(48), *(t for t in prompt_of(40) if t != token), token), 6)
    batcher = PagedBatcher(model, kv_tokens=512, max_batch_tokens=32)
    guilt = Guilt(model, token, 0, math.nan)
    for requests in ([guilty], [guilty, sibling]):
        for request in requests:
            batcher.add(request)
        ends, tokens = {}, []
        while batcher.prepare():
            batcher.step()
            for output in batcher.outputs():
                ends[output.id] = output.reason
                tokens += output.tokens
            if "guilty" in ends and batcher.stats().running == 0:
                assert not batcher.processor.cache.cache_allocators["full_attention"].ledger.block_to_hash or len(ends) == 2
        assert ends["guilty"] == "error"
    guilt.remove()
    assert ends["sibling"] == "length"
    assert tokens == expected
    assert pages_are_free(batcher)
    batcher.close()


def test_a_sibling_of_a_cancelled_request_goes_on(built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    first, second = Request("first", prompt_of(100), 4), Request("second", (*prompt_of(100)[:90], 30), 4)
    batcher = PagedBatcher(model, kv_tokens=256, max_batch_tokens=24)
    batcher.add(first)
    batcher.add(second)
    collected = Collected(batcher).run(2)
    assert batcher.stats().running == 1, "the second waits for what the first computes"
    batcher.cancel("first")
    collected.run()
    assert collected.tokens["second"] == generated(model, second)
    assert batcher.stats().reused_tokens == 48, "what was computed until then"
    batcher.close()


def test_the_longest_unused_pages_are_evicted_first(built: Callable[[str], PreTrainedModel]):
    """A beginning that is used again and again stays, however many other prompts come by."""
    model = built("mixtral")
    batcher = PagedBatcher(model, kv_tokens=160)
    reused = 0
    for number, twin in enumerate(twins(6)):
        other = Request(f"other{number}", prompt_of(60, seed=100 + number), 4)
        assert finish(batcher, [twin]).tokens[twin.id] == generated(model, twin)
        assert batcher.stats().reused_tokens == reused
        assert finish(batcher, [other]).tokens[other.id] == generated(model, other)
        reused += 3 * PAGE
    assert batcher.stats().preempted == 0
    batcher.close()


def test_of_one_request_the_last_pages_are_evicted_first(built: Callable[[str], PreTrainedModel]):
    batcher = PagedBatcher(built("mixtral"), kv_tokens=96)
    finish(batcher, [Request("long", prompt_of(81), 1)])
    finish(batcher, [Request("other", prompt_of(33, seed=5), 1)])
    finish(batcher, [Request("again", prompt_of(81), 1)])
    assert batcher.stats().reused_tokens == 3 * PAGE, "two of its five pages were taken"
    batcher.close()


def test_pages_of_a_preempted_request_are_used_again(built: Callable[[str], PreTrainedModel]):
    """As far as no other request took them meanwhile: it goes on from there, with its random numbers, and loses nothing."""
    model = built("mixtral")
    requests = [Request(str(n), prompt_of(30, seed=n), 30, sampling=Sampling(1.0, seed=n)) for n in range(3)]
    expected = {request.id: drawn(model, request) for request in requests}
    batcher = PagedBatcher(model, kv_tokens=160)
    assert finish(batcher, requests).tokens == expected
    stats = batcher.stats()
    assert (stats.preempted, stats.reused_tokens) == (1, 32)
    assert stats.prompt_tokens == 3 * 30 + (30 + 19 - 32), "its prompt and 19 tokens, but for two pages"
    assert pages_are_free(batcher)
    batcher.close()


def test_switched_off_nothing_is_kept(built: Callable[[str], PreTrainedModel]):
    batcher = PagedBatcher(built("mixtral"), kv_tokens=256, prefix_cache=False)
    finish(batcher, [replace(request, max_new_tokens=2) for request in twins(3)])
    cache = batcher.processor.cache
    assert batcher.stats().reused_tokens == 0
    assert batcher.stats().prompt_tokens == 3 * 53
    assert cache.compute_free_capacity() == 1
    batcher.close()
