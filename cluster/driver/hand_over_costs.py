"""When a request changes its rank: costs of hand-overs and of prompts, as measured, and the decisions by them. Pure."""

from __future__ import annotations

import math

from epslots.piece_sizes import PIECE_BYTES

LEAST_LEFT_TOKENS = 8
FIRST_SECONDS = 0.02
"""A hand-over, before one was measured: some messages."""
FIRST_SHORT_TOKENS = 32
"""Tokens of a short prompt, before any was measured."""
LEAST_HIDDEN_S = 0.005
"""Seconds of copying that an early hand-over has to hide behind the prompt: less isn't worth its further messages."""
MEETING_S = 0.05
"""Seconds from the news of a prompt until its two ranks have met: events and commands take a while."""
_FADING = 0.95  # a measurement's weight over the next one's


class TransferTimes:
    """Seconds of a hand-over by one kind of way, as ``fixed + per_token x tokens``.

    Attributes:
        fixed_s, token_s: by least squares over the latest, each non-negative.
        token_bytes: of a token in a cache, in the latest.
    """

    def __init__(self) -> None:
        self.fixed_s, self.token_s, self.token_bytes = FIRST_SECONDS, 0.0, 0.0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        """Weighted: 1, tokens, tokens squared, seconds, tokens x seconds."""

    def observe(self, tokens: int, seconds: float, nbytes: int) -> None:
        """Note a hand-over of so many tokens and bytes; one without tokens tells nothing."""
        if tokens <= 0:
            return
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = tuple(_FADING * old + now for old, now in zip(self._sums, new, strict=True))  # type: ignore[assignment]
        weight, x, xx, y, xy = self._sums
        spread = xx - x * x / weight
        slope = (xy - x * y / weight) / spread if spread > 1e-6 * xx else y / x  # all of one length: no fixed part is seen
        self.token_s = min(max(0.0, slope), y / x)
        self.fixed_s = max(0.0, (y - self.token_s * x) / weight)
        self.token_bytes = nbytes / tokens

    def seconds(self, tokens: int) -> float:
        """Seconds of a hand-over."""
        return self.fixed_s + tokens * self.token_s


class HandOverCosts:
    """The costs of hand-overs and of prompts' tokens.

    Attributes:
        near, far: hand-overs between ranks that share memory, and between others.
        latest_near: the latest one was between ranks that share memory.
        prompt_token_s: of a prompt's token on the ranks that compute them; None = unknown.
        least_left_tokens: a request with fewer tokens to come isn't handed over.
        step_bytes: of caches that a source reads between two steps, lately.
    """

    def __init__(self) -> None:
        self.near, self.far, self.latest_near = TransferTimes(), TransferTimes(), False
        self.prompt_token_s: float | None = None
        self.least_left_tokens, self.step_bytes = LEAST_LEFT_TOKENS, PIECE_BYTES

    def way(self, near: bool) -> TransferTimes:
        """Of hand-overs between ranks that share memory or don't."""
        return self.near if near else self.far

    def observe(
        self, tokens: int, seconds: float, prompt_token_s: float, nbytes: int = 0, step_bytes: int = 0, *, near: bool
    ) -> None:
        """Note a hand-over of so many tokens.

        Args:
            seconds: without waiting for the prompt.
            prompt_token_s: seconds of a prompt's token that its source has measured; 0 = none.
            nbytes: of the cache.
            step_bytes: that its source reads between two steps; 0 = unknown.
            near: its ranks share memory.
        """
        self.way(near).observe(tokens, seconds, nbytes)
        self.latest_near = near
        if prompt_token_s > 0:
            self.prompt_token_s = prompt_token_s
        self.step_bytes = step_bytes or self.step_bytes

    def stays(self, to_compute: int, held: int, streams: int, near: bool, before: float = 0.0) -> bool:
        """Whether a prompt is computed where its request decodes, since that costs less than a hand-over.

        A prompt holds up all requests that decode there for as long as it takes; a hand-over its own request alone, as do the
        prompts that are computed before it elsewhere.

        Args:
            to_compute: tokens of the prompt that this rank would have to compute.
            held: tokens that the hand-over would carry.
            streams: requests that decode on that rank.
            near: the hand-over would be between ranks that share memory.
            before: tokens of prompts that its rank would compute first, if it were handed over.
        """
        if self.prompt_token_s is None:
            return to_compute <= FIRST_SHORT_TOKENS
        return (to_compute * (1 + streams) - before) * self.prompt_token_s <= self.way(near).seconds(held)

    def begins_early(self, computed: int, left: int, chunk: int, near: bool) -> bool:
        """Whether a hand-over begins before its prompt is computed, and now.

        It keeps room at its target from then on, so it begins as late as it can: when the rest of the prompt, after another
        step, would take less time than the hand-over and the meeting before it, or have fewer steps than it needs: its source
        looks between two of them whether it may read, and then reads ``step_bytes`` between two.

        Args:
            computed: tokens of the prompt until now.
            left: tokens that are to come.
            chunk: tokens of its latest step.
            near: its ranks share memory.
        """
        if self.prompt_token_s is None:
            return False
        way = self.way(near)
        hidden_s = min(left * self.prompt_token_s, computed * way.token_s)
        tokens, later = computed + left, left - chunk
        steps = 1 + math.ceil(tokens * way.token_bytes / self.step_bytes)
        in_time = later * self.prompt_token_s > MEETING_S + way.seconds(tokens) and later > steps * chunk
        return hidden_s >= LEAST_HIDDEN_S and not in_time

    def is_worth(self, left: int) -> bool:
        """Whether a request with so many tokens to come is handed over at all."""
        return left >= self.least_left_tokens
