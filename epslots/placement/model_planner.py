"""All layers of a model as every rank sees them: the placement that is followed, and the migrations towards it.

A placement is followed from between two steps, on all ranks before the same step. From then on its homes count, and every step
brings the slots nearer to it, within a budget of bytes for each rank:

    copies    wanted experts are fetched behind the demand of a layer's step (``planner/migration.py``)
    slots     a layer's slots are one range of its pool, and layers of a pool are neighbours: the boundary between two ranges
              shifts by a slot, at most one a step on each rank; distant layers trade slots through those between them

Pure, and the same on all ranks. Legend of shape suffixes: L MoE layers, R ranks, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from epslots.arrays import IntArray
from epslots.errors import ConfigError, StaleEpoch
from epslots.placement.placement import Placement
from epslots.planner.cost_model import Costs
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.migration import MigrationBudget


@dataclass(frozen=True)
class Shift:
    """A slot of one rank that moves from a layer to its neighbour.

    Attributes:
        rank: the rank that has the slot.
        giver, taker: indices of the layers in the model.
        evicted: the giver's expert that is evicted; -1 = it has an empty slot.
    """

    rank: int
    giver: int
    taker: int
    evicted: int


class ModelPlanner:
    """All layers of a model, the placement that they follow, and the budgets of a step.

    Args:
        layers: in order.
        placement: the one that the layers' homes come from.
        pools: the layers of each pool, in the order of their ranges of slots.
        budgets: shared with all layers' planners. ``migration`` is set while there is something to migrate.
        levels_R: slots that each layer of ``ceding`` has ceded to a rank's KV cache; None = no rank's layers cede any. If some
            do, slots don't move between layers, and no layer counts as complete.
        ceding: the layers that cede slots.

    Attributes:
        levels_R: as given, kept up to date by ``change_level``.
        complete: whether every rank holds every expert of every layer, for good: then each computes its own tokens.
        bytes_per_step: of the migration budget.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlanner],
        placement: Placement,
        pools: Sequence[Sequence[int]],
        budgets: FetchBudgets,
        *,
        levels_R: IntArray | None = None,
        ceding: Sequence[int] = (),
    ) -> None:
        self.layers = tuple(layers)
        self.levels_R, self._ceding = levels_R, tuple(ceding)
        # No other placement has as many slots.
        self.complete = levels_R is None and all(layer.state.holds_RE.all() for layer in layers)
        self.placement = placement
        self.budgets = budgets
        self.bytes_per_step = 0
        self._pools = tuple(tuple(pool) for pool in pools)
        self._shifting = False
        self._past = 0

    @property
    def pending_migrations(self) -> int:
        """The number of copies and slots that have yet to be moved."""
        slots = int(np.abs(self._quota_LR() - self.placement.quota_LR).sum()) // 2 if self._shifting else 0
        return sum(layer.state.pending_migrations for layer in self.layers) + slots

    @property
    def digest(self) -> int:
        """63 bits that differ between ranks whose layers or placements differ."""
        layers = np.array([layer.state.digest for layer in self.layers])
        return (xxhash.xxh3_64_intdigest(layers.tobytes()) ^ self._past) >> 1

    def check(self, placement: Placement) -> None:
        """Raise ConfigError if a placement isn't for this model and these ranks, StaleEpoch if it isn't a newer one."""
        if placement.version <= self.placement.version:
            raise StaleEpoch(f"placement {placement.version} is not newer than {self.placement.version}, which is followed")
        check_fits(placement, self.placement, self._pools)

    def follow(self, placement: Placement, bytes_per_step: int, scores: Callable[[int], IntArray] | None = None) -> None:
        """Follow ``placement`` from now on; between steps, on all ranks alike.

        Args:
            bytes_per_step: bytes that each rank migrates at most in a step. Less than an expert's size allows a migration
                every few steps.
            scores: the eviction policy's scores by layer; needed where slots are ceded, whose copies aren't wanted then.
        """
        self.placement, self.bytes_per_step = placement, bytes_per_step
        for index, layer in enumerate(self.layers):
            experts = int(placement.num_experts_L[index])
            layer.state.follow(placement.home_LE[index, :experts].copy(), placement.wanted_LRE[index, :, :experts].copy())
            if self.levels_R is not None:
                assert scores is not None
                layer.state.fit_wanted(scores(index))
        self._shifting = self.levels_R is None and bool((self._quota_LR() != placement.quota_LR).any())
        self.budgets.migration = self._migration_budget()
        numbers = np.array([placement.version, bytes_per_step, *placement.quota_LR.ravel()])
        self._past = xxhash.xxh3_64_intdigest(numbers.tobytes(), seed=self._past)

    def _migration_budget(self) -> MigrationBudget | None:
        """The budget while there is something to migrate."""
        if not self.pending_migrations:
            return None
        largest = max(layer.expert_bytes for layer in self.layers)
        return MigrationBudget(self.placement.ranks, self.bytes_per_step, largest)

    def begin_step(self, scores: Callable[[int], IntArray]) -> list[Shift]:
        """Renew the budgets and shift slots; returns the shifts in order, which the caller applies to its rank's pool.

        Called once before every step, on all ranks.

        Args:
            scores: the eviction policy's scores of a layer's experts, int64 [E], by the layer's index.
        """
        if self.budgets.prefetch is not None:
            self.budgets.prefetch.renew()
        budget = self.budgets.migration
        if budget is None:
            return []
        if not self.pending_migrations:
            self.budgets.migration = None
            self._shifting = False
            return []
        budget.renew()
        shifts = []
        if self._shifting:
            quota_LR = self._quota_LR()
            for rank in np.flatnonzero((quota_LR != self.placement.quota_LR).any(0)).tolist():
                target_L, experts_L = self.placement.quota_LR[:, rank], self.placement.num_experts_L
                pair = next_shift(quota_LR[:, rank], target_L, experts_L, self._pools)
                if pair is None or budget.left_R[rank] < self.layers[pair[0]].expert_bytes:
                    continue
                giver, taker = pair
                budget.spend(np.array([rank]), self.layers[giver].expert_bytes)
                evicted = self.layers[giver].state.resize(rank, -1, scores(giver))
                self.layers[taker].state.resize(rank, 1, scores(taker))
                shifts.append(Shift(rank, giver, taker, evicted))
        return shifts

    def change_level(self, rank: int, change: int, scores: Callable[[int], IntArray]) -> list[int]:
        """Let each layer of a rank cede one more slot to its KV cache, or use one again. ``change`` is 1 or -1.

        Called between steps, on all ranks alike.

        Args:
            scores: the eviction policy's scores of a layer's experts, int64 [E], by the layer's index.

        Returns:
            The expert that each ceding layer evicts there, -1 = none.
        """
        assert self.levels_R is not None
        self.levels_R[rank] += change
        evicted = [self.layers[layer].state.resize(rank, -change, scores(layer)) for layer in self._ceding]
        for layer in self._ceding:
            self.layers[layer].state.fit_wanted(scores(layer))
        if self.budgets.migration is None:  # copies may have slots again
            self.budgets.migration = self._migration_budget()
        return evicted

    def _quota_LR(self) -> IntArray:
        return np.stack([layer.state.quota_R for layer in self.layers])


