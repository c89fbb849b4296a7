"""Synthetic loads of windows that change over time; a static Zipf distribution flatters every planner.

Prompts have topics. Each topic prefers other experts, and each prompt departs from its topic, so that a window of few
prompts is noisier than its tokens alone would be. The topics change by ``kind``:

    still    the same mix of topics in all windows: every change is noise
    switch   one topic dominates for some windows, then another; earlier ones return
    drift    the topics' preferences and shares drift
    flash    sometimes half of the prompts are the same, for one to three windows
    all      drift, switches and flash crowds together

Legend of shape suffixes: W windows, L layers, E experts, T topics, P prompts of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.errors import ConfigError

KINDS = ("still", "switch", "drift", "flash", "all")


@dataclass(frozen=True)
class SyntheticTraffic:
    """The parameters of synthetic traffic.

    Attributes:
        kind: one of ``KINDS``.
        layers, experts, top_k: of the model.
        windows: the number of windows.
        prompts, tokens: prompts of each window, and tokens of each prompt: few prompts make noisy windows.
        topics: the number of topics.
        skew: standard deviation of the logarithm of experts' popularity over all topics.
        taste: standard deviation of a topic's departure from that.
        whim: standard deviation of a prompt's departure from its topic.
        pace: windows between switches; half of the time constant of a drift.
    """

    kind: str = "all"
    layers: int = 26
    experts: int = 64
    top_k: int = 6
    windows: int = 48
    prompts: int = 20
    tokens: int = 200
    topics: int = 6
    skew: float = 0.5
    taste: float = 0.7
    whim: float = 0.7
    pace: int = 8

    def __post_init__(self) -> None:
        counts = ("layers", "experts", "top_k", "windows", "prompts", "tokens", "topics", "pace")
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: allowed: {', '.join(KINDS)}")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed: 1 or more")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k={self.top_k}: allowed: at most the {self.experts} experts")


def generate(traffic: SyntheticTraffic, seed: int = 0) -> IntArray:
    """Pairs of each window for each expert, int64 [W, L, E]. Every layer of a window has prompts x tokens x top_k of them."""
    random = np.random.default_rng(seed)
    shape = (traffic.layers, traffic.experts)
    popular_LE = traffic.skew * random.standard_normal(shape)
    taste_TLE = traffic.taste * random.standard_normal((traffic.topics, *shape))
    loads_WLE = np.empty((traffic.windows, *shape), np.int64)
    mix_T = random.dirichlet(np.ones(traffic.topics))
    crowd_LE, crowd_windows = popular_LE, 0
    drifts = traffic.kind in ("drift", "all")
    for window in range(traffic.windows):
        if drifts:
            keep = 1 - 1 / (2 * traffic.pace)
            drift = traffic.taste * np.sqrt(1 - keep**2) * random.standard_normal(taste_TLE.shape)
            taste_TLE = keep * taste_TLE + drift
            mix_T = keep * mix_T + (1 - keep) * random.dirichlet(np.full(traffic.topics, 0.5))
        if traffic.kind in ("switch", "all") and window % traffic.pace == 0:
            mix_T = np.full(traffic.topics, 0.1 / traffic.topics)
            mix_T[int(random.integers(traffic.topics))] += 0.9
        topic_P = random.choice(traffic.topics, traffic.prompts, p=mix_T / mix_T.sum())
        whim_PLE = traffic.whim * random.standard_normal((traffic.prompts, *shape))
        logits_PLE = popular_LE + taste_TLE[topic_P] + whim_PLE
        if traffic.kind in ("flash", "all"):
            if crowd_windows == 0 and random.random() < 1 / traffic.pace:
                crowd_LE, crowd_windows = logits_PLE[0], int(random.integers(1, 4))
            if crowd_windows:
                logits_PLE[: max(1, traffic.prompts // 2)] = crowd_LE
                crowd_windows -= 1
        loads_WLE[window] = _choose(logits_PLE, traffic, random)
    return loads_WLE


def _choose(logits_PLE: NDArray[np.float64], traffic: SyntheticTraffic, random: np.random.Generator) -> IntArray:
    """Pairs of one window, int64 [L, E]: the choices of each prompt's tokens, none twice an expert (up to rounding)."""
    chance_PLE = np.exp(logits_PLE)
    chance_PLE /= chance_PLE.sum(2, keepdims=True)
    # No token chooses an expert twice, so no expert is chosen by more than every token.
    for _ in range(3 if traffic.top_k > 1 else 0):
        chance_PLE = np.minimum(chance_PLE, 1 / traffic.top_k)
        chance_PLE /= chance_PLE.sum(2, keepdims=True)
    loads_LE: IntArray = random.multinomial(traffic.tokens * traffic.top_k, chance_PLE).sum(0)
    return loads_LE
