"""The tokens of a sequence that penalties apply to. Pure. Suffix: U different tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TokenCounts:
    """The different tokens of a sequence, and how often its text has each.

    Args:
        prompt: tokens before the text.
        text: tokens that were generated so far.

    Attributes:
        tokens_U: int64 [U], each once, in no order.
        counts_U: int64 [U], 0 for those that only the prompt has.
    """

    def __init__(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        self.tokens_U, places = np.unique(np.array([*prompt, *text], np.int64), return_inverse=True)
        self.counts_U = np.bincount(places[len(prompt) :], minlength=len(self.tokens_U))

    def add(self, token: int) -> None:
        """Add the text's next token."""
        same_U = self.tokens_U == token
        if same_U.any():
            self.counts_U += same_U
        else:
            self.tokens_U = np.append(self.tokens_U, token)
            self.counts_U = np.append(self.counts_U, 1)
