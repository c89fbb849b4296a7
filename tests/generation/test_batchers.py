"""Requests advanced step by step give generate's tokens, with any cache, batch and failure."""

from __future__ import annotations

import inspect
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, ContinuousBatchProcessor
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens

import epslots
from epslots.errors import ConfigError, DoesNotFitError, PeerLost, UnsupportedModelError
from epslots.generation.batchers import batcher_for
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.requests import Output, Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import GREEDY, Sampling
from epslots.models.page_sizes import cache_blocks
from tests.support import zoo
from tests.support.batches import (
    Collected,
    Faults,
    drawn,
    expected_of,
    finish,
    generated,
    is_empty,
    pages_are_free,
    prompt_of,
    requests_of,
)
from tests.support.equality import LAYOUTS
from tests.support.remembered import Reference

# Plain keys and values; the others keep recurrent states, latents, indexers or compressed blocks, or attend in chunks.
PAGED = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "gemma4", "gemma4_multimodal", "olmoe", "olmoe_tied"}
PAGED |= {"olmoe_unaligned", "glm4_moe", "phimoe", "granitemoe", "ernie4_5_moe", "minimax_m2", "hunyuan_v1_moe", "muse_spark"}
PAGED |= {"step3p7", "ernie4_5_vl_moe", "llama", "dbrx", "deepseek_v2", "deepseek_v3", "kimi", "longcat_flash"}
# Their attention is that of a model which stays.
TWINS = {"olmoe_tied", "olmoe_unaligned", "gemma4_multimodal", "kimi"}
BATCHERS = [PagedBatcher, RowBatcher]
# One longer than any step, one of a single token; requests of one new token and of several.
LENGTHS_AND_NEW = ((3, 6), (100, 4), (17, 3), (64, 1), (33, 3), (1, 5))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No environment, and no warning in transformers' log."""
    warnings: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logger, keep = logging.getLogger("ContinuousBatchingLogger"), Keep(logging.WARNING)
    logger.addHandler(keep)
    environment = dict(os.environ)
    yield
    logger.removeHandler(keep)
    environment["PYTEST_CURRENT_TEST"] = os.environ["PYTEST_CURRENT_TEST"]
    assert dict(os.environ) == environment
    assert not warnings


# --- the same tokens ---------------------------------------------------------------------------------------------------------


# Rows of every model are in test_rows.py, every loaded model in tests/equality: both together are tried for each way to store
# experts, and for the caches of most own code.
LOADED = (
    zoo.ZOO if os.environ.get("EPSLOTS_WHOLE_ZOO") else [*LAYOUTS, "deepseek_v3", "deepseek_v4", "qwen3_next", "jamba", "doge"]
)
IN_PAGES = sorted(PAGED if os.environ.get("EPSLOTS_WHOLE_ZOO") else PAGED - TWINS)


