"""Thousands of random steps of several ranks in one process, with every table and every byte checked after each.

The layers, pools, loaders and plans are the real ones; the model around them is left out. An expert multiplies each element of
a row by its own numbers, so that a result tells which expert made it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from epslots.cache.copy_engine import SynchronousEngine
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.slot_pool import SlotPool
from epslots.layout import LayerSpec, RecordLayout
from epslots.moe.expert_cache import ExpertCache
from epslots.moe.expert_compute import ExpertCompute
from epslots.moe.moe_layer import MoELayer
from epslots.moe.prefetcher import Prefetcher
from epslots.placement.model_planner import ModelPlanner
from epslots.placement.placement import Placement, default_homes, default_placement
from epslots.planner.cache_policy import POLICIES
from epslots.planner.cost_model import Costs
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.prefetch_policy import PrefetchBudget
from epslots.planner.use_history import UseHistory
from epslots.telemetry import Telemetry
from epslots.transport.local_transport import LocalTransport
from epslots.transport.lockstep import Header, LockStep
from tests.support.grouped_ranks import ALL_COSTS
from tests.support.late_link import Echo, Guesses, LateLink
from tests.support.plan_strategies import random_placement
from tests.support.rank_helpers import run_threads

HIDDEN = 8
LAYOUT = RecordLayout.of([("scale", (HIDDEN,), "float32")])
BYTES = LAYOUT.nbytes
CPU = torch.device("cpu")
LAYERS = 2


def scale_of(layer: int, expert: int) -> torch.Tensor:
    return torch.arange(1, HIDDEN + 1, dtype=torch.float32) + 10 * expert + 1000 * layer


class Store:
    pinned = False

    def __init__(self, experts: int) -> None:
        self._records = {}
        for layer in range(LAYERS):
            for expert in range(experts):
                record = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
                record[: HIDDEN * 4] = scale_of(layer, expert).view(torch.uint8)
                self._records[layer, expert] = record

    def record(self, layer: int, expert: int) -> torch.Tensor:
        return self._records[layer, expert]

    request = record

    def lend(self, layer: int, expert: int) -> contextlib.AbstractContextManager[torch.Tensor]:
        return contextlib.nullcontext(self.record(layer, expert))


class Scaling:
    """In the place of a ``GroupedGemm``."""

    dtype = torch.float32
    hidden_size = HIDDEN

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.use(weights)

    def use(self, weights: dict[str, torch.Tensor]) -> None:
        self._scale_QH = weights["scale"]

    def ready_products(self, pairs: int) -> None:
        """None is there."""

    def __call__(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, key_N: torch.Tensor, first_key: int = 0) -> torch.Tensor:
        return rows_NH * self._scale_QH[(key_N - first_key).clamp(max=len(self._scale_QH) - 1)]


@dataclass(frozen=True)
class Episode:
    seed: int
    quotas: tuple[int, ...]
    experts: int
    top_k: int
    costs: Costs
    policy: str
    steps: int
    identity: bool
    nodes: bool = False
    predictions: type[Guesses] | None = None


class OneRank:
    """The layers of one rank."""

    def __init__(self, episode: Episode, transport: LocalTransport) -> None:
        specs = [LayerSpec(f"layer{i}", episode.experts, LAYOUT) for i in range(LAYERS)]
        rank, quota = transport.rank, episode.quotas[transport.rank]
        self.telemetry = Telemetry(specs, [quota] * LAYERS, CPU)
        self.pool = SlotPool(specs, [quota] * LAYERS, CPU)
        link = SynchronousEngine() if episode.predictions is None else LateLink()
        self.loader = ExpertLoader(self.pool, Store(episode.experts), link, tuple(range(LAYERS)), self.telemetry)  # type: ignore[arg-type]
        self.loader.join(transport)
        history = UseHistory.empty(LAYERS, episode.experts)
        self.layers, shared = [], []
        bound = None if episode.predictions is None else PrefetchBudget(transport.size, 5 * BYTES)
        budgets = FetchBudgets(prefetch=bound)
        quota_R = np.array(episode.quotas)
        for index in range(LAYERS):
            cache = ExpertCache(index, index, episode.experts, self.loader, self.telemetry)
            kernel: Any = Scaling(self.pool.weights(index))
            experts = ExpertCompute(index, cache, kernel, self.telemetry, identity=episode.identity)
            past = history.layer(index, episode.experts)
            self.layers.append(
                MoELayer(index, experts, policy=POLICIES[episode.policy], history=past, telemetry=self.telemetry)
            )
            holds = np.zeros((transport.size, episode.experts), bool)
            homes = default_homes(episode.experts, quota_R, index)
            node_R = np.arange(transport.size) // 2 if episode.nodes else None
            state = LayerState(holds, quota_R.copy(), homes, node_R)
            shared.append(LayerPlanner(rank, state, episode.costs, expert_bytes=BYTES, budgets=budgets))
        first = default_placement([episode.experts] * LAYERS, np.tile(quota_R, (LAYERS, 1)))
        self.shared = ModelPlanner(shared, first, [range(LAYERS)], budgets)
        self.rank = rank
        self.offered: tuple[Placement, int] | None = None
        self.reached = 0
        self.lockstep = LockStep(
            transport,
            model=1,
            most_experts=episode.experts,
            idle_layers=[layer.idle for layer in self.layers],
            digest=lambda: self.shared.digest,
            offered=lambda: 0,
            explain_divergence=lambda: "the driver found it",
            on_header=self.begin_step,
        )
        for layer, one in zip(self.layers, self.shared.layers, strict=True):
            layer.form(self.lockstep, one, complete=False)
        if episode.predictions is not None:
            predictor = episode.predictions(episode.experts, rank)
            self.layers[0].prefetch_by(Prefetcher(0, self.layers[1].prefetch_target, predictor))

    def begin_step(self, header: Header) -> None:
        if self.offered is not None:
            self.shared.check(self.offered[0])
            self.shared.follow(*self.offered)
            self.offered = None
        moving = self.shared.budgets.migration is not None
        for shift in self.shared.begin_step(lambda layer: self.layers[layer].scores()):
            if shift.rank == self.rank:
                self.layers[shift.giver].give_slot(self.layers[shift.taker], shift.evicted)
        if moving and self.shared.budgets.migration is None:
            self.reached += 1
            quotas = [layer.cache.slots for layer in self.layers]
            assert quotas == self.shared.placement.quota_LR[:, self.rank].tolist()

    def check(self, rank: int) -> None:
        self.pool.check_integrity()
        self.loader.check_content()
        for layer, shared in zip(self.layers, self.shared.layers, strict=True):
            assert (shared.state.holds_RE[rank] == layer.cache.resident_E).all()
            assert shared.state.quota_R[rank] == layer.cache.slots


def drive(transport: LocalTransport, episode: Episode) -> tuple[int, ...]:
    """One rank's part; returns its hits, misses, pairs sent, bytes copied from peers, moves, prefetches, hits that hadn't
    landed, and placements reached.
    """
    rank = OneRank(episode, transport)
    common = np.random.default_rng(episode.seed)  # the same on all ranks
    own = np.random.default_rng((episode.seed, transport.rank))
    ids_end = episode.experts + (2 if episode.identity else 0)
    scales_L = [
        torch.stack([scale_of(number, e) if e < episode.experts else torch.ones(HIDDEN) for e in range(ids_end)])
        for number in range(LAYERS)
    ]
    for _ in range(episode.steps):
        if common.random() < 0.03:  # a new placement, effective with the next step
            placement = random_placement(common, rank.shared.placement)
            rank.offered = placement, int(common.choice([BYTES // 3, BYTES, 20 * BYTES]))
        skew = common.choice([0.0, 1.0, 2.5])
        weights = 1 / np.arange(1, ids_end + 1) ** skew
        favourites = common.permutation(ids_end)
        tokens = int(own.choice([0, 1, 2, 7, 60]))
        if not tokens:
            rank.lockstep.idle_step()
            rank.check(transport.rank)
            continue
        chance = np.empty(ids_end)
        chance[favourites] = weights / weights.sum()
        index = np.stack([own.choice(ids_end, episode.top_k, replace=False, p=chance) for _ in range(tokens)])
        hidden = torch.from_numpy(own.standard_normal((tokens, HIDDEN))).float()
        gates = torch.from_numpy(own.random((tokens, episode.top_k))).float()
        rank.lockstep.begin()
        for number, layer in enumerate(rank.layers):
            if number == 1 and own.random() < 0.2:
                break  # this rank's model leaves the layer out
            got = layer(hidden, torch.from_numpy(index), gates)
            expected = (hidden[:, None] * scales_L[number][index] * gates[..., None]).sum(1)
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-3)
        rank.lockstep.end()
        rank.check(transport.rank)
    layers = rank.telemetry.snapshot().layers
    names = ("hits", "misses", "pairs_sent", "peer_bytes", "migrations", "prefetches", "late", "taken_back")
    return *(sum(getattr(x, name) for x in layers) for name in names), rank.reached


EPISODES = [
    Episode(seed, quotas, experts, top_k, ALL_COSTS[costs], *rest)
    for seed, (quotas, experts, top_k, costs, *rest) in enumerate(
        [
            ((3, 2), 8, 2, "tokens travel", "lrfu", 180, False),
            ((4, 4, 4), 12, 3, "copies travel", "lru", 150, False),
            ((1, 1, 1, 1), 16, 4, "gather", "lfu", 120, True),
            ((2, 9, 5), 9, 2, "work spreads", "lrfu", 150, False),
            ((6, 1), 10, 3, "nothing travels", "lrfu", 120, True),
            ((5, 5, 5, 5), 20, 4, "copies travel", "lrfu", 240, False, True),
            ((7, 7, 7), 16, 2, "copies travel", "lrfu", 120, False, True),
            ((1, 2, 1, 2, 1), 3, 1, "work spreads", "lru", 90, False),
            ((3, 2), 16, 2, "tokens travel", "lrfu", 250, False, False, Echo),
            ((4, 4, 4), 16, 3, "copies travel", "lrfu", 200, True, True, Guesses),
            ((1, 6), 16, 2, "nothing travels", "lru", 200, False, False, Echo),
        ]
    )
]


@pytest.mark.parametrize("episode", EPISODES, ids=lambda e: f"{e.seed}")
def test_random_steps(episode: Episode):
    counts = run_threads(drive, len(episode.quotas), episode)
    hits, misses, sent, copied, moves, prefetches, late, dropped, reached = (
        sum(column) for column in zip(*counts, strict=True)
    )
    assert hits and misses and moves and reached, "nothing happened"
    assert bool(prefetches and late and dropped) == (episode.predictions is not None)
    assert bool(sent) == (episode.costs not in (ALL_COSTS["nothing travels"], ALL_COSTS["copies travel"]))
    assert copied or episode.costs is not ALL_COSTS["copies travel"]
