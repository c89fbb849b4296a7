"""Random situations of one layer on several ranks, for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from epslots.costs import Costs


@dataclass(frozen=True)
class Situation:
    counts_RE: np.ndarray
    holds_RE: np.ndarray
    quota_R: np.ndarray
    home_E: np.ndarray
    score_E: np.ndarray
    costs: Costs
    tolls_RE: np.ndarray

    @property
    def arguments(self):
        return self.counts_RE, self.holds_RE, self.quota_R, self.home_E, self.costs


def some_costs() -> st.SearchStrategy[Costs]:
    """Cheap and dear things in any combination, so that every way to serve a miss is the best one now and then."""
    amounts = st.sampled_from([1, 30, 1_000, 40_000, 2_000_000])
    return st.builds(Costs, **dict.fromkeys(Costs.__struct_fields__, amounts))


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    quota_R = random.integers(1, experts + 1, ranks) if draw(st.booleans()) else np.full(ranks, draw(st.integers(1, experts)))
    holds_RE = np.zeros((ranks, experts), bool)
    for rank, quota in enumerate(quota_R.tolist()):
        holds_RE[rank, random.permutation(experts)[: random.integers(0, quota + 1)]] = True
    most = draw(st.sampled_from([1, 2, 40, 5000]))
    counts_RE = random.integers(0, most + 1, (ranks, experts))
    counts_RE[random.random((ranks, experts)) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0
    if draw(st.booleans()):
        counts_RE[:, random.integers(experts)] *= 50  # one hot expert
    if draw(st.booleans()):
        counts_RE[random.integers(ranks)] = 0  # a rank without work
    return Situation(
        counts_RE.astype(np.int32),
        holds_RE,
        quota_R.astype(np.int64),
        random.integers(0, ranks, experts),
        random.integers(0, 5, experts),
        draw(some_costs()),
        random.integers(0, draw(st.sampled_from([1, 10**4, 10**7])), (ranks, experts)),
    )
