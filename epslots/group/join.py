"""How ranks become one model: they compare versions, publish their slots, agree on costs, and step together from then on.

``load`` calls ``start_rank``, which fills a rank's slots and calls ``join``. After a loss the survivors form the next epoch's
group and ``join`` again: the common table of residents is rebuilt from each rank's own slots.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import msgspec
import numpy as np
import xxhash
from torch import nn

from epslots.arrays import IntArray
from epslots.errors import GroupError, PeerLost, StepFailed
from epslots.group.cost_probe import largest, measure_alone, measure_costs
from epslots.group.handshake import (
    Handshake,
    agree_on_placement,
    decode,
    encode,
    exchange_handshakes,
    greet_peers,
    settings_of,
)
from epslots.group.rank_group import RankGroup, enter, group_of, slot_pools
from epslots.models.experts import experts_modules
from epslots.models.layer_calls import calls_are_taken
from epslots.moe.moe_layer import plan_alone
from epslots.moe.peers import Alone
from epslots.placement.model_planner import check_fits
from epslots.placement.placement import Placement, default_placement, first_residents, pack
from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import CpuShare
from epslots.planner.layer_planner import FetchBudgets
from epslots.planner.prefetch_policy import PrefetchBudget
from epslots.progress import ProgressDisplay
from epslots.runtime import Runtime, runtime_of
from epslots.transport.lockstep import LockStep
from epslots.transport.transport import Transport

# Bytes that each rank fetches in a step towards the placement that it was started with, until it is offered another.
_START_BYTES = 2**20


def join(
    model: nn.Module,
    transport: Transport,
    *,
    settings: Mapping[str, str] | None = None,
    costs: Costs | None = None,
    placement: Placement | None = None,
    node: str | None = None,
) -> RankGroup:
    """Make this rank's model one with those of all other ranks. All ranks call it together.

    Args:
        model: from ``epslots.load``, alone or in an earlier epoch's group.
        settings: more values that must be equal on all ranks, by name; those of the earlier group if not given.
        costs: the same on all ranks. By default those that an earlier group of any rank agreed on, else measured.
        placement: to begin with, the same on all ranks; by default that of the earlier group, if there was one.
        node: the name of this rank's node; by default the host's.

    Raises:
        ConfigError: the placement is for other ranks or another model.
        RankMismatchError: ranks run different checkpoints, versions or settings; on all of them.
        StaleEpoch: a rank belongs to another epoch.
        PeerLost: a rank is gone, or could not load.
    """
    runtime, last = runtime_of(model), group_of(model)
    runtime.telemetry.collect()  # the device gives back the slots that it decides about, with their tables and histories
    for loader in runtime.loaders:
        loader.vacate_unconfirmed()
    if settings is None:
        settings = {} if last is None else last.settings
    followed = last.placement if placement is None and last is not None else placement
    if placement is not None:
        settings = {**settings, "placement": f"{placement.version} ({xxhash.xxh3_64_hexdigest(pack(placement))})"}
    handshake = Handshake(
        epoch=transport.epoch,
        settings=settings_of(runtime, {**settings, "costs": "measured" if costs is None else str(costs)}),
        slots=[runner.cache.room for runner in runtime.runners],
        levels=-1 if runtime.plan.cache_slots is None else runtime.ceding_loader.pool.levels,
        residents=[np.flatnonzero(runner.cache.resident_E).tolist() for runner in runtime.runners],
        node=socket.gethostname() if node is None else node,
        steps=sum(runner.steps for runner in runtime.runners),
        costs=[] if last is None else list(last.costs),
        group=-1 if last is None or placement is not None else last.transport.epoch,
        rank=-1 if last is None else last.transport.rank,
        placement=0 if followed is None else followed.version,
        bytes_per_step=(0 if last is None else last.shared.bytes_per_step) or _START_BYTES,
    )
    handshakes = greet_peers(transport, handshake)
    _share_history(transport, runtime, handshakes)
    if placement is not None:
        slots_LR = np.array([other.slots for other in handshakes]).T
        there = default_placement([layer.num_experts for layer in runtime.layers], slots_LR)
        check_fits(placement, there, slot_pools(runtime, handshakes))
    agreed = _agree_on_costs(transport, runtime, handshakes, costs)
    group = RankGroup(runtime, transport, settings, handshakes, agreed, agree_on_placement(transport, handshakes, followed))
    if group_of(model) is None:
        _step_with_every_pass(model)
    enter(model, group)
    return group


def _agree_on_costs(
    transport: Transport, runtime: Runtime, handshakes: Sequence[Handshake], given: Costs | None
) -> list[Costs]:
    """The costs of each pool: given ones, those of a rank's last group, or measured ones."""
    if given is not None:
        return [given] * len(runtime.loaders)
    known = [handshake.costs for handshake in handshakes if handshake.costs]
    if known:
        return [largest(pool) for pool in zip(*known, strict=True)]
    return [
        measure_costs(transport, loader, runtime.runners[loader.store_layers[0]].experts, on_cpu=runtime.computes_on_host)
        for loader in runtime.loaders
    ]


