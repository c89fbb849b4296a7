"""A request gets all that it asks for in pages, too: among any others, and after any failure of a step."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from epslots.errors import ConfigError, PeerLost
from epslots.generation.batcher import Batcher
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Grammar, Output, Request, TokenLogprobs
from epslots.generation.sampling import Sampling
from tests.support import zoo
from tests.support.batches import Faults, drawn, generated, pages_are_free, prompt_of, requests_of
from tests.support.choices import FakeGrammar, ReadyGrammars
from tests.support.guilty_requests import Guilt, unused

GRAMMAR = Grammar("regex", "of the fake")
STOPS = frozenset({17, 200})
SETTINGS: tuple[dict[str, Any], ...] = (
    {"logprobs": 3, "prompt_logprobs": 2},
    {"sampling": Sampling(repetition_penalty=1.5, frequency_penalty=0.3)},
    {"sampling": Sampling(1.0, min_p=0.02, seed=5, presence_penalty=1.0), "logprobs": 0},
    {},
    {"sampling": Sampling(1.3, 40, 0.9, seed=6, logit_bias=((30, 4.0), (31, -4.0)), min_tokens=4), "stop_tokens": STOPS},
    {"prompt_logprobs": 0, "sampling": Sampling(0.8, seed=7)},
    {"grammar": GRAMMAR, "logprobs": 1},
    {"grammar": GRAMMAR, "sampling": Sampling(1.0, seed=8), "stop_tokens": STOPS, "prompt_logprobs": 20},
)
SIZES = ((40, 8), (3, 9), (17, 12), (70, 7), (1, 9), (33, 3), (5, 12), (50, 12))


def grammar_of(request: Request) -> FakeGrammar:
    return FakeGrammar(zoo.VOCAB, length=4, stops=sorted(request.stop_tokens))


def all_kinds(seed: int = 2) -> list[Request]:
    return [replace(request, **SETTINGS[i]) for i, request in enumerate(requests_of(SIZES, seed))]


def opened(model: PreTrainedModel, *, kv_tokens: int = 512, chunk: int = 32, rows: int = 16) -> PagedBatcher:
    """A batcher whose steps have this many rows of logits."""
    batcher = PagedBatcher(model, kv_tokens=kv_tokens, max_batch_tokens=chunk, max_requests=rows)
    batcher.grammars = ReadyGrammars(grammar_of)  # type: ignore[assignment]
    return batcher


class Got:
    """All that came of each request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt: dict[str, list[TokenLogprobs]] = {}
        self.reasons: dict[str, str] = {}
        self.portions: dict[str, int] = {}

    def take(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            assert output.id not in self.reasons and output.error is None
            assert output.tokens or output.prompt_logprobs or output.finished
            assert not output.logprobs or len(output.logprobs) == len(output.tokens)
            self.tokens.setdefault(output.id, []).extend(output.tokens)
            self.logprobs.setdefault(output.id, []).extend(output.logprobs)
            self.prompt.setdefault(output.id, []).extend(output.prompt_logprobs)
            self.portions[output.id] = self.portions.get(output.id, 0) + bool(output.prompt_logprobs)
            if output.reason:
                self.reasons[output.id] = output.reason

    def run(self, batcher: Batcher, steps: int = 10_000) -> Got:
        while steps and batcher.prepare():
            steps -= 1
            try:
                batcher.step()
            except PeerLost:
                continue
            self.take(batcher.outputs())
        return self


class Plain:
    """Each request's output alone, by plain transformers and the formulas."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request]) -> None:
        self.model, self.requests = model, {request.id: request for request in requests}
        self.tokens = {request.id: drawn(model, request, grammar_of(request)) for request in requests}

    def assert_got(self, got: Got) -> None:
        assert got.tokens == self.tokens
        for id, request in self.requests.items():
            self._assert_logprobs(request, got.logprobs[id], got.prompt[id])
            assert got.reasons[id] == ("length" if len(got.tokens[id]) == request.max_new_tokens else "stop")

    def _assert_logprobs(self, request: Request, new: list[TokenLogprobs], prompt: list[TokenLogprobs]) -> None:
        sequence, start = [*request.prompt, *self.tokens[request.id]], len(request.prompt)
        with torch.no_grad():
            expected = self.model(torch.tensor([sequence]), use_cache=False).logits[0].double().log_softmax(dim=-1).numpy()
        for top, found, first, end in (
            (request.logprobs, new, start, len(sequence)),
            (request.prompt_logprobs, prompt, 1, start),
        ):
            assert [each.token for each in found] == ([] if top is None else sequence[first:end])
            for each, row in zip(found, expected[first - 1 :], strict=False):
                numbers = [each.logprob, *(logprob for _, logprob in each.top)]
                assert len(each.top) == top
                np.testing.assert_allclose(numbers, row[[each.token, *(token for token, _ in each.top)]], atol=1e-4)
                np.testing.assert_allclose(numbers[1:], np.sort(row)[::-1][:top], atol=1e-4)


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain(zoo.ZOO["mixtral"].build(), all_kinds())


# --- in one batch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [8, 32, 512])
def test_each_gets_among_others_what_it_gets_alone(plain: Plain, chunk: int):
    batcher, got = opened(plain.model, chunk=chunk), Got()
    requests = list(plain.requests.values())
    random.Random(chunk).shuffle(requests)
    for request in requests:
        batcher.add(request)
    got.run(batcher)
    plain.assert_got(got)
    assert pages_are_free(batcher)
    assert {id for id, count in got.portions.items() if count > 1} >= {"r0", "r7"}, "longer than the rows of a step"
    batcher.close()


def test_windows_too():
    """Chunks are cut where a window's ring is overwritten."""
    plain = Plain(zoo.ZOO["gpt_oss"].build(), all_kinds(5))
    batcher = opened(plain.model, rows=5)
    for request in plain.requests.values():
        batcher.add(request)
    got = Got().run(batcher)
    batcher.close()  # its attention is the model's while it is open
    plain.assert_got(got)


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kv_tokens=st.sampled_from([96, 128, 512]),
    chunk=st.sampled_from([4, 16, 64]),
    rows=st.sampled_from([1, 2, 3, 8, 100]),
)
def test_requests_come_while_others_run(seed: int, kv_tokens: int, chunk: int, rows: int, plain: Plain):
    """Any number of rows and pages: chunks are cut, requests preempted, and prompts computed again."""
    batcher, numbers = opened(plain.model, kv_tokens=kv_tokens, chunk=chunk, rows=rows), random.Random(seed)
    got, waiting = Got(), numbers.sample(list(plain.requests.values()), len(plain.requests))
    while waiting or batcher.has_work:
        for _ in range(min(numbers.randint(0, 3), len(waiting))):
            batcher.add(waiting.pop())
        got.run(batcher, numbers.randint(1, 4))
    plain.assert_got(got)
    assert not batcher.prepare(), "and what has ended is free"
    assert pages_are_free(batcher)
    batcher.close()


