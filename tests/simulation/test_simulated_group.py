"""The simulator against real ranks: for the same choices of the router, all that ranks do is the same, to the last eviction.

Real models run on real slots over the fake transport; what their routers choose is fed to the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import epslots
from epslots.group.rank_group import group_of
from epslots.placement.placement import Placement, default_placement, first_residents
from epslots.planner.cache_policy import POLICIES
from epslots.planner.cost_model import Costs
from epslots.simulation.simulated_group import SimulatedGroup, StepTally
from epslots.simulation.timing import Timing
from tests.support.grouped_ranks import ALL_COSTS, Grouped

EXPERTS, LAYERS = 16, 3  # of the zoo's qwen3_moe


class Watched(Grouped):
    """Ranks whose routers' choices are kept: pairs of each step, [L, E], by rank."""

    def forward(self, steps: Sequence[Sequence[int]], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Run steps of so many tokens on each rank (all above 0); pairs [L, R, E] and tokens [R] of each step."""

        def one(rank: int, model: Any) -> list[np.ndarray]:
            counts: list[np.ndarray] = []

            def observe(layer: int, index_TK: torch.Tensor) -> None:
                counts[-1][layer] += np.bincount(index_TK.flatten().numpy(), minlength=EXPERTS)

            generator = torch.Generator().manual_seed(seed * 100 + rank)
            for runner in self.runtime(rank).runners:
                runner.observe(observe)
            for tokens in steps[rank]:
                counts.append(np.zeros((LAYERS, EXPERTS), np.int64))
                model(torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator))
            return counts

        by_rank = self.run(one)
        tokens_SR = np.array(steps).T
        return [(np.stack(ranks, 1), tokens_R) for ranks, tokens_R in zip(zip(*by_rank, strict=True), tokens_SR, strict=True)]

    def holds(self) -> np.ndarray:
        group = group_of(self.models[0])
        assert group is not None
        return np.stack([layer.state.holds_RE for layer in group.shared.layers])

    def counters(self) -> dict[str, np.ndarray]:
        stats = [epslots.stats(model).layers for model in self.models]
        names = ("hits", "misses", "host_bytes", "peer_bytes", "evictions")
        return {name: np.array([[getattr(x, name) for x in layers] for layers in stats]).T for name in names}


def assert_equal(tally: StepTally, real: dict[str, np.ndarray], expert_bytes: int) -> None:
    simulated = {
        "hits": tally.hits,
        "misses": tally.misses,
        "host_bytes": (tally.host_fetches + tally.host_migrations) * expert_bytes,
        "peer_bytes": (tally.peer_fetches + tally.peer_migrations) * expert_bytes,
        "evictions": tally.evictions,
    }
    for name, counts_LR in simulated.items():
        assert counts_LR.tolist() == real[name].tolist(), name


def timing(costs: Costs) -> Timing:
    return Timing(costs, 0, 0, 0, 0, 0)


CASES = [
    ((3, 2), "tokens travel", "lrfu"),
    ((8, 8), "copies travel", "lrfu"),
    ((4, 5), "tokens travel", "adaptive"),
    ((10, 10), "copies travel", "lru"),
    ((4, 3, 4, 4), "tokens travel", "lfu"),
    ((5, 1, 7, 4), "copies travel", "lrfu"),
    ((2, 2, 2, 2), "work spreads", "lrfu"),
    ((6, 6, 6, 6), "nothing travels", "lru"),
]


@pytest.mark.parametrize(("slots", "costs", "policy"), CASES)
def test_the_simulator_does_what_ranks_do(
    slots: tuple[int, ...], costs: str, policy: str, checkpoint: Callable[[str], Path], cache_dir: Path
):
    ranks = Watched(checkpoint("qwen3_moe"), cache_dir, slots, ALL_COSTS[costs], policy=policy)
    quota_LR = np.tile(slots, (LAYERS, 1))
    placement = default_placement([EXPERTS] * LAYERS, quota_LR)
    assert (ranks.holds() == first_residents(placement)).all(), "slots are filled alike"
    generator = np.random.default_rng(len(slots))
    steps = generator.choice([1, 1, 1, 2, 9, 40], (len(slots), 24))
    before = ranks.counters()
    seen = ranks.forward(steps.tolist(), seed=1)
    after = ranks.counters()
    expert_bytes = group_of(ranks.models[0]).shared.layers[0].expert_bytes  # type: ignore[union-attr]
    simulated = SimulatedGroup(placement, timing(ALL_COSTS[costs]), POLICIES[policy], expert_bytes=expert_bytes)
    for counts_LRE, tokens_R in seen:
        simulated.step(counts_LRE, tokens_R)
    tally = simulated.take()
    assert tally.misses.sum() and tally.hits.sum(), "nothing happened"
    assert_equal(tally, {name: after[name] - before[name] for name in after}, expert_bytes)
    assert (ranks.holds() == np.stack([layer.state.holds_RE for layer in simulated.model.layers])).all()
    assert (tally.misses == tally.host_fetches + tally.peer_fetches).all()
    assert bool(tally.peer_fetches.sum()) or costs != "copies travel" or sum(slots) < EXPERTS


def another_placement(quota_LR: np.ndarray, seed: int) -> Placement:
    """Homes, wanted copies and slots of layers at random, within the rules."""
    generator = np.random.default_rng(seed)
    layers, ranks = quota_LR.shape
    quota_LR = quota_LR.copy()
    for rank in range(ranks):
        giver, taker = generator.permutation(layers)[:2]
        quota_LR[giver, rank] -= 1
        quota_LR[taker, rank] += 1
    wanted_LRE = np.zeros((layers, ranks, EXPERTS), bool)
    for layer in range(layers):
        for rank in range(ranks):
            wanted_LRE[layer, rank, generator.permutation(EXPERTS)[: quota_LR[layer, rank] - 1]] = True
    home_LE = generator.integers(0, ranks, (layers, EXPERTS))
    home_LE = np.where(wanted_LRE.any(1), wanted_LRE.argmax(1), home_LE)
    placement = Placement(1, np.full(layers, EXPERTS), home_LE, wanted_LRE, quota_LR)
    placement.check()
    return placement


@pytest.mark.parametrize("slots", [(9, 8), (6, 5, 6, 5)])
def test_the_simulator_follows_placements_as_ranks_do(
    slots: tuple[int, ...], checkpoint: Callable[[str], Path], cache_dir: Path
):
    ranks = Watched(checkpoint("qwen3_moe"), cache_dir, slots, ALL_COSTS["copies travel"], policy="lrfu")
    quota_LR = np.tile(slots, (LAYERS, 1))
    steps = np.random.default_rng(7).choice([1, 1, 2, 9], (len(slots), 30)).tolist()
    before = ranks.counters()
    seen = ranks.forward(steps, seed=2)
    placement = another_placement(quota_LR, seed=len(slots))
    groups = [group_of(model) for model in ranks.models]
    expert_bytes = groups[0].shared.layers[0].expert_bytes  # type: ignore[union-attr]
    for group in groups:
        assert group is not None
        group.offer(placement, 6 * expert_bytes)
    seen += ranks.forward(steps, seed=3)
    assert groups[0].placement.version == 1  # type: ignore[union-attr]
    after = ranks.counters()
    simulated = SimulatedGroup(
        default_placement([EXPERTS] * LAYERS, quota_LR),
        timing(ALL_COSTS["copies travel"]),
        POLICIES["lrfu"],
        expert_bytes=expert_bytes,
    )
    for number, (counts_LRE, tokens_R) in enumerate(seen):
        if number == len(steps[0]):
            simulated.model.follow(placement, 6 * expert_bytes)
        simulated.step(counts_LRE, tokens_R)
    tally = simulated.take()
    assert (tally.host_migrations + tally.peer_migrations).sum(), "nothing was moved"
    assert_equal(tally, {name: after[name] - before[name] for name in after}, expert_bytes)
    assert (ranks.holds() == np.stack([layer.state.holds_RE for layer in simulated.model.layers])).all()
    assert groups[0].pending_migrations == simulated.model.pending_migrations  # type: ignore[union-attr]
