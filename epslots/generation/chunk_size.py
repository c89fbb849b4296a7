"""The prompt tokens of a step, by a target for the step's time. Pure.

    size = ChunkSize(most=512, target_s=0.05)
    tokens = size.prompt_tokens(decoding, balanced)     # before a step that computes prompts
    size.observe(prompt_tokens, decoding, seconds)      # after every step

Decoding requests wait for the prompts that are computed in their steps. A step is taken to last

    fixed + per_token x prompt tokens + per_request x decoding requests
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np

from epslots.arrays import FloatArray

LEAST_PACE = 0.5
"""A prompt that has to wait for those of other ranks is computed at this share of its full pace, at least: its chunk isn't so
short that the fixed costs of steps take more than the rest of their time."""
FIRST_TOKENS = 16
"""Prompt tokens of the first step, before anything is known."""
GROWTH = 1.5
"""Prompt tokens of a step, at most, as a multiple of the largest recent number."""
LEAST_SHARE = 0.1
"""Share of the target that prompts get where decoding alone takes all of it, or more: else they would never be done."""
_MEMORY_STEPS, _RECENT_STEPS = 32, 3  # of each kind
_FADING = 0.95  # a step's weight over the next one's
_CHANGED = 1.5  # times that a step takes longer, or less long, if the machine's speed has changed
_SLOWER_OF, _FASTER_OF = 3, 5  # latest steps, most of which have to say so: prompts shrink quickly and grow slowly
_RIDGE = 1e-9  # where all steps were alike, and nothing tells the costs apart, each has an equal part of their time
_LEAST_S = 1e-9  # a clock may have stood still


@dataclass(eq=False)
class _TimedStep:
    """A step in memory; ``ratio`` is its time over the expected one, if any was expected."""

    prompt_tokens: int
    decoding: int
    seconds: float
    ratio: float = 1.0

    @property
    def has_prompt(self) -> bool:
        return self.prompt_tokens > 0

    @property
    def is_odd(self) -> bool:
        return not 1 / _CHANGED <= self.ratio <= _CHANGED


class ChunkSize:
    """Chooses how many prompt tokens a step computes beside its decoding requests.

    The three costs of a step are fitted to the last steps, with prompts and without, by least squares of relative errors. A
    step that was held up has an error of 1 at most. If most of the latest steps, of sizes that the fit knows, were much slower
    or faster than it says, the machine's speed has changed: all older times are scaled by as much. A step has at most
    ``GROWTH`` times the prompt tokens of the largest recent one.

    Args:
        most: tokens of a step, at most, decoding requests included.
        target_s: seconds that a step may take; None = ``most`` alone limits it.

    Attributes:
        target_s: as given.
    """

    def __init__(self, most: int, target_s: float | None) -> None:
        self._most, self.target_s = most, target_s
        self._prompts: deque[_TimedStep] = deque(maxlen=_MEMORY_STEPS)
        self._decodes: deque[_TimedStep] = deque(maxlen=_MEMORY_STEPS)
        self._latest: deque[_TimedStep] = deque(maxlen=_FASTER_OF)
        self._costs_3: FloatArray = np.zeros(3)
        """Seconds of a step, of a prompt token, and of a decoding request, by the latest fit."""
        self._fitted: set[bool] = set()
        """Whether steps with a prompt, and without, were fitted."""

    def prompt_tokens(self, decoding: int, balanced: int | None = None) -> int:
        """Prompt tokens that the next step may compute beside this many decoding requests; at least 1.

        Args:
            balanced: a length for the sake of other ranks (``chunk_balance.py``); None = any.
        """
        allowed = self._allowed(decoding)
        return allowed if balanced is None or balanced >= allowed else max(balanced, min(allowed, self._least_worth(decoding)))

    @property
    def fixed_s(self) -> float:
        """Seconds of a step that don't grow with its tokens and requests; 0 while none was timed."""
        if not self._prompts and not self._decodes:
            return 0.0
        self._costs_3 = self._fit()
        return float(self._costs_3[0])

    def _least_worth(self, decoding: int) -> int:
        """Prompt tokens with which a step computes them at ``LEAST_PACE``; as many as it may while none was timed."""
        if not self._prompts:
            return self._most
        self._costs_3 = self._fit()
        fixed, per_token, per_request = map(float, self._costs_3)
        without_s = fixed + per_request * decoding
        return max(1, round(without_s / max(per_token, _LEAST_S) * LEAST_PACE / (1 - LEAST_PACE)))

    def _allowed(self, decoding: int) -> int:
        most = max(1, self._most - decoding)
        if self.target_s is None:
            return most
        if not self._prompts:
            return min(FIRST_TOKENS, most)
        self._costs_3 = self._fit()
        fixed, per_token, per_request = map(float, self._costs_3)
        without_s = fixed + per_request * decoding
        largest = max(step.prompt_tokens for step in islice(reversed(self._prompts), _RECENT_STEPS))
        # However wrong the fit is, prompts that took too long get shorter.
        per_token = max(per_token, LEAST_SHARE * (without_s / largest + per_token), _LEAST_S)
        left_s = max(self.target_s - without_s, LEAST_SHARE * self.target_s)
        return max(1, min(most, max(FIRST_TOKENS, int(GROWTH * largest) + 1), round(left_s / per_token)))

    def observe(self, prompt_tokens: int, decoding: int, seconds: float) -> None:
        """Note a step that has passed as a whole, and its duration."""
        step = _TimedStep(prompt_tokens, decoding, max(seconds, _LEAST_S))
        if step.has_prompt in self._fitted and self._is_like_others(step):
            step.ratio = step.seconds / self._expected(step)
        (self._prompts if step.has_prompt else self._decodes).append(step)
        self._latest.append(step)
        self._adapt()

    def _is_like_others(self, step: _TimedStep) -> bool:
        """Whether the fit knows steps of about this size: of others, a wrong time says more of the fit than of the machine."""
        known = [other.prompt_tokens for other in self._prompts] if step.has_prompt else [0]
        return min(known) <= GROWTH * step.prompt_tokens and step.prompt_tokens <= GROWTH * max(known)

    def _expected(self, step: _TimedStep) -> float:
        """Seconds of a step by the latest fit."""
        return max(float(self._costs_3 @ (1, step.prompt_tokens, step.decoding)), _LEAST_S)

    def _adapt(self) -> None:
        """Take older steps to have been as slow, or as fast, as the latest ones, if the machine's speed has changed."""
        latest = list(self._latest)
        slower = [step for step in latest[-_SLOWER_OF:] if step.is_odd and step.ratio > 1]
        faster = [step for step in latest if step.is_odd and step.ratio < 1]
        changed = slower if len(slower) > _SLOWER_OF / 2 else faster if len(faster) > _FASTER_OF / 2 else []
        if not changed:
            return
        change = median(step.ratio for step in changed)
        self._costs_3 = self._costs_3 * change
        for step in (*self._decodes, *self._prompts):
            step.seconds *= 1 if step in changed else change
        self._latest.clear()

    def _fit(self) -> FloatArray:
        """The costs by the steps in memory: float64 [3], none negative. The latest odd ones wait: they may be chance."""
        steps, ages = list[_TimedStep](), list[int]()
        for kind in (self._decodes, self._prompts):
            kept_steps = [step for step in kind if not (step.is_odd and step in self._latest)]
            steps += kept_steps
            ages += range(len(kept_steps), 0, -1)
        self._fitted = {step.has_prompt for step in steps}
        relative_S3 = np.array([(1, step.prompt_tokens, step.decoding) for step in steps])
        relative_S3 = relative_S3 / np.array([step.seconds for step in steps])[:, None]
        weights_S = _FADING ** np.array(ages)
        costs_3, kept = np.zeros(3), np.flatnonzero(relative_S3.any(axis=0)).tolist()
        while True:
            part_SK = relative_S3[:, kept]
            products_KK = part_SK.T @ (weights_S[:, None] * part_SK)
            products_KK += np.diag(_RIDGE * products_KK.diagonal())
            found_K = np.linalg.solve(products_KK, part_SK.T @ weights_S)
            if (found_K >= 0).all():
                costs_3[kept] = found_K
                return costs_3
            del kept[int(found_K.argmin())]
