"""A request that the model fails with ends with an error; what it was batched with, and what comes later, doesn't notice."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import epslots
from epslots.errors import CorruptExpertError, UnsupportedModelError
from epslots.generation.batcher import Batcher
from epslots.generation.batchers import batcher_for
from epslots.generation.engine import Engine
from epslots.generation.isolation import Isolation
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import Sampling
from epslots.models.batch_invariance import make_batch_invariant
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.batches import drawn, expected_of, generated, is_empty, pages_are_free, prompt_of, requests_of
from tests.support.guilty_requests import WAYS, Guilt, error_of, guilty_requests, unused


def served(batcher: Batcher, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The tokens of each request, and the errors of those that ended with one."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    errors: dict[str, str] = {}
    for request in requests:
        batcher.add(request)
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            tokens[output.id] += output.tokens
            if output.reason == "error":
                errors[output.id] = output.error or ""
    assert not batcher.has_work
    return tokens, errors


def without(token: int, requests: list[Request]) -> list[Request]:
    """The same requests, with another token in its place."""
    return [replace(request, prompt=tuple(20 if t == token else t for t in request.prompt)) for request in requests]


def nothing_is_spoilt(batcher: PagedBatcher) -> bool:
    """Whether all that the pages hold are numbers."""
    return all(bool(a.cache_tensor.isfinite().all()) for a in batcher.processor.cache.cache_allocators.values())


# --- the decision ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@example(size=1, guilty={0}, dear=True)
@given(size=st.integers(1, 70), guilty=st.sets(st.integers(0, 69)), dear=st.booleans())
def test_guilty_requests_come_out_and_others_pass_once(size: int, guilty: set[int], dear: bool):
    guilty = {item for item in guilty if item < size}
    isolation, passed, found, runs, failures = Isolation(range(size)), [], [], 0, 0
    while not isolation.done:
        part = isolation.part
        runs += 1
        if guilty & set(part):
            failures += 1
            item = isolation.failed(singly=dear)
            found += [] if item is None else [item]
        else:
            isolation.passed()
            passed += part
    assert sorted(found) == sorted(guilty)
    assert sorted(passed) == sorted(set(range(size)) - guilty)
    if dear:
        assert failures == (len(guilty) + 1 if guilty else 0), "each breaks the group once, after the whole"
    else:
        assert runs <= 1 + 2 * len(guilty) * (1 + math.ceil(math.log2(size)))


# --- batchers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("mixtral", way) for way in WAYS),
        *((n, w) for n in ("gpt_oss", "deepseek_v3", "gemma4") for w in ("nan", "RuntimeError")),
    ],
)
def test_mates_get_the_tokens_they_would_get_without_it(name: str, way: str):
    """Prompts in one chunk and in several, guilty ones among them; and requests that get the guilty one's pages."""
    model = zoo.ZOO[name].build()
    mates = requests_of(((3, 12), (70, 8), (17, 5), (40, 1), (33, 3), (1, 10)))
    mates[2] = replace(mates[2], sampling=Sampling(0.9, seed=3))
    expected = expected_of(model, mates, drawn)
    token = unused(mates, expected)
    guilty = guilty_requests(token, (5, 50, 16))
    innocent = without(token, guilty)
    later = expected_of(model, innocent)
    batcher = PagedBatcher(model, kv_tokens=512, max_batch_tokens=32)
    guilt = Guilt(model, token, 0, WAYS[way]())
    order = [*mates, *guilty]
    random.Random(way).shuffle(order)
    tokens, errors = served(batcher, order)
    guilt.remove()
    assert {id: tokens[id] for id in expected} == expected
    assert errors.keys() == {request.id for request in guilty}
    assert all(error_of(way) in error for error in errors.values())
    assert guilt.fell
    assert nothing_is_spoilt(batcher)
    assert served(batcher, [*mates, *innocent]) == ({**expected, **later}, {})
    assert pages_are_free(batcher)
    batcher.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_request_may_fail_in_the_middle_of_its_tokens(way: str):
    """It keeps what it had until then."""
    model = zoo.ZOO["qwen3_moe"].build()
    requests = requests_of(((9, 12), (20, 12), (30, 12), (5, 12)))
    expected = expected_of(model, requests)
    alone = [t for t in expected["r1"] if not any(t in (*r.prompt, *expected[r.id]) for r in requests if r.id != "r1")]
    token = next(t for t in alone if t not in requests[1].prompt)
    at = expected["r1"].index(token)
    batcher = PagedBatcher(model, kv_tokens=256, max_batch_tokens=32)
    guilt = Guilt(model, token, 0, WAYS[way]())
    tokens, errors = served(batcher, requests)
    guilt.remove()
    assert list(errors) == ["r1"]
    assert tokens == {**expected, "r1": expected["r1"][: at + 1]}
    batcher.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_one_at_a_time_the_next_request_goes_on(name: str, way: str):
    model = zoo.ZOO[name].build()
    mates = requests_of(((3, 6), (20, 4)))
    expected = {request.id: generated(model, request) for request in mates}
    token = unused(mates, expected)
    guilty = guilty_requests(token, (12,))
    guilt = Guilt(model, token, 0, WAYS[way]())
    batcher = RowBatcher(model, kv_tokens=128)
    tokens, errors = served(batcher, [mates[0], *guilty, mates[1]])
    guilt.remove()
    assert list(errors) == ["guilty0"] and error_of(way) in errors["guilty0"]
    assert tokens == {**expected, "guilty0": []}
    assert served(batcher, without(token, guilty))[1] == {}
    assert is_empty(batcher)


