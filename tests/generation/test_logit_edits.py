"""Grammar, min_tokens, biases and penalties change logits by their formulas, in vLLM's order: against numpy in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from epslots.generation import logit_edits, next_token
from epslots.generation.logit_edits import edit_logits, edits_logits
from epslots.generation.next_token import choose
from epslots.generation.requests import Grammar, Request
from epslots.generation.sampling import Sampling, uniform_numbers
from epslots.generation.tracked_request import NO_TOKEN, NextToken, TrackedRequest
from tests.support.choices import FakeGrammar, bits_of

V = 12
Logits = NDArray[np.float64]


class Allowing:
    """A grammar's state that allows these tokens."""

    finished, error = False, None

    def __init__(self, tokens: Collection[int], vocabulary: int = V) -> None:
        self.tokens, self.vocabulary = set(tokens), vocabulary

    def allowed(self) -> NDArray[np.int32]:
        return bits_of(self.tokens, self.vocabulary)

    def accept(self, token: int) -> None:
        raise AssertionError


def entry_of(
    sampling: Sampling,
    prompt: Sequence[int] = (0,),
    text: Sequence[int] = (),
    *,
    stops: Collection[int] = (),
    allowed: Collection[int] | None = None,
    resumed: int = 0,
    logprobs: int | None = None,
) -> TrackedRequest:
    """A request after its text, of which the first ``resumed`` tokens are from before it was moved."""
    request = Request("a", tuple(prompt), 10**6, frozenset(stops), sampling, logprobs=logprobs).after(text[:resumed])
    return TrackedRequest(request, list(text[resumed:]), grammar_state=None if allowed is None else Allowing(allowed))


def edited(
    logits: Logits, sampling: Sampling, prompt: Sequence[int], text: Sequence[int], stops: Collection[int], allowed: Any
) -> Logits:
    """One logit after the other, by the formulas."""
    found = np.array(logits, np.float64)
    if allowed is not None:
        found[[token for token in range(len(found)) if token not in allowed]] = -math.inf
    if len(text) < sampling.min_tokens:
        others = [token for token in range(len(found)) if token not in stops and found[token] > -math.inf]
        found[[token for token in stops if others and token < len(found)]] = -math.inf
    for token, bias in sampling.logit_bias:
        found[token] += bias
    counts = Counter(text)
    for token in {*prompt, *text}:
        penalty = sampling.repetition_penalty
        found[token] = found[token] / penalty if found[token] > 0 else found[token] * penalty
        found[token] -= sampling.frequency_penalty * counts[token]
        found[token] -= sampling.presence_penalty * (counts[token] > 0)
    return found


def edited_by_us(logits: Logits, entries: Sequence[TrackedRequest]) -> Logits:
    rows = torch.tensor(np.tile(logits, (len(entries), 1)), dtype=torch.float32)
    edit_logits(rows, entries)
    return rows.double().numpy()


token = st.integers(0, V - 1)
logit = st.one_of(
    st.integers(-30 * 1024, 30 * 1024).map(lambda drawn: drawn / 1024),  # float32 holds them, and no two differ by rounding
    st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 0.5, 3.0]),
)
rows_of_logits = st.lists(logit, min_size=V, max_size=V).filter(lambda row: max(row) > -math.inf)
editing = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.1, -2.0, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5, 1000.0, 1e-3]),
    logit_bias=st.dictionaries(token, st.sampled_from([-100.0, -1.0, 0.25, 5.0, 100.0]), max_size=V).map(
        lambda given: tuple(given.items())
    ),
    min_tokens=st.integers(0, 6),
)
contexts = st.fixed_dictionaries(
    {
        "prompt": st.lists(token, min_size=1, max_size=10),
        "text": st.lists(token, max_size=10),
        "stops": st.sets(st.integers(0, V + 3), max_size=3),
        "allowed": st.one_of(st.none(), st.sets(token, min_size=1)),
    }
)


