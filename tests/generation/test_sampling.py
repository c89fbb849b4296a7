"""Tokens are drawn as often as they are likely, from those that the filters keep, by numbers of the request's own."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.generation import next_token
from epslots.generation.next_token import choose
from epslots.generation.sampling import GREEDY, SEEDS, Sampling, uniform_numbers
from epslots.generation.tracked_request import NO_TOKEN
from tests.support.choices import RequestAt, next_tokens

V = 40
PLAIN = Sampling(1.0)


def tokens_at(logits: Sequence[float] | torch.Tensor, sampling: Sampling, positions: Sequence[int]) -> list[int]:
    """Tokens of the same logits at many positions."""
    rows = torch.as_tensor(logits, dtype=torch.float32).repeat(len(positions), 1)
    return next_tokens(rows, [sampling] * len(positions), positions).tolist()


def logits_of(seed: int, rows: int = 1, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def kept(logits: Sequence[float], sampling: Sampling) -> tuple[dict[int, float], float]:
    """The tokens that the filters keep, and their weights: one by one, as documented.

    Also how far the nearest token is from being kept or dropped, in probability: what the last bits decide isn't tested.
    """
    most = max(logits)
    weights = [math.exp((logit - most) / sampling.temperature) for logit in logits]
    tokens = list(range(len(logits)))
    margin = 1.0
    if sampling.min_p:
        margin = min((abs(weights[token] - sampling.min_p) for token in tokens if logits[token] < most), default=1.0)
        tokens = [token for token in tokens if weights[token] >= sampling.min_p]
    if 0 < sampling.top_k < len(logits):
        least = sorted(logits, reverse=True)[sampling.top_k - 1]
        tokens = [token for token in tokens if logits[token] >= least]
    if sampling.top_p < 1:
        total = math.fsum(weights[token] for token in tokens)
        likelier = {t: math.fsum(weights[other] for other in tokens if logits[other] > logits[t]) for t in tokens}
        margin = min(margin, *(abs(likelier[token] / total - sampling.top_p) for token in tokens))
        tokens = [token for token in tokens if likelier[token] < sampling.top_p * total]
    return {token: weights[token] for token in tokens}, margin


# --- numbers -----------------------------------------------------------------------------------------------------------------


def splitmix64(state: int) -> int:
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.lists(st.tuples(st.integers(0, SEEDS - 1), st.integers(0, 2**40)), max_size=20))
def test_numbers_are_those_of_splitmix64(pairs: list[tuple[int, int]]):
    expected = []
    for seed, position in pairs:
        start = splitmix64(seed) + (position - 1) * 0x9E3779B97F4A7C15
        expected.append((splitmix64(start) >> 11) / 2**53)
    numbers = uniform_numbers([seed for seed, _ in pairs], [position for _, position in pairs])
    assert numbers.tolist() == expected
    assert all(0 <= number < 1 for number in expected)


def test_known_numbers():
    """Other numbers would change the tokens of every request there is."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "the generator's first number from 0, as published"
    assert uniform_numbers([0, 1, 2**63 - 1], [0, 1, 7]).tolist() == [
        0.28176129772258496,
        0.36818951565166946,
        0.9058234958246422,
    ]


@pytest.mark.parametrize("of", ["positions", "seeds"])
def test_numbers_are_even_and_unrelated(of: str):
    count = 100_000
    line, constant = list(range(count)), [5] * count
    numbers = uniform_numbers(constant, line) if of == "positions" else uniform_numbers(line, constant)
    cells = np.bincount((numbers * 100).astype(int), minlength=100)
    assert cells.sum() == count
    assert ((cells - count / 100) ** 2 / (count / 100)).sum() < 149  # chi-square, 99 degrees of freedom: p = 0.001
    for distance in (1, 2, 64):
        assert abs(np.corrcoef(numbers[:-distance], numbers[distance:])[0, 1]) < 0.012
    other = uniform_numbers([6] * count, line) if of == "positions" else uniform_numbers(line, [6] * count)
    assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.012


# --- the likeliest -----------------------------------------------------------------------------------------------------------


def test_temperature_0_is_argmax():
    rows = torch.cat([logits_of(1, 20), torch.zeros(1, V)])
    greedy = Sampling(top_k=3, top_p=0.5, seed=9)
    assert torch.equal(next_tokens(rows, [greedy] * 21, range(21)), rows.argmax(dim=-1))
    assert next_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 3.0]]), [Sampling()] * 2, [0, 0]).tolist() == [1, 0]
    assert next_tokens(rows[:0], [], []).shape == (0,)


