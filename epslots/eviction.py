"""Which resident expert to give up: pure functions of each expert's past uses.

A policy scores the experts of one layer; the lowest score is evicted first, ties by expert id. Scores are integers made
by shifts and adds, so that numpy on the host, a kernel on the device and the simulator agree to the bit.

The history behind them is kept by whoever runs the cache (``record_use`` once per step and layer):

    last_use   the layer's step number of the expert's last use, 0 = never
    recent     uses, each step losing 1/16 of the sum: what the last dozen steps wanted
    frequent   uses, each step losing 1/128: what the text at hand wants

Sources: LRU and LFU with exponential ageing are textbook; summing two decay rates is the idea of LRFU (Lee et al., IEEE
Trans. Computers 2001), whose single decay rate spans the range between LRU and LFU.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.errors import ConfigError

IntArray = NDArray[np.int64]

# One use, in fixed point.
USE = 1 << 16
RECENT_SHIFT = 4
FREQUENT_SHIFT = 7
# Ties on a frequency go to the more recent: the low bits of a score hold the step number.
_STEP_BITS = 32


@dataclass(frozen=True)
class UseHistory:
    """Past uses of every expert: three int64 arrays of one shape, [layers, experts] or a row of it."""

    last_use: IntArray
    recent: IntArray
    frequent: IntArray

    @classmethod
    def empty(cls, layers: int, experts: int) -> UseHistory:
        return cls(*(np.zeros((layers, experts), np.int64) for _ in range(3)))

    def layer(self, layer: int, experts: int) -> UseHistory:
        """The row of one layer with ``experts`` experts, as views."""
        return UseHistory(*(a[layer, :experts] for a in (self.last_use, self.recent, self.frequent)))


def record_use(history: UseHistory, used_E: NDArray[np.bool_], step: int) -> None:
    """Enter one step of one layer into ``history`` (a row), in place. ``step`` counts from 1."""
    history.recent[:] -= history.recent >> RECENT_SHIFT
    history.frequent[:] -= history.frequent >> FREQUENT_SHIFT
    history.recent[used_E] += USE
    history.frequent[used_E] += USE
    history.last_use[used_E] = step


def lru(history: UseHistory) -> IntArray:
    """Least recently used goes first."""
    return history.last_use


def lfu(history: UseHistory) -> IntArray:
    """Least frequently used goes first, uses ageing by 1/128 a step (decay 0.992)."""
    return (history.frequent << _STEP_BITS) + history.last_use


def lrfu(history: UseHistory) -> IntArray:
    """Least recent *and* frequent goes first: the long-run frequency, lifted by a burst of recent uses."""
    return ((history.frequent + (history.recent << 1)) << _STEP_BITS) + history.last_use


Policy = Callable[[UseHistory], IntArray]
POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "lrfu": lrfu}
DEFAULT_POLICY = "lrfu"


def policy_name(policy: str | Policy) -> str:
    """What tells a policy from others: its name, and of a function its code as well."""
    if isinstance(policy, str):
        return policy
    code = getattr(policy, "__code__", None)
    name = f"{getattr(policy, '__module__', '')}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
    return name if code is None else f"{name} ({zlib.crc32(code.co_code + repr(code.co_consts).encode()):08x})"


def resolve_policy(policy: str | Policy) -> Policy:
    """A policy by name, or the user's own function of a ``UseHistory`` row [experts] to int64 scores [experts].

    Raises:
        ConfigError: no policy of that name.
    """
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r}: allowed: {', '.join(POLICIES)}, or a function of a UseHistory")
    return POLICIES[policy]
