"""How many tokens one MoE layer computes at a time: as many as there is memory for. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Of the free memory, this part is for one MoE layer; attention takes some, and fragments are of no use.
_SHARE = 2


@dataclass(frozen=True)
class TokenRoom:
    """Memory for a step of one layer. An engine's steps are as long as planned; ``generate`` computes a prompt at once.

    Attributes:
        planned: tokens that the memory plan reserves room for.
        token_bytes: of a token's activations in the layer.
        free_bytes: what the device has left; asked only in longer steps than planned.
    """

    planned: int
    token_bytes: int
    free_bytes: Callable[[], int]

    def parts(self, tokens: int) -> int:
        """Parts of about the same length that a step of so many tokens is computed in. 1 where memory allows it.

        With fewer slots than experts, each part fetches the experts that it misses anew.
        """
        if tokens <= self.planned:
            return 1
        most = max(self.planned, self.free_bytes() // _SHARE // self.token_bytes)
        return -(-tokens // most)
