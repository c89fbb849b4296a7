"""Requests that are kept in rows get plain generate's tokens of each alone, for all that a model's layers may keep."""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from epslots.errors import PeerLost
from epslots.generation.batcher import Batcher
from epslots.generation.batchers import batcher_for
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from tests.support import zoo
from tests.support.batches import Collected, RowsModelFree, StepClock, generated, is_empty, prompt_of, requests_of

MODELS = {**zoo.ZOO, **zoo.STRESSED}
# Of a single token to several chunks. They join beside others' prompts, beside others' decoding, and after all have left.
SIZES = ((3, 6), (40, 4), (1, 7), (23, 4), (9, 3))
JOINS = (0, 0, 3, 5, 21)
# States, states and latents, windows, an indexer; and one whose layers are computed row by row.
KINDS = ("qwen3_next", "kimi_linear", "mimo_v2_flash", "glm_moe_dsa", "deepseek_v4")
LENGTHS, MOST_NEW = (1, 2, 5, 9, 16, 17, 31, 40), 8


@cache
def model_of(name: str) -> PreTrainedModel:
    """One of ``KINDS``, shared by tests that leave it as it is."""
    return build(name)


def build(name: str) -> PreTrainedModel:
    model = MODELS[name].build()
    if MODELS[name].interface:
        model.set_experts_implementation("eager")  # takes any strides
    return model


@cache
def tokens_of(name: str, length: int) -> list[int]:
    """The tokens of ``generate`` for ``prompt_of(length)``: a request of fewer new tokens gets their beginning."""
    return generated(model_of(name), Request("alone", prompt_of(length), MOST_NEW))


def open_rows(model: PreTrainedModel, **given: Any) -> RowBatcher:
    sizes = {"kv_tokens": 256, "max_requests": 4, "max_batch_tokens": 16} | given
    batcher = batcher_for(model, cache="rows", **sizes)
    assert isinstance(batcher, RowBatcher)
    return batcher


class Interruptions:
    """Breaks forward passes off, each at a submodule chosen at random: before it, or after it has kept something."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.raised = 0
        self._random = random.Random(seed)
        self._modules = list(model.get_decoder().modules())

    def step(self, batcher: Batcher) -> None:
        """A prepared step, made twice if the pass came to the chosen submodule."""
        module = self._random.choice(self._modules)
        hook = self._random.choice([module.register_forward_pre_hook, module.register_forward_hook])(self._lose)
        before = self.raised
        try:
            batcher.step()
        except PeerLost:
            assert not batcher.outputs()
            assert batcher.prepare()
        finally:
            hook.remove()
        if self.raised > before:
            batcher.step()

    def _lose(self, *_: Any) -> None:
        self.raised += 1
        raise PeerLost("a peer was lost")


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_generate(name: str):
    """Every second pass is broken off somewhere and made again."""
    model, requests = build(name), requests_of(SIZES)
    expected = {request.id: generated(model, request) for request in requests}
    batcher = open_rows(model)
    interruptions = Interruptions(model, zlib.crc32(name.encode()))
    collected = Collected(batcher)
    waiting = list(zip(JOINS, requests, strict=True))
    for step in range(200):
        while waiting and waiting[0][0] == step:
            batcher.add(waiting.pop(0)[1])
        if batcher.prepare():
            if step % 2:
                interruptions.step(batcher)
            else:
                batcher.step()
            collected.take()
        elif not waiting:
            break
    assert collected.tokens == expected
    assert set(collected.reasons.values()) == {"length"}
    assert interruptions.raised > 2
    batcher.close()
    assert generated(model, requests[0]) == expected["r0"], "the model is as it was"


@pytest.mark.parametrize("name", KINDS)
def test_decoding_is_one_pass_over_all_rows(name: str):
    model = model_of(name)
    batcher = open_rows(model)
    requests = requests_of(((3, 12), (20, 9), (1, 10), (7, 11), (5, 4)))
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher)
    while len(collected.tokens) < 4:
        collected.run(1)
    shapes: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: shapes.append(tuple(ids[0].shape)))
    before = {id: len(tokens) for id, tokens in collected.tokens.items()}
    collected.run(3)
    hook.remove()
    assert shapes == [(4, 1)] * 3
    assert {id: len(tokens) for id, tokens in collected.tokens.items()} == {id: n + 3 for id, n in before.items()}
    assert "r4" not in before, "there are four rows"
    assert collected.run().tokens == {request.id: generated(model, request) for request in requests}
    batcher.close()


def test_decoding_waits_for_one_chunk_at_most():
    batcher = open_rows(model_of("qwen3_next"))
    batcher.add(Request("decodes", prompt_of(3), 20))
    collected = Collected(batcher).run(2)
    batcher.add(Request("comes", prompt_of(100), 3))
    had = [len(collected.run(1).tokens["decodes"]) for _ in range(14)]
    assert "comes" in collected.tokens, "seven chunks"
    assert all(after > before for before, after in zip(had, had[2:], strict=False))
    batcher.close()


@pytest.mark.parametrize("target_ms", [None, 30.0])
def test_prompts_take_the_time_that_a_pass_may_take(target_ms: float | None):
    """Of a simulated clock: passes are timed, and no model is run."""
    clock = StepClock()
    batcher = RowBatcher(model_of("kimi_linear"), kv_tokens=4096, step_target_ms=target_ms, clock=clock)
    RowsModelFree(batcher, clock.step)
    for number in range(8):
        batcher.add(Request(f"d{number}", prompt_of(4, seed=number), 200))
    Collected(batcher).run(10)
    for number in range(3):
        batcher.add(Request(f"p{number}", prompt_of(400, seed=10 + number), 2))
    clock.steps.clear()
    collected = Collected(batcher).run(120)
    assert {f"p{number}" for number in range(3)} <= collected.reasons.keys()
    longest = max(clock.steps)
    assert longest == pytest.approx(0.010 + 0.0002 * 400) if target_ms is None else 0.025 < longest < 0.033
    batcher.close()


@pytest.mark.parametrize("name", KINDS)
def test_requests_that_outgrow_the_cache_lose_nothing(name: str):
    model = model_of(name)
    requests = requests_of(((20, 12), (3, 24), (30, 8), (17, 12), (40, 4)), seed=3)
    expected = {request.id: generated(model, request) for request in requests}
    batcher = open_rows(model, kv_tokens=64)
    for request in requests:
        batcher.add(request)
    assert Collected(batcher).run().tokens == expected
    assert batcher.stats().preempted > 0, "the cache was really too small"
    batcher.close()


@pytest.mark.parametrize("shares", [True, False])
def test_cancelled_requests_leave_a_prepared_step(shares: bool):
    """It is made all the same: their rows are freed after it."""
    model = model_of("qwen3_next")
    batcher = open_rows(model, prefix_cache=shares)
    requests = requests_of(((5, 9), (20, 9), (9, 9)))
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher).run(3)
    assert batcher.prepare()
    before = len(collected.tokens["r0"])
    batcher.cancel("r0")
    batcher.step()
    collected.take()
    assert collected.reasons == {"r0": "cancelled"}
    collected.run()
    for request in requests:
        assert collected.tokens[request.id] == generated(model, request)[: before if request.id == "r0" else None]
    assert is_empty(batcher)
    batcher.close()


@pytest.mark.parametrize("name", ["qwen3_next", "jamba"])
def test_a_prompts_logprobs_take_the_planned_rows_of_logits(name: str):
    """One for each request, also where all are taken before the next token's; and after it was cancelled, none is added."""
    model, rows = model_of(name), list[int]()
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
    batcher = open_rows(model, max_batch_tokens=64)
    for request in requests_of(((25, 6), (3, 9), (40, 3))):
        batcher.add(replace(request, prompt_logprobs=1))
    found = dict[str, int]()
    while batcher.prepare():
        if found.get("r2") == 8 and any(running.entry.request.id == "r2" for running in batcher._isolation.part):
            batcher.cancel("r2")
        batcher.step()
        for output in batcher.outputs():
            found[output.id] = found.get(output.id, 0) + len(output.prompt_logprobs)
    hook.remove()
    assert max(rows) == batcher.max_requests
    assert found == {"r0": 24, "r1": 2, "r2": 8}
    batcher.close()


