"""A scripted cluster whose ranks have numbers: any number of ranks, layers and experts, under a load that moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.driver.controller_client import ControllerStats
from cluster.driver.hand_overs import HandOverCounts
from cluster.messages.controller import ControllerState, Explanation, Judgement
from cluster.messages.rank import LayerPlacement
from cluster.reports import ClusterState, ClusterStats, GroupReport, PlacementReport, RankStats
from epslots.generation.engine_stats import EngineStats, sum_engines
from epslots.rank_groups import Role
from epslots.telemetry import COUNTERS, LayerStats, Stats, sum_over_ranks
from tests.support.scripted_cluster import ScriptedCluster

GIB = 1024**3


def judgement(**changes: Any) -> Judgement:
    """A decision of the controller."""
    given: dict[str, Any] = {
        "placement": 7,
        "kept": False,
        "asked": False,
        "balance_now": 0.71,
        "balance_then": 0.94,
        "gain_s": 0.182,
        "migration_s": 0.041,
        "copies": 38,
        "trust": 0.9,
        "windows": 12.0,
        "reasons": {},
        "plan_s": 0.02,
    }
    return Judgement(**given | changes)


class BusyCluster(ScriptedCluster):
    """A ``ScriptedCluster`` whose ranks' counters grow with every look.

    Args:
        shape: ranks, MoE layers, experts of each.
        share: of a layer's experts that a rank has slots for.
        roles: of the groups, into which the ranks are divided.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (4, 2, 16),
        share: float = 0.25,
        roles: tuple[Role, ...] = ("mixed",),
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.ranks, self.layers, self.experts = shape
        self._roles, self._size = roles, self.ranks // len(roles)
        self.formed = [True] * len(roles)
        self.hand_overs = HandOverCounts(done=9, failed=2, nbytes=9 * 2**20, seconds=0.27)
        self.serving = self.ranks
        self.missing: tuple[str, ...] = ()
        self.asked_layers: list[tuple[int, ...]] = []
        random_ = self._random = random.Random(5)
        self._slots = max(1, round(share * self.experts))
        order = [random_.sample(range(self.experts), self.experts) for _ in range(self.layers)]
        self._hot = [{expert: 1 / (place + 4) for place, expert in enumerate(one)} for one in order]
        # The hottest experts are on several ranks, each of the others on one.
        self.holders = [self._placed(one) for one in order]
        self._tokens = [[[0] * self.experts for _ in range(self.layers)] for _ in range(self.ranks)]
        self._looks = 0

    def _placed(self, order: list[int]) -> list[tuple[int, ...]]:
        room, found = [self._slots] * self.ranks, [set[int]() for _ in range(self.experts)]
        wanted = [(expert, max(1, round(self.ranks / (place / 2 + 2)))) for place, expert in enumerate(order)]
        for expert, copies in wanted:
            for rank in sorted(range(self.ranks), key=lambda r: (-room[r], self._random.random()))[:copies]:
                if room[rank]:
                    room[rank] -= 1
                    found[expert].add(rank)
        for rank in range(self.ranks):  # what is left, with what is hot
            for expert in (expert for expert in order if rank not in found[expert]):
                if not room[rank]:
                    break
                room[rank] -= 1
                found[expert].add(rank)
        return [tuple(sorted(ranks)) for ranks in found]

    def work(self) -> None:
        """A second's load."""
        self._looks += 1
        for rank, layers in enumerate(self._tokens):
            for layer, counts in enumerate(layers):
                hot = self._hot[layer]
                shift = (self._looks // 4 + rank * 3) % self.experts
                for expert in range(self.experts):
                    level = hot[expert] + 0.4 * hot[(expert + shift) % self.experts]
                    counts[expert] += int(level * 900 * self._random.uniform(0.6, 1.4))

    def state(self) -> ClusterState:
        groups = tuple(
            GroupReport(number, role, 3 + number, self.formed[number], self._size, number)
            for number, role in enumerate(self._roles)
        )
        return replace(super().state(), ranks=self.serving, groups=groups)

    def _layer(self, rank: int, layer: int) -> LayerStats:
        looks, counts = self._looks, self._tokens[rank][layer]
        moved = {"pairs_sent": sum(counts) // 4, "pairs_received": sum(counts) // 4 + 40 * looks * ((rank * 7) % 5 - 2)}
        counters = {"steps": 40 * looks, "hits": 900 * looks, "misses": 60 * looks + 2 * rank, **moved}
        given = COUNTERS | counters | {"host_bytes": 40_000_000 * looks, "peer_bytes": 90_000_000 * looks}
        return LayerStats(
            layer=f"model.layers.{layer}.mlp.experts",
            num_experts=self.experts,
            slots=self._slots,
            tokens_per_expert=tuple(counts),
            **given,  # type: ignore[arg-type]
        )

    def _rank(self, rank: int) -> RankStats:
        looks = self._looks
        own = self._random.randint(90, 120)
        engine = EngineStats(
            steps=40 * looks,
            replayed_steps=0,
            crowded_steps=0,
            ragged_steps=0,
            graph_bytes=0,
            prompt_tokens=700 * looks,
            new_tokens=own * looks,
            reused_tokens=0,
            preempted=0,
            running=4,
            waiting=0,
            kv_used=2600 + 90 * (looks % 9),
            kv_tokens=8192,
        )
        return RankStats(
            group=rank // self._size,
            role=self._roles[rank // self._size],
            rank=rank,
            where=f"node-{rank // 8:02d}, process {4100 + rank}",
            stats=Stats(
                tuple(self._layer(rank, layer) for layer in range(self.layers)),
                steps=40 * looks,
                zero_miss_steps=29 * looks,
            ),
            engine=engine,
            steps=40 * looks,
            requests=4,
            memory_bytes=int((6.2 + rank % 3 / 10) * GIB),
            descriptors=90,
            threads=20,
            placement=7 + rank // self._size,
        )

    def stats(self, layers: Sequence[int] = ()) -> ClusterStats:
        self.asked_stats += 1
        self.asked_layers.append(tuple(layers))
        self.work()
        ranks = tuple(self._rank(rank) for rank in range(self.ranks))
        placed = tuple(
            LayerPlacement(
                layer=f"model.layers.{layer}.mlp.experts",
                slots=(self._slots,) * self.ranks,
                home=tuple(expert % self.ranks for expert in range(self.experts)),
                holders=tuple(self.holders[layer]),
                wanted=tuple(self.holders[layer]),
            )
            for layer in layers
            if layer < self.layers
        )
        return ClusterStats(
            epoch=3,
            queued=0,
            ranks=ranks,
            total=sum_over_ranks([rank.stats for rank in ranks]),
            engine=sum_engines([rank.engine for rank in ranks]),
            controllers=tuple(ControllerStats("watching", "node-00", 7 + n, 1, 0, 0) for n in range(len(self._roles))),
            hand_overs=self.hand_overs,
            missing=self.missing,
            placement=PlacementReport(3, tuple(rank.where for rank in ranks), placed, 7, 0),
        )

    def explain(self, group: int = 0) -> Explanation:
        return Explanation(
            state=ControllerState.WATCHING,
            epoch=3 + group,
            role=self._roles[group],
            placement=7 + group,
            followed=7 + group,
            pending_migrations=0,
            windows=31,
            pooled=1,
            speeds=(1000,) * self.ranks,
            incomplete=0,
            dropped=0,
            refused=0,
            refusals=(),
            step_s=0.02,
            bytes_per_step=2**20,
            published=judgement(placement=7 + group),
            latest=judgement(kept=True, balance_now=0.93),
        )
