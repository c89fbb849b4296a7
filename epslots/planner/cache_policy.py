"""Eviction policies: which resident expert is given up first. To add one, write a function and enter it in ``POLICIES``.

A policy scores the experts of one layer from their past uses (``use_history.py``); the lowest score is evicted first, ties by
expert id. It is a pure function of a layer's ``UseHistory``, so that all ranks evict alike. Users pass a name or their own
function; ``resolve_policy`` checks both. How scores become evictions: ``evictions.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.planner.use_history import STEP_BITS, UseHistory, expected_use

Policy = Callable[[UseHistory], IntArray]
Scores = Callable[[], IntArray]
"""A policy's scores of a layer's experts as they are now, int64 [E]; called only where needed, since it takes time."""
AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


def without_learning(policy: AnyPolicy) -> AnyPolicy:
    """Mark a policy that reads only the fields that each use enters: ``note_use`` then learns nothing for it."""
    setattr(policy, "learns", False)  # noqa: B010 - a function to mypy
    return policy


@without_learning
def lru(history: UseHistory) -> IntArray:
    """Evict the least recently used expert first."""
    return history.last_use


@without_learning
def lfu(history: UseHistory) -> IntArray:
    """Evict the least frequently used expert first; uses age by 1/128 a step (decay 0.992)."""
    return (history.frequent << STEP_BITS) + history.last_use


@without_learning
def lrfu(history: UseHistory) -> IntArray:
    """Evict by frequency, lifted by a burst of recent uses: two decay rates summed.

    The idea is LRFU's (Lee et al., IEEE Trans. Computers 2001), whose single decay rate spans the range from LRU to LFU.
    """
    return ((history.frequent + (history.recent << 1)) << STEP_BITS) + history.last_use


def adaptive(history: UseHistory) -> IntArray:
    """Evict the expert with the least expected use first (``use_history.expected_use``)."""
    return expected_use(history)


POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "lrfu": lrfu, "adaptive": adaptive}
DEFAULT_POLICY = "adaptive"


def own_name(policy: Policy) -> str | None:
    """The name of one of ``POLICIES``; None of any other function."""
    return next((name for name, known in POLICIES.items() if known is policy), None)


def learns(policy: Policy) -> bool:
    """Whether a policy may read what ``note_use`` learns from the number of slots; marked policies don't."""
    return getattr(policy, "learns", True) is True


def policy_name(policy: str | Policy) -> str:
    """A policy's identity as text: its name, and for a function a checksum of its code."""
    if isinstance(policy, str):
        return policy
    code = getattr(policy, "__code__", None)
    name = f"{getattr(policy, '__module__', '')}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
    return name if code is None else f"{name} ({zlib.crc32(code.co_code + repr(code.co_consts).encode()):08x})"


def resolve_policy(policy: str | Policy) -> Policy:
    """The policy of a name, or the user's own function after a trial call.

    A function takes a layer's ``UseHistory`` to int64 scores [E].

    Raises:
        ConfigError: no policy has that name, or the function returns anything else.
    """
    if callable(policy):
        scores = policy(UseHistory.empty(1, 4).layer(0, 4))
        valid = isinstance(scores, np.ndarray) and scores.dtype == np.int64 and scores.shape == (4,)
        if not valid or not scores.flags.c_contiguous:
            made = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, np.ndarray) else type(scores).__name__
            raise ConfigError(f"policy={policy_name(policy)}: for 4 experts it returns {made}; allowed: contiguous int64 [4]")
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r}: allowed: {', '.join(POLICIES)}, or a function of a UseHistory")
    return POLICIES[policy]