def movement_budget(step_s: float, costs: Costs, expert_bytes: int, share: float) -> int:
    """Bytes that a rank may migrate in a step, if migrations may take a share of the step's time.

    Args:
        step_s: seconds of a step.
        costs: the nanoseconds of an expert's fetch.
        expert_bytes: bytes of that expert.
        share: more than 0.
    """
    return max(1, int(share * step_s * 1e9 / costs.host_fetch * expert_bytes))


def check_fits(placement: Placement, other: Placement, pools: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError, naming the difference, if two placements aren't for the same model and ranks."""
    if placement.num_experts_L.tolist() != other.num_experts_L.tolist():
        raise ConfigError(
            f"the placement is for another model: its layers have {placement.num_experts_L.tolist()} experts, "
            f"this model's {other.num_experts_L.tolist()}"
        )
    if placement.ranks != other.ranks:
        raise ConfigError(f"the placement is for {placement.ranks} ranks, and there are {other.ranks}")
    for pool in pools:
        single = [layer for layer in pool if placement.num_experts_L[layer] == 1]
        if single and (placement.quota_LR[list(pool)] != other.quota_LR[list(pool)]).any():
            raise ConfigError(
                f"layer {single[0]} has a single expert, so slots can't move past it; leave the slots of layers as they are"
            )
        given_R, there_R = placement.quota_LR[list(pool)].sum(0), other.quota_LR[list(pool)].sum(0)
        for rank in np.flatnonzero(given_R != there_R).tolist():
            raise ConfigError(
                f"the placement gives rank {rank} {given_R[rank]} slots, and it has {there_R[rank]} (in layers "
                f"{pool[0]} to {pool[-1]}, whose experts are alike)"
            )


def next_shift(
    quota_L: IntArray, target_L: IntArray, num_experts_L: IntArray, pools: Sequence[Sequence[int]]
) -> tuple[int, int] | None:
    """The next slot to move from a layer to its neighbour, as (giver, taker); None if the targets are reached.

    A layer above its target gives a slot, in a direction in which one is lacking: so every shift brings a boundary nearer, and
    a layer that slots move through loses none. A layer that has a slot for every expert gives one first.

    Args:
        quota_L, target_L: the rank's slots of each layer, now and in the end.
        num_experts_L: experts of each layer.
        pools: the layers of each pool, in the order of their ranges of slots.
    """
    for pool in pools:
        members = list(pool)
        now, aim = quota_L[members], target_L[members]
        # Slots that must cross each boundary: to the right if positive.
        flow = (now - aim).cumsum()
        for position in np.flatnonzero(now > aim).tolist():
            direction = 1 if flow[position] > 0 else -1
            if direction < 0 and not (position and flow[position - 1] < 0):
                continue
            # A slot that enters a full layer must leave it on the other side, so the last layer of the row isn't full.
            while now[position + direction] >= num_experts_L[members[position + direction]]:
                position += direction
            return members[position], members[position + direction]
    return None
