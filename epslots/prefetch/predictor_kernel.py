"""What an estimator tells of a few rows on a CPU, in one compiled call.

For a token or two, a chain of torch's calls takes several times longer than the arithmetic: beside a model that runs, each of
them finds its code and its arguments no longer in the processor's caches. The sums are those of ``predictor.Fitted`` and
``predictor.Naive``, up to the order of additions.

Legend of shape suffixes: T tokens, H hidden size, P numbers known of the previous token (H, or 0), D = H + P, M hidden units,
E experts that logits are of, U those of them that are told of.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from epslots.arrays import Float32Array
from epslots.compiled import compiled

# Usage is in so many parts of certainty, and as one byte holds it: ranks tell each other bytes.
CERTAIN = 256
MOST = 255
# Multiplications of so many rows that one core makes in less time than torch's calls take.
FEW = 1 << 18
# A naive logit falls by one where a score falls by this part of the scores' deviation over the experts.
NAIVE_STEP = 0.25


@compiled(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[::1], float32[:, ::1], int64, int32[::1])",
)
def usage_of(
    rows_TH: Float32Array,
    before_TP: Float32Array,
    first_DN: Float32Array,
    bias_N: Float32Array,
    second_ME: Float32Array,
    top_k: int,
    usage_U: npt.NDArray[np.int32],
) -> None:
    """How likely any of the rows' tokens chooses each expert, in 256ths, 255 at most, to ``usage_U``.

    Args:
        first_DN: N = M + E columns: those of the hidden units, then those of the linear map.
        top_k: 0 = these are logits. Else they are scores: as ``predictor.Naive`` has it.
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
        least, unit_of_logit = 0.0, 1.0
        if top_k:
            left_E = logit_E.copy()
            for _ in range(top_k):
                best = 0
                for expert in range(experts):
                    if left_E[expert] > left_E[best]:
                        best = expert
                least = float(left_E[best])
                left_E[best] = -np.inf
            mean = 0.0
            for expert in range(experts):
                mean += logit_E[expert]
            mean /= experts
            square = 0.0
            for expert in range(experts):
                square += (logit_E[expert] - mean) ** 2
            unit_of_logit = math.sqrt(square / experts) * NAIVE_STEP + 1e-9
        for expert in range(len(usage_U)):
            unused_U[expert] /= 1 + math.exp(min((logit_E[expert] - least) / unit_of_logit, 700.0))
    for expert in range(len(usage_U)):
        usage_U[expert] = min(int((1 - unused_U[expert]) * CERTAIN + 0.5), MOST)