def test_greedy_rows_cost_argmax_alone(monkeypatch: pytest.MonkeyPatch):
    for name in ("to_device", "_draw", "edit_logits", "score"):
        monkeypatch.setattr(next_token, name, None)
    assert next_tokens(logits_of(1, 3), [Sampling()] * 3, [0, 1, 2]).dtype == torch.int64


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sampling=st.sampled_from(
        [
            Sampling(1e-300),
            Sampling(1e-9),
            Sampling(1.0, top_k=1),
            Sampling(1e300, top_k=1),
            Sampling(0.7, top_p=5e-324),
            Sampling(0.7, top_k=5, top_p=1e-9),
            Sampling(0.7, min_p=1.0),
        ]
    ),
)
def test_what_amounts_to_the_likeliest(seed: int, sampling: Sampling):
    logits = logits_of(seed)[0]
    assert tokens_at(logits, replace(sampling, seed=seed), [0, 1, 2]) == [int(logits.argmax())] * 3


# --- drawing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6, seed=1),
        Sampling(2.5, seed=2),
        Sampling(1.3, top_k=5, seed=3),
        Sampling(0.9, top_p=0.8, seed=4),
        Sampling(1.0, top_k=12, top_p=0.9, seed=5),
        Sampling(1.2, min_p=0.05, seed=8),
        Sampling(1.0, top_k=12, top_p=0.9, min_p=0.1, seed=9),
        Sampling(1.0, top_k=V + 3, seed=6),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling):
    logits = logits_of(7)[0]
    count = 20_000
    drawn = np.bincount(tokens_at(logits, sampling, range(count)), minlength=V)
    expected = torch.softmax(logits.double() / sampling.temperature, dim=-1).numpy()
    tokens, _ = kept(logits.tolist(), sampling)
    allowed = np.isin(np.arange(V), list(tokens))
    assert drawn[~allowed].sum() == 0
    expected = np.where(allowed, expected, 0) / expected[allowed].sum() * count
    often = expected >= 5
    pearson = ((drawn - expected)[often] ** 2 / expected[often]).sum()
    freedom = max(1, often.sum() - 1)
    assert pearson < freedom + 4 * math.sqrt(2 * freedom)
    assert drawn[~often].sum() < expected[~often].sum() + 4 * math.sqrt(expected[~often].sum()) + 1


def test_unlikely_tokens_of_a_large_vocabulary_get_their_share():
    """A million tokens alike beside one three times as likely: sums in float32 would round a share by up to a tenth."""
    count = 2**20
    logits = torch.full((1, count), math.log(0.3))
    logits[0, 0] = 0.0
    share = logits[0, 1].exp().item()
    total = 1 + (count - 1) * share
    for token in range(count - 1, count - 1000, -50):
        for part in (0.02, 0.98):
            assert drawn_with(logits, (1 + (token - 1 + part) * share) / total) == token
    assert drawn_with(logits, 0.0) == 0
    assert drawn_with(logits, 1 - 2**-53) == count - 1