@pytest.mark.parametrize("batcher_class", [PagedBatcher, RowBatcher])
def test_a_failure_that_passes_costs_nobody_anything(batcher_class: type):
    model = zoo.ZOO["mixtral"].build()
    requests = requests_of(((3, 6), (20, 4), (9, 5)))
    expected = expected_of(model, requests)
    batcher, passes = batcher_class(model, kv_tokens=128), 0

    def fail_sometimes(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes in (1, 4, 8):
            raise RuntimeError("a moment's weakness")

    handle = model.model.layers[1].register_forward_hook(fail_sometimes)
    assert served(batcher, requests) == (expected, {})
    handle.remove()


@pytest.mark.parametrize("invariant", [False, True])
def test_a_moment_of_nan_in_a_cut_prompt_is_made_up_for(invariant: bool):
    """No token is chosen after a prompt's first chunk, and what it left in the cache would spoil all that follow.

    In usual attention all rows of the batch show it: values of others are multiplied by zeros. In batch-invariant attention
    only rows of the same prompt do.
    """
    model = zoo.ZOO["mixtral"].build()
    if invariant:
        make_batch_invariant(model)
    requests = requests_of(((3, 6), (100, 6)))
    expected = {request.id: generated(model, request) for request in requests}
    batcher, chunks = PagedBatcher(model, kv_tokens=256, max_batch_tokens=32), 0

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> None:
        nonlocal chunks
        chunks += 1
        if chunks in (1, 4):
            output[0, 5] = math.nan

    handle = model.model.layers[0].register_forward_hook(spoil)
    assert served(batcher, requests) == (expected, {})
    handle.remove()
    batcher.close()


def test_a_model_that_always_fails_errs_and_serves_on():
    model = zoo.ZOO["mixtral"].build()
    requests = requests_of(((3, 6), (20, 4), (9, 5)))
    batcher = PagedBatcher(model, kv_tokens=128)

    def fail(*_: object) -> None:
        raise ValueError("x" * 10_000)

    handle = model.model.layers[1].register_forward_hook(fail)
    tokens, errors = served(batcher, requests)
    handle.remove()
    assert tokens == {"r0": [], "r1": [], "r2": []}
    assert len(errors) == 3 and all(len(error) < 1000 for error in errors.values())
    assert pages_are_free(batcher)
    assert served(batcher, requests) == ({request.id: generated(model, request) for request in requests}, {})


def test_prompts_that_begin_like_a_guilty_one_are_served():
    """Its pages are never reused, though they were complete; those that it shared with others stay."""
    model = zoo.ZOO["mixtral"].build()
    common = prompt_of(48)
    mate, like = Request("mate", (*common, 30), 6), Request("like", (*common, 31, *prompt_of(31), 33), 6)
    expected = {request.id: generated(model, request) for request in (mate, like)}
    token = unused([mate, like], expected)
    guilty = Request("guilty", (*like.prompt[:-1], *prompt_of(9), token, 32), 6)
    batcher = PagedBatcher(model, kv_tokens=512, max_batch_tokens=64)
    guilt = Guilt(model, token, 0, math.nan)
    for requests in ([mate], [guilty], [mate, guilty, like], [like, guilty], [mate]):
        tokens, errors = served(batcher, requests)
        assert list(errors) == [request.id for request in requests if request.id == "guilty"]
        assert all(tokens[id] == expected[id] for id in tokens.keys() & expected.keys())
        assert nothing_is_spoilt(batcher)
    guilt.remove()
    assert pages_are_free(batcher)


def test_cancelling_what_is_being_isolated():
    model = zoo.ZOO["mixtral"].build()
    mates = requests_of(((3, 6), (20, 4), (9, 5)))
    expected = {request.id: generated(model, request) for request in mates}
    token = unused(mates, expected)
    guilty = guilty_requests(token, (5,))
    batcher = PagedBatcher(model, kv_tokens=128)
    guilt = Guilt(model, token, 0, math.nan)
    for request in (*mates, *guilty):
        batcher.add(request)
    assert batcher.prepare()
    batcher.step()
    assert not batcher.outputs(), "the step was for nothing"
    batcher.cancel("guilty0")
    batcher.cancel("r2")
    found: dict[str, list[int]] = {}
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            found.setdefault(output.id, []).extend(output.tokens)
            assert output.reason in (None, "length", "cancelled")
    guilt.remove()
    assert found == {"r0": expected["r0"], "r1": expected["r1"], "r2": [], "guilty0": []}
    assert pages_are_free(batcher)


def test_an_error_of_files_is_no_request_s(checkpoint: Callable[[str], Path]):
    model = zoo.ZOO["mixtral"].build()
    batcher = PagedBatcher(model, kv_tokens=128)
    batcher.add(Request("a", (20, 21), 3))
    assert batcher.prepare()

    def corrupt(*_: object) -> None:
        raise CorruptExpertError("layer", 3, "here")

    handle = model.model.layers[1].register_forward_hook(corrupt)
    for _ in range(3):
        with pytest.raises(CorruptExpertError):
            batcher.step()
    handle.remove()
    assert batcher.has_work


# --- with slots --------------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_guilty_request_among_any_mates(data: st.DataObject, loaded: tuple[PreTrainedModel, PreTrainedModel]):
    """Few slots, so that experts are fetched, and fetched ahead, for rows that are no numbers."""
    reference, model = loaded
    draw = data.draw
    sizes = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=5))
    mates = requests_of(tuple(sizes))
    expected = {request.id: generated(reference, request) for request in mates}
    token = unused(mates, expected)
    guilty = guilty_requests(token, tuple(draw(st.lists(st.integers(1, 60), max_size=3))))
    way, layer = draw(st.sampled_from(sorted(WAYS))), draw(st.integers(0, 1))
    order = draw(st.permutations([*mates, *guilty]))
    engine = Engine(model, kv_tokens=512, max_batch_tokens=draw(st.sampled_from([8, 32, 256])))
    guilt = Guilt(model, token, layer, WAYS[way]())
    tokens, errors = served(engine.batcher, list(order))
    guilt.remove()
    engine.batcher.close()
    assert errors.keys() == {request.id for request in guilty}
    assert {id: tokens[id] for id in expected} == expected
    runtime_of(model).check_integrity()


