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
    """How the next token is drawn: from the ``top_k`` likeliest, and of those from the likeliest that hold ``top_p``.

    Raises:
        ConfigError: a number is not one of those allowed.
    """

    temperature: float = 0.0
    """0 takes the likeliest token and ignores the other settings; above 0, a higher one makes the choice more even."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    """A share of the probability that ``top_k`` leaves."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("temperature", sys.float_info.max), ("top_p", 1.0)):
            given = getattr(self, name)
            number = isinstance(given, int | float) and not isinstance(given, bool)
            if not number or not 0 <= given <= most or (name == "top_p" and given == 0):
                allowed = "a finite number, at least 0" if name == "temperature" else "a number over 0, up to 1"
                raise ConfigError(f"{name}={shown(given)}; allowed: {allowed}")
            object.__setattr__(self, name, float(given))
        for name, allowed in (("top_k", "an int, at least 0 (0: all tokens)"), ("seed", "an int from 0 to 2**63 - 1")):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < 0 or (name == "seed" and given >= SEEDS):
                raise ConfigError(f"{name}={shown(given)}; allowed: {allowed}")


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
