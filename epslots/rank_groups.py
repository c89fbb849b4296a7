"""``RankGroups``: how ranks are divided into groups and roles. Pure; the cluster, its plan and its simulation share it."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from epslots.errors import ConfigError

Role = Literal["mixed", "prefill", "decode"]
"""The requests that a group serves: all; prompts, which others decode; or requests whose prompts were computed elsewhere."""


class RankGroups(msgspec.Struct, frozen=True):
    """Ranks in groups of one size. The first groups compute prompts, if there are roles.

    Attributes:
        ranks: of all groups.
        groups: their number; it divides the ranks.
        prefill_ranks: ranks of groups that compute only prompts; 0 = every group does all.
    """

    ranks: int
    groups: int = 1
    prefill_ranks: int = 0

    @property
    def group_size(self) -> int:
        """Ranks of a group."""
        return self.ranks // self.groups

    def role_of(self, group: int) -> Role:
        """The role of the group with this number."""
        if not self.prefill_ranks:
            return "mixed"
        return "prefill" if group * self.group_size < self.prefill_ranks else "decode"

    def groups_of(self, role: Role) -> int:
        """The number of groups with a role."""
        return sum(self.role_of(group) == role for group in range(self.groups))


def divide_ranks(ranks: int | None, groups: int, prefill_ranks: int, decode_ranks: int) -> RankGroups | None:
    """The division that these settings ask for; None if the number of ranks is not known.

    Args:
        ranks: None = those of both roles, if both are given.
        groups: 1 with roles = of the largest size that divides the ranks of both.
        prefill_ranks, decode_ranks: 0 = not given: no roles; or all other ranks.

    Raises:
        ConfigError: the numbers don't go together.
    """
    if decode_ranks and not prefill_ranks:
        raise ConfigError(f"decode_ranks={decode_ranks}; allowed with prefill_ranks, which compute the prompts")
    if ranks is None and decode_ranks:
        ranks = prefill_ranks + decode_ranks
    if ranks is None:
        return None
    if prefill_ranks and groups == 1 and 0 < prefill_ranks < ranks:
        groups = ranks // math.gcd(prefill_ranks, ranks - prefill_ranks)
    check_division(ranks, groups, prefill_ranks, decode_ranks)
    return RankGroups(ranks, groups, prefill_ranks)


def check_division(ranks: int, groups: int, prefill_ranks: int, decode_ranks: int) -> None:
    """Raise ConfigError, naming what was given, if these numbers of ranks and groups don't go together."""
    if ranks % groups:
        raise ConfigError(f"groups={groups} with ranks={ranks}; allowed: a number that divides the ranks")
    if not prefill_ranks:
        return
    others = ranks - prefill_ranks
    if others < 1 or (decode_ranks and decode_ranks != others):
        raise ConfigError(
            f"prefill_ranks={prefill_ranks}, decode_ranks={decode_ranks} with ranks={ranks}; allowed: at least one of each, "
            f"together as many as ranks"
        )
    if prefill_ranks % (size := ranks // groups):
        raise ConfigError(
            f"prefill_ranks={prefill_ranks} with ranks={ranks} in groups={groups}; allowed: multiples of {size}, the size of "
            f"a group"
        )