@pytest.mark.parametrize(("name", "cache"), [(name, "auto") for name in LOADED] + [(name, "pages") for name in IN_PAGES])
def test_every_architecture_equals_generate(name: str, cache: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    tiny, folder = zoo.ZOO[name], checkpoint(name)
    if tiny.served and tiny.num_experts:
        model = epslots.load(folder, slots="50%", device="cpu", dtype="float32", progress=False, cache_dir=cache_dir)
    else:
        model = zoo.reference(folder)
    requests = requests_of(LENGTHS_AND_NEW)
    reference = Reference(folder)
    expected = {request.id: generated(reference, request) for request in requests}

    random_state = torch.get_rng_state()
    batcher = batcher_for(model, kv_tokens=512, max_batch_tokens=64, cache=cache)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(batcher, PagedBatcher if cache == "pages" else RowBatcher)

    calls: Counter[str] = Counter()
    experts = zoo.experts_modules(model)
    handles = [m.register_forward_pre_hook(lambda *_, n=n: calls.update([n])) for n, m in experts.items()]

    def step() -> None:
        calls.clear()
        batcher.step()
        assert set(calls.values()) <= {1}, "one forward pass"
        assert len(calls) == len(experts) - tiny.idle_layers

    for request in requests:
        batcher.add(request)
    collected = Collected(batcher).run(step=step)
    assert collected.tokens == expected
    assert set(collected.reasons.values()) == {"length"}
    for handle in handles:
        handle.remove()

    batcher.close()
    if cache == "auto":
        assert generated(model, requests[2]) == expected["r2"], "the model is as it was"
        return  # rows with failures: test_rows.py

    # Again, in a new cache, with failures in every step.
    batcher = batcher_for(model, kv_tokens=512, max_batch_tokens=64, cache=cache)
    faults = Faults(model)
    retried = Collected(batcher)

    def step_in_spite_of_faults() -> None:
        for _ in range(2):
            with pytest.raises(PeerLost, match="a peer was lost"):
                batcher.step()
            assert not batcher.outputs()
            assert batcher.prepare()
        batcher.step()

    few = [replace(request, max_new_tokens=3) for request in requests[:3]]  # each step is three
    for request in few:
        batcher.add(request)
    retried.run(step=step_in_spite_of_faults)
    faults.remove()
    assert retried.tokens == {request.id: expected[request.id][:3] for request in few}
    assert faults.raised == 2 * retried.steps
    batcher.close()
    assert generated(model, few[0]) == expected["r0"][:3], "the model is as it was"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4"])
def test_an_oversubscribed_cache_loses_nothing(name: str):
    model = zoo.ZOO[name].build()
    sizes = ((20, 12), (3, 40), (9, 40), (17, 30), (40, 6), (5, 38), (25, 20), (3, 12))
    requests = requests_of(sizes, seed=3)
    expected = expected_of(model, requests)
    batcher = PagedBatcher(model, kv_tokens=96, max_batch_tokens=32)
    memory = batcher.processor.cache.cache_tensor.data_ptr()
    assert finish(batcher, requests).tokens == expected
    # Where windows share the cache, its last pages are never given away before they are needed.
    assert batcher.stats().preempted > 0 or name in ("gpt_oss", "gemma4"), "the cache was really too small"
    assert pages_are_free(batcher)
    assert batcher.processor.cache.cache_tensor.data_ptr() == memory, "allocated once"
    batcher.close()


def test_scattered_pages_are_put_in_order():
    """Two layers attend to all, one to a window: a sector holds one page of the first kind, or two of the other.

    "a" and "b" grow together and share the sectors of the windows' pages. When "b" is done, "a" keeps one page in each, so
    that one sector less is left than it needs in the end, and than it would have found in an empty cache.
    """
    tiny = zoo.ZOO["gpt_oss"]
    layers = ["full_attention", "full_attention", "sliding_attention"]
    model = replace(tiny, settings={**tiny.settings, "layer_types": layers, "sliding_window": 32}).build()
    batcher = PagedBatcher(model, kv_tokens=48)
    assert batcher.capacity == 80
    sizes = {"a": (3, 78), "b": (4, 29), "c": (5, 4), "d": (6, 3), "e": (7, 2)}
    requests = {id: Request(id, prompt_of(length), new) for id, (length, new) in sizes.items()}
    scattered, begin_again = [], batcher._start_over

    def seen() -> None:
        scattered.append(batcher.processor.cache.pool.num_free_sectors)
        begin_again()
        batcher.add(requests["e"])
        batcher.cancel("c")

    batcher._start_over = seen  # type: ignore[method-assign]
    batcher.add(requests["a"])
    batcher.add(requests["b"])
    collected = Collected(batcher).run(50)
    assert collected.reasons == {"b": "length"}
    batcher.add(requests["c"])
    batcher.add(requests["d"])
    collected.run()
    assert scattered == [0]
    assert pages_are_free(batcher)
    batcher.close()
    assert list(collected.reasons) == ["b", "c", "a", "e", "d"]
    assert collected.reasons.pop("c") == "cancelled"
    for id in collected.reasons:
        assert collected.tokens[id] == generated(model, requests[id])


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_many_requests_through_a_small_cache(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    batcher = batcher_class(model, kv_tokens=48)
    rng = random.Random(5)
    common = prompt_of(16)
    # Some begin alike, so that pages are shared.
    requests = [
        Request(f"{i}", common[: 16 * rng.randint(0, 1)] + prompt_of(rng.randint(1, 8)), rng.randint(1, 8)) for i in range(24)
    ]
    expected = expected_of(model, requests)
    assert finish(batcher, requests).tokens == expected
    assert is_empty(batcher)
    assert not batcher.has_work
    assert not batcher._entries


# --- ends --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_stop_tokens_end_a_request_and_are_its_last(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    plain = Request("plain", prompt_of(9), 8)
    tokens = generated(model, plain)
    stop = tokens[3]
    at = tokens.index(stop)
    requests = [
        replace(plain, id="early", stop_tokens=frozenset({stop, 319})),
        replace(plain, id="last", stop_tokens=frozenset({tokens[at]}), max_new_tokens=at + 1),
        replace(plain, id="never", stop_tokens=frozenset(set(range(zoo.VOCAB)) - set(tokens))),
        plain,
    ]
    collected = finish(batcher_class(model, kv_tokens=128), requests)
    assert collected.tokens["early"] == collected.tokens["last"] == tokens[: at + 1]
    assert collected.tokens["early"] == generated(model, requests[0])
    assert collected.tokens["never"] == collected.tokens["plain"] == tokens
    assert collected.reasons == {"early": "stop", "last": "stop", "never": "length", "plain": "length"}


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_the_cache_can_be_filled_to_its_last_token(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    batcher = batcher_class(model, kv_tokens=32)
    assert batcher.capacity == 32
    requests = [Request("a", prompt_of(20), 13), Request("b", prompt_of(32), 1), Request("c", prompt_of(1), 32)]
    collected = finish(batcher, requests)
    assert {k: len(v) for k, v in collected.tokens.items()} == {"a": 13, "b": 1, "c": 32}
    assert all(collected.tokens[request.id] == generated(model, request) for request in requests)


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_cancelling(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    batcher = batcher_class(model, kv_tokens=128)
    requests = requests_of(((5, 9), (7, 9), (9, 9), (4, 6)))
    expected = expected_of(model, requests)
    batcher.add(Request("first", prompt_of(5), 9))
    for _ in range(2):
        batcher.prepare()
        batcher.step()
    batcher.cancel("first")
    (output,) = batcher.outputs()
    assert (output.id, len(output.tokens), output.reason) == ("first", 2, "cancelled")
    assert isinstance(batcher, PagedBatcher) or is_empty(batcher)
    for request in requests[:3]:
        batcher.add(request)
    collected = Collected(batcher).run(3)
    batcher.cancel("r2")
    batcher.cancel("unknown")
    assert [output.id for output in collected.take()] == ["r2"]
    # Between a step's preparation and its run: the step is run, and what it says of the request doesn't count.
    assert batcher.prepare()
    batcher.cancel("r0")
    batcher.cancel("r0")
    with pytest.raises(ConfigError, match=r"'r0'.*taken"):
        batcher.add(requests[0])
    batcher.step()
    collected.take()
    assert collected.reasons == {"r2": "cancelled", "r0": "cancelled"}
    for id in ("r0", "r2"):
        assert collected.tokens[id] == expected[id][: len(collected.tokens[id])]
    assert [request.id for request, _ in batcher.unfinished()] == ["r1"]
    # An id is free again once its end was handed out.
    batcher.add(requests[3])
    batcher.add(requests[0])
    again = Collected(batcher).run()
    assert again.tokens["r0"] == expected["r0"]
    assert collected.tokens.get("r1", []) + again.tokens["r1"] == expected["r1"]
    assert again.tokens["r3"] == expected["r3"]
    assert not batcher.prepare()
    assert is_empty(batcher)


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_cancelling_all_of_a_prepared_step(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    """Peers have been told of the step: it is run all the same."""
    batcher = batcher_class(built("mixtral"), kv_tokens=128)
    batcher.add(Request("a", prompt_of(5), 9))
    for _ in range(2):
        batcher.prepare()
        batcher.step()
    assert batcher.prepare()
    batcher.cancel("a")
    assert not batcher.has_work
    assert batcher.prepare()
    batcher.step()
    (output,) = batcher.outputs()
    assert (len(output.tokens), output.reason) == (2, "cancelled")
    assert not batcher.prepare()
    assert not batcher.unfinished()
    assert is_empty(batcher)


def test_cancelling_after_a_preemption_lets_the_next_ones_in(built: Callable[[str], PreTrainedModel]):
    """After it gave up pages, the scheduler admits nothing until a request finishes. If that is cancelled, it never would."""
    model = built("mixtral")
    batcher = PagedBatcher(model, kv_tokens=64)
    batcher.add(Request("long", prompt_of(3), 46))
    batcher.add(Request("late", prompt_of(4), 45))
    collected = Collected(batcher)
    while not batcher.processor.scheduler.block_new_requests:
        assert batcher.has_work
        collected.run(1)
    batcher.cancel("long")
    batcher.add(Request("last", prompt_of(5), 3))
    collected.run(1)
    assert len(batcher.processor.scheduler.active_requests) == 2, "both at once"
    collected.run()
    assert collected.reasons == {"long": "cancelled", "late": "length", "last": "length"}
    assert collected.tokens["late"] == generated(model, Request("late", prompt_of(4), 45))


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_going_on_in_another_batcher(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    requests = requests_of(((5, 9), (7, 2), (9, 6)))
    expected = expected_of(model, requests)
    first, second = (batcher_class(model, kv_tokens=128) for _ in range(2))
    for request in requests:
        first.add(request)
    collected = Collected(first).run(3)
    first.prepare()
    first.step()  # What it brought was not handed out: it is lost with the batcher.
    unfinished = first.unfinished()
    first.close()
    assert first.unfinished() == unfinished
    assert {request.id for request, _ in unfinished} == expected.keys() - collected.reasons.keys()
    for request, tokens in unfinished:
        assert list(tokens) == collected.tokens.get(request.id, [])
        second.add(request.after(tokens))
    rest = Collected(second).run()
    for id, tokens in expected.items():
        assert collected.tokens.get(id, []) + rest.tokens.get(id, []) == tokens


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_a_step_is_prepared_once(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    batcher = batcher_class(built("mixtral"), kv_tokens=128)
    assert not batcher.has_work
    assert not batcher.prepare()
    with pytest.raises(AssertionError, match="prepare"):
        batcher.step()
    batcher.add(Request("a", prompt_of(5), 2))
    assert batcher.has_work
    assert batcher.prepare()
    batcher.add(Request("b", prompt_of(6), 1))
    assert batcher.prepare()
    batcher.step()
    assert [(output.id, len(output.tokens)) for output in batcher.outputs()] == [("a", 1)]
    assert not batcher.outputs(), "handed out once"
    with pytest.raises(AssertionError, match="prepare"):
        batcher.step()


def test_what_fails_within_transformers_is_an_output(built: Callable[[str], PreTrainedModel]):
    batcher = PagedBatcher(built("mixtral"), kv_tokens=128)
    requests = requests_of(((5, 4), (6, 4)))
    for request in requests:
        batcher.add(request)
    for _ in range(2):
        batcher.prepare()
        batcher.step()
    batcher.outputs()
    broken = batcher.processor.scheduler.active_requests["0"]
    batcher.processor._handle_request_error(ValueError("no such thing"), broken)
    batcher.processor.scheduler.finish_request("0")
    batcher.prepare()
    batcher.step()
    first, second = batcher.outputs()
    assert first == Output("r0", (), True, "error", "no such thing")
    assert (second.id, second.reason) == ("r1", None)
    assert [request.id for request, _ in batcher.unfinished()] == ["r1"]
    assert batcher.prepare()


# --- drawn tokens ------------------------------------------------------------------------------------------------------------

SAMPLINGS = (
    Sampling(1.0, seed=1),
    GREEDY,
    Sampling(0.7, top_k=20, seed=2),
    Sampling(1.5, top_p=0.8, seed=2**63 - 1),
    Sampling(1.0, top_k=50, top_p=0.9),
    Sampling(0.3, seed=7),
)


def sampled(requests: list[Request]) -> list[Request]:
    return [replace(request, sampling=SAMPLINGS[i % len(SAMPLINGS)]) for i, request in enumerate(requests)]


@pytest.mark.parametrize(
    ("name", "batcher_class"),
    [("mixtral", PagedBatcher), ("gpt_oss", PagedBatcher), ("mixtral", RowBatcher), ("qwen3_next", RowBatcher)],
)
def test_drawn_tokens_are_the_same_alone_and_together(name: str, batcher_class: type):
    """And with prompts that begin alike or take several steps, and when every step is repeated twice."""
    model = zoo.ZOO[name].build()
    common = prompt_of(32)
    twins = [replace(r, id=f"{r.id}+", prompt=common + r.prompt[:5]) for r in requests_of(((9, 7), (9, 8), (9, 5)))]
    requests = sampled([*requests_of(((3, 12), (100, 4), (17, 5), (64, 1), (33, 3), (1, 10))), *twins])
    expected = expected_of(model, requests, drawn)
    assert sum(expected[request.id] != generated(model, request) for request in requests) == 7, "but for the greedy ones"
    batcher = batcher_class(model, kv_tokens=512, max_batch_tokens=64)
    assert finish(batcher, requests).tokens == expected
    assert finish(batcher, requests[::-1]).tokens == expected
    assert finish(batcher, [requests[2]]).tokens == {"r2": expected["r2"]}
    faults, again = Faults(model), Collected(batcher)

    def step_in_spite_of_faults() -> None:
        for _ in range(2):
            with pytest.raises(PeerLost):
                batcher.step()
        batcher.step()

    for request in requests:
        batcher.add(request)
    assert again.run(step=step_in_spite_of_faults).tokens == expected
    faults.remove()
    batcher.close()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_drawn_tokens_survive_lost_pages(name: str):
    model = zoo.ZOO[name].build()
    sizes = ((20, 8), (3, 28), (9, 28), (17, 20), (40, 4), (5, 26))
    requests = sampled(requests_of(sizes, seed=3))
    expected = expected_of(model, requests, drawn)
    batcher = PagedBatcher(model, kv_tokens=96, max_batch_tokens=32)
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher)
    collected.run(20)
    batcher._start_over()
    assert batcher.stats().preempted
    assert collected.run(1).batcher.stats().running == 1, "the oldest alone"
    assert collected.run().tokens == expected
    batcher.close()


@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_cancelling_moves_no_drawn_token_to_another_request(batcher_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    requests = sampled(requests_of(((5, 9), (7, 9), (9, 9))))
    requests[1] = replace(requests[1], sampling=Sampling(1.0, seed=5))
    batcher = batcher_class(model, kv_tokens=128)
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher).run(3)
    assert batcher.prepare()
    batcher.cancel("r0")
    collected.run()
    for request in requests:
        assert collected.tokens[request.id] == drawn(model, request)[: len(collected.tokens[request.id])]
    assert collected.reasons == {"r0": "cancelled", "r1": "length", "r2": "length"}


@pytest.mark.parametrize("first_class", BATCHERS)
@pytest.mark.parametrize("second_class", BATCHERS)
def test_another_batcher_draws_on(first_class: type, second_class: type, built: Callable[[str], PreTrainedModel]):
    model = built("mixtral")
    requests = sampled(requests_of(((5, 9), (7, 12), (9, 10))))
    first, second = first_class(model, kv_tokens=128), second_class(model, kv_tokens=128)
    for request in requests:
        first.add(request)
    collected = Collected(first).run(6)
    first.prepare()
    first.step()
    moved = [request.after(tokens) for request, tokens in first.unfinished()]
    assert [request.sampling for request in moved] == [request.sampling for request in requests[-len(moved) :]]
    first.close()
    rest = finish(second, moved)
    for request in requests:
        assert collected.tokens.get(request.id, []) + rest.tokens.get(request.id, []) == drawn(model, request)


def test_a_sampling_is_one():
    with pytest.raises(ConfigError, match=r"'a': sampling=0.7; allowed: a Sampling"):
        Request("a", (1,), 1, sampling=0.7)  # type: ignore[arg-type]


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", (), 1), r"'a' has an empty prompt"),
        (Request("a", (20, 320), 1), r"the prompt has token 320; allowed: 0 to 319"),
        (Request("a", (-1,), 1), r"the prompt has token -1; allowed: 0 to 319"),
        (Request("a", (20,), 0), r"max_new_tokens=0; at least 1"),
        (Request("a", (20,) * 40, 10), r"49 tokens of KV cache \(40 of prompt, 10 new.*holds 48"),
        (Request("b", (20,), 1), r"'b': this id is taken"),
    ],
)
@pytest.mark.parametrize("batcher_class", BATCHERS)
def test_bad_requests(batcher_class: type, request_: Request, message: str, built: Callable[[str], PreTrainedModel]):
    batcher = batcher_class(built("mixtral"), kv_tokens=48)
    batcher.add(Request("b", (20,), 1))
    with pytest.raises(ConfigError, match=message):
        batcher.add(request_)
    assert [request.id for request, _ in batcher.unfinished()] == ["b"]


def test_bad_sizes(built: Callable[[str], PreTrainedModel]):
    for sizes in ({"kv_tokens": 0}, {"kv_tokens": 9, "max_batch_tokens": 0}, {"max_requests": 0}):
        with pytest.raises(ConfigError, match=r"=0[:;] .*at least 1"):
            batcher_for(built("mixtral"), **sizes)
    with pytest.raises(ConfigError, match="kv_tokens=0"):
        RowBatcher(built("qwen3_next"), kv_tokens=0)
    with pytest.raises(DoesNotFitError, match=r"a cache of 100,000,000,000,000 tokens and 16 requests"):
        RowBatcher(built("qwen3_next"), kv_tokens=10**14)
    model = zoo.ZOO["gpt_oss"].build()
    with pytest.raises(DoesNotFitError, match="KV cache of 1000000000000 tokens"):
        batcher_for(model, kv_tokens=10**12, cache="pages")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnsupportedModelError, match=r"Qwen3Next.*recurrent state; allowed: cache='rows' or 'auto'"):
        PagedBatcher(built("qwen3_next"), kv_tokens=64)


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture, built: Callable[[str], PreTrainedModel]):
    with caplog.at_level(logging.INFO, "epslots.generation.batchers"):
        batcher_for(built("mixtral"), kv_tokens=64)
        batcher_for(built("qwen3_next"), kv_tokens=64)
    first, second = [r.getMessage() for r in caplog.records if r.name == "epslots.generation.batchers"]
    assert first == "MixtralForCausalLM: requests are kept in rows, because without flash attention pages aren't read faster"
    assert second == "Qwen3NextForCausalLM: requests are kept in rows, because some of its layers keep a recurrent state"


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("llama4", "keeps no pages for its layers .*chunked_attention"),
        ("jetmoe", "repeats keys and values"),
        ("doge", "choose experts for one another"),
        ("zaya", "recurrent state"),
    ],
)
def test_obstacles_of_models(name: str, obstacle: str, built: Callable[[str], PreTrainedModel]):
    with pytest.raises(UnsupportedModelError, match=obstacle):
        PagedBatcher(built(name), kv_tokens=64)


