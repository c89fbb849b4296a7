"""A forecast of the next window of load from the windows so far, and its reliability. ``replanner.py`` calls it.

A short window is mostly noise, so many should be averaged; but traffic drifts and switches topics, so that old windows
mislead. Several forecasts therefore run in parallel, each a weighted mean of past windows; weights fall with a window's age
at one of several rates, and with its distance from the newest window (analog forecasting, Lorenz 1969). They are mixed with
the weights, at least 0, that would have had the least squared error on the recent windows (stacking, Breiman 1996; by
exponentiated gradient, Kivinen and Warmuth 1997). All layers see the same traffic, so that their errors are added up and few
windows suffice. The result is a weight for each past window, thus a sample of possible loads besides their mean: the planner
levels ranks over it.

Pure. Legend of shape suffixes: L layers, E experts, K windows remembered, M forecasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import FloatArray, IntArray
from epslots.errors import ConfigError

# The forecasts: by how sharply weights fall with distance (in units of the usual distance between similar windows), and by the
# factor of a weight for each window of age.
LIKENESS = (0.0, 2.0, 8.0, 32.0)
AGEING = (1.0, 0.9, 0.7, 0.3)
# The factor of an error's weight for each window of age, when forecasts are scored.
_SCORE_MEMORY = 0.9
_GRADIENT_STEPS = 500
MOST_WINDOWS = 64
# A forecast is believed to hold for at most so many windows.
_LONGEST_HORIZON = 16.0


@dataclass(frozen=True)
class ExpectedLoad:
    """The load that is expected in the coming window.

    Attributes:
        tokens_LE: int64, pairs of each expert.
        uses_LE: int64, steps that use each expert.
        steps: of the window.
        trust: from 0 to 1: the share of experts' differences that past forecasts predicted.
        windows: the coming windows for which the expectation is believed to hold: the time in which a migration must pay.
        sample_KLE: float64, each expert's share of its layer's pairs in past windows: a sample of possible loads. None: only
            the mean is known.
        weight_K: float64, the probability of each of them; adds up to 1. None with ``sample_KLE``.
    """

    tokens_LE: IntArray
    uses_LE: IntArray
    steps: int
    trust: float
    windows: float
    sample_KLE: FloatArray | None = None
    weight_K: FloatArray | None = None


class Forecast:
    """Forecasts the next window from the last ``MOST_WINDOWS``. Not safe to share between threads."""

    def __init__(self) -> None:
        self._sizes: list[tuple[FloatArray, FloatArray, int]] = []  # pairs of each layer, uses, steps
        self._shares: list[FloatArray] = []
        self._forecasts_MLE: FloatArray | None = None
        self._weights_MK = np.zeros((len(LIKENESS) * len(AGEING), 0))
        self._errors_MM = np.zeros((len(LIKENESS) * len(AGEING),) * 2)
        self._scored = 0.0
        self._error, self._variation = 0.0, 0.0

    @property
    def windows(self) -> int:
        """The number of windows kept."""
        return len(self._shares)

    def add(self, tokens_LE: IntArray, uses_LE: IntArray, steps: int) -> None:
        """Add the next window. In a layer without pairs, all experts count as equally loaded.

        Args:
            tokens_LE: pairs of each expert over all ranks.
            uses_LE: steps that used each expert.
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
        self._shares = [*self._shares, share_LE][-MOST_WINDOWS:]
        self._sizes = [*self._sizes, (total_L, uses, steps)][-MOST_WINDOWS:]
        self._weights_MK = self._candidate_weights()
        self._forecasts_MLE = np.tensordot(self._weights_MK, np.stack(self._shares), 1)

    def expected(self) -> ExpectedLoad:
        """The load of the coming window.

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
        effective = 1 / float((weight_K**2).sum())
        # Traffic that has lasted for so many windows is expected to last as long again.
        return ExpectedLoad(tokens_LE, uses_LE, steps, self._trust(), min(effective, _LONGEST_HORIZON), sample_KLE, weight_K)

    def _score(self, share_LE: FloatArray) -> None:
        """Enter the errors of the forecasts about this window."""
        if self._forecasts_MLE is None:
            return
        error_MX = (share_LE - self._forecasts_MLE).reshape(len(self._errors_MM), -1)
        mixture = self._mixture()
        self._errors_MM = _SCORE_MEMORY * self._errors_MM + error_MX @ error_MX.T
        self._scored = _SCORE_MEMORY * self._scored + 1
        self._error = _SCORE_MEMORY * self._error + float(((mixture @ error_MX) ** 2).sum())
        self._variation = _SCORE_MEMORY * self._variation + float(((share_LE - share_LE.mean(1, keepdims=True)) ** 2).sum())

    def _trust(self) -> float:
        if self._scored and self._variation:
            return float(np.clip(1 - self._error / self._variation, 0.0, 1.0))
        return 0.5  # one window: no forecast was tested yet

    def _mixture(self) -> FloatArray:
        """The weight of each forecast, float64 [M]: the mixture that would have had the least squared error."""
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
        roots_KX = np.sqrt(np.stack(self._shares)).reshape(count, -1)  # Hellinger distance: noise is equal for all loads
        distance_KK = np.maximum(2 * len(self._shares[0]) - 2 * (roots_KX @ roots_KX.T), 0.0)
        distance_K = np.ones(count)
        if count > 1:
            # Windows at the usual distance of nearest neighbours differ by noise only; so would the newest from itself.
            usual = float(np.median((distance_KK + np.where(np.eye(count, dtype=bool), np.inf, 0.0)).min(1)))
            distance_K = np.maximum(distance_KK[-1] / max(usual, 1e-12), 1.0)
        age_K = np.arange(count)[::-1]
        logs = [age_K * np.log(kept) - sharp * (distance_K - 1.0) for sharp in LIKENESS for kept in AGEING]
        weights_MK = np.exp(np.stack(logs) - np.max(logs, axis=1, keepdims=True))
        result: FloatArray = weights_MK / weights_MK.sum(1, keepdims=True)
        return result