def test_a_step_computes_no_more_rows_than_it_has(plain: Plain, monkeypatch: pytest.MonkeyPatch):
    """Rows of logits are planned for: one for each request."""
    rows: list[int] = []
    head = plain.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, _inputs, logits: rows.append(logits.shape[1]))
    batcher = opened(plain.model, rows=6)
    for request in plain.requests.values():
        batcher.add(replace(request, prompt_logprobs=1))
    Got().run(batcher)
    handle.remove()
    batcher.close()
    assert max(rows) == 6


def test_a_prompt_without_prefix_of_others(plain: Plain):
    """Pages that it could share give no logits; those that it computes are shared again."""
    batcher, got, reused = opened(plain.model), Got(), []
    for asked in (None, 1, None):
        batcher.add(Request(str(len(reused)), prompt_of(40), 3, prompt_logprobs=asked))
        got.run(batcher)
        reused.append(batcher.stats().reused_tokens)
    assert reused == [0, 0, 32]
    assert [each.token for each in got.prompt["1"]] == list(prompt_of(40)[1:])
    assert len({tuple(tokens) for tokens in got.tokens.values()}) == 1
    batcher.close()


# --- what happens to a step --------------------------------------------------------------------------------------------------


def test_a_repeated_step_gives_nothing_twice(plain: Plain):
    batcher, got = opened(plain.model, chunk=16, rows=6), Got()
    faults = Faults(plain.model)
    for request in plain.requests.values():
        batcher.add(request)
    got.run(batcher)
    faults.remove()
    assert faults.raised > 20
    plain.assert_got(got)
    batcher.close()


def test_a_preempted_request_gives_nothing_twice(plain: Plain):
    """Its prompt is computed again, without rows for what is known."""
    requests = [
        replace(request, max_new_tokens=30, grammar=None, stop_tokens=frozenset()) for request in plain.requests.values()
    ]
    expected = Plain(plain.model, requests)
    batcher, got = opened(plain.model, kv_tokens=112, chunk=16, rows=4), Got()
    scheduler, again = batcher.processor.scheduler, []
    wait = scheduler.add_waiting_request
    scheduler.add_waiting_request = lambda state: (again.append(state.request_id), wait(state))
    for request in requests:
        batcher.add(request)
    got.run(batcher)
    assert len(again) > len(requests), "requests were preempted"
    expected.assert_got(got)
    batcher.close()


