"""What the next window of traffic will be like, from the windows so far; and how far to trust that.

A short window is mostly noise, so many should be averaged; but traffic drifts and switches topics, and then old windows
mislead. No single rate of forgetting suits both. So several forecasts run beside each other, each a weighted mean of past
windows:

    by age         all alike, or with weights that fall at one of several rates
    by likeness    windows that resemble the newest one weigh more, however old: a topic that returns is known at once (analog
                   forecasting, Lorenz 1969)

What weighs how much in the final forecast is found from the windows themselves: the mixture, with weights of at least 0, that
would have had the least squared error in forecasting each of the recent windows from those before it (stacking, Breiman 1996;
the weights by exponentiated gradient, Kivinen and Warmuth 1997). All layers see the same traffic, so their errors are added
up, which makes few windows enough. The result is a weight for each remembered window, and with that not a mean alone but a
sample of what may come: the planner levels ranks over it.

Pure: arrays in, arrays out. Legend of shape suffixes: L layers, E experts, K windows remembered, M forecasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import FloatArray, IntArray
from epslots.errors import ConfigError

# How sharply likeness counts (in units of the usual distance between windows that are alike), and what a window's age leaves
# of its weight.
LIKENESS = (0.0, 2.0, 8.0, 32.0)
AGEING = (1.0, 0.9, 0.7, 0.3)
# What a step back in time leaves of an error's weight, when forecasts are scored.
_SCORE_MEMORY = 0.9
_GRADIENT_STEPS = 500
MOST_WINDOWS = 64
# The longest a forecast is believed to hold.
_LONGEST = 16.0


@dataclass(frozen=True)
class ExpectedLoad:
    """What the coming window is expected to be like.

    Attributes:
        tokens_LE: int64, pairs of each expert.
        uses_LE: int64, steps in which an expert is used at all.
        steps: of the window.
        trust: from 0 to 1: the share of experts' differences that past forecasts foresaw.
        windows: how many coming windows the expectation is believed to hold: the time in which a move must pay.
        sample_KLE: float64, each expert's share of its layer's pairs in remembered windows: what may come, not the mean alone.
            None: nothing is known but the mean.
        weight_K: float64, how likely each of them is; adds up to 1. None with ``sample_KLE``.
    """

    tokens_LE: IntArray
    uses_LE: IntArray
    steps: int
    trust: float
    windows: float
    sample_KLE: FloatArray | None = None
    weight_K: FloatArray | None = None


class Forecast:
    """Takes windows one after another. Not safe to share between threads.

    Args:
        most_windows: how many are remembered.
    """

    def __init__(self, most_windows: int = MOST_WINDOWS) -> None:
        if most_windows < 1:
            raise ConfigError(f"most_windows={most_windows}: allowed: 1 or more")
        self._most = most_windows
        self._sizes: list[tuple[FloatArray, FloatArray, int]] = []  # pairs of each layer, uses, steps
        self._shares: list[FloatArray] = []
        self._forecasts_MLE: FloatArray | None = None
        self._weights_MK = np.zeros((len(LIKENESS) * len(AGEING), 0))
        self._errors_MM = np.zeros((len(LIKENESS) * len(AGEING),) * 2)
        self._scored = 0.0
        self._missed, self._varied = 0.0, 0.0

    @property
    def windows(self) -> int:
        """Windows remembered."""
        return len(self._shares)

    def add(self, tokens_LE: IntArray, uses_LE: IntArray, steps: int) -> None:
        """Take the next window. A layer without any pairs counts as level in it.

        Args:
            tokens_LE: pairs of each expert over all ranks.
            uses_LE: steps in which each expert was used at all.
            steps: of the window.

        Raises:
            ConfigError: shapes differ from each other or from those before, or a number is negative.
        """
        tokens, uses = np.asarray(tokens_LE, np.float64), np.asarray(uses_LE, np.float64)
        shape = self._shares[-1].shape if self._shares else tokens.shape
        if tokens.ndim != 2 or not tokens.size or tokens.shape != shape or uses.shape != shape:
            raise ConfigError(
                f"a window of tokens {list(tokens.shape)} and uses {list(uses.shape)}: allowed: both {list(shape)}"
            )
        if steps < 0 or not (np.isfinite(tokens).all() and np.isfinite(uses).all() and tokens.min() >= 0 and uses.min() >= 0):
            raise ConfigError("a window's tokens, uses and steps must be finite and at least 0")
        total_L = tokens.sum(1)
        share_LE = np.where(total_L[:, None] > 0, tokens / np.maximum(total_L, 1)[:, None], 1 / shape[1])
        self._score(share_LE)
        self._shares = [*self._shares, share_LE][-self._most :]
        self._sizes = [*self._sizes, (total_L, uses, steps)][-self._most :]
        self._weights_MK = self._candidate_weights()
        self._forecasts_MLE = np.tensordot(self._weights_MK, np.stack(self._shares), 1)

    def expected(self) -> ExpectedLoad:
        """The coming window, from all so far.

        Raises:
            ConfigError: no window was added yet.
        """
        if not self._shares:
            raise ConfigError("nothing can be expected before the first window")
        weight_K = self._mixture() @ self._weights_MK
        sample_KLE = np.stack(self._shares)
        totals_KL = np.stack([total for total, _, _ in self._sizes])
        share_LE = np.tensordot(weight_K, sample_KLE, 1)
        recent_K = 0.7 ** np.arange(len(weight_K))[::-1]
        recent_K /= recent_K.sum()
        tokens_LE = np.rint(share_LE * (recent_K @ totals_KL)[:, None]).astype(np.int64)
        uses_LE = np.rint(np.tensordot(weight_K, np.stack([uses for _, uses, _ in self._sizes]), 1)).astype(np.int64)
        steps = round(float(recent_K @ [steps for _, _, steps in self._sizes]))
        alike = 1 / float((weight_K**2).sum())
        # What has lasted for so many windows is expected to last as long again.
        return ExpectedLoad(tokens_LE, uses_LE, steps, self._trust(), min(alike, _LONGEST), sample_KLE, weight_K)

    def _score(self, share_LE: FloatArray) -> None:
        """How wrong the forecasts were about this window."""
        if self._forecasts_MLE is None:
            return
        error_MX = (share_LE - self._forecasts_MLE).reshape(len(self._errors_MM), -1)
        mixture = self._mixture()
        self._errors_MM = _SCORE_MEMORY * self._errors_MM + error_MX @ error_MX.T
        self._scored = _SCORE_MEMORY * self._scored + 1
        self._missed = _SCORE_MEMORY * self._missed + float(((mixture @ error_MX) ** 2).sum())
        self._varied = _SCORE_MEMORY * self._varied + float(((share_LE - share_LE.mean(1, keepdims=True)) ** 2).sum())

    def _trust(self) -> float:
        if self._scored and self._varied:
            return float(np.clip(1 - self._missed / self._varied, 0.0, 1.0))
        return 0.5  # one window: nothing was foreseen yet

    def _mixture(self) -> FloatArray:
        """What each forecast weighs, float64 [M]: the mixture that would have had the least squared error."""
        mixture = np.full(len(self._errors_MM), 1 / len(self._errors_MM))
        least = float(np.diagonal(self._errors_MM).min())
        if least <= 0:
            return mixture
        for _ in range(_GRADIENT_STEPS):
            gradient = 4 / least * (self._errors_MM @ mixture)
            mixture = mixture * np.exp(gradient.min() - gradient)
            mixture /= mixture.sum()
        return mixture

    def _candidate_weights(self) -> FloatArray:
        """The weight that each forecast gives each window, float64 [M, K]; rows add up to 1."""
        count = len(self._shares)
        roots_KX = np.sqrt(np.stack(self._shares)).reshape(count, -1)  # Hellinger's distance: noise is alike for all loads
        distance_KK = np.maximum(2 * len(self._shares[0]) - 2 * (roots_KX @ roots_KX.T), 0.0)
        distance_K = np.ones(count)
        if count > 1:
            # Windows as near as the nearest usually are differ by noise alone; and so would the newest from itself.
            usual = float(np.median((distance_KK + np.where(np.eye(count, dtype=bool), np.inf, 0.0)).min(1)))
            distance_K = np.maximum(distance_KK[-1] / max(usual, 1e-12), 1.0)
        age_K = np.arange(count)[::-1]
        logs = [age_K * np.log(kept) - sharp * (distance_K - 1.0) for sharp in LIKENESS for kept in AGEING]
        weights_MK = np.exp(np.stack(logs) - np.max(logs, axis=1, keepdims=True))
        result: FloatArray = weights_MK / weights_MK.sum(1, keepdims=True)
        return result