def test_layers_that_share_keys_are_kept_in_rows():
    tiny = zoo.ZOO["gemma4"]
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 1}
    # transformers' gemma4 shares keys only where layers have inputs of their own.
    model = replace(tiny, settings={**tiny.settings, **layers, "hidden_size_per_layer_input": 8}).build()
    assert "DummyLayer" in (paging_obstacle(model) or "")
    batcher = batcher_for(model, kv_tokens=96)
    assert isinstance(batcher, RowBatcher)
    requests = requests_of(((20, 4), (33, 6), (3, 9)))
    assert finish(batcher, requests).tokens == {request.id: generated(model, request) for request in requests}


def test_obstacles_of_settings():
    model = zoo.ZOO["mixtral"].build()
    model.config.attn_logit_softcapping = 30.0
    assert "soft cap" in (paging_obstacle(model) or "")
    model.config.attn_logit_softcapping = None
    model.config.is_encoder_decoder = True
    assert "encoder" in (paging_obstacle(model) or "")
    model.config.is_encoder_decoder = False
    model.config._attn_implementation_internal = "flex_attention"
    assert "'flex_attention'" in (paging_obstacle(model) or "")
    model.config._attn_implementation_internal = "eager"
    assert paging_obstacle(model) is None
    model._supports_sdpa = False
    assert "eager attention may do" in (paging_obstacle(model) or "")
    model._supports_attention_backend = False
    assert "attention interface" in (paging_obstacle(model) or "")