@pytest.fixture(scope="module")
def loaded(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, PreTrainedModel]:
    folder, cache = checkpoint("qwen3_moe"), tmp_path_factory.mktemp("cache")
    settings = {"device": "cpu", "dtype": "float32", "progress": False, "cache_dir": cache}
    return zoo.reference(folder), epslots.load(folder, slots=3, link="1GB/s,20us", prefetch="4MiB", **settings)


# --- configurations ----------------------------------------------------------------------------------------------------------

FLAGS = {
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_cache": False,
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("name", "batcher_class"), [("mixtral", PagedBatcher), ("qwen3_next", RowBatcher)])
def test_flags_that_ask_for_more_outputs_are_off(name: str, batcher_class: type, flag: str):
    """And as they were for callers of the model itself."""
    model = zoo.ZOO[name].build()
    requests = requests_of(((5, 4), (20, 3)))
    expected = expected_of(model, requests)
    setattr(model.config, "_output_attentions" if flag == "output_attentions" else flag, FLAGS[flag])
    batcher = batcher_class(model, kv_tokens=64)
    assert served(batcher, requests) == (expected, {})
    assert getattr(model.config, flag) == FLAGS[flag]


def test_flags_of_a_text_configuration_are_off():
    model = zoo.ZOO["ernie4_5_vl_moe"].build()
    requests = requests_of(((5, 4), (20, 3)))
    expected = expected_of(model, requests)
    for config in (model.config, model.config.get_text_config()):
        config.output_router_logits = config.output_hidden_states = True
    assert served(batcher_for(model, kv_tokens=64), requests) == (expected, {})


@pytest.mark.parametrize("make", [batcher_for, PagedBatcher, RowBatcher])
def test_a_model_without_a_head_is_refused(make: Callable[..., Batcher]):
    with pytest.raises(UnsupportedModelError, match=r"MixtralModel has no language-model head.*ForCausalLM"):
        make(zoo.ZOO["mixtral"].build().model, kv_tokens=64)
