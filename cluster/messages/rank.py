"""Messages between the driver and a worker, as msgpack. A command's call returns at once; events follow in batches.

driver -> worker   command          answer, as an event (worker -> driver)
                   Load             LoadProgress, then Loaded
                   Form             Contact; then, after Contacts, Formed
                   Submit, Cancel   Outputs
                   Wake             Asleep, when no rank has work any more
                   GetReport        RankReport
                   HandOver, ...    HandedOver, ...: see ``hand_over.py``
                   Adopt            Adopted: the worker serves another driver from now on
                   Stop             RankStopped
unasked                             Broken: the group lost a rank; Failed: the worker's last event; WakesOthers
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cluster.messages.hand_over import (
    Forget,
    GoOn,
    HandedOver,
    HandOver,
    HandOverContact,
    HandOverContacts,
    PromptProgress,
    Release,
    TakeOver,
)
from cluster.messages.placement import GetGroupState, GroupState, LoadReport, PlacementRejected, SetPlacement
from epslots.config import LoadConfig
from epslots.generation.engine_stats import EngineStats
from epslots.generation.request_limits import ModelLimits
from epslots.generation.requests import Output, Request
from epslots.planner.cost_model import Costs
from epslots.telemetry import Stats


class Origin(msgspec.Struct, frozen=True):
    """Where the ranks of a cluster that outlives its driver come from.

    Attributes:
        content: digest of the checkpoint's files.
        version: of epslots.
        user: number of the driver's user.
    """

    content: str
    version: str
    user: int


class Load(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Load the model, without a group.

    Attributes:
        path: the checkpoint's folder on every node, or a hub id.
        config: the model's settings.
        neighbours: ranks that share the node's RAM, this one included.
        ranks: ranks of its group, this one included.
        threads: CPU threads for computing; 0 leaves torch's choice.
        window_steps: steps of one window of telemetry; 0 = none is sent.
        groups: into which the cluster's ranks are divided; a driver that divides them otherwise can't adopt this one.
        origin: None for a rank that ends with its driver.
    """

    path: str
    config: LoadConfig
    neighbours: int
    ranks: int
    threads: int
    window_steps: int
    groups: int = 1
    origin: Origin | None = None