@settings(max_examples=60, deadline=None)
@given(logits=rows_of_logits, sampling=editing, context=contexts, data=st.data())
def test_logits_change_by_the_formulas(logits: list[float], sampling: Sampling, context: dict[str, Any], data: st.DataObject):
    """All settings together, wherever the request was moved."""
    expected = edited(np.array(logits), sampling, **context)
    resumed = data.draw(st.integers(0, len(context["text"])))
    (found,) = edited_by_us(np.array(logits), [entry_of(sampling, resumed=resumed, **context)])
    size = np.abs(expected[np.isfinite(expected)]).max(initial=100)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * size)


@settings(max_examples=60, deadline=None)
@given(logits=rows_of_logits, sampling=editing, context=contexts)
def test_the_choice_is_of_the_edited_logits(logits: list[float], sampling: Sampling, context: dict[str, Any]):
    """The likeliest one, or the token whose interval the position's number falls to."""
    expected = edited(np.array(logits), sampling, **context)
    given_ = torch.tensor([logits])
    (choice,) = choose(given_, [entry_of(sampling, **context)]).read()
    assert given_[0].tolist() == logits, "the model's logits stay"
    if expected.max() == -math.inf:
        assert choice.token == NO_TOKEN
        return
    assert expected[choice.token] > -math.inf, "no setting lets a forbidden token pass"
    if sampling.temperature == 0:
        assert expected[choice.token] >= expected.max() - 1e-5 - 1e-6 * abs(expected.max())
        return
    assume(abs(expected.max()) < 300)  # so that rounded logits give the same weights to three digits
    weights, margin = kept(expected, sampling)
    assume(margin > 1e-3)
    position = len(context["prompt"]) + len(context["text"])
    (number,) = uniform_numbers([sampling.seed], [position])
    ends = np.cumsum(weights) / weights.sum()
    assert weights[choice.token] > 0
    assert ends[choice.token] - weights[choice.token] / weights.sum() - 1e-3 <= number <= ends[choice.token] + 1e-3


def kept(logits: Logits, sampling: Sampling) -> tuple[Logits, float]:
    """The weights of the tokens that the filters keep, and how far any is from being kept or dropped."""
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    margins = [1.0]
    if sampling.min_p:
        margins += list(np.abs(weights - sampling.min_p)[(weights > 0) & (weights < 1)])
        weights = np.where(weights >= sampling.min_p, weights, 0)
    different = np.unique(weights[weights > 0])
    margins += list(np.diff(different) / different[1:])  # rounded, two weights may be one
    if sampling.top_k:
        weights = np.where(weights >= np.sort(weights)[-sampling.top_k], weights, 0)
    if sampling.top_p < 1:
        likelier = np.array([weights[weights > weight].sum() for weight in weights]) / weights.sum()
        margins += list(np.abs(likelier - sampling.top_p)[weights > 0])
        weights = np.where(likelier < sampling.top_p, weights, 0)
    return weights, float(min(margins))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(rows_of_logits, editing, contexts, st.integers(0, 3)), min_size=1, max_size=6),
    part=st.sampled_from([1, 2 * V, 10**6]),
    shuffle=st.randoms(use_true_random=False),
)
def test_batch_mates_with_any_settings_change_nothing(rows: list[Any], part: int, shuffle: Any):
    entries = [entry_of(sampling, logprobs=top or None, **context) for _, sampling, context, top in rows]
    logits = torch.tensor([row for row, *_ in rows])
    alone = [choose(logits[[row]], [entry]).read()[0] for row, entry in enumerate(entries)]
    order = shuffle.sample(range(len(rows)), len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "PART_LOGITS", part)
        together = choose(logits[order], [entries[row] for row in order]).read()
    assert together == [alone[row] for row in order]


