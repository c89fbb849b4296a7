"""Prompts that begin alike share what rows keep of their beginning, and get the tokens that they would get alone."""

from __future__ import annotations

import pytest
import torch

from epslots.generation.requests import Request
from epslots.generation.row_admission import LEAST_SHARED_TOKENS
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.tracked_request import TrackedRequest
from tests.support import zoo
from tests.support.batches import Collected, finish, generated, prompt_of

MODELS = {**zoo.ZOO, **zoo.STRESSED}
KINDS = {
    "deepseek_v3": "latents: any beginning",
    "glm_moe_dsa": "latents and indexers: any beginning",
    "qwen3_next": "recurrent states: the beginning that a chunk ends at",
    "mimo_v2_flash": "windows",
    "deepseek_v4": "compressed blocks of each row's own",
    "inkling": "states and windows, attention row by row",
}
COMMON = prompt_of(41)


@pytest.mark.parametrize("name", KINDS)
def test_shared_beginnings_change_no_token(name: str):
    model = MODELS[name].build()
    prompts = [(*COMMON, *prompt_of(tail, seed=tail)) for tail in (9, 14, 9, 1, 30)]
    requests = [Request(f"r{i}", prompt, 6) for i, prompt in enumerate([*prompts, prompts[0], prompt_of(20)])]
    batcher = RowBatcher(model, kv_tokens=512, max_requests=8, max_batch_tokens=16)
    computed = [0]
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, ids: computed.append(ids[0].numel() if ids[0].shape[1] > 1 else 0)
    )
    for request in requests:
        batcher.add(request)
    found = Collected(batcher).run()
    hook.remove()
    assert found.tokens == {request.id: generated(model, request) for request in requests}
    stats, prompt_tokens = batcher.stats(), sum(len(request.prompt) for request in requests)
    assert stats.reused_tokens >= 5 * len(COMMON), "all but the first share, with states, too"
    assert stats.prompt_tokens <= prompt_tokens - stats.reused_tokens
    assert sum(computed) <= prompt_tokens - stats.reused_tokens
    assert batcher.admission.make_room(512, 8), "nothing but rows of finished requests is left"
    batcher.cache.check()
    batcher.close()


@pytest.mark.parametrize("name", KINDS)
def test_a_row_that_went_on_lends_what_it_still_has(name: str):
    """Of tokens any beginning; states, windows and compressed blocks are those of its present length."""
    model = MODELS[name].build()
    first, late = Request("first", (*COMMON, 30), 12), Request("late", (*COMMON, 31, 32), 6)
    batcher = RowBatcher(model, kv_tokens=256, max_requests=4, max_batch_tokens=64)
    batcher.add(first)
    collected = Collected(batcher).run(4)
    batcher.add(late)
    assert collected.run().tokens == {request.id: generated(model, request) for request in (first, late)}
    assert batcher.stats().reused_tokens == (0 if batcher.cache.keeps_states else len(COMMON))
    assert batcher.cache.keeps_states == ("latents" not in KINDS[name])
    batcher.close()


def test_choices_of_one_prompt_compute_it_once():
    model = MODELS["qwen3_next"].build()
    prompt = prompt_of(50)
    batcher = RowBatcher(model, kv_tokens=512, max_requests=8, max_batch_tokens=64)
    for number in range(4):
        batcher.add(Request(f"r{number}", prompt, 5))
    found = Collected(batcher).run()
    assert batcher.stats().reused_tokens == 3 * 49, "but for its last token, whose logits each needs"
    assert set(map(tuple, found.tokens.values())) == {tuple(generated(model, Request("a", prompt, 5)))}
    batcher.close()


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_a_request_waits_for_no_beginning_of_a_later_turn(name: str):
    """It begins with what is there: else it would be served after all others of its priority."""
    model = MODELS[name].build()
    low, high = Request("low", (*COMMON, 30), 2, priority=1), Request("high", (*COMMON, 31), 2)
    others = [Request(f"other{i}", prompt_of(30, seed=i), 2) for i in range(3)]
    batcher = RowBatcher(model, kv_tokens=512, max_requests=8, max_batch_tokens=16)
    batcher.add(low)
    collected = Collected(batcher).run(2)
    for request in (high, *others):
        batcher.add(request)
    collected.run()
    assert list(collected.reasons) == ["high", "other0", "other1", "other2", "low"]
    assert batcher.stats().reused_tokens == 32
    assert collected.tokens == {request.id: generated(model, request) for request in (low, high, *others)}
    batcher.close()


def test_prefix_cache_switches_it_off():
    model = MODELS["qwen3_next"].build()
    batcher = RowBatcher(model, kv_tokens=512, max_batch_tokens=64, prefix_cache=False)
    for number in range(3):
        batcher.add(Request(f"r{number}", COMMON, 5))
    Collected(batcher).run()
    assert batcher.stats().reused_tokens == 0
    batcher.close()


def test_a_prompt_with_logprobs_is_computed_whole():
    model = MODELS["deepseek_v3"].build()
    batcher = RowBatcher(model, kv_tokens=512, max_requests=4, max_batch_tokens=64)
    batcher.add(Request("first", COMMON, 30))
    batcher.add(Request("second", COMMON, 3, prompt_logprobs=2))
    outputs = []
    while batcher.prepare():
        batcher.step()
        outputs += batcher.outputs()
    found = [row for output in outputs for row in output.prompt_logprobs]
    with torch.no_grad():
        expected = model(torch.tensor([COMMON])).logits[0].float().log_softmax(-1)
    assert [row.token for row in found] == list(COMMON[1:])
    for position, row in enumerate(found):
        assert row.logprob == pytest.approx(float(expected[position, row.token]), abs=1e-4)
    assert batcher.stats().reused_tokens == 0
    batcher.close()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "mimo_v2_flash"])
