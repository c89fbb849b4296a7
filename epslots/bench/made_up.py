"""Made-up traffic of one layer: choices in each step, int16 [steps, k], each pattern with one reason for reuse.

Where steps differ in how much they choose, rows are as long as the longest needs, and end in -1.

Legend of shape suffixes: T steps, E experts, K choices of a step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import FloatArray

Ids = NDArray[np.int16]
Pattern = Callable[[np.random.Generator, int, int, int], Ids]
"""Called with a generator, experts, k and steps."""


def static(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Zipf: what is popular stays so."""
    return _draw(random, np.broadcast_to(_zipf(random, experts, 1.0), (steps, experts)), top_k)


def drifting(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Each expert's popularity (its logarithm) wanders by itself and comes back within some thousand steps."""
    log_TE = np.empty((steps, experts))
    now_E = 1.2 * random.normal(size=experts)
    for step in range(steps):
        log_TE[step] = now_E
        now_E = 0.9992 * now_E + 0.05 * random.normal(size=experts)
    return _draw(random, np.exp(log_TE), top_k)


def topics(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Five topics, each with a Zipf of its own; another one every 150 steps."""
    share_SE = np.array([_zipf(random, experts, 1.3) for _ in range(5)])
    return _draw(random, share_SE[random.integers(5, size=steps // 150 + 1).repeat(150)[:steps]], top_k)


def in_turn(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Six tenths of the experts, one after the other, again and again: as when a model repeats itself."""
    several = random.permutation(experts)[: max(top_k, int(0.6 * experts))]
    return several[np.arange(steps * top_k).reshape(steps, top_k) % len(several)].astype(np.int16)


def scans(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Zipf, and in every third stretch of 150 steps one choice that goes through all experts."""
    ids_TK = static(random, experts, top_k, steps)
    scanned_T = (np.arange(steps) // 2 % experts).astype(np.int16)
    free_T = (np.arange(steps) // 150 % 3 == 0) & ~(ids_TK == scanned_T[:, None]).any(1)
    ids_TK[free_T, 0] = scanned_T[free_T]
    return ids_TK


def walking(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """A neighbourhood that moves on: what was used lately is used again, and later not any more."""
    centre_T = np.cumsum(random.random(steps) < 0.15) * 2 % experts
    away_TE = np.abs((np.arange(experts) - centre_T[:, None] + experts // 2) % experts - experts // 2)
    return _draw(random, np.exp(-away_TE / (top_k + 2)), top_k)


def phases(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """500 steps of one pattern, then of another, with popularities and orders drawn anew."""
    parts = (static, in_turn, walking)
    return np.concatenate([parts[n % 3](random, experts, top_k, 500) for n in range(-(-steps // 500))])[:steps]


def prompts(random: np.random.Generator, experts: int, top_k: int, steps: int) -> Ids:
    """Requests one after the other: a step for a prompt of 50 tokens, then 99 of one token, by the request's own Zipf."""
    ids_TK = np.full((steps, 50 * top_k), -1, np.int16)
    for start in range(0, steps, 100):
        end = min(start + 100, steps)
        tokens_TK = _draw(random, np.broadcast_to(_zipf(random, experts, 1.3), (50 + end - start, experts)), top_k)
        ids_TK[start] = tokens_TK[:50].ravel()
        ids_TK[start + 1 : end, :top_k] = tokens_TK[51:]
    return ids_TK


PATTERNS: dict[str, Pattern] = {
    "static": static,
    "drifting": drifting,
    "topics": topics,
    "in turn": in_turn,
    "scans": scans,
    "walking": walking,
    "phases": phases,
    "prompts": prompts,
}
# Those whose steps are drawn at random: with several tokens a step they are what they were.
DRAWN = ("static", "drifting", "topics", "walking")


def _zipf(random: np.random.Generator, experts: int, exponent: float) -> FloatArray:
    shares: FloatArray = random.permutation(1 / np.arange(1, experts + 1) ** exponent)
    return shares


def _draw(random: np.random.Generator, share_TE: FloatArray, top_k: int) -> Ids:
    """``top_k`` different experts a step, by their shares (Gumbel's trick), int16 [T, K]."""
    keys_TE = np.log(share_TE) + random.gumbel(size=share_TE.shape)
    return np.argsort(-keys_TE, axis=1)[:, :top_k].astype(np.int16)
