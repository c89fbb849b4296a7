"""Reports of a small model's ranks to a controller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from cluster.controller.controller import Controller
from cluster.messages.controller import Attach, Explain, Explanation, Learn, LoadReport, Reply
from cluster.messages.placement import GroupState
from epslots.load_window import LoadWindow
from epslots.placement.placement import Placement, default_placement, pack
from epslots.placement.planner import Proposal, RankHardware, Reasons
from epslots.planner.cost_model import Costs

LAYERS, EXPERTS, SLOTS = 3, 6, 4
COSTS = Costs(
    host_fetch=1_000_000,
    peer_fetch=500_000,
    pair_transfer=100,
    pair_compute=10_000,
    expert_compute=1000,
    exchange=10_000,
    gather=10_000,
)
NO_REASONS = Reasons(0.0, 0.0, 0, 0.0, 0)


def placement_of(ranks: int, version: int = 0, slots: int = SLOTS) -> Placement:
    """As dealt, under another number."""
    dealt = default_placement([EXPERTS] * LAYERS, np.full((LAYERS, ranks), slots))
    return Placement(version, dealt.num_experts_L, dealt.home_LE, dealt.wanted_LRE, dealt.quota_LR)


def group_state_of(placement: Placement, *, epoch: int = 0, number: int = 1, **changes: Any) -> GroupState:
    """A rank's state of a group that follows a placement."""
    usual: dict[str, Any] = {
        "number": number,
        "epoch": epoch,
        "nodes": tuple(f"node {rank // 2}" for rank in range(placement.ranks)),
        "placement": pack(placement),
        "pending_migrations": 0,
        "costs": COSTS,
        "expert_bytes": (1000,) * LAYERS,
        "pools": (0,) * LAYERS,
    }
    return GroupState(**(usual | changes))


def meeting(placement: Placement, *, epoch: int = 0, published: int = -1, **changes: Any) -> Attach:
    """The order that introduces a group."""
    return Attach(
        group=group_state_of(placement, epoch=epoch),
        **({"offered": None, "published": published, "frozen": False} | changes),
    )


def window(tokens_E: Sequence[int] = (8,) * EXPERTS, *, steps: int = 10, **changes: Any) -> bytes:
    """A window in which a rank's tokens in every layer go to experts as given."""
    tokens = np.tile(np.array(tokens_E, "<i8"), (LAYERS, 1))
    usual: dict[str, Any] = {
        "steps": steps,
        "seconds": 0.5,
        "tokens": tokens.tobytes(),
        "uses": np.minimum(tokens, steps).tobytes(),
        "reuse": np.zeros((LAYERS, EXPERTS + 1), "<i8").tobytes(),
        "hits": (5,) * LAYERS,
        "misses": (1,) * LAYERS,
        "pairs_sent": (0,) * LAYERS,
        "pairs_received": (0,) * LAYERS,
        "compute_s": (0.0,) * LAYERS,
    }
    return msgspec.msgpack.encode(msgspec.structs.replace(LoadWindow(**usual), **changes))


def told(number: int, ranks: int, message: bytes | None = None, *, epoch: int = 0, dropped: int = 0) -> Learn:
    """The same window of all ranks."""
    message = window() if message is None else message
    return Learn(tuple(LoadReport(epoch, rank, number, message) for rank in range(ranks)), dropped)


class Planner:
    """A planner that does as told.

    Attributes:
        moves: whether it has something better.
        asked: the arguments of each call.
    """

    def __init__(self, *, moves: bool = False) -> None:
        self.moves = moves
        self.asked: list[tuple[Placement, Any, RankHardware, Any]] = []

    def __call__(self, current: Placement, expected: Any, hardware: RankHardware, quota_LR: Any) -> Proposal:
        self.asked.append((current, expected, hardware, quota_LR))
        if not self.moves:
            return Proposal(current, True, 0, 0, 0, 0.75, 0.75, NO_REASONS)
        home_LE = (current.home_LE + 1) % current.ranks
        quota = current.quota_LR if quota_LR is None else quota_LR
        turned = Placement(current.version + 1, current.num_experts_L, home_LE, np.zeros_like(current.wanted_LRE), quota)
        return Proposal(turned, False, 3_000_000_000, 1_000_000_000, 5, 0.75, 0.875, NO_REASONS)


def controller(planner: Planner | None = None, **settings: Any) -> Controller:
    """One without a clock."""
    return Controller(lambda: 0.0, **({} if planner is None else {"planner": planner}), **settings)


def steady(there: Controller, ranks: int, placement: int, numbers: Sequence[int], **changes: Any) -> list[Reply]:
    """LoadReports that say that the ranks follow a placement, and have all of it."""
    return [there.answer(told(number, ranks, window(placement=placement, **changes))) for number in numbers]


def explained(there: Any) -> Explanation:
    explanation = there.answer(Explain()).explanation
    assert explanation is not None
    return explanation


# LoadReports that can't be true, of a group that was never told of a placement.
BAD: dict[str, bytes] = {
    "not msgpack": b"\xc1",
    "another message": msgspec.msgpack.encode({"steps": "many"}),
    "seconds nan": window(seconds=float("nan")),
    "seconds inf": window(seconds=float("inf")),
    "seconds negative": window(seconds=-1.0),
    "compute_s nan": window(compute_s=(0.1, float("nan"), 0.1)),
    "compute_s negative": window(compute_s=(0.1, -0.1, 0.1)),
    "tokens negative": window((8, -1, 0, 0, 0, 0)),
    "tokens absurd": window((2**62, 0, 0, 0, 0, 0)),
    "tokens of another size": window(tokens=bytes(8)),
    "uses beyond the steps": window(uses=np.full((LAYERS, EXPERTS), 11, "<i8").tobytes()),
    "reuse of another size": window(reuse=b""),
    "hits of another model": window(hits=(1,) * (LAYERS + 1)),
    "misses negative": window(misses=(-1,) * LAYERS),
    "a placement that was never published": window(placement=1),
    "pending_migrations negative": window(pending_migrations=-5),
    "steps negative": window(steps=-1),
}
