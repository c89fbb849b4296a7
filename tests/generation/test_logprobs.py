"""Log-probabilities are log_softmax of the model's own logits, against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.generation import next_token
from epslots.generation.next_token import choose, prompt_logprobs
from epslots.generation.requests import MOST_LOGPROBS, Request, TokenLogprobs
from epslots.generation.sampling import Sampling
from epslots.generation.tracked_request import TrackedRequest


def expected_of(logits: Sequence[float], token: int, top: int) -> TokenLogprobs:
    numbers = np.array(logits, np.float64)
    logprobs = numbers - numbers.max() - math.log(np.exp(numbers - numbers.max()).sum())
    order = sorted(range(len(logits)), key=lambda other: (-logits[other], other))
    return TokenLogprobs(token, logprobs[token], tuple((other, logprobs[other]) for other in order[:top]))


def assert_equal(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    """The same tokens in the same order; numbers up to rounding."""
    assert (found.token, [t for t, _ in found.top]) == (expected.token, [t for t, _ in expected.top])
    numbers = [found.logprob, *(p for _, p in found.top)]
    np.testing.assert_allclose(numbers, [expected.logprob, *(p for _, p in expected.top)], rtol=1e-5, atol=1e-5)


def entry_of(top: int | None, sampling: Sampling = Sampling()) -> TrackedRequest:  # noqa: B008
    return TrackedRequest(Request("a", (0, 3), 9, sampling=sampling, logprobs=top))


few_values = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 7.5])
rows = st.integers(1, 25).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(few_values, st.floats(-1e4, 1e4, width=32)), min_size=size, max_size=size).filter(
            lambda row: max(row) > -math.inf
        ),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=60, deadline=None)
@given(rows=rows, tops=st.lists(st.sampled_from([None, 0, 1, 3, MOST_LOGPROBS]), min_size=5, max_size=5))
def test_logprobs_of_tokens_and_of_the_likeliest(rows: list[list[float]], tops: list[int | None]):
    """Of equally likely tokens the lower id comes first, also among 0.0 and -0.0."""
    choices = choose(torch.tensor(rows), [entry_of(top) for top in tops[: len(rows)]]).read()
    for row, top, choice in zip(rows, tops, choices, strict=False):
        if top is None:
            assert choice.logprobs is None
        else:
            assert choice.logprobs is not None
            assert_equal(choice.logprobs, expected_of(row, choice.token, top))


def test_no_setting_changes_them():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(
        2.0, 3, min_p=0.1, repetition_penalty=3.0, presence_penalty=1.0, logit_bias=((4, 50.0), (2, -50.0)), seed=5
    )
    (choice,) = choose(logits, [entry_of(4, sampling)]).read()
    assert choice.token == 4, "by its bias"
    assert choice.logprobs is not None
    assert_equal(choice.logprobs, expected_of(logits[0].tolist(), 4, 4))


def test_only_rows_that_ask_are_scored(monkeypatch: pytest.MonkeyPatch):
    shapes, score = [], next_token.score
    monkeypatch.setattr(next_token, "score", lambda logits, *rest: (shapes.append(logits.shape[0]), score(logits, *rest))[1])
    logits = torch.randn(9, 30)
    choose(logits, [entry_of(None)] * 9)
    assert shapes == []
    choose(logits, [None, *[entry_of(2), entry_of(None)] * 4])
    assert shapes == [4]
    monkeypatch.setattr(next_token, "PART_LOGITS", 60)
    choose(logits, [None, *[entry_of(2), entry_of(None)] * 4])
    assert shapes == [4, 2, 2]


def test_a_row_without_a_token_has_no_score():
    """It ends its request, and spoils no other's."""
    logits = torch.zeros(2, 30)
    logits[1, 4] = math.nan
    found = choose(logits, [entry_of(2), entry_of(2)]).read()
    assert found[1].token == -1
    assert found[0].logprobs is not None
    assert_equal(found[0].logprobs, expected_of(logits[0].tolist(), 0, 2))


@pytest.mark.parametrize("part", [1, 70, 10**6])
@pytest.mark.parametrize("top", [0, 3, MOST_LOGPROBS])
def test_logprobs_of_given_tokens(part: int, top: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(next_token, "PART_LOGITS", part)
    logits = 3 * torch.randn(11, 35, generator=torch.Generator().manual_seed(1))
    tokens = [5, 34, 0, 7, 7, 7, 1, 2, 3, 4, 33]
    found = prompt_logprobs(logits, tokens, top)
    assert len(found) == 11
    for logprobs, row, token in zip(found, logits.tolist(), tokens, strict=True):
        assert_equal(logprobs, expected_of(row, token, top))
    assert prompt_logprobs(logits[:0], (), top) == ()


def test_a_small_vocabulary_has_fewer_likeliest_tokens():
    logits = torch.tensor([[1.0, 3.0, 3.0]])
    (choice,) = choose(logits, [entry_of(MOST_LOGPROBS)]).read()
    assert choice.logprobs is not None and [token for token, _ in choice.logprobs.top] == [1, 2, 0]
    assert [token for token, _ in prompt_logprobs(logits, [2], MOST_LOGPROBS)[0].top] == [1, 2, 0]
