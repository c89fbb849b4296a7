"""``GroupedCluster``: the settings of a simulated cluster whose groups serve requests that arrive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import IntArray
from epslots.config import EngineConfig
from epslots.errors import ConfigError
from epslots.placement.placement import MOST_RANKS, default_placement
from epslots.planner.cache_policy import Policy
from epslots.rank_groups import RankGroups, Role
from epslots.simulation.simulated_group import SimulatedGroup
from epslots.simulation.timing import HandOverTiming, Timing


@dataclass(frozen=True)
class GroupedCluster:
    """A simulated cluster.

    Attributes:
        division: its ranks, groups and roles.
        nodes: ranks are dealt to nodes in their order.
        quota_L: slots of each layer of the trace, on each rank.
        timing: of a layer's step, on each rank.
        hand_over: seconds of a hand-over.
        expert_bytes: bytes of each expert.
        kv_token_bytes: bytes of a token's cache, in all layers of the model.
        policy: the eviction policy.
        engine: of each rank; requests are kept in rows.
        depth: layers of the model for each layer of the trace: a step takes so many times as long.
        window_steps: steps of a window of load; 0 = no controller.
        speeds: how fast ranks compute, one after the other, and again from the first; 1 = usual.
    """

    division: RankGroups
    nodes: int
    quota_L: IntArray
    timing: Timing
    hand_over: HandOverTiming
    expert_bytes: int
    kv_token_bytes: int
    policy: Policy
    engine: EngineConfig
    depth: float = 1.0
    window_steps: int = 0
    speeds: tuple[float, ...] = (1.0,)

    @property
    def ranks(self) -> int:
        return self.division.ranks

    @property
    def group_size(self) -> int:
        return self.division.group_size

    def node_of(self, rank: int) -> int:
        return rank * self.nodes // self.ranks

    def role_of(self, rank: int) -> Role:
        return self.division.role_of(rank // self.group_size)

    def check(self, num_experts_L: IntArray) -> None:
        """Raise ConfigError if a number is out of range, or the slots are for other layers."""
        limits = {"ranks": (self.ranks, MOST_RANKS), "nodes": (self.nodes, self.ranks)}
        for name, (given, most) in limits.items():
            if not 1 <= given <= most:
                raise ConfigError(f"{name}={given}; allowed: 1 to {most}")
        if len(self.quota_L) != len(num_experts_L) or (self.quota_L < 1).any():
            raise ConfigError(f"slots of {self.quota_L.tolist()}; allowed: 1 or more in each of {len(num_experts_L)} layers")
        if not 0 < self.depth < 1e6:
            raise ConfigError(f"depth={self.depth}; allowed: more than 0")
        if not self.speeds or not all(0.01 <= speed <= 100 for speed in self.speeds):
            raise ConfigError(f"speeds={self.speeds}; allowed: numbers from 0.01 to 100, 1 = usual")
        if self.kv_token_bytes < 0 or self.window_steps < 0:
            raise ConfigError(f"kv_token_bytes={self.kv_token_bytes}, window_steps={self.window_steps}; allowed: 0 or more")

    def expert_groups(self, num_experts_L: IntArray) -> list[SimulatedGroup]:
        """Each group's slots and planner; experts are dealt to slots alike in all groups."""
        quota_L = np.minimum(self.quota_L, num_experts_L)
        placement = default_placement(num_experts_L.tolist(), np.repeat(quota_L[:, None], self.group_size, axis=1))
        return [
            SimulatedGroup(
                placement,
                self.timing,
                self.policy,
                expert_bytes=self.expert_bytes,
                node_R=self._nodes_of(number),
                speed_R=np.array([self.speeds[rank % len(self.speeds)] for rank in self._ranks_of(number)]),
            )
            for number in range(self.division.groups)
        ]

    def _ranks_of(self, group: int) -> range:
        return range(group * self.group_size, (group + 1) * self.group_size)

    def _nodes_of(self, group: int) -> IntArray | None:
        """The node of each rank of a group, from 0; None if it is on one."""
        node_R = np.array([self.node_of(rank) for rank in self._ranks_of(group)])
        node_R -= node_R[0]
        return node_R if node_R.any() else None