def test_a_model_with_eager_attention_is_paged(built: Callable[[str], PreTrainedModel]):
    model = zoo.ZOO["mixtral"].build()
    model.set_attn_implementation("eager")
    requests = requests_of(((5, 4), (20, 3)))
    expected = expected_of(model, requests)
    batcher = batcher_for(model, kv_tokens=64, cache="pages")
    assert isinstance(batcher, PagedBatcher)
    assert finish(batcher, requests).tokens == expected
    batcher.close()
    assert model.config._attn_implementation == "eager"


# --- sizes -------------------------------------------------------------------------------------------------------------------


def test_blocks_of_a_cache():
    full, mixed = (3,), (5, 1)
    assert cache_blocks(64, 16, full) == 4
    assert cache_blocks(65, 16, full) == 5
    assert cache_blocks(64, 16, mixed) == 5, "six layers' pages and a sector of five more"
    assert cache_blocks(1, 16, (3, 2)) == 1 + 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma4", "step3p7", "deepseek_v3"])
def test_a_request_of_kv_tokens_fits(name: str, built: Callable[[str], PreTrainedModel]):
    for kv_tokens in (1, 17, 512):
        batcher = PagedBatcher(built(name), kv_tokens=kv_tokens)
        assert batcher.capacity >= kv_tokens
        batcher.close()


