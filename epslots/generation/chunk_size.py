"""The prompt tokens of a step, by a target for the step's time. Pure.

    size = ChunkSize(most=512, target_s=0.05)
    tokens = size.prompt_tokens(decoding)               # before a step that computes prompts
    size.observe(prompt_tokens, decoding, seconds)      # after every step

Decoding requests wait for the prompts that are computed in their steps. A step is taken to last

    pace x (fixed + per_token x prompt tokens + per_request x decoding requests)

The three costs are fitted to the last steps, with prompts and without, by least squares of relative errors: a step that was
held up has an error of 1 at most. ``pace`` corrects the fit by the latest steps: by the median of three, which sees a slower
machine after two steps, or by that of nine, whichever is larger. So prompts shrink quickly and grow slowly. A step has at most
twice the prompt tokens of the largest step in memory.
"""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

from epslots.arrays import FloatArray

FIRST_TOKENS = 16
"""Prompt tokens of the first step, before anything is known."""
GROWTH = 2
"""Prompt tokens of a step, at most, as a multiple of the largest number in memory."""
LEAST_SHARE = 0.1
"""Share of the target that prompts get where decoding alone takes all of it, or more: else they would never be done."""
_MEMORY_STEPS = 32  # of each kind
_PACE_STEPS = (3, 9)
_LEAST_S = 1e-9
_RIDGE = 1e-9  # where all steps were alike, the costs are told apart by nothing: prompt tokens then bear the most


class ChunkSize:
    """Chooses how many prompt tokens a step computes beside its decoding requests.

    Args:
        most: tokens of a step, at most, decoding requests included.
        target_s: seconds that a step may take; None = ``most`` alone limits it.
    """

    def __init__(self, most: int, target_s: float | None) -> None:
        self._most, self._target_s = most, target_s
        # (prompt tokens, decoding requests, seconds) of steps.
        self._prompts: deque[tuple[int, int, float]] = deque(maxlen=_MEMORY_STEPS)
        self._decodes: deque[tuple[int, int, float]] = deque(maxlen=_MEMORY_STEPS)
        self._latest: deque[tuple[int, int, float]] = deque(maxlen=max(_PACE_STEPS))

    def prompt_tokens(self, decoding: int) -> int:
        """Prompt tokens that the next step may compute beside this many decoding requests; at least 1."""
        most = max(1, self._most - decoding)
        if self._target_s is None:
            return most
        if not self._prompts:
            return min(FIRST_TOKENS, most)
        fixed, per_token, per_request = costs_3 = self._fit()
        target_s = self._target_s / self._pace(costs_3)
        left_s = max(target_s - fixed - per_request * decoding, LEAST_SHARE * target_s)
        most = min(most, GROWTH * max(tokens for tokens, _, _ in self._prompts))
        return most if left_s >= most * per_token else max(1, int(left_s / per_token))

    def observe(self, prompt_tokens: int, decoding: int, seconds: float) -> None:
        """Note a step that has passed as a whole, and its duration."""
        if self._target_s is None or seconds <= 0:
            return
        step = prompt_tokens, decoding, seconds
        (self._prompts if prompt_tokens else self._decodes).append(step)
        self._latest.append(step)

    def _fit(self) -> FloatArray:
        """Seconds of a step, of a prompt token, and of a decoding request: float64 [3], none negative."""
        steps_S3 = np.array([*self._decodes, *self._prompts])
        rows_S3 = np.column_stack([np.ones(len(steps_S3)), steps_S3[:, 0], steps_S3[:, 1]]) / steps_S3[:, 2:]
        costs_3, kept = np.zeros(3), [0, 1, 2]
        while True:
            part = rows_S3[:, kept]
            products = part.T @ part
            products += np.eye(len(kept)) * (_RIDGE * products.trace())
            found = np.linalg.solve(products, part.sum(axis=0))
            if (found >= 0).all():
                costs_3[kept] = found
                return costs_3
            del kept[int(found.argmin())]

    def _pace(self, costs_3: FloatArray) -> float:
        """The latest steps' seconds over the fit's."""
        fixed, per_token, per_request = costs_3
        fitted = [max(fixed + per_token * tokens + per_request * decoding, _LEAST_S) for tokens, decoding, _ in self._latest]
        ratios = [seconds / fit for (*_, seconds), fit in zip(self._latest, fitted, strict=True)]
        return max(median(ratios[-steps:]) for steps in _PACE_STEPS)