def stand_alone(model: nn.Module, costs: Costs | None = None) -> None:
    """Let a rank make its steps alone, with its bound of prefetches and its share of misses on the CPU.

    Args:
        costs: decide which misses are computed on the CPU, where that is allowed; measured if not given.
    """
    runtime = runtime_of(model)
    bound = runtime.prefetch_config.bytes_per_step
    budgets = FetchBudgets(None if bound is None else PrefetchBudget(1, bound))
    peers = Alone(lambda: None if budgets.prefetch is None else budgets.prefetch.renew())
    for loader in runtime.loaders:
        runners = [runtime.runners[index] for index in loader.store_layers]
        known = (costs or measure_alone(loader, runners[0].experts, on_cpu=True)) if runtime.computes_on_host else None
        for runner in runners:
            share = None
            if known is not None and known.computes_on_host:
                share = CpuShare(1, runner.cache.num_experts, known, concurrent=loader.link.concurrent)
            runner.form(peers, plan_alone(runner.cache, budgets, share), complete=runner.cache.holds_all)


def _share_history(transport: Transport, runtime: Runtime, handshakes: Sequence[Handshake]) -> None:
    """Give all ranks the past uses of the rank that has seen most: all must evict the same experts."""
    eldest = max(range(transport.size), key=lambda rank: (handshakes[rank].steps, -rank))
    mine = [(runner.steps, runner.history.pack()) for runner in runtime.runners]
    messages = transport.gather_bytes(encode(mine) if transport.rank == eldest else b"")
    theirs = msgspec.msgpack.decode(messages[eldest], type=list[tuple[int, bytes]])
    for runner, (steps, content) in zip(runtime.runners, theirs, strict=True):
        runner.history.unpack(content)
        runner.continue_from(steps)


def start_rank(
    model: nn.Module,
    transport: Transport | None,
    *,
    settings: Mapping[str, str],
    costs: Costs | None,
    display: ProgressDisplay,
    placement: Placement | None = None,
) -> None:
    """Fill the slots of a rank that has just loaded, and let it join the others; alone without ``transport``.

    Where all ranks together have a slot for every expert of a layer, each fills its own share. With a placement, each fills
    its slots as the placement wants it. Arguments are those of ``join``.

    Raises:
        ConfigError: the placement is for other ranks or another model.
        GroupError: as ``join``.
    """
    runtime = runtime_of(model)
    mine = [runner.cache.slots for runner in runtime.runners]
    rank, slots_RL = 0, [mine]
    if transport is not None:
        rank, slots_RL = transport.rank, [decode(m, list[int]) for m in transport.gather_bytes(encode(mine))]
    if len({len(slots) for slots in slots_RL}) == 1:  # else they run different models, which join says
        slots_LR = np.array(slots_RL).T
        if placement is not None:
            _divide(runtime, placement, slots_LR, rank)
        first = placement or default_placement([layer.num_experts for layer in runtime.layers], slots_LR)
        runtime.fill(_shares(runtime, first, rank), display)
    if transport is None:
        stand_alone(model, costs)
    else:
        join(model, transport, settings=settings, costs=costs, placement=placement)


def _divide(runtime: Runtime, placement: Placement, slots_LR: IntArray, rank: int) -> None:
    there = default_placement([layer.num_experts for layer in runtime.layers], slots_LR)
    single = [(layer,) for layer in range(len(runtime.layers))]
    pools = [loader.store_layers for loader in runtime.loaders] if runtime.plan.cache_slots is None else single
    check_fits(placement, there, pools)
    runtime.divide(placement.quota_LR[:, rank].tolist())


