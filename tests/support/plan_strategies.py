"""Random situations of one layer on several ranks, for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from epslots.placement.placement import Placement
from epslots.planner.cost_model import Costs


@dataclass(frozen=True)
class Situation:
    counts_RE: np.ndarray
    holds_RE: np.ndarray
    quota_R: np.ndarray
    home_E: np.ndarray
    score_E: np.ndarray
    costs: Costs
    remote_ns_RE: np.ndarray

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


def random_quotas(generator: np.random.Generator, quota_LR: np.ndarray, num_experts_L: np.ndarray) -> np.ndarray:
    """Other slots of each layer, for ranks that keep their sums."""
    quota_LR = quota_LR.copy()
    layers, ranks = quota_LR.shape
    for rank in range(ranks):
        for _ in range(int(generator.integers(0, 3 * layers))):
            giver, taker = generator.integers(0, layers, 2)
            if quota_LR[giver, rank] > 1 and quota_LR[taker, rank] < num_experts_L[taker]:
                quota_LR[giver, rank] -= 1
                quota_LR[taker, rank] += 1
    return quota_LR


def random_placement(generator: np.random.Generator, last: Placement) -> Placement:
    """A sound placement for the same model and ranks: other homes, some copies wanted, other slots."""
    layers, ranks, experts = last.wanted_LRE.shape
    quota_LR = random_quotas(generator, last.quota_LR, last.num_experts_L)
    wanted_LRE = generator.random(last.wanted_LRE.shape) < generator.choice([0.0, 0.2, 0.9])
    wanted_LRE &= np.arange(experts) < last.num_experts_L[:, None, None]
    wanted_LRE &= wanted_LRE.cumsum(2) <= quota_LR[:, :, None]
    anywhere_LE = generator.integers(0, ranks, (layers, experts))
    home_LE = np.where(wanted_LRE.any(1), wanted_LRE.argmax(1), anywhere_LE)
    placement = Placement(last.version + 1, last.num_experts_L, home_LE, wanted_LRE, quota_LR)
    placement.check()
    return placement


# A slow host, fast peers, compute worth levelling: roughly a large expert over PCIe and NVLink.
COSTS = Costs(
    host_fetch=2_000_000,
    peer_fetch=200_000,
    pair_transfer=100,
    pair_compute=500,
    expert_compute=10_000,
    exchange=20_000,
    gather=15_000,
)


def holds(ranks: int, experts: int, *places: tuple[int, int]) -> np.ndarray:
    table = np.zeros((ranks, experts), bool)
    for rank, expert in places:
        table[rank, expert] = True
    return table
