"""A request's choice of tokens, and its random numbers: a pure function of its seed and of the token's position.

A request's tokens therefore don't depend on its batch mates, on its rank, or on how often it was moved or a step of it
repeated: after an interruption, the same numbers are drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.errors import ConfigError, shown

SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the model's logits; the settings apply in the order of this list.

    The order and the formulas are vLLM's: penalties and biases change the logits of greedy choice, too.

    Attributes:
        min_tokens: stop tokens aren't chosen before this many new tokens, unless the grammar allows no other.
        logit_bias: (token, number added to its logit), each token once.
        repetition_penalty: logits of tokens in the prompt or the text so far are divided by it, negative ones multiplied
            (Keskar et al., "CTRL", 2019).
        frequency_penalty: subtracted for each time that the text so far has the token (OpenAI's API).
        presence_penalty: subtracted once if it does.
        temperature: 0 takes the likeliest token and ignores the settings below; a higher one makes the choice more even.
        min_p: tokens less likely than this share of the likeliest one's probability aren't drawn (Nguyen et al., 2024).
        top_k: draw from this many likeliest tokens; 0 = all.
        top_p: of those, draw from the likeliest that together hold this share of their probability.
        seed: of the random numbers.

    Raises:
        ConfigError: a number is not one of those allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            number = allowed.check(name, getattr(self, name))
            object.__setattr__(self, name, number)
        for name, limit in (("top_k", None), ("seed", SEEDS), ("min_tokens", None)):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < 0 or (limit is not None and given >= limit):
                raise ConfigError(f"{name}={shown(given)}; allowed: an int, {_INTEGERS[name]}")
        _check_bias(self.logit_bias)


MOST_BIASES = 1024
"""Tokens in ``logit_bias``."""
_MOST_BIAS = 1e6
_INTEGERS = {"top_k": "at least 0 (0: all tokens)", "seed": "from 0 to 2**63 - 1", "min_tokens": "at least 0"}


@dataclass(frozen=True)
class _Range:
    """The numbers that a setting may have."""

    low: float
    high: float
    words: str
    open_low: bool = False

    def check(self, name: str, given: object) -> float:
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not self.low <= given <= self.high or (self.open_low and given == self.low):  # type: ignore[operator]
            raise ConfigError(f"{name}={shown(given)}; allowed: {self.words}")
        return float(given)  # type: ignore[arg-type]


_RANGES = {
    "temperature": _Range(0, sys.float_info.max, "a finite number, at least 0"),
    "top_p": _Range(0, 1, "a number over 0, up to 1", open_low=True),
    "min_p": _Range(0, 1, "a number from 0 to 1"),
    "presence_penalty": _Range(-2, 2, "a number from -2 to 2"),
    "frequency_penalty": _Range(-2, 2, "a number from -2 to 2"),
    "repetition_penalty": _Range(0, 1e3, "a number over 0, up to 1000", open_low=True),
}


def _check_bias(given: object) -> None:
    allowed = f"allowed: pairs of a token and a number from -{_MOST_BIAS:g} to {_MOST_BIAS:g}, at most {MOST_BIASES}"
    good = isinstance(given, tuple) and len(given) <= MOST_BIASES
    for pair in given if good else ():  # type: ignore[attr-defined]
        token, bias = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= _MOST_BIAS
        good &= type(token) is int and token >= 0 and number
    if not good or len({token for token, _ in given}) < len(given):  # type: ignore[attr-defined,arg-type]
        raise ConfigError(f"logit_bias={shown(given)}; {allowed}, each token once")


GREEDY = Sampling()


def uniform_numbers(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """For each seed and position a number in [0, 1), a multiple of 2**-53.

    Number ``position`` of the SplitMix64 generator (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
    OOPSLA 2014). It hashes a counter, so that any of its numbers takes equally long. The counter starts at a hash of the seed:
    small seeds (0, 1, 2) and positions would form a lattice.
    """
    starts = _mix(np.array(seeds, dtype=np.uint64) + _STRIDE)
    hashes = _mix(starts + _STRIDE * np.array(positions, dtype=np.uint64))
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


_STRIDE = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: each bit of ``z`` changes each bit of the result with probability one half."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several choices of a prompt: ``seed`` itself for choice 0.

    For choice i it is half of number -i of the seed's generator (``uniform_numbers``), whose numbers from 0 on are drawn for
    tokens. So the choices of one prompt, and of prompts with other seeds, are drawn independently of each other.
    """
    if choice == 0:
        return seed
    start = _mix(np.array([seed], dtype=np.uint64) + _STRIDE)
    return int(_mix(start - _STRIDE * np.array([choice], dtype=np.uint64))[0]) >> 1