ADD = st.tuples(st.just("add"), st.sampled_from(LENGTHS), st.integers(1, MOST_NEW))
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0))
STEPS = st.tuples(st.just("steps"), st.integers(1, 5), st.just(0))
INTERRUPTED = st.tuples(st.just("interrupted"), st.integers(0, 2**16), st.just(0))


class Life:
    """Drives a batcher whose cache is smaller than what its requests need, and holds each against ``generate``."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, model_of(name)
        self.batcher = open_rows(self.model, kv_tokens=64)
        self.collected = Collected(self.batcher)
        self.lengths: dict[str, tuple[int, int]] = {}

    def apply(self, event: str, first: int, second: int) -> None:
        match event:
            case "add":
                id = f"r{len(self.lengths)}"
                self.lengths[id] = first, second
                self.batcher.add(Request(id, prompt_of(first), second))
            case "cancel":
                self.batcher.cancel(f"r{first}")
                self.collected.take()
            case "steps":
                self.collected.run(first)
            case "interrupted":
                interruptions = Interruptions(self.model, first)
                self.collected.run(1, lambda: interruptions.step(self.batcher))

    def finish(self) -> None:
        """Run to the end; then one request has the whole cache to itself, if nothing of the others was left in it."""
        self.collected.run(400)
        assert not self.batcher.has_work
        assert self.collected.reasons.keys() == self.lengths.keys()
        for id, (length, new) in self.lengths.items():
            cancelled = self.collected.reasons[id] == "cancelled"
            tokens = self.collected.tokens.get(id, [])
            assert tokens == tokens_of(self.name, length)[: len(tokens) if cancelled else new]
            assert len(tokens) <= new
        whole = self.batcher.capacity - MOST_NEW + 1
        self.batcher.add(Request("whole", prompt_of(whole), MOST_NEW))
        assert self.collected.run(400).tokens["whole"] == tokens_of(self.name, whole)


@pytest.mark.parametrize("name", MODELS if os.environ.get("EPSLOTS_WHOLE_ZOO") else KINDS[::2])
@settings(max_examples=6)
@given(events=st.lists(st.one_of(ADD, ADD, CANCEL, STEPS, STEPS, INTERRUPTED), max_size=16))
def test_requests_come_and_go_at_random(name: str, events: list[tuple[str, int, int]]):
    life = Life(name)
    for event in events:
        life.apply(*event)
    life.finish()
    life.batcher.close()
