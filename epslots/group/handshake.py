"""The messages by which ranks become one model, and the checks that they match. ``join.py`` calls this.

A handshake names a rank's versions and settings, the experts in its slots, and the placement that it followed.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec
import numba
import numpy as np
import torch
import transformers
import xxhash

from epslots._version import __version__
from epslots.errors import PeerLost, RankMismatchError, StaleEpoch
from epslots.placement.placement import Placement, carry_over, pack, unpack
from epslots.planner.cost_model import Costs
from epslots.runtime import Runtime
from epslots.transport.transport import Transport

Message = TypeVar("Message")

# To be raised when ranks of this version can't work with those of the last.
PROTOCOL = 5


class Handshake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank's first message; lists are by layer.

    Attributes:
        settings: values that must be equal on all ranks, by name.
        slots: slots of each layer, those included that it has ceded.
        residents: the experts in them.
        levels: slots that each layer has ceded to the rank's KV cache; -1 = its cache has a size of its own.
        node: the name of the rank's node.
        steps: steps of all layers that the rank's eviction policy has seen.
        costs: the costs that the rank's last group agreed on, by pool; empty if it had none.
        group, rank: epoch of the rank's last group, and its number there; -1 if it had none.
        placement: version of the placement that the rank follows; 0 = none.
        bytes_per_step: bytes that a rank fetches in a step to reach it.
        failure: why this rank can't take part; empty if it can.
    """

    epoch: int
    settings: dict[str, str]
    slots: list[int]
    residents: list[list[int]]
    levels: int = -1
    node: str = ""
    steps: int = 0
    costs: list[Costs] = []
    group: int = -1
    rank: int = -1
    placement: int = 0
    bytes_per_step: int = 0
    failure: str = ""


def encode(value: object) -> bytes:
    """A message between ranks."""
    return msgspec.msgpack.encode(value)


def decode(message: bytes, kind: type[Message]) -> Message:
    """The other end of ``encode``."""
    return msgspec.msgpack.decode(message, type=kind)


def settings_of(runtime: Runtime, given: Mapping[str, str]) -> dict[str, str]:
    """The values that must be equal on all ranks, for their results and plans to be."""
    layers = xxhash.xxh3_64_hexdigest(msgspec.msgpack.encode(runtime.layers))
    return {
        "epslots": __version__,
        "protocol": str(PROTOCOL),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "machine": platform.machine(),
        "checkpoint": runtime.checkpoint,
        "layers": f"{len(runtime.layers)} ({layers})",
        **given,
    }


def greet_peers(transport: Transport, handshake: Handshake) -> list[Handshake]:
    """All ranks' handshakes, checked against each other.

    Raises:
        RankMismatchError: ranks run different checkpoints, versions or settings.
        StaleEpoch: a rank belongs to another epoch.
        PeerLost: a rank is gone, or could not load.
    """
    handshakes = exchange_handshakes(transport, handshake)
    for rank, other in enumerate(handshakes):
        if other.failure:
            raise PeerLost(f"rank {rank} could not load the model: {other.failure}")
    epochs = [other.epoch for other in handshakes]
    if len(set(epochs)) > 1:
        raise StaleEpoch(f"ranks belong to different epochs of the group: {epochs}, by rank")
    for rank, other in enumerate(handshakes):
        for name in sorted(handshakes[0].settings.keys() | other.settings.keys()):
            first, second = handshakes[0].settings.get(name), other.settings.get(name)
            if first != second:
                raise RankMismatchError(f"ranks differ: {name} is {first!r} on rank 0 and {second!r} on rank {rank}")
    return handshakes


def exchange_handshakes(transport: Transport, handshake: Handshake) -> list[Handshake]:
    """All ranks' handshakes, unchecked.

    Raises:
        RankMismatchError: a rank speaks another protocol.
    """
    try:
        return [msgspec.msgpack.decode(m, type=Handshake) for m in transport.gather_bytes(encode(handshake))]
    except msgspec.DecodeError as error:
        raise RankMismatchError(f"a rank speaks another protocol than this one's ({PROTOCOL}): {error}") from error


def agree_on_placement(
    transport: Transport, handshakes: Sequence[Handshake], mine: Placement | None
) -> tuple[Placement, int] | None:
    """The placement of the newest of the ranks' last groups, carried over to these ranks, and its bytes per step.

    All ranks call it together.

    Args:
        mine: the placement that this rank follows.

    Returns:
        None if no rank of the newest group followed a placement.
    """
    eldest = max(range(transport.size), key=lambda rank: (handshakes[rank].group, handshakes[rank].placement, -rank))
    newest = max(handshake.placement for handshake in handshakes)
    if not handshakes[eldest].placement:
        return None
    messages = transport.gather_bytes(pack(mine) if transport.rank == eldest and mine is not None else b"")
    placement, group = unpack(messages[eldest]), handshakes[eldest].group
    if group >= 0:  # else all ranks have just loaded with it
        rank_of_old = [-1] * placement.ranks
        for rank, handshake in enumerate(handshakes):
            if handshake.group == group:
                rank_of_old[handshake.rank] = rank
        quota_LR = np.array([handshake.slots for handshake in handshakes]).T
        placement = replace(carry_over(placement, rank_of_old, quota_LR), version=newest + 1)
        placement.check()
    return placement, handshakes[eldest].bytes_per_step
