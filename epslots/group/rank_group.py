"""One rank's membership in a group of ranks that are one model. ``join.py`` makes it, at every epoch.

It holds the planners, keeps the rank in lock-step, and follows placements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from torch import nn

from epslots.arrays import BoolArray, IntArray
from epslots.cache.expert_loader import ExpertLoader
from epslots.errors import ConfigError, ExchangeError
from epslots.group.handshake import Handshake, decode, encode
from epslots.models.cache_slots import largest_pool
from epslots.placement.model_planner import ModelPlanner, check_fits
from epslots.placement.placement import Placement, default_placement
from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import CpuShare
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.prefetch_policy import PrefetchBudget
from epslots.runtime import Runtime
from epslots.transport.lockstep import Header, LockStep
from epslots.transport.transport import Transport
from epslots.units import MOST_STEP_BYTES, format_bytes

_ATTRIBUTE = "epslots_group"


class RankGroup:
    """One rank's membership in a group of ranks that are one model.

    Attributes:
        transport: to the others.
        settings: equal on all ranks.
        costs: agreed by all, by pool.
        nodes: the name of each rank's node.
        pools: the layers between which slots may move, by pool.
        shared: the planner of the model; the same on all ranks.
        lockstep: keeps this rank in step.
    """

    def __init__(
        self,
        runtime: Runtime,
        transport: Transport,
        settings: Mapping[str, str],
        handshakes: Sequence[Handshake],
        costs: Sequence[Costs],
        followed: tuple[Placement, int] | None,
    ) -> None:
        self.transport = transport
        self.settings = dict(settings)
        self.costs = tuple(costs)
        self.nodes = tuple(handshake.node for handshake in handshakes)
        self._runtime = runtime
        self._offered: dict[int, tuple[Placement, int]] = {}
        self._tables = [(loader, _table(loader, handshakes)) for loader in runtime.loaders]
        self.pools = slot_pools(runtime, handshakes)
        self.shared = self._planners(handshakes)
        if followed is not None:
            self.shared.follow(*followed, self._scores)
        self._newest = self.shared.placement.version
        self.lockstep = LockStep(
            transport,
            model=xxhash.xxh3_64_intdigest(handshakes[0].settings["checkpoint"].encode()) & 0x7FFFFFFF,
            most_experts=max(layer.num_experts for layer in runtime.layers),
            idle_layers=[runner.idle for runner in runtime.runners],
            offered=lambda: self._newest,
            digest=self._digest,
            explain_divergence=self._explain_divergence,
            on_header=self._begin_step,
        )
        self.lockstep.cede(max(0, handshakes[transport.rank].levels))
        for loader in runtime.loaders:
            loader.join(transport)
        for runner, planner in zip(runtime.runners, self.shared.layers, strict=True):
            runner.form(self.lockstep, planner, complete=self.shared.complete)

    def _planners(self, handshakes: Sequence[Handshake]) -> ModelPlanner:
        """A planner for each layer, from what all ranks hold."""
        runtime, size = self._runtime, self.transport.size
        quota_LR = np.array([handshake.slots for handshake in handshakes]).T
        placement = default_placement([layer.num_experts for layer in runtime.layers], quota_LR)
        levels_R, ceding = np.array([handshake.levels for handshake in handshakes]), largest_pool(runtime.layers)
        quota_LR[list(ceding)] -= levels_R.clip(min=0)
        _, node_R = np.unique(self.nodes, return_inverse=True)
        bound = runtime.prefetch_config.bytes_per_step
        budgets = FetchBudgets(None if bound is None else PrefetchBudget(size, bound))
        layers: dict[int, LayerPlanner] = {}
        for (loader, table), costs in zip(self._tables, self.costs, strict=True):
            for position, index in enumerate(loader.store_layers):
                experts = runtime.layers[index].num_experts
                offloads = runtime.computes_on_host and costs.computes_on_host
                layers[index] = LayerPlanner(
                    self.transport.rank,
                    LayerState(
                        table[position, :, :experts],
                        quota_LR[index].copy(),
                        placement.home_LE[index, :experts],
                        node_R if node_R.any() else None,
                    ),
                    costs,
                    expert_bytes=loader.pool.layout.nbytes,
                    budgets=budgets,
                    cpu_share=CpuShare(size, experts, costs, concurrent=loader.link.concurrent) if offloads else None,
                )
        in_order = [layers[index] for index in range(len(layers))]
        ceded_R = levels_R.clip(min=0) if (levels_R >= 0).any() else None
        return ModelPlanner(in_order, placement, self.pools, budgets, levels_R=ceded_R, ceding=ceding)

    @property
    def placement(self) -> Placement:
        """The placement that this rank follows: homes, wanted copies and slots."""
        return self.shared.placement

    @property
    def pending_migrations(self) -> int:
        """Copies and slots that all ranks together have yet to migrate for it."""
        return self.shared.pending_migrations

    def offer(self, placement: Placement, bytes_per_step: int) -> None:
        """Follow a newer placement from the first step before which all ranks were offered it.

        Ranks may be offered placements at different times, but in the same order. One that isn't newer is ignored.

        Args:
            bytes_per_step: what each rank may fetch in a step to get there; equal on all ranks.

        Raises:
            ConfigError: the placement is for other ranks or another model, or the bytes aren't positive.
        """
        if not 0 < bytes_per_step < MOST_STEP_BYTES:
            most = format_bytes(MOST_STEP_BYTES)
            raise ConfigError(f"bytes_per_step={bytes_per_step!r}: allowed: bytes, more than 0 and less than {most}")
        if placement.version > self._newest:
            check_fits(placement, self.placement, self.pools)
            self._offered[placement.version] = placement, bytes_per_step
            self._newest = placement.version

    def _begin_step(self, header: Header) -> None:
        """Follow the newest placement that all ranks have, move the slots of this step for it, and cede others to caches."""
        if header.placement > self.placement.version:
            if header.placement not in self._offered:
                error = ExchangeError(
                    f"rank {self.transport.rank} was offered the placements {sorted(self._offered)}, and another rank "
                    f"{header.placement}; all must be offered the same ones, in the same order"
                )
                self.lockstep.fail(error)  # the others don't know
                raise error
            self.shared.follow(*self._offered[header.placement], self._scores)
            self._offered = {version: offer for version, offer in self._offered.items() if version > header.placement}
        runners = self._runtime.runners
        for shift in self.shared.begin_step(self._scores):
            if shift.rank == self.transport.rank:
                runners[shift.giver].give_slot(runners[shift.taker], shift.evicted)
        if self.shared.levels_R is not None:
            for rank, levels in enumerate(header.levels_R):
                self._change_levels(rank, levels - int(self.shared.levels_R[rank]))

    def _scores(self, layer: int) -> IntArray:
        """The eviction policy's scores of a layer's experts, the same on all ranks."""
        return self._runtime.runners[layer].scores()

    def _change_levels(self, rank: int, change: int) -> None:
        """Enter that a rank's layers cede further slots to its KV cache, or use some again; on that rank, let them."""
        for _ in range(abs(change)):
            evicted = self.shared.change_level(rank, 1 if change > 0 else -1, self._scores)
            if rank != self.transport.rank:
                continue
            if change > 0:
                self._runtime.cede_level(evicted)
            else:
                self._runtime.take_back_level(complete=False)

    def _digest(self) -> int:
        """The digest of this rank's tables, after its own rows were brought up to its slots."""
        for loader, table in self._tables:
            mine, actual = table[:, self.transport.rank], loader.pool.slot_of >= 0
            for position in np.flatnonzero((mine != actual).any(1)):
                mine[position] = actual[position]
                self.shared.layers[loader.store_layers[position]].state.holds_changed()
        return self.shared.digest

    def _explain_divergence(self) -> str:
        """The first layer and slot in which the ranks' tables differ. All ranks call it together."""
        layers = [planner.state for planner in self.shared.layers]
        digests = np.array([decode(m, list[int]) for m in self._gather([layer.digest for layer in layers])])
        differing_L = np.flatnonzero((digests != digests[0]).any(0))
        if not len(differing_L):
            return "all layers are alike, but ranks came to them by different placements, or in different steps"
        index = int(differing_L[0])
        name = self._runtime.layers[index].name
        pool, position = self._runtime.place_of(index)
        tables_R = np.array([decode(m, list[list[bool]]) for m in self._gather(layers[index].holds_RE.tolist())])
        slots_RE = np.array([decode(m, list[int]) for m in self._gather(pool.slot_of[position].tolist())])
        differing = np.argwhere((tables_R != tables_R[0]).any(0))
        again = "Load the model again, or form the next epoch of the group"
        if not len(differing):
            return f"layer {name}: all slots are alike, but placements or earlier plans differ. {again}"
        owner, expert = differing[0].tolist()
        say_yes = np.flatnonzero(tables_R[:, owner, expert]).tolist()
        slot = int(slots_RE[owner, expert])
        return (
            f"layer {name}, expert {expert} on rank {owner}: "
            f"{f'it is in slot {slot} there' if slot >= 0 else 'it is in no slot there'}; ranks {say_yes} of "
            f"{self.transport.size} believe that it is. {again}"
        )

    def _gather(self, value: object) -> list[bytes]:
        return self.transport.gather_bytes(encode(value))


def slot_pools(runtime: Runtime, handshakes: Sequence[Handshake]) -> list[tuple[int, ...]]:
    """The layers between which slots may move, by pool. There are none where some rank's layers cede slots to its cache."""
    if any(handshake.levels >= 0 for handshake in handshakes):
        return [(layer,) for layer in range(len(runtime.layers))]
    return [loader.store_layers for loader in runtime.loaders]


def _table(loader: ExpertLoader, handshakes: Sequence[Handshake]) -> BoolArray:
    """Which rank holds which expert of a pool's layers, bool [layers, R, E]."""
    table = np.zeros((len(loader.store_layers), len(handshakes), loader.pool.slot_of.shape[1]), bool)
    for position, index in enumerate(loader.store_layers):
        for rank, handshake in enumerate(handshakes):
            table[position, rank, handshake.residents[index]] = True
    return table


def group_of(model: nn.Module) -> RankGroup | None:
    """The group that the model's rank belongs to; None for a model on its own."""
    group: RankGroup | None = getattr(model, _ATTRIBUTE, None)
    return group


def enter(model: nn.Module, group: RankGroup) -> None:
    """Make ``group`` the one that ``group_of`` finds."""
    setattr(model, _ATTRIBUTE, group)
