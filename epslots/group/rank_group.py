"""One rank's membership in a group of ranks that are one model: what it shares with them, and how it follows placements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from torch import nn

from epslots.cache.slot_pool import SlotPool
from epslots.errors import ConfigError, ExchangeError
from epslots.group.handshake import Handshake, decode, encode
from epslots.placement.model_planner import ModelPlanner, check_fits
from epslots.placement.placement import Placement, default_placement
from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import CpuShare
from epslots.planner.layer_planner import LayerPlanner
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
        shared: what all ranks know of the model.
        lockstep: keeps this rank in step.
    """

    def __init__(
        self,
        runtime: Runtime,
        transport: Transport,
        settings: Mapping[str, str],
        hellos: Sequence[Handshake],
        costs: Sequence[Costs],
        followed: tuple[Placement, int] | None,
    ) -> None:
        self.transport = transport
        self.settings = dict(settings)
        self.costs = tuple(costs)
        self.nodes = tuple(hello.node for hello in hellos)
        self._runtime = runtime
        self._offered: dict[int, tuple[Placement, int]] = {}
        quota_LR = np.array([hello.slots for hello in hellos]).T
        placement = default_placement([layer.num_experts for layer in runtime.layers], quota_LR)
        _, node_R = np.unique(self.nodes, return_inverse=True)
        shared: dict[int, LayerPlanner] = {}
        self._tables: list[tuple[SlotPool, np.ndarray, tuple[int, ...]]] = []
        for loader, pool_costs in zip(runtime.movers, self.costs, strict=True):
            table = np.zeros((len(loader.store_layers), transport.size, loader.pool.slot_of.shape[1]), bool)
            for position, index in enumerate(loader.store_layers):
                for rank, hello in enumerate(hellos):
                    table[position, rank, hello.residents[index]] = True
                experts = runtime.layers[index].num_experts
                shared[index] = LayerPlanner(
                    transport.rank,
                    table[position, :, :experts],
                    quota_LR[index].copy(),
                    placement.home_LE[index, :experts],
                    pool_costs,
                    expert_bytes=loader.pool.layout.nbytes,
                    node_R=node_R if node_R.any() else None,
                )
                shared[index].record_bytes = runtime.layers[index].record.nbytes
                if runtime.computes_on_host and pool_costs.computes_on_host:
                    shared[index].cpu_share = CpuShare(transport.size, experts, pool_costs, beside=loader.link.concurrent)
            self._tables.append((loader.pool, table, loader.store_layers))
            loader.transport = transport
        layers = [shared[index] for index in range(len(runtime.layers))]
        self.shared = ModelPlanner(layers, placement, [loader.store_layers for loader in runtime.movers])
        if runtime.foresight.bytes_per_step is not None:
            self.shared.bound_prefetches(runtime.foresight.bytes_per_step)
        if followed is not None:
            self.shared.adopt(*followed)
        self.lockstep = LockStep(
            transport,
            model=xxhash.xxh3_64_intdigest(hellos[0].settings["checkpoint"].encode()) & 0x7FFFFFFF,
            most_experts=max(layer.num_experts for layer in runtime.layers),
            idle_layers=[runner.idle for runner in runtime.runners],
            digest=self._digest,
            explain_divergence=self._explain_divergence,
            on_header=self._begin_step,
        )
        self.lockstep.placement = self.shared.placement.version
        for runner, layer in zip(runtime.runners, self.shared.layers, strict=True):
            runner.join(self.lockstep, layer)

    @property
    def placement(self) -> Placement:
        """What this rank follows: the homes, wanted copies and slots that the ranks move towards."""
        return self.shared.placement

    @property
    def pending_migrations(self) -> int:
        """Copies and slots that all ranks together have yet to move to get there."""
        return self.shared.pending_migrations

    def offer(self, placement: Placement, bytes_per_step: int) -> None:
        """Follow a newer placement as soon as it was offered to all ranks; to all in the same order, at whatever time.

        One that isn't newer than those so far is passed over.

        Args:
            bytes_per_step: what each rank may fetch in a step to get there; equal on all ranks.

        Raises:
            ConfigError: the placement is for other ranks or another model, or the bytes aren't positive.
        """
        if not 0 < bytes_per_step < MOST_STEP_BYTES:
            most = format_bytes(MOST_STEP_BYTES)
            raise ConfigError(f"bytes_per_step={bytes_per_step!r}: allowed: bytes, more than 0 and less than {most}")
        if placement.version > self.lockstep.placement:
            check_fits(placement, self.placement, [loader.store_layers for loader in self._runtime.movers])
            self._offered[placement.version] = placement, bytes_per_step
            self.lockstep.placement = placement.version

    def _begin_step(self, header: Header) -> None:
        """Adopt the placement that all ranks have by now, and go a step towards it."""
        if header.placement > self.placement.version:
            if header.placement not in self._offered:
                error = ExchangeError(
                    f"rank {self.transport.rank} was offered the placements {sorted(self._offered)}, and another rank "
                    f"{header.placement}; all must be offered the same ones, in the same order"
                )
                self.lockstep.fail(error)  # the others don't know
                raise error
            self.shared.adopt(*self._offered[header.placement])
            self._offered = {g: offer for g, offer in self._offered.items() if g > header.placement}
        runners = self._runtime.runners
        for shift in self.shared.begin_step(lambda layer: runners[layer].score_E):
            if shift.rank == self.transport.rank:
                runners[shift.giver].experts.pass_slot(runners[shift.taker].experts, shift.evicted)

    def _digest(self) -> int:
        """Of the table as it is here, with this rank's row as its slots really are."""
        for pool, table, layers in self._tables:
            mine, actual = table[:, self.transport.rank], pool.slot_of >= 0
            for position in np.flatnonzero((mine != actual).any(1)):
                mine[position] = actual[position]
                self.shared.layers[layers[position]].forget_digest()
        return self.shared.digest

    def _explain_divergence(self) -> str:
        """The first layer and slot in which the ranks' tables differ. All ranks call it together."""
        layers = self.shared.layers
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


def group_of(model: nn.Module) -> RankGroup | None:
    """The group that the model's rank belongs to; None for a model on its own."""
    group: RankGroup | None = getattr(model, _ATTRIBUTE, None)
    return group


def enter(model: nn.Module, group: RankGroup) -> None:
    """Make ``group`` the one that ``group_of`` finds."""
    setattr(model, _ATTRIBUTE, group)
