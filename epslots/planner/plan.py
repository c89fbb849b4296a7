"""The structs of one layer's step, in the order in which they come to be, and where each is filled.

    Batch       ``MoELayer.prepare`` (moe_layer.py): a rank's tokens
    Gathered    the peers (lockstep.py): all ranks' counts
    Assignment  the rule (assignment.py): how many pairs each rank computes, and the fetches that this takes
    Migrations  ``choose_migrations`` (migration.py): the fetches for the placement's sake
    LayerPlan   ``LayerPlanner.decide``: the consequences for every rank's slots; the same on all ranks
    RankPlan    ``LayerPlanner.plan``: one rank's part, with its ``TokenSplits`` (token_splits.py) and ``PeerCopies``;
                ``ExpertCache`` adds each ``ExpertPass`` (expert_passes.py)

Legend of shape suffixes: R ranks, E experts of the layer, U those with tokens ("used"), F fetches, M migrations,
C experts on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from epslots.arrays import NO_EXPERTS, BoolArray, IntArray
from epslots.planner.expert_passes import ExpertPass
from epslots.planner.token_splits import TokenSplits


class Assignment(msgspec.Struct, frozen=True):
    """Which rank computes how many pairs, and which experts are fetched for it. The rule fills every field.

    Attributes:
        experts_U: int64, the experts with tokens on any rank, in order of their ids.
        counts_RU: int64, pairs of each rank's tokens for each of them.
        computed_RU: int64, pairs of each of them that each rank computes. Columns add up to the pairs there are.
        fetch_ranks, fetch_experts, fetch_sources: int64 [F], parallel, by rank and expert: the target, the expert's id, and
            the rank it is copied from, -1 = the target's host.
        cost_ns: nanoseconds that the cost model expects.
    """

    experts_U: IntArray
    counts_RU: IntArray
    computed_RU: IntArray
    fetch_ranks: IntArray
    fetch_experts: IntArray
    fetch_sources: IntArray
    cost_ns: int


class Migrations(msgspec.Struct, frozen=True):
    """The copies that are fetched for the placement, in the order of target ranks; all int64 [M]. The rule fills every field.

    Attributes:
        ranks, experts: the target rank and the expert that it gets.
        evicted: the expert evicted there; -1 = an empty slot is filled.
        sources: the rank that the expert is copied from; -1 = the target's host.
    """

    ranks: IntArray
    experts: IntArray
    evicted: IntArray
    sources: IntArray

    def __len__(self) -> int:
        return len(self.ranks)


NO_MIGRATIONS = Migrations(NO_EXPERTS, NO_EXPERTS, NO_EXPERTS, NO_EXPERTS)


class LayerPlan(msgspec.Struct, frozen=True):
    """The plan of one layer's step for all ranks. ``LayerPlanner.decide`` fills every field.

    Attributes:
        assignment: the work, and the fetches that are left when CPUs have taken their share.
        cpu_ranks, cpu_experts: int64 [C], parallel: missing experts that a rank's CPU computes instead of fetching them.
        evicted_RE: residents that are evicted for the fetches.
        migrations: fetches for the placement, behind the layer's compute.
        score_E: the eviction policy's scores; zeros where nothing is missing.
    """

    assignment: Assignment
    cpu_ranks: IntArray
    cpu_experts: IntArray
    evicted_RE: BoolArray
    migrations: Migrations
    score_E: IntArray


class PeerCopies(msgspec.Struct, frozen=True):
    """One rank's part of the copies from slot to slot in a layer's step. All ranks take part, some with nothing.

    Attributes:
        sources: the source rank of each expert that comes from a peer.
        sends: (target rank, expert) of each copy that this rank sends. Both ends list a pair of ranks' copies by expert.
    """

    sources: Mapping[int, int]
    sends: Sequence[tuple[int, int]]


class RankPlan(msgspec.Struct):
    """One rank's part of the plan of one layer's step.

    ``LayerPlanner.plan`` fills:
        assignment: the work of all ranks; None if no pair travels anywhere.
        score_E: the eviction policy's scores; zeros where nothing is missing.
        computed_E: int64, pairs of each expert that this rank computes.
        cpu_experts: int64, those of these experts that its CPU computes.
        slots_E: int64, pairs of each expert that it computes from slots.
        evicted_E: its residents that are evicted.
        moved: pairs that the busiest rank sends or receives; 0 = no pair travels anywhere.
        splits: the pairs that this rank sends and receives; None if no pair travels anywhere.
        sent, received: pairs that leave this rank, and that come to it.
        copies: its part of the copies between ranks; None if no rank copies anything.
        migrated, displaced: the expert that it fetches for the placement, and the one evicted for it; -1 = none.
        migration_copies: its part of the copies between ranks for the placement; None if no rank copies anything.

    ``ExpertCache.schedule`` fills:
        passes: the passes over the experts of ``slots_E``, in order; none if all of them are in their slots.

    ``ExpertCache.fetch`` fills, and ``ExpertCache.begin_pass`` carries on:
        begun: passes whose fetches have begun.
    """

    assignment: Assignment | None
    score_E: IntArray
    computed_E: IntArray
    cpu_experts: IntArray
    slots_E: IntArray
    evicted_E: BoolArray
    moved: int
    splits: TokenSplits | None
    sent: int
    received: int
    copies: PeerCopies | None
    migrated: int
    displaced: int
    migration_copies: PeerCopies | None
    passes: tuple[ExpertPass, ...] = ()
    begun: int = 0


_NO_EVICTIONS = np.empty(0, bool)
NOTHING_PLANNED = RankPlan(
    None, NO_EXPERTS, NO_EXPERTS, NO_EXPERTS, NO_EXPERTS, _NO_EVICTIONS, 0, None, 0, 0, None, -1, -1, None
)
"""The plan of a rank whose host plans nothing: all experts are in slots, no rank has tokens, or the device decides."""
