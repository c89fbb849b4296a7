"""Many ranks become one model: they compare what they run, publish their slots, agree on costs, and keep in step from then on.

``join`` does it for a first group and for every later one: after a loss the survivors form the next generation's group and
join again, and the common table of who holds what is rebuilt from what each rank really holds.
"""

from __future__ import annotations

import functools
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import msgspec
import numpy as np
import torch
import transformers
import xxhash
from torch import nn

from epslots import __version__
from epslots.costs import Costs
from epslots.errors import GroupError, PeerLost, RankMismatchError, StaleGeneration
from epslots.experts import experts_modules
from epslots.link_speed import largest, measure_costs
from epslots.lockstep import LockStep
from epslots.placement import default_homes
from epslots.progress import ProgressDisplay
from epslots.runtime import Runtime, runtime_of
from epslots.shared_layer import SharedLayer
from epslots.slot_pool import SlotPool
from epslots.transport import Transport

# Raise it when ranks of this version couldn't work with those of the last.
PROTOCOL = 1
_ATTRIBUTE = "epslots_group"


class _Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank says first; lists are by layer.

    Attributes:
        settings: what must be equal on all ranks, by name.
        slots: slots of each layer.
        residents: the experts in them.
        steps: steps of all layers that the rank's eviction policy has seen.
        costs: what the rank's last group agreed on, by pool; empty if it had none.
        failure: why this rank can't take part; empty if it can.
    """

    generation: int
    settings: dict[str, str]
    slots: list[int]
    residents: list[list[int]]
    steps: int = 0
    costs: list[Costs] = []
    failure: str = ""


class RankGroup:
    """One rank's membership in a group of ranks that are one model.

    Attributes:
        transport: to the others.
        settings: equal on all ranks.
        costs: agreed by all, by pool.
        shared: what all ranks know of each layer.
        lockstep: keeps this rank in step.
    """

    def __init__(
        self,
        runtime: Runtime,
        transport: Transport,
        settings: Mapping[str, str],
        hellos: Sequence[_Hello],
        costs: Sequence[Costs],
    ) -> None:
        self.transport = transport
        self.settings = dict(settings)
        self.costs = tuple(costs)
        self._runtime = runtime
        shared: dict[int, SharedLayer] = {}
        self._tables: list[tuple[SlotPool, np.ndarray, tuple[int, ...]]] = []
        for mover, pool_costs in zip(runtime.movers, self.costs, strict=True):
            table = np.zeros((len(mover.store_layers), transport.size, mover.pool.slot_of.shape[1]), bool)
            for position, index in enumerate(mover.store_layers):
                for rank, hello in enumerate(hellos):
                    table[position, rank, hello.residents[index]] = True
                experts = runtime.layers[index].num_experts
                quota_R = np.array([hello.slots[index] for hello in hellos])
                homes = default_homes(experts, quota_R, index)
                shared[index] = SharedLayer(transport.rank, table[position, :, :experts], quota_R, homes, pool_costs)
            self._tables.append((mover.pool, table, mover.store_layers))
            mover.transport = transport
        self.shared = tuple(shared[index] for index in range(len(runtime.layers)))
        self.lockstep = LockStep(
            transport,
            model=xxhash.xxh3_64_intdigest(hellos[0].settings["checkpoint"].encode()) & 0x7FFFFFFF,
            most_experts=max(layer.num_experts for layer in runtime.layers),
            idle_layers=[runner.idle for runner in runtime.runners],
            digest=self._digest,
            explain_divergence=self._explain_divergence,
        )
        for runner, layer in zip(runtime.runners, self.shared, strict=True):
            runner.join(self.lockstep, layer)

    def _digest(self) -> int:
        """Of the table as it is here, with this rank's row as its slots really are."""
        for pool, table, layers in self._tables:
            mine, actual = table[:, self.transport.rank], pool.slot_of >= 0
            for position in np.flatnonzero((mine != actual).any(1)):
                mine[position] = actual[position]
                self.shared[layers[position]].forget_digest()
        return xxhash.xxh3_64_intdigest(np.array([layer.digest for layer in self.shared]).tobytes()) >> 1

    def _explain_divergence(self) -> str:
        """The first layer and slot in which the ranks' tables differ. All ranks call it together."""
        digests = np.array([_decode(m, list[int]) for m in self._gather([layer.digest for layer in self.shared])])
        index = int(np.flatnonzero((digests != digests[0]).any(0))[0])
        name = self._runtime.layers[index].name
        pool, position = self._runtime.place_of(index)
        tables_R = np.array([_decode(m, list[list[bool]]) for m in self._gather(self.shared[index].holds_RE.tolist())])
        slots_RE = np.array([_decode(m, list[int]) for m in self._gather(pool.slot_of[position].tolist())])
        differing = np.argwhere((tables_R != tables_R[0]).any(0))
        again = "Load the model again, or form the next generation of the group"
        if not len(differing):
            return f"layer {name}: all slots are alike, but homes or earlier plans differ. {again}"
        owner, expert = differing[0].tolist()
        say_yes = np.flatnonzero(tables_R[:, owner, expert]).tolist()
        slot = int(slots_RE[owner, expert])
        return (
            f"layer {name}, expert {expert} on rank {owner}: "
            f"{f'it is in slot {slot} there' if slot >= 0 else 'it is in no slot there'}; ranks {say_yes} of "
            f"{self.transport.size} believe that it is. {again}"
        )

    def _gather(self, value: object) -> list[bytes]:
        return self.transport.gather_bytes(_encode(value))


