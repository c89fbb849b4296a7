"""Messages between the driver and the controller, as msgpack.

    driver -> controller   order       answer: a Reply (controller -> driver)
                           Attach      the state; from now on the group is this one
                           Learn       a SetPlacement for all ranks, if a better placement was found
                           Rebalance   the same, and an Explanation
                           Freeze      the state
                           Explain     an Explanation

The controller's process serves all groups; an order is about one of them (``address``). It gets one order of a group at a
time, and sends nothing unasked. It can't reach the ranks: the driver passes their load reports on, and sends them its
placements.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from cluster.messages.placement import GroupState, LoadReport, SetPlacement


class ControllerState(StrEnum):
    """The controller's activity.

    Attributes:
        WAITING: no group is attached.
        WATCHING: the ranks have reached the newest placement; every window is compared with it.
        MOVING: a placement was published, and the ranks haven't reached it yet.
        FROZEN: windows are learned from, and nothing is published unasked.
    """

    WAITING = "waiting"
    WATCHING = "watching"
    MOVING = "moving"
    FROZEN = "frozen"


class Attach(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Serve this group: it has formed, or the controller has just started.

    Attributes:
        group: the group's state, from one of its ranks.
        offered: a newer placement, which was sent to the ranks and may not be followed yet.
        published: the highest version of a placement that the driver has seen.
        frozen: publish nothing unasked.
        role: what the group serves; groups of one role share a forecast.
    """

    group: GroupState
    offered: bytes | None
    published: int
    frozen: bool
    role: str = "mixed"


class Learn(msgspec.Struct, tag=True, frozen=True):
    """Learn from load reports of the group's ranks, in the order of their arrival.

    Attributes:
        dropped: load reports that the driver dropped since the last ``Learn``, because the controller was busy.
    """

    reports: tuple[LoadReport, ...]
    dropped: int


class Rebalance(msgspec.Struct, tag=True, frozen=True):
    """Plan a placement now, and publish it if it gains anything."""


class Freeze(msgspec.Struct, tag=True, frozen=True):
    """Publish nothing unasked from now on (``frozen``), or publish again."""

    frozen: bool


class Explain(msgspec.Struct, tag=True, frozen=True):
    """Explain the present placement."""


Order = Attach | Learn | Rebalance | Freeze | Explain


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A planned placement, compared with the present one.

    Attributes:
        placement: version of the planned placement; of the present one, if that is kept.
        kept: the present placement is kept, because nothing better pays.
        asked: planned for ``rebalance``, not after a window.
        balance_now, balance_then: mean load of the ranks / largest load, averaged over layers: at present, and as planned.
        gain_s: seconds that it is expected to save over the next windows.
        migration_s: seconds that its migrations cost.
        copies: number of its migrations.
        trust: in the forecast, 0 to 1.
        windows: number of windows that the forecast is expected to hold.
        reasons: further numbers of the planner, by name.
        plan_s: seconds that planning took.
    """

    placement: int
    kept: bool
    asked: bool
    balance_now: float
    balance_then: float
    gain_s: float
    migration_s: float
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
            f"{self.gain_s * 1e6:.3g} us in the coming windows for {self.migration_s * 1e6:.3g} us of moving {self.copies} "
            f"copies{', which need not pay when asked' if self.asked else ''} (trust {self.trust:.2f}, for {self.windows:.1f} "
            "windows)"
        )


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why experts are placed as they are, in numbers; ``str`` gives them as text.

    Attributes:
        state: of the controller: "waiting", "watching", "moving" or "frozen".
        epoch: of the group; -1 = no group is attached.
        role: what the group serves.
        placement: the newest version of a placement.
        followed: the version that all ranks follow, as of the last window.
        pending_migrations: copies and slots that have yet to be moved for it, as of the last window.
        windows: windows that all ranks reported, and that were learned from.
        pooled: groups of this role whose windows the forecast learns from together.
        speeds: of the ranks' computing, as learned; 1000 = usual, or not known.
        incomplete: windows that some rank didn't report, and that were left out.
        dropped: load reports that ranks and driver dropped, because the controller was busy.
        refused: load reports with impossible contents.
        refusals: the last of these, with the reason.
        step_s: seconds of one step, in the last window.
        bytes_per_step: bytes that each rank may fetch for a placement in one step.
        published: the reason for the newest placement; None if this controller has published none.
        latest: the newest comparison, whether or not it led to a placement.
    """

    state: ControllerState
    epoch: int
    role: str
    placement: int
    followed: int
    pending_migrations: int
    windows: int
    pooled: int
    speeds: tuple[int, ...]
    incomplete: int
    dropped: int
    refused: int
    refusals: tuple[str, ...]
    step_s: float
    bytes_per_step: int
    published: Judgement | None
    latest: Judgement | None

    @property
    def _differ(self) -> bool:
        """Whether the ranks' speeds differ."""
        return len(set(self.speeds)) > 1

    def __str__(self) -> str:
        lines = [
            f"{self.state}: placement {self.placement}, followed by all ranks: {self.followed}, "
            f"copies and slots to move: {self.pending_migrations}",
            f"epoch {self.epoch}, role {self.role}, {self.windows} windows learned from, {self.incomplete} incomplete, "
            f"{self.dropped} load reports dropped, {self.refused} refused",
            "no step was measured yet"
            if not self.step_s
            else f"a step takes {self.step_s * 1e3:.3g} ms, and fetches at most {self.bytes_per_step / 2**20:.3g} MiB for a "
            "placement on each rank",
            f"the forecast is that of {self.pooled} {'group' if self.pooled == 1 else 'groups'} of this role",
            *([f"speeds of the ranks, usual = 1: {', '.join(f'{speed / 1000:.2f}' for speed in self.speeds)}"] * self._differ),
            f"published: {self.published or 'nothing yet'}",
            f"latest: {self.latest or 'nothing yet'}",
            *(f"refused: {refusal}" for refusal in self.refusals),
        ]
        return "\n".join(lines)


class Reply(msgspec.Struct, frozen=True):
    """The answer to an order.

    Attributes:
        version: the newest version of a placement that the controller knows.
        windows: number of complete windows that it has learned from.
        set_placement: to be sent to all ranks; None if nothing was published.
        explanation: the answer to ``Explain`` and ``Rebalance``.
        speeds: of the group's ranks, as far as they are known; 1000 = usual.
    """

    state: ControllerState
    version: int
    windows: int
    set_placement: SetPlacement | None = None
    explanation: Explanation | None = None
    speeds: tuple[int, ...] = ()


class Addressed(msgspec.Struct, frozen=True):
    """An order about one of the cluster's groups.

    Attributes:
        group: its number.
        order: an ``Order``.
    """

    group: int
    order: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_addressed = msgspec.msgpack.Decoder(Addressed)
_orders = msgspec.msgpack.Decoder(Order)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Order | Reply) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def address(group: int, order: bytes) -> bytes:
    """An encoded order, addressed to the controller of a group."""
    return _encoder.encode(Addressed(group, msgspec.Raw(order)))


def decode_addressed(message: bytes) -> tuple[int, bytes]:
    """The group that an order is about, and the order, for ``decode_order``."""
    addressed = _addressed.decode(message)
    return addressed.group, bytes(addressed.order)


def decode_order(message: bytes) -> Order:
    return _orders.decode(message)


def decode_reply(message: bytes) -> Reply:
    return _replies.decode(message)