def test_a_conversation_goes_on_from_its_own_row(name: str, rows: int):
    """Each turn's prompt is the whole conversation before it, and more; it continues in its place if there is no other row."""
    model = MODELS[name].build()
    batcher = RowBatcher(model, kv_tokens=256, max_requests=rows, max_batch_tokens=32)
    conversation, before, reused = COMMON, (), 0
    for turn in range(4):
        request = Request(f"turn {turn}", conversation, 6)
        batcher.add(request)
        tokens = Collected(batcher).run().tokens[request.id]
        assert tokens == generated(model, request)
        # The last token of a text was never computed with.
        assert batcher.stats().reused_tokens - reused == max(0, len(before) - 1)
        reused = batcher.stats().reused_tokens
        before = (*conversation, *tokens)
        conversation = (*before, *prompt_of(7, seed=turn))
    batcher.close()


def test_kept_rows_are_evicted_for_requests():
    model = MODELS["deepseek_v3"].build()
    requests = [Request(f"r{i}", prompt_of(length, seed=i), 9) for i, length in enumerate((40, 30, 50, 20, 55, 48, 3))]
    batcher = RowBatcher(model, kv_tokens=64, max_requests=2, max_batch_tokens=32)
    for request in requests:
        batcher.add(request)
    assert Collected(batcher).run().tokens == {request.id: generated(model, request) for request in requests}
    assert batcher.admission.kept, "the last ones are still there"
    batcher.close()


def test_a_kept_row_is_cut_where_tokens_are_short():
    """The end of "first" is evicted for "second", while "beside" holds the other row; its beginning is shared."""
    model = MODELS["deepseek_v3"].build()
    requests = [Request("first", (*COMMON, *prompt_of(20, seed=1)), 2), Request("beside", prompt_of(6), 30)]
    requests.append(Request("second", (*COMMON, *prompt_of(30, seed=2)), 5))
    batcher = RowBatcher(model, kv_tokens=112, max_requests=2, max_batch_tokens=64)
    found = finish(batcher, requests[:1]).tokens
    batcher.add(requests[1])
    collected = Collected(batcher).run(3)
    batcher.add(requests[2])
    collected.run(1)
    assert len(batcher.admission.running) == 2
    assert not batcher.admission.kept
    batcher.cache.check()
    found |= collected.run().tokens
    assert batcher.stats().reused_tokens == len(COMMON)
    assert found == {request.id: generated(model, request) for request in requests}
    batcher.cache.check()
    batcher.close()


def test_the_longest_unused_row_gives_way_first():
    batcher = RowBatcher(MODELS["deepseek_v3"].build(), kv_tokens=256, max_requests=4, max_batch_tokens=64)
    prompts = {"a": COMMON, "b": prompt_of(20, seed=1), "like a": (*COMMON, 30), "d": prompt_of(5), "e": prompt_of(6)}
    for id, prompt in prompts.items():
        finish(batcher, [Request(id, prompt, 2)])
    assert batcher.stats().reused_tokens == len(COMMON)
    assert [running.entry.request.id for running in batcher.admission.kept] == ["a", "like a", "d", "e"], "there are four rows"
    batcher.close()


def test_a_prompt_given_up_halfway_is_computed_again():
    """Its own row is no beginning to wait for: nothing goes on there."""
    model = MODELS["deepseek_v3"].build()
    requests = [Request("old", prompt_of(20, seed=1), 8), Request("new", prompt_of(39, seed=2), 8)]
    batcher = RowBatcher(model, kv_tokens=64, max_requests=2, max_batch_tokens=8)
    collected = Collected(batcher)
    batcher.add(requests[0])
    while not collected.tokens:
        collected.run(1)
    batcher.add(requests[1])
    collected.run()
    assert batcher.stats().preempted > 0, "the cache was really too small"
    assert collected.tokens == {request.id: generated(model, request) for request in requests}
    batcher.close()


def test_a_request_that_waits_costs_no_list_of_a_prompt(monkeypatch: pytest.MonkeyPatch):
    """Its prompt is held against those of all rows in every step."""
    batcher = RowBatcher(MODELS["deepseek_v3"].build(), kv_tokens=170, max_requests=8, max_batch_tokens=64)
    for number in range(5):
        batcher.add(Request(f"r{number}", (*COMMON, *prompt_of(30, seed=number)), 40))
    collected = Collected(batcher).run(8)
    assert batcher.stats().waiting > 0
    ids, taken = TrackedRequest.ids, list[int]()
    monkeypatch.setattr(TrackedRequest, "ids", lambda self, start, end: taken.append(end - start) or ids(self, start, end))
    collected.run(3)
    assert max(taken) == LEAST_SHARED_TOKENS
    batcher.close()


def test_a_row_that_failed_is_no_beginning_of_others():
    """The cause of its NaNs is gone; the numbers that it left in the row are not."""
    model = MODELS["deepseek_v3"].build()
    batcher = RowBatcher(model, kv_tokens=256, max_requests=2, max_batch_tokens=64)
    handle = model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output.fill_(torch.nan))
    batcher.add(Request("failed", COMMON, 6))
    assert batcher.prepare()
    batcher.step()
    handle.remove()
    (output,) = batcher.outputs()
    assert (output.reason, output.tokens) == ("error", ())
    request = Request("next", (*COMMON, *prompt_of(9)), 6)
    assert finish(batcher, [request]).tokens == {"next": generated(model, request)}
    assert batcher.stats().reused_tokens == 0
    batcher.close()
