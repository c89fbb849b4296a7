"""A simulated cluster: step times and cache hits from a routing trace, a machine's timing and the ranks' own rules.

``epslots simulate`` and the benchmarks call ``simulate``. Ranks form expert-parallel groups of bounded size, each a whole
model. Every rank decodes ``batch`` sequences of the trace at a time, a token a step, prompts too, and takes the next sequence
when one is done. Ranks neither prefetch nor compute experts on their CPUs. With a controller, windows of load lead to
placements, which the groups reach within a budget of bytes, as real ranks do.

Pure. Legend of shape suffixes: L layers, R ranks, B lanes (sequences at a time), K experts per token, E experts of the largest
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.placement.model_planner import movement_budget
from epslots.placement.placement import MOST_RANKS, Placement, default_placement
from epslots.placement.planner import RankHardware
from epslots.placement.replanner import OVERDUE, SHARE, Replanner
from epslots.planner.cache_policy import Policy
from epslots.simulation.cache_replay import IdArray
from epslots.simulation.lanes import read_on
from epslots.simulation.simulated_group import SimulatedGroup, StepTally
from epslots.simulation.timing import Timing

GROUP_SIZE = 64
_USUAL_SPEED = 1000


@dataclass(frozen=True)
class RecordedTraffic:
    """A routing trace (``trace.py``).

    Attributes:
        expert_ids: [tokens, L, K].
        starts: the first token of each sequence.
        num_experts_L: experts of each layer.
    """

    expert_ids: IdArray
    starts: IntArray
    num_experts_L: IntArray


@dataclass(frozen=True)
class SimulatedCluster:
    """The ranks that are simulated.

    Attributes:
        ranks, nodes: ranks are dealt to nodes in their order.
        quota_L: slots of each layer on each rank; ignored with a placement.
        timing: of a rank's machine.
        expert_bytes: bytes of each expert.
        policy: the eviction policy.
        group_size: the most ranks of an expert-parallel group.
        placement: of each group, at the start; None: experts dealt by slots.
        window_steps: steps of a window of load; 0 = no controller.
    """

    ranks: int
    nodes: int
    quota_L: IntArray
    timing: Timing
    expert_bytes: int
    policy: Policy
    group_size: int = GROUP_SIZE
    placement: Placement | None = None
    window_steps: int = 0

    def check(self, num_experts_L: IntArray) -> None:
        """Raise ConfigError if a number is out of range, or the placement is for other groups or layers."""
        limits = {"ranks": (1, MOST_RANKS), "nodes": (1, self.ranks), "group_size": (1, MOST_RANKS)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed: {least} to {most}")
        if self.placement is not None:
            sizes = {len(ranks) for ranks in self.groups()}
            if sizes != {self.placement.ranks}:
                raise ConfigError(f"the placement is for {self.placement.ranks} ranks, and groups have {sorted(sizes)}")
            if self.placement.num_experts_L.tolist() != num_experts_L.tolist():
                raise ConfigError(
                    f"the placement is for layers of {self.placement.num_experts_L.tolist()} experts, and the trace's have "
                    f"{num_experts_L.tolist()}"
                )

    def groups(self) -> list[IntArray]:
        """The ranks of each group: as few groups as possible, of sizes as equal as possible."""
        return np.array_split(np.arange(self.ranks), -(-self.ranks // self.group_size))


class TimeStats(msgspec.Struct, frozen=True):
    """Statistics of times, in milliseconds."""

    mean: float
    p50: float
    p99: float
    max: float


class Outcome(msgspec.Struct, frozen=True):
    """The results of a simulation, over all ranks and counted steps.

    Attributes:
        batch: sequences of each rank.
        step_ms: milliseconds of all groups' steps.
        tokens_per_s: of the whole cluster.
        balance: mean / largest pairs of a group's ranks, averaged over layers and steps.
        hit_rate: hits per use.
        bytes_by_source: bytes fetched on demand and for placements; ``from_other_nodes`` is part of the peers'.
        evictions: evicted experts.
        placements: the number of placements followed after the first.
        layer_us: mean microseconds of each layer.
    """

    batch: int
    ranks: int
    nodes: int
    groups: int
    steps: int
    step_ms: TimeStats
    tokens_per_s: float
    balance: float
    hit_rate: float
    bytes_by_source: dict[str, int]
    evictions: int
    placements: int
    layer_us: list[float]


def simulate(
    traffic: RecordedTraffic,
    cluster: SimulatedCluster,
    batch: int,
    steps: int,
    warm_up: int = 0,
    advance: Callable[[int], object] = int,
) -> Outcome:
    """The outcome of ``steps`` steps of all groups, after ``warm_up`` steps that don't count.

    Args:
        batch: sequences of each rank.
        advance: called with 1 after each step of a group.

    Raises:
        ConfigError: the trace is empty, a number is out of range, or the placement is for other groups or layers.
    """
    if not len(traffic.expert_ids):
        raise ConfigError("the trace holds no token")
    if batch < 1 or steps < 1 or warm_up < 0:
        raise ConfigError(f"batch={batch}, steps={steps}, warm_up={warm_up}: allowed: from 1, 1 and 0")
    cluster.check(traffic.num_experts_L)
    groups = [_SimulatedRanks(cluster, traffic, ranks, batch) for ranks in cluster.groups()]
    controllers = {group.size: _SimulatedController(cluster, group) for group in groups} if cluster.window_steps else {}
    lanes = read_on(traffic.starts, len(traffic.expert_ids), cluster.ranks * batch)
    for step, row_B in zip(range(warm_up + steps), lanes, strict=False):
        if step == warm_up:
            _take_tallies(groups)
        for group in groups:
            group.step(row_B)
            advance(1)
        if controllers and (step + 1) % cluster.window_steps == 0:
            for size, controller in controllers.items():
                controller.close_window([group for group in groups if group.size == size])
    tallies = _take_tallies(groups)
    versions = max(group.simulated.model.placement.version for group in groups)
    first = 0 if cluster.placement is None else cluster.placement.version
    return _outcome(cluster, batch, tallies, [group.size for group in groups], versions - first)


def _take_tallies(groups: Sequence[_SimulatedRanks]) -> list[StepTally]:
    return [group.simulated.take() for group in groups]


class _SimulatedRanks:
    """A group and its lanes: lane b belongs to rank b modulo the cluster's ranks."""

    def __init__(self, cluster: SimulatedCluster, traffic: RecordedTraffic, ranks: IntArray, batch: int) -> None:
        self.size = len(ranks)
        self._traffic = traffic
        self._lanes = (ranks[:, None] + np.arange(batch) * cluster.ranks).ravel()
        self._rank_of_lane = np.repeat(np.arange(self.size), batch)
        self._tokens_R = np.full(self.size, batch)
        node_R = ranks * cluster.nodes // cluster.ranks
        self.node_R = node_R - node_R[0]
        quota_LR = np.repeat(np.minimum(cluster.quota_L, traffic.num_experts_L)[:, None], self.size, axis=1)
        self.simulated = SimulatedGroup(
            cluster.placement or default_placement(traffic.num_experts_L.tolist(), quota_LR),
            cluster.timing,
            cluster.policy,
            expert_bytes=cluster.expert_bytes,
            node_R=self.node_R if self.node_R.any() else None,
        )
        self._layers_L1 = np.arange(len(traffic.num_experts_L))[:, None]

    def step(self, row_B: IntArray) -> None:
        experts_L = self._traffic.num_experts_L
        layers, experts = len(experts_L), int(experts_L.max())
        ids_BLK = self._traffic.expert_ids[row_B[self._lanes]].astype(np.int64)
        place_BLK = (self._layers_L1 * self.size + self._rank_of_lane[:, None, None]) * experts + ids_BLK
        valid_BLK = (ids_BLK >= 0) & (ids_BLK < experts_L[:, None])
        counts = np.bincount(place_BLK[valid_BLK], minlength=layers * self.size * experts)
        self.simulated.step(counts.reshape(layers, self.size, experts), self._tokens_R)