def _encode(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def _decode(message: bytes, kind: type) -> object:
    return msgspec.msgpack.decode(message, type=kind)


def settings_of(runtime: Runtime, given: Mapping[str, str]) -> dict[str, str]:
    """What must be equal on all ranks for their results and their plans to be."""
    layers = xxhash.xxh3_64_hexdigest(msgspec.msgpack.encode(runtime.layers))
    return {
        "epslots": __version__,
        "protocol": str(PROTOCOL),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "checkpoint": runtime.checkpoint,
        "layers": f"{len(runtime.layers)} ({layers})",
        **given,
    }


def join(
    model: nn.Module, transport: Transport, *, settings: Mapping[str, str] | None = None, costs: Costs | None = None
) -> RankGroup:
    """Make this rank's model one with those of all other ranks. All ranks call it together.

    Args:
        model: from ``epslots.load``, alone or in an earlier generation's group.
        settings: more of what must be equal on all ranks, by name; those of the earlier group if not given.
        costs: what things cost, on all ranks alike. If not given, they are what an earlier group of any rank had agreed on,
            else they are measured.

    Raises:
        RankMismatchError: ranks run different checkpoints, versions or settings; on all of them.
        StaleGeneration: a rank belongs to another generation.
        PeerLost: a rank is gone, or could not load.
    """
    runtime, last = runtime_of(model), group_of(model)
    for mover in runtime.movers:
        mover.give_up_unconfirmed()
    if settings is None:
        settings = {} if last is None else last.settings
    hello = _Hello(
        generation=transport.generation,
        settings=settings_of(runtime, {**settings, "costs": "measured" if costs is None else str(costs)}),
        slots=[runtime.plan.quotas[index] for index in range(len(runtime.layers))],
        residents=[np.flatnonzero(runner.experts.resident_E).tolist() for runner in runtime.runners],
        steps=sum(runner.steps for runner in runtime.runners),
        costs=[] if last is None else list(last.costs),
    )
    hellos = _greet(transport, hello)
    _share_history(transport, runtime, hellos)
    group = RankGroup(runtime, transport, settings, hellos, _agree_on_costs(transport, runtime, hellos, costs))
    if group_of(model) is None:
        _step_with_every_pass(model)
    setattr(model, _ATTRIBUTE, group)
    return group


def _agree_on_costs(transport: Transport, runtime: Runtime, hellos: Sequence[_Hello], given: Costs | None) -> list[Costs]:
    """What things cost, by pool: as given, as a rank's last group had it, or measured."""
    if given is not None:
        return [given] * len(runtime.movers)
    known = [hello.costs for hello in hellos if hello.costs]
    if known:
        return [largest(pool) for pool in zip(*known, strict=True)]
    kernels = [runtime.runners[mover.store_layers[0]].experts for mover in runtime.movers]
    return [measure_costs(transport, m, k.kernel, k.slots) for m, k in zip(runtime.movers, kernels, strict=True)]


def _share_history(transport: Transport, runtime: Runtime, hellos: Sequence[_Hello]) -> None:
    """Give all ranks the past uses of the one that has seen most: what gives way must not depend on who asks."""
    eldest = max(range(transport.size), key=lambda rank: (hellos[rank].steps, -rank))
    rows = [np.stack([r.history.last_use, r.history.recent, r.history.frequent]) for r in runtime.runners]
    mine = [(runner.steps, row.tobytes()) for runner, row in zip(runtime.runners, rows, strict=True)]
    messages = transport.gather_bytes(_encode(mine) if transport.rank == eldest else b"")
    theirs = msgspec.msgpack.decode(messages[eldest], type=list[tuple[int, bytes]])
    for runner, (steps, content) in zip(runtime.runners, theirs, strict=True):
        runner.steps = steps
        history = runner.history
        arrays = np.frombuffer(content, np.int64).reshape(3, -1)
        history.last_use[:], history.recent[:], history.frequent[:] = arrays


def group_of(model: nn.Module) -> RankGroup | None:
    """The group that the model's rank belongs to; None for a model on its own."""
    group: RankGroup | None = getattr(model, _ATTRIBUTE, None)
    return group


def group_up(
    model: nn.Module, transport: Transport, *, settings: Mapping[str, str], costs: Costs | None, display: ProgressDisplay
) -> RankGroup:
    """``join`` for ranks that have just loaded: where all of them together have a slot for every expert of a layer, each
    fills its own share first.
    """
    runtime = runtime_of(model)
    mine = _encode([runtime.plan.quotas[i] for i in range(len(runtime.layers))])
    slots_RL = [msgspec.msgpack.decode(m) for m in transport.gather_bytes(mine)]
    if len({len(slots) for slots in slots_RL}) == 1:  # else they run different models, which join says
        shares = {}
        for index, layer in enumerate(runtime.layers):
            quota_R = np.array([slots[index] for slots in slots_RL])
            if quota_R.sum() >= layer.num_experts > quota_R[transport.rank]:
                homes = default_homes(layer.num_experts, quota_R, index)
                shares[index] = np.flatnonzero(homes == transport.rank)
        runtime.fill(shares, display)
    return join(model, transport, settings=settings, costs=costs)


def announce_failure(transport: Transport, failure: BaseException) -> None:
    """Tell ranks that wait in ``group_up`` why this one won't come."""
    with suppress(PeerLost):  # then somebody else has failed before
        transport.gather_bytes(_encode([]))
        _exchange_hellos(transport, _Hello(transport.generation, {}, [], [], failure=f"{type(failure).__name__}: {failure}"))


def _greet(transport: Transport, hello: _Hello) -> list[_Hello]:
    hellos = _exchange_hellos(transport, hello)
    for rank, other in enumerate(hellos):
        if other.failure:
            raise PeerLost(f"rank {rank} could not load the model: {other.failure}")
    generations = [other.generation for other in hellos]
    if len(set(generations)) > 1:
        raise StaleGeneration(f"ranks belong to different generations of the group: {generations}, by rank")
    for rank, other in enumerate(hellos):
        for name in sorted(hellos[0].settings.keys() | other.settings.keys()):
            first, second = hellos[0].settings.get(name), other.settings.get(name)
            if first != second:
                raise RankMismatchError(f"ranks differ: {name} is {first!r} on rank 0 and {second!r} on rank {rank}")
    return hellos


def _exchange_hellos(transport: Transport, hello: _Hello) -> list[_Hello]:
    try:
        return [msgspec.msgpack.decode(m, type=_Hello) for m in transport.gather_bytes(_encode(hello))]
    except msgspec.DecodeError as error:
        raise RankMismatchError(f"a rank speaks another protocol than this one's ({PROTOCOL}): {error}") from error


def ranks_here(transport: Transport) -> int:
    """How many ranks are on this one's node, itself included. All ranks call it together."""
    nodes = transport.gather_bytes(socket.gethostname().encode())
    return nodes.count(nodes[transport.rank])


def _step_with_every_pass(model: nn.Module) -> None:
    """Make every forward pass of the model a step of all ranks, which ends for all if it fails on one."""
    trunk = _trunk(model)
    forward = trunk.forward

    @functools.wraps(forward)
    def step(*args: object, **kwargs: object) -> object:
        group = group_of(model)  # looked up each time: a later generation brings another
        assert group is not None
        group.lockstep.begin()
        try:
            output = forward(*args, **kwargs)
            group.lockstep.end()
        except GroupError:
            raise  # all ranks know
        except BaseException as error:
            group.lockstep.fail(error)
            raise
        return output

    setattr(trunk, "forward", step)  # noqa: B010 - a method to mypy


def _trunk(model: nn.Module) -> nn.Module:
    """The innermost module that runs all MoE layers, once per forward pass, whichever way the model is entered."""
    paths = [name.split(".") for name in experts_modules(model)]
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and common + 1 < min(map(len, paths)):
        common += 1
    while common and isinstance(model.get_submodule(".".join(paths[0][:common])), nn.ModuleList | nn.ModuleDict):
        common -= 1
    return model.get_submodule(".".join(paths[0][:common]))


@contextmanager
def keep_in_step(model: nn.Module) -> Iterator[None]:
    """Let ranks make different numbers of forward passes: at the end of the block, this rank takes part in the others' steps
    without tokens until no rank has work. All ranks enter such a block, like torch's ``Join``.

        with epslots.keep_in_step(model):
            for prompt in my_prompts:  # on some ranks many, on others none
                model.generate(**prompt)

    Does nothing for a model on a single rank. A block left by an error doesn't wait for anybody.

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
