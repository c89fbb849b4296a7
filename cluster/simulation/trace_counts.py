"""``TraceCounts``: the experts that the tokens of a simulated step choose, from a routing trace. Pure.

Legend of shape suffixes: T tokens of the trace, L layers, K experts per token, E experts of the largest layer, R ranks of a
group, N tokens of a step, P pairs of a token in all layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.simulation.simulate import RecordedTraffic


class TraceCounts:
    """A trace that is read in a circle: after its last token comes its first.

    Args:
        traffic: the trace.
        ranks: of a group.

    Raises:
        ConfigError: it holds no token.
    """

    def __init__(self, traffic: RecordedTraffic, ranks: int) -> None:
        self.tokens = len(traffic.expert_ids)
        if not self.tokens:
            raise ConfigError("the trace holds no token")
        layers, experts = len(traffic.num_experts_L), int(traffic.num_experts_L.max())
        self._shape = layers, ranks, experts
        ids_TLK = traffic.expert_ids.astype(np.int64)
        valid_TLK = (ids_TLK >= 0) & (ids_TLK < traffic.num_experts_L[:, None])
        # A pair's place in [L, R, E] flattened, for rank 0; those that chose no expert count behind the end.
        self._nowhere = layers * ranks * experts
        place_TLK = np.arange(layers)[:, None] * ranks * experts + ids_TLK
        self._place_TP = np.where(valid_TLK, place_TLK, self._nowhere).reshape(self.tokens, -1)
        token_TLK, layer_TLK, _ = np.indices(ids_TLK.shape)
        flat = (token_TLK * layers + layer_TLK) * experts + ids_TLK
        counts = np.bincount(flat[valid_TLK], minlength=self.tokens * layers * experts).reshape(self.tokens, layers, experts)
        self._before_TLE = np.zeros((self.tokens + 1, layers, experts), np.int64)
        np.cumsum(counts, axis=0, out=self._before_TLE[1:])

    def of_tokens(self, row_N: IntArray, rank_N: IntArray) -> IntArray:
        """Pairs of single tokens by the rank that has them, int64 [L, R, E].

        Args:
            row_N: their rows in the trace.
            rank_N: their ranks.
        """
        place_NP = self._place_TP[row_N] + (rank_N * self._shape[2])[:, None]
        return np.bincount(np.minimum(place_NP, self._nowhere).ravel(), minlength=self._nowhere)[: self._nowhere].reshape(
            self._shape
        )

    def of_stretches(self, stretches: Iterable[tuple[int, int]]) -> IntArray:
        """Pairs of stretches of the trace together, int64 [L, E].

        Args:
            stretches: the first row of each, and its tokens.
        """
        found_LE = np.zeros_like(self._before_TLE[0])
        for first, tokens in stretches:
            rounds, end = divmod(first + tokens, self.tokens)
            found_LE += rounds * self._before_TLE[-1] + self._before_TLE[end] - self._before_TLE[first]
        return found_LE
