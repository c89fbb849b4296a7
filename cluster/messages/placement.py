"""Messages about placements: between ranks and driver, and in part passed on between driver and controller.

    driver -> rank    SetPlacement    answered by PlacementRejected only if the rank can't follow it
    driver -> rank    GetGroupState   answered by GroupState
    rank -> driver    LoadReport      after every window of steps; the driver passes it on to the controller

They aren't in ``rank.py`` because the controller's process imports them, and nothing of the engine.
"""

from __future__ import annotations

import msgspec

from epslots.planner.cost_model import Costs


class GetGroupState(msgspec.Struct, tag=True, frozen=True):
    """Ask a rank for a ``GroupState`` with this number, when its current step is done."""

    number: int


class SetPlacement(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Follow a placement as soon as all ranks of the group have it. A rank of another epoch ignores it.

    Attributes:
        epoch: of the group that the placement is for.
        version: of the placement.
        placement: encoded by ``placement.pack``.
        bytes_per_step: bytes that each rank may fetch for it in one step.
    """

    epoch: int
    version: int
    placement: bytes
    bytes_per_step: int


class LoadReport(msgspec.Struct, tag=True, frozen=True):
    """The load that one rank measured in one window of steps. A rank holds at most one that the driver hasn't taken.

    Attributes:
        epoch: of the rank's group.
        rank: the rank's number in that epoch.
        number: of the window; all ranks of a group end their windows after the same steps.
        window: a ``LoadWindow`` as msgpack.
    """

    epoch: int
    rank: int
    number: int
    window: bytes


class GroupState(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The state of a group; every rank of it would send the same.

    Attributes:
        number: of the ``GetGroupState`` that this answers.
        epoch: of the group.
        nodes: name of each rank's node.
        placement: the placement that the ranks follow, encoded by ``placement.pack``.
        pending_migrations: copies and slots that have yet to be moved for it, over all ranks.
        costs: the costs that the ranks plan with; the largest where layers differ.
        expert_bytes: bytes of one expert, by layer.
        pools: number of the slot pool, by layer; slots may move between layers with the same number.
    """

    number: int
    epoch: int
    nodes: tuple[str, ...]
    placement: bytes
    pending_migrations: int
    costs: Costs
    expert_bytes: tuple[int, ...]
    pools: tuple[int, ...]


class PlacementRejected(msgspec.Struct, tag=True, frozen=True):
    """The rank can't follow the placement that it was sent, and keeps the last one."""

    cause: str