# --- transformers' internals, one test for each that is used -----------------------------------------------------------------


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_contract_a_manager_makes_a_processor_stepped_by_hand(built: Callable[[str], PreTrainedModel]):
    assert parameters(ContinuousBatchingManager._create_batch_processor) == ["self"]
    assert parameters(ContinuousBatchProcessor._generation_step) == ["self", "model"]
    batcher = PagedBatcher(built("mixtral"), kv_tokens=64)
    manager, processor = batcher._manager, batcher.processor
    assert manager.model is built("mixtral")
    assert isinstance(processor, ContinuousBatchProcessor)
    assert processor.inputs_and_outputs.compute_stream is None, "on the CPU"
    assert processor.cb_config.use_async_batching is False
    assert processor.cb_config.use_cuda_graph == (False, False)
    assert processor.cb_config.auto_switch_to_flash is False
    assert processor.cb_config.disable_nccl_graph_mixing is False
    assert processor.prepare_next_batch() is False
    manager.add_request([20, 21], request_id="7", max_new_tokens=2, eos_token_id=[], streaming=True)
    assert processor.prepare_next_batch() is True
    (entry,) = processor.inputs_and_outputs.requests_in_batch
    assert (entry.state.request_id, entry.query_length, entry.state.position_offset) == ("7", 2, 2)
    batcher._choice.prepare([entry], [None])
    processor._generation_step(manager.model)
    assert manager.output_router.output_queue.empty()
    processor.update_batch()
    result = manager.output_router.output_queue.get()
    assert (result.request_id, len(result.generated_tokens), result.error) == ("7", 1, None)
    assert not result.is_finished()
    manager.cancel_request("7")
    processor.prepare_next_batch()
    assert pages_are_free(batcher)