class Form(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Leave the present group at once, and form the next one.

    Attributes:
        secret: known only to the ranks of this epoch; they recognise each other by it.
        form_s: seconds to wait for the other ranks.
        deadline_s: seconds that one operation between ranks may take afterwards.
        fresh: all ranks have just loaded the model, so they fill their slots together.
        costs: the costs to plan with; None = measured ones.
        placement: the first placement of the group (``placement.pack``); None = the one that its ranks followed last, or the
            default one.
        reports_prompts: send ``PromptProgress``: the group's requests are handed over when their prompts are computed.
    """

    epoch: int
    rank: int
    size: int
    secret: bytes
    form_s: float
    deadline_s: float
    fresh: bool
    costs: Costs | None
    placement: bytes | None = None
    reports_prompts: bool = False


class Contacts(msgspec.Struct, tag=True, frozen=True):
    """Entries that ranks of this epoch have published, by key."""

    epoch: int
    entries: dict[str, bytes]


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Requests for this rank."""

    requests: tuple[Request, ...]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Cancel requests; their outputs end with the reason "cancelled"."""

    ids: tuple[str, ...]


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Make the steps of this epoch up to ``step``, with or without work: another rank has some."""

    epoch: int
    step: int


class GetReport(msgspec.Struct, tag=True, frozen=True):
    """Ask for a ``RankReport`` with this number, when the current step is done.

    Attributes:
        layers: numbers of the MoE layers whose slots the report has; None = all. There may be fewer layers than that.
    """

    number: int
    layers: tuple[int, ...] | None = None


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Answer with a ``Pong`` at once, even while busy."""


class GiveUp(msgspec.Struct, tag=True, frozen=True):
    """Give up all requests, since no driver waits for them any more."""


class Adopt(msgspec.Struct, tag=True, frozen=True):
    """Give up all requests, leave the group, and answer ``Adopted``: the next commands are another driver's."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Release everything, and answer ``RankStopped``."""


Command = (
    Load
    | Form
    | Contacts
    | Submit
    | Cancel
    | Wake
    | GetReport
    | GetGroupState
    | SetPlacement
    | HandOver
    | TakeOver
    | HandOverContacts
    | GoOn
    | Forget
    | Release
    | Ping
    | GiveUp
    | Adopt
    | Stop
)


class Pong(msgspec.Struct, frozen=True):
    """The answer to a ``Ping``.

    Attributes:
        running: the worker can go on; False after ``Failed`` and ``RankStopped``.
    """

    running: bool


class LoadProgress(msgspec.Struct, tag=True, frozen=True):
    """How many bytes of one stage of loading are done."""

    title: str
    done_bytes: int
    total_bytes: int


class Loaded(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The model is loaded.

    Attributes:
        limits: the requests that can be served.
        max_requests: requests that run at a time.
        shares_prefixes: the computed cache of a prompt is kept for others that begin alike.
        seconds: duration of each stage of loading, by name.
        machine: equal for ranks that can share memory; "" = this one can't.
    """

    limits: ModelLimits
    max_requests: int
    shares_prefixes: bool
    seconds: dict[str, float]
    machine: str = ""


class Adopted(msgspec.Struct, tag=True, frozen=True):
    """The worker has given up all requests, and waits for a ``Form``.

    Attributes:
        loaded: as after loading.
        epoch: the newest that the worker knows of; the next one must be greater.
        grouped: the worker has been in a group, and holds experts for it.
    """

    loaded: Loaded
    epoch: int
    grouped: bool


class Contact(msgspec.Struct, tag=True, frozen=True):
    """An entry of torch's rendezvous store, which the other ranks of this epoch need in order to connect."""

    epoch: int
    key: str
    value: bytes


class Formed(msgspec.Struct, tag=True, frozen=True):
    """The group of this epoch has formed, and this rank makes steps in it."""

    epoch: int
    seconds: float


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """New tokens and ends of this rank's requests."""

    outputs: tuple[Output, ...]


class Asleep(msgspec.Struct, tag=True, frozen=True):
    """No rank had work in ``step`` of this epoch; this rank sleeps until it gets a request or a ``Wake``."""

    epoch: int
    step: int


class WakesOthers(msgspec.Struct, tag=True, frozen=True):
    """This rank, which slept, begins a step of this epoch without a request. Its cache waits for slots of experts."""

    epoch: int


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The group of this epoch lost a rank, or didn't form; this rank waits for the next ``Form``.

    Attributes:
        stood: the group had formed.
    """

    epoch: int
    cause: str
    stood: bool


class Failed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The worker raised an error, and can't go on.

    Attributes:
        kind: name of the error's class.
        message: its text.
        deliberate: it is one of epslots' own errors, whose text says what to do.
        traceback: for bugs.
    """

    doing: Literal["loading", "forming", "serving"]
    kind: str
    message: str
    deliberate: bool
    traceback: str


class LayerPlacement(msgspec.Struct, frozen=True):
    """Where the experts of one layer are, and where the placement wants them.

    Attributes:
        slots: number of slots, by rank.
        home: the rank that fetches an expert which no rank holds, by expert.
        holders: the ranks that hold the expert, by expert.
        wanted: the ranks that the placement names for the expert, by expert.
    """

    layer: str
    slots: tuple[int, ...]
    home: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    wanted: tuple[tuple[int, ...], ...]


class RankReport(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A rank's counters, and the slots of all ranks (every rank of a group knows the same).

    Attributes:
        number: of the ``GetReport`` that this answers.
        epoch: of the group.
        steps: made in this epoch.
        stats: counters of its layers.
        engine: counters of its requests.
        layers: those that were asked for, in their order in the model.
        placement: version of the placement that the ranks follow.
        pending_migrations: copies and slots that have yet to be moved for it, over all ranks.
        memory_bytes, descriptors, threads: of the process.
    """

    number: int
    epoch: int
    steps: int
    stats: Stats
    engine: EngineStats
    layers: tuple[LayerPlacement, ...]
    placement: int
    pending_migrations: int
    memory_bytes: int
    descriptors: int
    threads: int


class RankStopped(msgspec.Struct, tag=True, frozen=True):
    """The worker has released everything; its process may end."""


Event = (
    LoadProgress
    | Loaded
    | Adopted
    | Contact
    | Formed
    | Outputs
    | Asleep
    | WakesOthers
    | Broken
    | Failed
    | RankReport
    | LoadReport
    | GroupState
    | PlacementRejected
    | HandOverContact
    | HandedOver
    | PromptProgress
    | RankStopped
)

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_events = msgspec.msgpack.Decoder(list[Event])
_pongs = msgspec.msgpack.Decoder(Pong)


def encode(message: Command | Pong | list[Event]) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_command(message: bytes) -> Command:
    return _commands.decode(message)


def decode_events(message: bytes) -> list[Event]:
    return _events.decode(message)


def decode_pong(message: bytes) -> Pong:
    return _pongs.decode(message)