class _SimulatedController:
    """The cluster's controller for groups of one size, which all follow the same placements."""

    def __init__(self, cluster: SimulatedCluster, group: _SimulatedRanks) -> None:
        self._cluster = cluster
        self._hardware = RankHardware(group.node_R, np.full(group.size, _USUAL_SPEED), cluster.timing.costs)
        self._placement = group.simulated.model.placement
        self._since = 0
        layers = len(self._placement.num_experts_L)
        self._replanner = Replanner(self._placement.num_experts_L, [range(layers)])

    def close_window(self, groups: Sequence[_SimulatedRanks]) -> None:
        """Learn from the groups' loads since the last call; if another placement pays, let them follow it."""
        simulated = [group.simulated for group in groups]
        tokens_LE, uses_LE, reuse_LD = (
            sum(parts[1:], parts[0]) for parts in zip(*(s.take_window() for s in simulated), strict=True)
        )
        # The placement is for one group, so it needs the mean group's tokens and uses.
        self._replanner.learn(tokens_LE // len(groups), uses_LE // len(groups), reuse_LD, self._cluster.window_steps)
        self._since += 1
        if self._since <= OVERDUE and any(one.model.pending_migrations for one in simulated):
            return
        _, proposal = self._replanner.weigh(self._placement, self._hardware)
        if proposal.keep:
            return
        self._placement, self._since = proposal.placement, 0
        costs, step_ns = self._cluster.timing.costs, float(np.mean([np.mean(one.tally.step_ns) for one in simulated]))
        budget = movement_budget(step_ns / 1e9, costs, self._cluster.expert_bytes, SHARE)
        for one in simulated:
            one.model.follow(self._placement, budget)


def _outcome(
    cluster: SimulatedCluster, batch: int, tallies: Sequence[StepTally], sizes: Sequence[int], placements: int
) -> Outcome:
    """Sum up the groups."""
    step_ms = np.concatenate([tally.step_ns for tally in tallies]) / 1e6

    def total(name: str) -> int:
        return int(sum(getattr(tally, name).sum() for tally in tallies))

    uses = total("hits") + total("misses")
    steps = len(tallies[0].step_ns)
    return Outcome(
        batch=batch,
        ranks=cluster.ranks,
        nodes=cluster.nodes,
        groups=len(tallies),
        steps=steps,
        step_ms=TimeStats(
            mean=float(step_ms.mean()),
            p50=float(np.percentile(step_ms, 50)),
            p99=float(np.percentile(step_ms, 99)),
            max=float(step_ms.max()),
        ),
        tokens_per_s=sum(1e9 * size * batch * steps / sum(t.step_ns) for size, t in zip(sizes, tallies, strict=True)),
        balance=sum(float(t.levels_L.sum()) for t in tallies) / max(1, total("steps_L")),
        hit_rate=total("hits") / max(1, uses),
        bytes_by_source={
            "host": total("host_fetches") * cluster.expert_bytes,
            "peers": total("peer_fetches") * cluster.expert_bytes,
            "host_for_placements": total("host_migrations") * cluster.expert_bytes,
            "peers_for_placements": total("peer_migrations") * cluster.expert_bytes,
            "from_other_nodes": total("far_fetches") * cluster.expert_bytes,
        },
        evictions=total("evictions"),
        placements=placements,
        layer_us=(np.sum([t.time_L for t in tallies], axis=0) / (steps * len(tallies) * 1e3)).tolist(),
    )