def test_contract_a_preempted_request_keeps_tokens_blocks_others(built: Callable[[str], PreTrainedModel]):
    batcher = PagedBatcher(built("mixtral"), kv_tokens=64)
    scheduler = batcher.processor.scheduler
    for id in ("a", "b"):
        batcher.add(Request(id, prompt_of(3, seed=ord(id)), 46))
    while not scheduler.block_new_requests:
        assert batcher.prepare()
        batcher.step()
    (waiting,) = scheduler.waiting_requests.values()
    assert waiting.initial_tokens[:3] == list(prompt_of(3, seed=ord("b")))
    assert len(waiting.initial_tokens) == 3 + (46 - waiting.max_new_tokens)
    batcher.processor.reset()
    assert not scheduler.has_pending_requests()
    assert scheduler.block_new_requests is False
    assert pages_are_free(batcher)


def test_contract_the_message_when_nothing_fits():
    assert "no requests can be offloaded" in inspect.getsource(ContinuousBatchProcessor.prepare_next_batch)


def test_contract_tokens_are_chosen_by_a_replaceable_method(built: Callable[[str], PreTrainedModel]):
    """Row i of the scores is that of the i-th request of the batch that gets a token: where sampling by request plugs in."""
    assert parameters(ModelRunner._sample) == ["self", "scores", "output_ids"]
    batcher = PagedBatcher(built("mixtral"), kv_tokens=256, max_batch_tokens=32)
    own, seen = batcher.processor.model_runner._sample, list[tuple[torch.dtype, bool]]()

    def choose(scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        batch = batcher.processor.inputs_and_outputs.requests_in_batch
        seen.append((scores.dtype, scores.shape[1] >= sum(entry.has_new_token for entry in batch)))
        own(scores, output_ids)

    batcher.processor.model_runner._sample = choose
    requests = requests_of(((5, 3), (60, 2), (4, 3)))
    assert finish(batcher, requests).tokens == {r.id: generated(built("mixtral"), r) for r in requests}
    assert set(seen) == {(torch.float32, True)}


def test_contract_attention_gives_keys_and_values_to_the_cache(built: Callable[[str], PreTrainedModel]):
    assert parameters(PagedAttentionCache.update) == ["self", "key_states", "value_states", "layer_idx", "kwargs"]
    batcher = PagedBatcher(built("deepseek_v3"), kv_tokens=64)
    cache = batcher.processor.cache
    assert isinstance(cache, PagedAttentionCache)
    assert {allocator.head_dim for allocator in cache.layer_to_allocator.values()} == {4 * 24}
    assert cache.cache_allocators["full_attention"].num_key_value_heads == 1
    assert built("deepseek_v3").config.head_dim == 8, "the model's own configuration is not touched"
    update, shapes = cache.update, []

    def seen(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(**given)
        shapes.append((given["key_states"].shape, given["value_states"].shape, keys.shape, values.shape))
        return keys, values

    cache.update = seen
    finish(batcher, [Request("a", prompt_of(5), 2)])
    assert shapes[0] == ((1, 4, 5, 24), (1, 4, 5, 16)) * 2
    assert shapes[-1] == ((1, 4, 1, 24), (1, 4, 1, 16), (1, 4, 6, 24), (1, 4, 6, 16))


def test_contract_windows_are_rings_of_blocks(built: Callable[[str], PreTrainedModel]):
    model = zoo.ZOO["gpt_oss"].build()
    batcher = PagedBatcher(model, kv_tokens=64, max_batch_tokens=8)
    cache = batcher.processor.cache
    window = cache.cache_allocators["sliding_attention"]
    assert window.sliding_window == 16
    assert not hasattr(cache.cache_allocators["full_attention"], "sliding_window")
    batcher.add(Request("a", prompt_of(30), 2))
    blocks = []
    while batcher.prepare():
        batcher.step()
        blocks.append(list(window.block_table.get("0", [])))
    assert blocks[0] == blocks[2] != []
    assert window._copy_view[blocks[0]].any()


def test_contract_what_a_model_says_of_its_layers(built: Callable[[str], PreTrainedModel]):
    assert built("mixtral")._is_stateful is False
    assert built("qwen3_next")._is_stateful is True
    assert built("mixtral")._supports_attention_backend is True
    assert built("gpt_oss")._supports_sdpa is False
    assert any(hasattr(module, "sinks") for module in built("gpt_oss").modules())
    assert built("gemma4").config.is_heterogeneous is True
    assert built("mixtral").config.is_heterogeneous is False
    config = built("muse_spark").config.get_text_config()
    assert group_layers_by_attn_type(config) == {"sliding_attention": [0, 1], "full_attention": [2]}
    kinds = [DynamicSlidingWindowLayer, DynamicSlidingWindowLayer, DynamicLayer]
    assert [type(layer) for layer in DynamicCache(config=config).layers] == kinds
    with pytest.raises(ValueError, match="chunked_attention"):
        group_layers_by_attn_type(built("llama4").config)
    assert infer_max_single_request_tokens(PagedBatcher(built("mixtral"), kv_tokens=64).processor.cache) == 64