@pytest.mark.parametrize("jitter", [1e-9, -1e-9])
def test_sums_rounded_apart_choose_no_dropped_token(jitter: float, monkeypatch: pytest.MonkeyPatch):
    """As a scan in parallel may round: the sums at tokens without weight differ from the sum before."""
    exact = torch.Tensor.cumsum

    def rounded(sums: torch.Tensor, **settings: Any) -> torch.Tensor:
        return exact(sums, **settings) + jitter * (sums == 0)

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 2.0]])
    for number, token in ((0.0, 1), (0.5 - 1e-12, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert drawn_with(logits, number, Sampling(1.0, top_k=2)) == token


def drawn_with(logits: torch.Tensor, number: float, sampling: Sampling = PLAIN) -> int:
    """The token that a random number falls to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "uniform_numbers", lambda seeds, positions: np.array([number]))
        return int(next_tokens(logits, [sampling], [0])[0])


logit = st.floats(-30, 30, width=32)
filters = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5, 20.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 9, 100]),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.95, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.4, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.one_of(logit, st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 3.0])), min_size=1, max_size=12),
    sampling=filters,
    number=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
)
def test_a_number_falls_to_the_token_of_its_interval(logits: list[float], sampling: Sampling, number: float):
    assume(max(logits) > -math.inf)
    tokens, margin = kept(logits, sampling)
    assume(margin > 1e-5)
    token = drawn_with(torch.tensor([logits]), number, sampling)
    assert token in tokens
    assert logits[token] > -math.inf
    total = math.fsum(tokens.values())
    start = math.fsum(weight for other, weight in tokens.items() if other < token) / total
    assert start - 1e-5 <= number <= start + tokens[token] / total + 1e-5


def test_equally_likely_tokens_are_kept_or_dropped_together():
    logits = [1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]
    for sampling, tokens in (
        (Sampling(1.0, top_k=1), {1, 3}),
        (Sampling(1.0, top_k=3), {1, 2, 3, 4, 5}),
        (Sampling(1.0, top_p=0.1), {1, 3}),
        (Sampling(1.0, top_p=0.7), {1, 2, 3, 4, 5}),
    ):
        assert set(tokens_at(logits, sampling, range(300))) == tokens


@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_a_nucleus_is_found_however_wide(spread: float, logprobs: int | None):
    """Few of the likeliest tokens are looked through first; where these aren't enough, all are, and nothing else changes."""
    logits = logits_of(7, rows=3, spread=spread)
    samplings = [Sampling(1.0, top_p=0.9, seed=1), Sampling(1.0, top_k=20, seed=2), GREEDY]
    entries = [RequestAt(sampling, 5, logprobs=logprobs) for sampling in samplings]
    exact = choose(logits, entries, nucleus_ranks=V)
    for ranks in (1, 4, V + 5):
        found = choose(logits, entries, nucleus_ranks=ranks)
        assert found.read() == exact.read()
        assert (int(found.tokens_N[0]) == -2) is (ranks < V and spread < 1)


def test_top_p_is_of_what_min_p_leaves():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    assert set(tokens_at(logits, Sampling(1.0, min_p=0.49), range(300))) == {0, 1, 2}
    assert set(tokens_at(logits, Sampling(1.0, min_p=0.51), range(300))) == {0, 1}
    assert set(tokens_at(logits, Sampling(1.0, min_p=0.51, top_p=0.56), range(300))) == {0}, "4/7 of the two"
    assert set(tokens_at(logits, Sampling(1.0, min_p=0.51, top_p=0.58), range(300))) == {0, 1}
    assert set(tokens_at(logits, Sampling(1.0, min_p=0.51, top_k=1), range(300))) == {0}


def test_min_p_follows_the_temperature():
    """A share of the probabilities that are drawn by, as in vLLM: a high temperature keeps more."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    assert set(tokens_at(logits, Sampling(0.5, min_p=0.3), range(300))) == {0}, "0.25 and 0.03 of the likeliest"
    assert set(tokens_at(logits, Sampling(1.0, min_p=0.3), range(300))) == {0, 1}, "0.5 and 0.17"
    assert set(tokens_at(logits, Sampling(2.0, min_p=0.3), range(300))) == {0, 1, 2}, "0.71 and 0.41"


def test_top_p_is_of_what_top_k_leaves():
    uneven = torch.tensor([0.46, *[0.06] * 9]).log()
    assert set(tokens_at(uneven, Sampling(1.0, top_p=0.5), range(300))) == set(range(10))
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(tokens_at(logits, Sampling(1.0, top_p=0.6), range(300))) == {0, 1}
    assert set(tokens_at(logits, Sampling(1.0, top_k=2, top_p=0.56), range(300))) == {0}, "4/7 of the two"
    assert set(tokens_at(logits, Sampling(1.0, top_k=2, top_p=0.58), range(300))) == {0, 1}


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5), Sampling(1.0, 3, 0.5)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_give_no_token(sampling: Sampling, value: float):
    """Nor do they change the rows beside them. A token that can't come, at -inf, is nothing out of the ordinary."""
    rows = torch.cat([logits_of(3, 2), torch.full((1, V), value), logits_of(4)])
    rows[1, 5] = value
    tokens = next_tokens(rows, [sampling] * 4, range(4)).tolist()
    assert tokens[2] == NO_TOKEN
    assert 0 <= tokens[1] < V and tokens[1] != 5 if value == -math.inf else tokens[1] == NO_TOKEN
    assert [tokens[0], tokens[3]] == next_tokens(rows[[0, 3]], [sampling] * 2, [0, 3]).tolist()


# --- rows by themselves ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    samplings=st.lists(
        st.one_of(filters, st.just(Sampling())).flatmap(
            lambda s: st.integers(0, SEEDS - 1).map(lambda seed: replace(s, seed=seed))
        ),
        min_size=1,
        max_size=8,
    ),
    part=st.sampled_from([1, 2 * V, 3 * V + 1, 10**6]),
    shuffle=st.randoms(use_true_random=False),
)
def test_batch_mates_and_their_order_change_nothing(samplings: list[Sampling], part: int, shuffle: random.Random):
    count = len(samplings)
    logits, positions = logits_of(count, count), [11 * row for row in range(count)]
    alone = [next_tokens(logits[[row]], [samplings[row]], [positions[row]]).item() for row in range(count)]
    order = shuffle.sample(range(count), count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "PART_LOGITS", part)
        together = next_tokens(logits[order], [samplings[row] for row in order], [positions[row] for row in order])
    assert together.tolist() == [alone[row] for row in order]