# --- against transformers ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    penalty=st.sampled_from([1.0, 1.3, 0.7, 50.0]),
    least=st.integers(0, 5),
    filters=st.tuples(
        st.sampled_from([0.0, 0.05, 0.3]),
        st.sampled_from([0, 3, 7]),
        st.sampled_from([1.0, 0.5, 0.9]),
        st.sampled_from([0.7, 2.0]),
    ),
    prompt=st.lists(token, min_size=1, max_size=8),
    text=st.lists(token, max_size=8),
)
def test_tokens_are_those_that_transformers_keeps(
    seed: int, penalty: float, least: int, filters: tuple[float, int, float, float], prompt: list[int], text: list[int]
):
    """Its processors, called in our order."""
    logits = 3 * torch.randn(1, V, generator=torch.Generator().manual_seed(seed))
    min_p, top_k, top_p, temperature = filters
    ids, scores = torch.tensor([[*prompt, *text]]), logits.clone()
    for process in (
        MinNewTokensLengthLogitsProcessor(len(prompt), least, [2, 5]),
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        MinPLogitsWarper(min_p),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ):
        scores = process(ids, scores)
    sampling = Sampling(temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=penalty, min_tokens=least)
    (choice,) = choose(logits, [entry_of(sampling, prompt, text, stops=(2, 5))]).read()
    ends = scores[0].double().softmax(dim=-1).cumsum(dim=-1)
    (number,) = uniform_numbers([seed], [len(prompt) + len(text)])
    assume((ends - number).abs().min() > 1e-4)
    assert choice.token == int((ends > number).nonzero()[0])


# --- the edges ---------------------------------------------------------------------------------------------------------------


@example(penalty=5e-324, logit=3.0)
@example(penalty=5e-324, logit=-math.inf)
@example(penalty=1000.0, logit=-3.4e38)
@given(
    penalty=st.floats(0, 1000, exclude_min=True),
    logit=st.one_of(st.floats(-(2.0**127), 2.0**127, width=32), st.just(-math.inf)),
)
@settings(deadline=None)
def test_penalties_at_their_limits_give_numbers(penalty: float, logit: float):
    """And a request its token: numbers beyond the range of float32 are its largest."""
    sampling = Sampling(repetition_penalty=penalty, frequency_penalty=2.0, presence_penalty=-2.0)
    logits = np.array([0.0, logit, 1.0])
    (found,) = edited_by_us(logits, [entry_of(sampling, [1], [1, 1])])
    assert not np.isnan(found).any() and found.max() < math.inf
    assert (found == -math.inf).tolist() == (logits == -math.inf).tolist()
    assert choose(torch.tensor(logits, dtype=torch.float32)[None], [entry_of(sampling, [1], [1, 1])]).read()[0].token >= 0


def test_a_token_that_came_often_is_penalised_each_time():
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    (found,) = edited_by_us(np.zeros(V), [entry_of(sampling, [3], [7] * 100_000 + [1])])
    assert found.tolist() == [0, -0.75, 0, 0, 0, 0, 0, -50_000.25, 0, 0, 0, 0], "the prompt's token is none of the text"


def test_biases_force_and_forbid():
    logits = torch.tensor([[0.0, 30.0, 0.0, 29.0]])
    for bias, expected in ((((2, 1e6),), 2), (((1, -1e6),), 3), (((1, -1e6), (3, -1e6), (0, 50.0)), 0)):
        for temperature in (0.0, 1.0):
            assert choose(logits, [entry_of(Sampling(temperature, logit_bias=bias))]).read()[0].token == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", [31, 32, 33, 64, 100])
def test_a_mask_of_one_token_leaves_it(vocabulary: int, temperature: float):
    """With any other settings; at each bit of a word, the sign among them."""
    sampling = Sampling(temperature, 3, 0.5, min_p=0.9, repetition_penalty=9.0, logit_bias=((5, 100.0),), min_tokens=3)
    for only in range(vocabulary):
        entry = entry_of(sampling, [only], [only], stops=[only])
        entry.grammar_state = Allowing([only], vocabulary)
        logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(only))
        assert choose(logits, [entry]).read()[0].token == only


