"""The plan of a cluster whose ranks are divided by role.

What each role has room for, and what a hand-over between two costs. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from epslots.errors import ConfigError
from epslots.models.memory_plan import MemoryPlan
from epslots.models.model_shape import ModelShape
from epslots.rank_groups import RankGroups, Role
from epslots.simulation.timing import HandOverTiming

_ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")


class RolePlan(msgspec.Struct, frozen=True):
    """The groups of one role. All ranks have the same memory, slots and cache.

    Attributes:
        groups: their number.
        group_ranks: ranks of each.
        slots_per_expert: slots of a group for each expert; below 1, some experts are in none.
        kv_tokens, requests: that the caches of all of its ranks keep, and that run at a time.
        kv_bytes: of these caches.
    """

    role: Role
    groups: int
    group_ranks: int
    slots_per_expert: float
    kv_tokens: int
    requests: int
    kv_bytes: int

    @property
    def ranks(self) -> int:
        return self.groups * self.group_ranks


class HandOverCost(msgspec.Struct, frozen=True):
    """A hand-over of a request's cache.

    Attributes:
        tokens: that it holds.
        nbytes: of it.
        node_s, network_s: between ranks of one node, and of two.
    """

    tokens: int
    nbytes: int
    node_s: float
    network_s: float


def plan_roles(plan: MemoryPlan, division: RankGroups) -> list[RolePlan]:
    """The groups of each role that there is.

    Args:
        plan: of one rank, for a group of the division's size.
    """
    assert plan.ranks == division.group_size
    found = []
    for role in _ROLES:
        if groups := division.groups_of(role):
            ranks = groups * division.group_size
            found.append(
                RolePlan(
                    role=role,
                    groups=groups,
                    group_ranks=division.group_size,
                    slots_per_expert=plan.slots_per_expert,
                    kv_tokens=ranks * plan.most_kv_tokens,
                    requests=ranks * plan.engine.max_requests,
                    kv_bytes=ranks * plan.kv_bytes,
                )
            )
    return found


def plan_hand_overs(shape: ModelShape, kv_tokens: int, tokens: Sequence[int], timing: HandOverTiming) -> list[HandOverCost]:
    """The cost of hand-overs of so many tokens each.

    Raises:
        ConfigError: a number is less than 1, or more than a rank's cache keeps.
    """
    for count in tokens:
        if not 1 <= count <= kv_tokens:
            raise ConfigError(f"hand_over_tokens={count}; allowed: 1 to kv_tokens={kv_tokens}")
    sizes = [(count, count * shape.token_bytes + shape.request_bytes) for count in tokens]
    return [
        HandOverCost(
            tokens=count,
            nbytes=size,
            node_s=timing.fixed_s + timing.transfer_s(size, same_node=True),
            network_s=timing.fixed_s + timing.transfer_s(size, same_node=False),
        )
        for count, size in sizes
    ]