def test_the_last_bits_of_logits_hardly_ever_matter():
    """Two tokens as likely up to rounding, and a number far from every border."""
    close = torch.tensor([[1.0, 0.0, 1.0]])
    for nudge in (-1e-6, 1e-6):
        nudged = close + torch.tensor([[0.0, 0.0, nudge]])
        for number, token in ((0.2, 0), (0.5, 1), (0.8, 2)):
            assert drawn_with(nudged, number) == token


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1; allowed: a finite number, at least 0"),
        ({"temperature": math.inf}, r"temperature=inf"),
        ({"temperature": math.nan}, r"temperature=nan"),
        ({"temperature": 10**400}, r"temperature=1000"),
        ({"temperature": "1"}, r"temperature='1'"),
        ({"temperature": True}, r"temperature=True"),
        ({"temperature": None}, r"temperature=None"),
        ({"top_p": 0}, r"top_p=0; allowed: a number over 0, up to 1"),
        ({"top_p": 1.01}, r"top_p=1.01"),
        ({"top_p": math.nan}, r"top_p=nan"),
        ({"top_p": True}, r"top_p=True"),
        ({"top_k": -1}, r"top_k=-1; allowed: an int, at least 0"),
        ({"top_k": 2.0}, r"top_k=2.0"),
        ({"top_k": False}, r"top_k=False"),
        ({"seed": -1}, r"seed=-1; allowed: an int, from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, r"seed=9223372036854775808"),
        ({"seed": 0.0}, r"seed=0.0"),
        ({"seed": True}, r"seed=True"),
        ({"min_p": -0.1}, r"min_p=-0.1; allowed: a number from 0 to 1"),
        ({"min_p": 1.01}, r"min_p=1.01"),
        ({"min_p": math.nan}, r"min_p=nan"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1; allowed: a number from -2 to 2"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty=-2.1; allowed: a number from -2 to 2"),
        ({"frequency_penalty": True}, r"frequency_penalty=True"),
        ({"repetition_penalty": 0}, r"repetition_penalty=0; allowed: a number over 0, up to 1000"),
        ({"repetition_penalty": 1000.1}, r"repetition_penalty=1000.1"),
        ({"repetition_penalty": math.nan}, r"repetition_penalty=nan"),
        ({"min_tokens": -1}, r"min_tokens=-1; allowed: an int, at least 0"),
        ({"min_tokens": 1.0}, r"min_tokens=1.0"),
        ({"min_tokens": True}, r"min_tokens=True"),
        ({"logit_bias": {3: 1.0}}, r"logit_bias=\{3: 1.0\}; allowed: pairs of a token and a number from -1e\+06 to 1e\+06"),
        ({"logit_bias": ((3, 1e6), (3, 1.0))}, r"logit_bias=.*each token once"),
        ({"logit_bias": ((-1, 1.0),)}, r"logit_bias=\(\(-1, 1.0\),\)"),
        ({"logit_bias": ((True, 1.0),)}, r"logit_bias="),
        ({"logit_bias": ((3, 1.1e6),)}, r"logit_bias="),
        ({"logit_bias": ((3, math.nan),)}, r"logit_bias="),
        ({"logit_bias": ((3, "1"),)}, r"logit_bias="),
        ({"logit_bias": (3,)}, r"logit_bias="),
        ({"logit_bias": tuple((token, 1.0) for token in range(1025))}, r"at most 1024"),
    ],
)
def test_bad_settings(given_: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Sampling(**given_)


def test_settings_at_their_limits():
    assert Sampling(1, 10**30, 1, 2**63 - 1) == Sampling(1.0, 10**30, 1.0, 2**63 - 1)
    assert isinstance(Sampling(1).temperature, float)
    extreme = Sampling(1.7e308, 10**30, 1, 2**63 - 1)
    assert len(set(tokens_at([0.0, 5.0, -math.inf], extreme, range(100)))) == 2, "even, but for what is impossible"