def test_no_token_is_left_where_none_is_allowed():
    for temperature in (0.0, 1.0):
        nothing, free = entry_of(Sampling(temperature), allowed=()), entry_of(Sampling(temperature))
        found = choose(torch.ones(3, V), [free, nothing, free]).read()
        assert [choice.token == NO_TOKEN for choice in found] == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_logit_is_found_behind_a_mask(value: float):
    logits = torch.zeros(1, V)
    logits[0, 7] = value
    for temperature in (0.0, 1.0):
        assert choose(logits, [entry_of(Sampling(temperature), allowed=(3, 4))]).read()[0].token == NO_TOKEN


def test_a_mask_forbids_what_lies_beyond_its_end():
    """A tokenizer may have fewer tokens than the head has rows; without a grammar those are tokens like others."""
    entry = entry_of(Sampling())
    logits = torch.arange(100.0)[None]
    assert choose(logits, [entry]).read()[0].token == 99
    entry.grammar_state = Allowing(range(40), 40)
    assert choose(logits, [entry]).read()[0].token == 39
    entry.grammar_state = Allowing({3, 999}, 1000)
    assert choose(logits, [entry]).read()[0].token == 3


def test_a_mask_may_be_a_tensor():
    entry = entry_of(Sampling())
    entry.grammar_state = Allowing([2])
    mask = torch.from_numpy(bits_of([2], V))
    entry.grammar_state.allowed = lambda: mask  # type: ignore[method-assign]
    assert choose(torch.arange(float(V))[None], [entry]).read()[0].token == 2


def test_stop_tokens_wait_for_min_tokens():
    """Counted over the whole text, wherever the request was moved."""
    logits = torch.tensor([[1.0, 9.0, 5.0]])
    for resumed in range(4):
        for written in range(resumed, 5):
            entry = entry_of(Sampling(min_tokens=3), text=[2] * written, stops=[1, 77], resumed=resumed)
            assert choose(logits, [entry]).read()[0].token == (2 if written < 3 else 1)
            assert edits_logits(entry) == (written < 3)


def test_a_complete_text_ends_before_min_tokens():
    """A grammar that allows only stop tokens is stronger."""
    entry = entry_of(Sampling(min_tokens=9), stops=[1, 4], allowed=[1, 4])
    assert choose(torch.arange(float(V))[None], [entry]).read()[0].token == 4
    entry.grammar_state = Allowing([0, 1, 4])
    assert choose(torch.arange(float(V))[None], [entry]).read()[0].token == 0


def test_only_rows_with_settings_are_edited(monkeypatch: pytest.MonkeyPatch):
    seen = []
    edit = next_token.edit_logits
    monkeypatch.setattr(next_token, "edit_logits", lambda logits, entries: (seen.append(entries), edit(logits, entries)))
    plain, biased = entry_of(Sampling()), entry_of(Sampling(logit_bias=((1, 2.0),)))
    choose(torch.zeros(4, V), [plain, biased, None, plain])
    assert seen == [[biased]]
    monkeypatch.setattr(logit_edits, "to_device", None)
    choose(torch.zeros(2, V), [entry_of(Sampling(1.0, 3, 0.9, min_p=0.1)), plain])
    assert len(seen) == 2, "draws alone send nothing"


def test_a_grammar_is_asked_once_a_token():
    grammar, asked = FakeGrammar(V), []
    allowed = grammar.allowed
    grammar.allowed = lambda: (asked.append(1), allowed())[1]  # type: ignore[method-assign]
    request = Request("a", (0,), 4, grammar=Grammar("regex", "x"))
    entry = TrackedRequest(request, grammar_state=grammar)
    mate = replace(request, id="b", grammar=None, sampling=Sampling(1.0))
    choices = choose(torch.zeros(2, V), [entry, TrackedRequest(mate)]).read()
    assert len(asked) == 1
    assert choices[0] == NextToken(0)