def _shares(runtime: Runtime, placement: Placement, rank: int) -> dict[int, IntArray]:
    """The experts with which a rank fills its empty layers, by layer."""
    first_LE = first_residents(placement)[:, rank]
    empty = [index for index, runner in enumerate(runtime.runners) if not runner.cache.resident_E.any()]
    return {index: np.flatnonzero(first_LE[index]) for index in empty if first_LE[index].any()}


def announce_failure(transport: Transport, failure: BaseException) -> None:
    """Tell the ranks that wait in ``start_rank`` why this one failed."""
    with suppress(PeerLost):  # another rank has failed before
        transport.gather_bytes(encode([]))
        exchange_handshakes(transport, Handshake(transport.epoch, {}, [], [], failure=f"{type(failure).__name__}: {failure}"))


def ranks_here(transport: Transport) -> int:
    """How many ranks are on this one's node, itself included. All ranks call it together."""
    nodes = transport.gather_bytes(socket.gethostname().encode())
    return nodes.count(nodes[transport.rank])


def _step_with_every_pass(model: nn.Module) -> None:
    """Make every forward pass of the model a step of all ranks. ``_fail`` handles one that fails here."""
    trunk = _trunk(model)
    forward = trunk.forward

    @functools.wraps(forward)
    def step(*args: object, **kwargs: object) -> object:
        if calls_are_taken():  # by code that makes the step
            return forward(*args, **kwargs)
        with step_of_all_ranks(model):
            return forward(*args, **kwargs)

    setattr(trunk, "forward", step)  # noqa: B010 - a method to mypy


@contextmanager
def step_of_all_ranks(model: nn.Module) -> Iterator[None]:
    """Within the context, a rank's MoE layers run as a step of all ranks of its group.

    A rank alone has no such step.

    Raises:
        StepFailed: what failed within can't be completed without this rank's tokens, though ``completes`` asks for it.
        GroupError: ranks don't match, are out of step, or gone.
    """
    group = group_of(model)  # looked up each time: a later epoch brings another
    if group is None:
        yield
        return
    try:
        group.lockstep.begin()
        yield
        group.lockstep.end()
    except GroupError:
        raise  # all ranks know of it
    except BaseException as error:
        _fail(group.lockstep, error)
        raise


def _fail(lockstep: LockStep, error: BaseException) -> None:
    """Complete the step without this rank's tokens, if ``completes`` asks for that, or end it for all ranks.

    Raises:
        StepFailed: it can't be completed, though ``completes`` asks for it.
        PeerLost: a rank is gone, too.
    """
    completes = lockstep.completes and isinstance(error, Exception)
    if completes and not lockstep.exchanging:
        lockstep.end()
        return
    lockstep.fail(error)
    if completes:
        what = f"this rank failed in a step: {type(error).__name__}: {error}"
        raise StepFailed(what, computing=lockstep.computing) from error


def _trunk(model: nn.Module) -> nn.Module:
    """The innermost module that runs all MoE layers, once per forward pass."""
    paths = [name.split(".") for name in experts_modules(model)]
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and common + 1 < min(map(len, paths)):
        common += 1
    while common and isinstance(model.get_submodule(".".join(paths[0][:common])), nn.ModuleList | nn.ModuleDict):
        common -= 1
    return model.get_submodule(".".join(paths[0][:common]))


@contextmanager
def sync_ranks(model: nn.Module) -> Iterator[None]:
    """Let ranks make different numbers of forward passes inside the block, like torch's ``Join``.

    At its end, this rank takes part in the others' steps without tokens until no rank has work. All ranks enter such a block.

        with epslots.sync_ranks(model):
            for prompt in my_prompts:  # on some ranks many, on others none
                model.generate(**prompt)

    Does nothing for a model on a single rank. A block left by an error waits for no rank.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
        PeerLost: a rank is gone.
    """
    runtime_of(model)
    yield
    group = group_of(model)
    if group is not None:
        header = group.lockstep.idle_step()
        while header.work and not header.stop:
            header = group.lockstep.idle_step()