def test_a_faulty_request_takes_nothing_from_its_mates(plain: Plain):
    token = unused(list(plain.requests.values()), plain.tokens)
    guilty = Request("guilty", (*prompt_of(20), token, 30), 5, prompt_logprobs=1, logprobs=1)
    batcher, got = opened(plain.model, rows=8), Got()
    guilt = Guilt(plain.model, token, 1, math.nan)
    for request in (*list(plain.requests.values())[:4], guilty, *list(plain.requests.values())[4:]):
        batcher.add(request)
    errors = []
    while batcher.prepare():
        batcher.step()
        outputs = batcher.outputs()
        errors += [output for output in outputs if output.id == "guilty"]
        got.take([output for output in outputs if output.id != "guilty"])
    guilt.remove()
    plain.assert_got(got)
    assert errors[-1].reason == "error" and "NaN or infinite" in (errors[-1].error or "")
    assert not any(output.tokens for output in errors)
    found = [each.token for output in errors for each in output.prompt_logprobs]
    assert found == list(guilty.prompt[1 : 1 + len(found)]) and len(found) < 21, "those before the damage"
    assert pages_are_free(batcher)
    batcher.close()


def test_a_cancelled_request_is_chosen_for_without_effect(plain: Plain):
    """Between a step's preparation and its end, and while its prompt is in pieces."""
    batcher, got = opened(plain.model, rows=8), Got()
    for request in plain.requests.values():
        batcher.add(request)
    got.run(batcher, 1)
    before = list(got.prompt["r0"])
    assert before and "r0" not in got.reasons
    assert batcher.prepare()
    for id in ("r0", "r6", "r7"):
        batcher.cancel(id)
    got.run(batcher)
    for id, tokens in got.tokens.items():
        assert tokens == plain.tokens[id][: len(tokens)]
        assert (got.reasons[id] == "cancelled") == (id in ("r0", "r6", "r7")) == (tokens != plain.tokens[id])
    assert got.prompt["r0"] == before
    assert pages_are_free(batcher)
    batcher.close()


@settings(max_examples=4, deadline=None)
@given(steps=st.lists(st.integers(1, 8), max_size=6), lost=st.booleans())
def test_a_moved_request_continues_where_it_was(steps: list[int], lost: bool, plain: Plain):
    """In its text, its grammar and its prompt's log-probabilities, and all that its last batcher didn't return."""
    requests, got = list(plain.requests.values()), Got()
    for count in (*steps, 10_000):
        batcher = opened(plain.model, chunk=16, rows=6)
        for request in requests:
            batcher.add(request)
        got.run(batcher, count)
        if lost and batcher.prepare():
            batcher.step()
        requests = [request.after(tokens) for request, tokens in batcher.unfinished()]
        batcher.close()
    plain.assert_got(got)


def test_a_grammar_s_end_frees_its_pages_at_once(plain: Plain):
    """transformers doesn't know of it: it would go on to max_new_tokens."""
    batcher, got = opened(plain.model, kv_tokens=64), Got()
    for number in range(6):
        batcher.add(Request(str(number), prompt_of(30), 30, grammar=GRAMMAR))
    got.run(batcher)
    assert [len(tokens) for tokens in got.tokens.values()] == [4] * 6
    assert set(got.reasons.values()) == {"stop"}
    assert pages_are_free(batcher)
    batcher.close()


def test_min_tokens_keep_transformers_from_ending(plain: Plain):
    """A stop token that greedy choice takes at once."""
    request = Request("a", prompt_of(9), 8)
    first = generated(plain.model, request)[0]
    for least, batcher in ((0, opened(plain.model)), (5, opened(plain.model))):
        sampling = Sampling(min_tokens=least, logit_bias=((first, 100.0),))
        batcher.add(replace(request, stop_tokens=frozenset({first}), sampling=sampling))
        got = Got().run(batcher)
        assert (len(got.tokens["a"]), got.tokens["a"].count(first)) == (least + 1, 1)
        batcher.close()


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"sampling": Sampling(logit_bias=((319, 1.0), (320, 1.0)))}, r"logit_bias has token 320; allowed: 0 to 319"),
        ({"sampling": Sampling(min_tokens=4)}, r"min_tokens=4; allowed: up to max_new_tokens=3"),
    ],
)
def test_requests_that_cannot_be_met(given_: dict[str, Any], message: str, plain: Plain):
    batcher = PagedBatcher(plain.model, kv_tokens=64)
    with pytest.raises(ConfigError, match=f"'a'.*{message}"):
        batcher.add(Request("a", (20,), 3, **given_))
    assert not batcher.has_work
    batcher.close()


def test_min_tokens_count_what_was_moved(plain: Plain):
    request = Request("a", (20,), 5, sampling=Sampling(min_tokens=5)).after((30, 31, 32))
    batcher = opened(plain.model)
    batcher.add(request)
    assert len(Got().run(batcher).tokens["a"]) == 2
    batcher.close()
