"""All that crosses between the driver and a worker, as msgpack. Each field's owner is the side that sends it.

    commands   driver -> worker, each answered at once: with an empty message, or with an ``Answer``
    events     worker -> driver, in the order in which they happened; handed over in batches

A worker's life: Load -> Loaded; Form -> Contact, Contacts -> Formed; then Submit, Cancel, Wake -> Outputs, Asleep; when the
group breaks, Broken; with the next Form it goes on where it was. ``Failed`` is its last word. Beside it, for the controller:
WindowReport events, and GetResidency -> Residency; SetPlacement (``placement.py``; what the controller itself is told is in
``controller.py``).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cluster.messages.placement import GetResidency, PlacementRejected, Residency, SetPlacement, WindowReport
from epslots.config import LoadConfig
from epslots.engine.requests import Output, Request
from epslots.planner.cost_model import Costs
from epslots.telemetry import Stats


class Load(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Load the model, alone.

    Attributes:
        path: the checkpoint's folder on every node, or a hub id.
        config: the model's settings.
        max_batch_tokens: the most tokens of one step of the engine.
        neighbours: ranks that share the node's RAM, this one included.
        threads: CPU threads for computing; 0 leaves torch's choice.
        window_steps: steps of one window of telemetry; 0 = none is sent.
    """

    path: str
    config: LoadConfig
    max_batch_tokens: int
    neighbours: int
    threads: int
    window_steps: int


class Form(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Leave the group there is, at once, and form the next.

    Attributes:
        secret: known to the ranks of this epoch alone, by which they know each other.
        form_s: seconds to wait for the others.
        deadline_s: seconds that one operation may take from then on.
        fresh: all ranks have just loaded, so that they may fill their slots together.
        costs: as ``epslots.load`` has them.
        placement: what the group begins with (``placement.pack``); None = what its ranks followed last, or as dealt.
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


class Contacts(msgspec.Struct, tag=True, frozen=True):
    """What ranks of this epoch have published, by key."""

    epoch: int
    entries: dict[str, bytes]


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Requests for this rank."""

    requests: tuple[Request, ...]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Give requests up; their outputs end with the reason "cancelled"."""

    ids: tuple[str, ...]


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Somebody has work: make the steps of this epoch up to ``step``, with or without work of one's own."""

    epoch: int
    step: int


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Send a ``RankReport`` when the step under way is done; ``number`` comes back with it."""

    number: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Answer, whatever the worker is busy with."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Give everything back; a ``RankStopped`` follows."""


Command = Load | Form | Contacts | Submit | Cancel | Wake | Ask | GetResidency | SetPlacement | Ping | Stop


class Answer(msgspec.Struct, frozen=True):
    """What a worker answers a ``Ping``.

    Attributes:
        going: whether it can go on; False after ``Failed`` and ``RankStopped``.
    """

    going: bool


class Progress(msgspec.Struct, tag=True, frozen=True):
    """How far a piece of the loading is."""

    title: str
    done_bytes: int
    total_bytes: int


class Loaded(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The model is there.

    Attributes:
        capacity: tokens that one request may keep.
        batches: whether requests run together; else one at a time.
        vocabulary: number of token ids.
        context: tokens of the model's context; None if it states none.
        end_tokens: those of the generation configuration.
        seconds: what took how long, by name.
    """

    capacity: int
    batches: bool
    vocabulary: int
    context: int | None
    end_tokens: tuple[int, ...]
    seconds: dict[str, float]


class Contact(msgspec.Struct, tag=True, frozen=True):
    """An entry that the other ranks of this epoch need in order to connect; as torch has written it."""

    epoch: int
    key: str
    value: bytes


class Formed(msgspec.Struct, tag=True, frozen=True):
    """The group of this epoch stands, and this rank makes steps in it."""

    epoch: int
    seconds: float


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """What came of this rank's requests."""

    outputs: tuple[Output, ...]


class Asleep(msgspec.Struct, tag=True, frozen=True):
    """Nobody had work in ``step`` of this epoch: the rank sleeps until it is woken."""

    epoch: int
    step: int


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The group of this epoch has lost a rank, or didn't form; this rank stands by for the next.

    Attributes:
        stood: it had formed.
    """

    epoch: int
    cause: str
    stood: bool


class Failed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The worker can't go on: what it raised.

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


class LayerPlace(msgspec.Struct, frozen=True):
    """Who holds which expert of a layer, and who should.

    Attributes:
        slots: of each rank.
        home: the rank that fetches an expert which nobody holds, by expert.
        holders: the ranks that hold it, by expert.
        wanted: the ranks where the placement wants it to stay, by expert.
    """

    layer: str
    slots: tuple[int, ...]
    home: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    wanted: tuple[tuple[int, ...], ...]


class RankReport(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A rank's counters, and what it knows of everybody's slots (all ranks know the same).

    Attributes:
        epoch: of the group.
        placement: version of the placement that the ranks make for.
        pending_migrations: copies that it wants and that are not there yet, on all ranks.
    """

    number: int
    epoch: int
    steps: int
    stats: Stats
    layers: tuple[LayerPlace, ...]
    placement: int
    pending_migrations: int
    memory_bytes: int
    descriptors: int
    threads: int


class RankStopped(msgspec.Struct, tag=True, frozen=True):
    """Everything is given back; the process may end."""


Event = (
    Progress
    | Loaded
    | Contact
    | Formed
    | Outputs
    | Asleep
    | Broken
    | Failed
    | RankReport
    | WindowReport
    | Residency
    | PlacementRejected
    | RankStopped
)

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_events = msgspec.msgpack.Decoder(list[Event])
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Command | Answer | list[Event]) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_command(message: bytes) -> Command:
    return _commands.decode(message)


def decode_events(message: bytes) -> list[Event]:
    return _events.decode(message)


def decode_answer(message: bytes) -> Answer:
    return _answers.decode(message)
