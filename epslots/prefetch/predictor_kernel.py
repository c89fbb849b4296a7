"""An estimator's prediction for a few rows on a CPU, in one compiled call. ``Predictor.usage`` is the caller.

For a token or two, a chain of torch's calls takes several times longer than the arithmetic: beside a running model, each call
finds its code and its arguments evicted from the processor's caches. The results are those of ``predictor.FittedEstimator``
and ``predictor.RouterEstimator``, up to the order of additions.

Legend of shape suffixes: T tokens, H hidden size, P numbers known of the previous token (H, or 0), D = H + P, M hidden units,
E experts with logits, U the first of them, which have weights; N = M + E.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from epslots.arrays import Float32Array
from epslots.compiled import compiled

# Usage is a probability in 256ths, and at most 255: ranks exchange it in bytes.
USAGE_SCALE = 256
USAGE_MAX = 255
# Up to so many multiplications for all rows, one core is faster than torch's calls.
KERNEL_MULTIPLICATIONS = 1 << 18
# A router's logit falls by one where its score falls by this part of the scores' standard deviation over the experts.
ROUTER_LOGIT_STEP = 0.25


@compiled("UniTuple(float64, 2)(float32[::1], int64)")
def _scale_of_scores(score_E: Float32Array, top_k: int) -> tuple[float, float]:
    """A router's scores as logits: the score of the k-th expert, whose logit is 0, and the scores' difference of one logit."""
    left_E = score_E.copy()
    least = 0.0
    for _ in range(top_k):
        best = 0
        for expert in range(len(left_E)):
            if left_E[expert] > left_E[best]:
                best = expert
        least = float(left_E[best])
        left_E[best] = -np.inf
    mean = 0.0
    for score in score_E:
        mean += score
    mean /= len(score_E)
    square = 0.0
    for score in score_E:
        square += (score - mean) ** 2
    return least, math.sqrt(square / len(score_E)) * ROUTER_LOGIT_STEP + 1e-9


@compiled(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[::1], float32[:, ::1], int64, int32[::1])",
)
def predict_usage(
    rows_TH: Float32Array,
    before_TP: Float32Array,
    first_DN: Float32Array,
    bias_N: Float32Array,
    second_ME: Float32Array,
    top_k: int,
    usage_U: npt.NDArray[np.int32],
) -> None:
    """Write to ``usage_U`` how probably any of the tokens chooses each expert, 0 to 255.

    Args:
        rows_TH: hidden states.
        before_TP: the previous tokens' hidden states; P = 0 without history.
        first_DN: columns of the hidden units, then those of the linear map.
        bias_N: of these.
        second_ME: from the hidden units to the experts.
        top_k: K where the outputs are a router's scores, whose logits are relative to a token's k-th; 0 where they are logits.
        usage_U: the result, int32.
    """
    hidden, experts = second_ME.shape
    both_N = np.empty(hidden + experts, np.float32)
    unused_U = np.ones(len(usage_U), np.float64)
    for token in range(len(rows_TH)):
        both_N[:] = bias_N
        for place in range(rows_TH.shape[1]):
            factor = rows_TH[token, place]
            row_N = first_DN[place]
            for column in range(len(both_N)):
                both_N[column] += factor * row_N[column]
        for place in range(before_TP.shape[1]):
            factor = before_TP[token, place]
            row_N = first_DN[rows_TH.shape[1] + place]
            for column in range(len(both_N)):
                both_N[column] += factor * row_N[column]
        logit_E = both_N[hidden:]
        for unit in range(hidden):
            value = both_N[unit]
            factor = value / (np.float32(1) + np.exp(-value))
            row_E = second_ME[unit]
            for expert in range(experts):
                logit_E[expert] += factor * row_E[expert]
        least, unit_of_logit = _scale_of_scores(logit_E, top_k) if top_k else (0.0, 1.0)
        for expert in range(len(usage_U)):
            unused_U[expert] /= 1 + math.exp(min((logit_E[expert] - least) / unit_of_logit, 700.0))
    for expert in range(len(usage_U)):
        usage_U[expert] = min(int((1 - unused_U[expert]) * USAGE_SCALE + 0.5), USAGE_MAX)
