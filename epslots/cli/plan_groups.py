"""``epslots plan --groups``: the options, tables and JSON of a cluster whose ranks are divided into groups and roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional

import msgspec
import typer

from epslots.cli.column_table import Columns, column_table
from epslots.cli.options import DecodeRanksOption, GroupsOption, PrefillRanksOption
from epslots.errors import ConfigError, shown
from epslots.models.cluster_plan import HandOverCost, RolePlan, plan_hand_overs, plan_roles
from epslots.models.memory_plan import MemoryPlan
from epslots.rank_groups import RankGroups, divide_ranks
from epslots.simulation.timing import DEVICES, hand_over_of
from epslots.units import format_bytes, parse_count

if TYPE_CHECKING:
    from rich.console import Console

_MACHINES = {"cuda": "h100", "cpu": "cpu"}


@dataclass(frozen=True)
class GroupPlanOptions:
    """The division of the ranks, and hand-overs between roles."""

    PANEL: ClassVar[str] = "Groups and roles"

    groups: GroupsOption = 1
    prefill_ranks: PrefillRanksOption = 0
    decode_ranks: DecodeRanksOption = 0
    hand_over_tokens: Annotated[
        Optional[str],
        typer.Option(help="Tokens of hand-overs whose costs are shown; several: 500,2000. Default: half of --kv-tokens."),
    ] = None
    machine: Annotated[
        Optional[str],
        typer.Option(help=f"Links of hand-overs, by data sheet: {', '.join(DEVICES)}. Default: h100; cpu on a CPU."),
    ] = None

    def division(self, ranks: int | None) -> RankGroups:
        """The ranks in groups; None = one, or those of both roles. ConfigError: the numbers don't go together."""
        if self.machine is not None and self.machine not in DEVICES:
            raise ConfigError(f"--machine {self.machine!r}: allowed: {', '.join(DEVICES)}")
        if ranks is None and not (self.prefill_ranks and self.decode_ranks):
            ranks = max(self.groups, 1 + self.prefill_ranks)
        found = divide_ranks(ranks, self.groups, self.prefill_ranks, self.decode_ranks)
        assert found is not None
        return found

    def hand_overs(self, plan: MemoryPlan) -> list[HandOverCost]:
        """Costs of hand-overs between ranks with this plan; empty without roles."""
        if not self.prefill_ranks:
            return []
        timing = hand_over_of(DEVICES[self.machine or _MACHINES[plan.device.kind]])
        return plan_hand_overs(plan.shape, plan.most_kv_tokens, self._tokens(plan.most_kv_tokens), timing)

    def _tokens(self, kv_tokens: int) -> list[int]:
        if self.hand_over_tokens is None:
            return [max(1, kv_tokens // 2)]
        counts = [parse_count(part) for part in self.hand_over_tokens.split(",")]
        found = [count for count in counts if count is not None]
        if len(found) < len(counts):
            given = shown(self.hand_over_tokens)
            raise ConfigError(f"--hand-over-tokens {given}; allowed: numbers of tokens, separated by commas")
        return found


_ROLE_COLUMNS: Columns[RolePlan] = (
    ("role", lambda one: one.role),
    ("groups", lambda one: str(one.groups)),
    ("ranks of each", lambda one: str(one.group_ranks)),
    ("slots for each expert", lambda one: f"{one.slots_per_expert:.3g}"),
    ("KV tokens of all", lambda one: f"{one.kv_tokens:,}"),
    ("their bytes", lambda one: format_bytes(one.kv_bytes)),
    ("requests at a time", lambda one: f"{one.requests:,}"),
)
_HAND_OVER_COLUMNS: Columns[HandOverCost] = (
    ("tokens", lambda one: f"{one.tokens:,}"),
    ("bytes", lambda one: format_bytes(one.nbytes)),
    ("within a node", lambda one: f"{1e3 * one.node_s:.3g} ms"),
    ("between nodes", lambda one: f"{1e3 * one.network_s:.3g} ms"),
)


def print_groups(console: Console, plan: MemoryPlan, division: RankGroups, options: GroupPlanOptions) -> None:
    """Print what each role has room for, and the costs of hand-overs."""
    title = f"{division.ranks} ranks in {division.groups} groups, each a whole model; each rank as above"
    console.print()
    console.print(column_table(title, _ROLE_COLUMNS, plan_roles(plan, division)))
    if costs := options.hand_overs(plan):
        machine = options.machine or _MACHINES[plan.device.kind]
        caption = f"{machine}, by data sheet, 10 GB/s within a host's memory, 20 ms of messages; clusters measure theirs"
        console.print()
        console.print(column_table("a hand-over from a prefill to a decode rank", _HAND_OVER_COLUMNS, costs, caption))


def groups_as_json(plan: MemoryPlan, division: RankGroups, options: GroupPlanOptions) -> dict[str, Any]:
    """Everything in these tables."""
    return {
        "ranks": division.ranks,
        "groups": division.groups,
        "group_ranks": division.group_size,
        "prefill_ranks": division.prefill_ranks,
        "roles": msgspec.to_builtins(plan_roles(plan, division)),
        "hand_overs": msgspec.to_builtins(options.hand_overs(plan)),
    }
