"""All that crosses between the driver and the controller, as msgpack: an order, and what it is answered.

The controller is asked one thing after another, and has nothing to say unasked. It can't reach the ranks: what they measure
comes through the driver, and what is decided for them goes through it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from cluster.messages.placement import Residency, SetPlacement


class GroupState(StrEnum):
    """What the controller is about.

    Attributes:
        WAITING: it knows of no group.
        WATCHING: the ranks have what was published; windows are weighed.
        MOVING: a placement was published, and the ranks are on their way to it.
        FROZEN: it watches, and publishes nothing by itself.
    """

    WAITING = "waiting"
    WATCHING = "watching"
    MOVING = "moving"
    FROZEN = "frozen"


class Attach(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A group has formed, or the controller is new: this is the group, as its ranks see it.

    Attributes:
        survey: what a rank says of the group.
        offered: a newer placement than that one, which ranks were told of and may not follow yet.
        published: the highest version of a placement that the driver has seen.
        frozen: whether to publish nothing unasked.
    """

    survey: Residency
    offered: bytes | None
    published: int
    frozen: bool


class LoadReport(msgspec.Struct, frozen=True):
    """A rank's window: the ``epslots.telemetry.Window`` of this number, as it came."""

    rank: int
    number: int
    window: bytes


class LoadReports(msgspec.Struct, tag=True, frozen=True):
    """LoadReports of the ranks of a group, in the order in which they came.

    Attributes:
        dropped: how many were given up before these, because the controller was busy.
    """

    group: int
    windows: tuple[LoadReport, ...]
    dropped: int


class Rebalance(msgspec.Struct, tag=True, frozen=True):
    """Plan now, and publish if anything at all is gained."""


class Freeze(msgspec.Struct, tag=True, frozen=True):
    """Publish nothing unasked from now on; or do so again."""

    frozen: bool


class Explain(msgspec.Struct, tag=True, frozen=True):
    """Say why the placement is what it is."""


Order = Attach | LoadReports | Rebalance | Freeze | Explain


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A placement that was weighed against the one there is.

    Attributes:
        placement: its version; that of the placement there is, if it is kept.
        kept: nothing better was found that pays.
        asked: by ``rebalance``, rather than because a window had come.
        balance_now, balance_then: mean load of the ranks / largest load, averaged over layers: as it is, and with it.
        gain_s: seconds that it is expected to save, over as many windows as the forecast is believed to hold.
        move_s: seconds that moving costs.
        copies: that have to be fetched.
        trust: in the forecast, 0 to 1.
        windows: that it is believed to hold.
        reasons: further numbers of the planner's.
        plan_s: what planning took.
    """

    placement: int
    kept: bool
    asked: bool
    balance_now: float
    balance_then: float
    gain_s: float
    move_s: float
    copies: int
    trust: float
    windows: float
    reasons: dict[str, float]
    plan_s: float

    def __str__(self) -> str:
        why = "asked" if self.asked else "by itself"
        if self.kept:
            return (
                f"{why}: kept; balance {self.balance_now:.3f}, nothing better pays "
                f"(trust {self.trust:.2f}, for {self.windows:.1f} windows)"
            )
        return (
            f"{why}: placement {self.placement}; balance {self.balance_now:.3f} -> {self.balance_then:.3f}, saves "
            f"{self.gain_s * 1e6:.3g} us in the coming windows for {self.move_s * 1e6:.3g} us of moving {self.copies} copies"
            f"{', which need not pay when asked' if self.asked else ''} (trust {self.trust:.2f}, for {self.windows:.1f} "
            "windows)"
        )


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why the placement is what it is, in numbers. As text, it is for people.

    Attributes:
        group: epoch of the group; -1 = the controller knows of none.
        placement: the newest version of a placement.
        adopted: that all ranks make for, as of the last window.
        pending_migrations: copies that are not there yet, as of the last window.
        windows: that all ranks told of, and that were weighed.
        incomplete: windows that some rank didn't tell of, so that they were left out.
        dropped: messages with windows that were given up on their way, by ranks and driver.
        refused: messages that can't be true.
        refusals: the last of these, and why.
        step_s: seconds of a step, in the last window.
        bytes_per_step: what each rank may fetch in a step to reach a placement.
        published: why the controller published its latest placement; None if it hasn't (a new one doesn't know).
        latest: what it weighed last.
    """

    state: GroupState
    group: int
    placement: int
    adopted: int
    pending_migrations: int
    windows: int
    incomplete: int
    dropped: int
    refused: int
    refusals: tuple[str, ...]
    step_s: float
    bytes_per_step: int
    published: Judgement | None
    latest: Judgement | None

    def __str__(self) -> str:
        lines = [
            f"{self.state}: placement {self.placement}, followed by all ranks: {self.adopted}, "
            f"copies to move: {self.pending_migrations}",
            f"group {self.group}, {self.windows} windows weighed, {self.incomplete} incomplete, {self.dropped} messages "
            f"dropped, {self.refused} refused",
            "no step was measured yet"
            if not self.step_s
            else f"a step takes {self.step_s * 1e3:.3g} ms, and fetches at most {self.bytes_per_step / 2**20:.3g} MiB for a "
            "placement on each rank",
            f"published: {self.published or 'nothing yet'}",
            f"latest: {self.latest or 'nothing yet'}",
            *(f"refused: {refusal}" for refusal in self.refusals),
        ]
        return "\n".join(lines)


class Reply(msgspec.Struct, frozen=True):
    """What the controller answers.

    Attributes:
        placement: the newest version of a placement that it knows of.
        windows: complete ones that it has learned from.
        place: for all ranks, if it has decided something.
        explanation: to ``Explain`` and ``Rebalance``.
    """

    state: GroupState
    placement: int
    windows: int
    place: SetPlacement | None = None
    explanation: Explanation | None = None


_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Order | Reply) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_order(message: bytes) -> Order:
    return _orders.decode(message)


def decode_reply(message: bytes) -> Reply:
    return _replies.decode(message)
