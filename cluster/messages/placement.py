"""Commands and events of ``rank.py`` that are about placements: what the controller learns from the ranks, and tells them.

Apart from the others because the controller's process needs nothing of a rank's.

    commands   GetResidency, SetPlacement
    events     WindowReport, Residency, PlacementRejected
"""

from __future__ import annotations

import msgspec

from epslots.planner.cost_model import Costs


class GetResidency(msgspec.Struct, tag=True, frozen=True):
    """Say how things stand, for the controller, with a ``Residency`` of this number, when the step under way is done."""

    number: int


class SetPlacement(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Make for a placement, step by step. All ranks of a group are told; one of another group ignores it.

    Attributes:
        group: epoch of the group that it is for.
        version: the placement's.
        placement: as ``placement.pack`` has it.
        bytes_per_step: what each rank may fetch for it in a step.
    """

    group: int
    version: int
    placement: bytes
    bytes_per_step: int


class WindowReport(msgspec.Struct, tag=True, frozen=True):
    """A window of telemetry. At most one of a rank waits to be handed over; what comes meanwhile is dropped.

    Attributes:
        group: epoch of the group.
        number: of the window; ranks of a group cut alike.
        window: an ``epslots.telemetry.Window``, as msgpack.
    """

    group: int
    number: int
    window: bytes


class Residency(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """How things stand in the group, as all its ranks know it.

    Attributes:
        group: its epoch.
        nodes: the name of each rank's node.
        placement: the one they make for (``placement.pack``).
        pending_migrations: copies that it wants and that are not there yet, on all ranks.
        costs: what the ranks reckon with; the largest, if layers differ.
        expert_bytes: of an expert, by layer.
        pools: by layer; layers of a pool share its memory.
    """

    number: int
    group: int
    nodes: tuple[str, ...]
    placement: bytes
    pending_migrations: int
    costs: Costs
    expert_bytes: tuple[int, ...]
    pools: tuple[int, ...]


class PlacementRejected(msgspec.Struct, tag=True, frozen=True):
    """A placement that was to be made for is refused; the last one stays."""

    cause: str
