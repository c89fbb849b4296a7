"""A request's results: entered once each, in order, however often a step is repeated or the request moved."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.generation.requests import Request, TokenLogprobs
from epslots.generation.sampling import Sampling
from epslots.generation.token_counts import TokenCounts
from epslots.generation.tracked_request import NO_TOKEN, NextToken, TrackedRequest
from tests.support.choices import FakeGrammar

token = st.integers(0, 9)


# --- tokens ------------------------------------------------------------------------------------------------------------------


def test_a_stop_token_or_the_length_ends_a_request():
    entry = TrackedRequest(Request("a", (1, 2), 3, frozenset({7})))
    entry.append(NextToken(5))
    assert (entry.tokens, entry.reason, entry.length, entry.text_length) == ([5], None, 3, 1)
    entry.append(NextToken(7))
    assert (entry.tokens, entry.reason) == ([5, 7], "stop")
    entry = TrackedRequest(Request("a", (1, 2), 2, frozenset({7})))
    for _ in range(2):
        entry.append(NextToken(5))
    assert entry.reason == "length"
    entry = TrackedRequest(Request("a", (1, 2), 1, frozenset({7})))
    entry.append(NextToken(7))
    assert entry.reason == "stop", "at the last token, too"


def test_no_token_is_never_entered():
    entry = TrackedRequest(Request("a", (1, 2), 3))
    with pytest.raises(AssertionError, match="committed"):
        entry.append(NextToken(NO_TOKEN))
    assert not entry.tokens


def test_a_grammar_follows_the_tokens_and_ends_the_text():
    grammar = FakeGrammar(10, length=2)
    entry = TrackedRequest(Request("a", (1, 2), 9), grammar_state=grammar)
    entry.append(NextToken(3))
    assert (grammar.text, entry.reason) == ([3], None)
    entry.append(NextToken(4))
    assert (grammar.text, entry.reason) == ([3, 4], "stop")


def test_a_stop_token_is_no_part_of_the_grammar_s_text():
    grammar = FakeGrammar(10, length=2, stops=[9])
    entry = TrackedRequest(Request("a", (1, 2), 9, frozenset({9})), grammar_state=grammar)
    for number in (3, 4, 9):
        assert entry.reason is None
        entry.append(NextToken(number))
    assert (grammar.text, entry.tokens, entry.reason) == ([3, 4], [3, 4, 9], "stop")


@pytest.mark.parametrize(("stop", "tokens"), [(9, [3, 9]), (4, [3])])
def test_an_end_that_a_mask_shows_leaves_out_its_token(stop: int, tokens: list[int]):
    """But for a stop token, which ends every text."""
    grammar = FakeGrammar(10, length=2)
    entry = TrackedRequest(Request("a", (1, 2), 9, frozenset({9}), logprobs=0), grammar_state=grammar)
    entry.append(NextToken(3, TokenLogprobs(3, -1.0)))
    grammar.length = 1
    entry.append(NextToken(stop, TokenLogprobs(stop, -1.0)))
    assert (entry.tokens, entry.reason, grammar.text) == (tokens, "stop", [3])
    assert [found.token for found in entry.logprobs] == tokens


@pytest.mark.parametrize("token", [3, 9])
def test_a_grammar_that_fails_ends_its_request_with_its_words(token: int):
    grammar = FakeGrammar(10)
    entry = TrackedRequest(Request("a", (1, 2), 9, frozenset({9})), grammar_state=grammar)
    grammar.error = "too much work"
    entry.append(NextToken(token))
    assert (entry.tokens, entry.reason, entry.error) == ([], "error", "too much work")


@settings(deadline=None)
@given(prompt=st.lists(token, min_size=1), text=st.lists(token), resumed=st.integers(0, 30), reads=st.sets(st.integers(0, 30)))
def test_counts_are_those_of_prompt_and_text(prompt: list[int], text: list[int], resumed: int, reads: set[int]):
    """Whenever they are read, and wherever the request was moved."""
    sampling = Sampling(repetition_penalty=2.0)
    entry = TrackedRequest(Request("a", tuple(prompt), 99, sampling=sampling).after(text[:resumed]))
    for number, new in enumerate(text[resumed:]):
        entry.append(NextToken(new))
        if number in reads:
            _ = entry.counts
    found = dict(zip(entry.counts.tokens_U.tolist(), entry.counts.counts_U.tolist(), strict=True))
    assert len(found) == len(entry.counts.tokens_U), "each token once"
    assert found == {number: Counter(text)[number] for number in {*prompt, *text}}
    without = TrackedRequest(Request("a", tuple(prompt), 99).after(text[:resumed]), text[resumed:])
    assert set(without.counts.tokens_U.tolist()) == set(text), "no other penalty sees the prompt"


def test_counts_of_nothing():
    counts = TokenCounts((), ())
    assert counts.tokens_U.shape == counts.counts_U.shape == (0,)
    counts.add(4)
    assert (counts.tokens_U.tolist(), counts.counts_U.tolist()) == ([4], [1])
    assert counts.counts_U.dtype == np.int64


# --- log-probabilities of the prompt -----------------------------------------------------------------------------------------


def of(position: int) -> TokenLogprobs:
    return TokenLogprobs(position, -float(position))


@settings(deadline=None)
@given(data=st.data(), length=st.integers(1, 20), resumed=st.integers(0, 5))
def test_each_is_delivered_once_in_order(data: st.DataObject, length: int, resumed: int):
    """Prompts are computed again from the start at any time, steps are repeated, and requests move with what is delivered."""
    request = Request("a", tuple(range(length + resumed)), 9, resumed=resumed, prompt_logprobs=2)
    delivered: list[TokenLogprobs] = []
    entry, at, setbacks = TrackedRequest(request), 0, data.draw(st.integers(0, 5))
    while at < len(request.prompt):
        end = data.draw(st.integers(at + 1, len(request.prompt)))
        rows = entry.prompt_rows(at, end)
        assert rows == entry.prompt_rows(at, end), "asking changes nothing"
        assert set(rows) <= set(range(at, end))
        at = end
        what = data.draw(st.sampled_from(["counts", "counts twice", "is lost"][: 2 + (setbacks > 0)]))
        if what != "is lost":
            for _ in range(1 + (what == "counts twice")):
                entry.add_prompt_logprobs(rows, [of(position + 1) for position in rows])
        if data.draw(st.booleans()):
            delivered += entry.take_prompt_logprobs()
        then = data.draw(st.sampled_from(["go on", "preempted", "moved"][: 1 + 2 * (setbacks > 0)]))
        if then == "moved":
            entry = TrackedRequest(entry.as_delivered)
        if what == "is lost" or then != "go on":
            at, setbacks = 0, setbacks - 1
    delivered += entry.take_prompt_logprobs()
    assert [found.token for found in delivered] == list(range(1, length)), "but for the first, and for what it generated"
    assert not entry.prompt_rows(0, len(request.prompt))


def test_a_request_with_a_delivered_token_has_had_them():
    request = Request("a", (1, 2, 3), 9, prompt_logprobs=2)
    assert request.after((), 1).prompt_logprobs_delivered == 1
    assert request.after((), 1).after((), 1).prompt_logprobs_delivered == 2
    moved = request.after((), 1).after((7,), 2)
    assert (moved.prompt_logprobs, moved.prompt_logprobs_delivered, moved.resumed) == (None, 0, 1)
    assert not TrackedRequest(moved).prompt_rows(0, 4)
    assert not TrackedRequest(Request("a", (1, 2, 3), 9)).prompt_rows(0, 3), "who doesn't ask gets none"


@pytest.mark.parametrize("given_", [-1, 4])
def test_more_cannot_be_delivered_than_there_are(given_: int):
    with pytest.raises(ConfigError, match=f"prompt_logprobs_delivered={given_}; allowed: 0 to the prompt's length"):
        Request("a", (1, 2, 3), 9, prompt_logprobs=1, prompt_logprobs_delivered=given_)
