"""``Controller``: load reports in, placements out. It decides and has no effects; the driver carries its messages.

It may be lost and replaced at any moment: ``Attach`` gives a new one all that it needs. Its state follows from what it knows:

    waiting    no group is attached
    watching   after every complete window (all ranks have reported it) a placement is planned, and published if it is expected
               to save more than its migrations cost
    moving     the ranks haven't reached the published placement. If that takes long, placements are planned again: traffic may
               change in the middle of a long migration
    frozen     windows are learned from; nothing is published but for ``Rebalance``

Shape suffixes: L MoE layers, R ranks, E experts of the largest layer, D = E + 1 stack distances.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import msgspec
import numpy as np

from cluster.messages.controller import (
    Attach,
    ControllerState,
    Explain,
    Explanation,
    Freeze,
    Judgement,
    Learn,
    Order,
    Rebalance,
    Reply,
)
from cluster.messages.placement import LoadReport, SetPlacement
from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.load_window import LoadWindow
from epslots.placement.model_planner import movement_budget
from epslots.placement.placement import Placement, pack, unpack
from epslots.placement.planner import RankHardware, propose
from epslots.placement.pooled_forecast import GroupForecast, PooledForecast
from epslots.placement.rank_speeds import RankSpeeds, busy_calls, work_ns
from epslots.placement.replanner import OVERDUE, SHARE, Propose, Replanner
from epslots.planner.cost_model import Costs

FindForecast = Callable[[str, tuple[int, ...]], GroupForecast]
"""Gives a group its way to the forecast of its role and of a model with so many experts in its layers."""

_MOST_GATHERED = 3
"""Windows that some ranks may have reported while others haven't."""
_MOST_REFUSALS = 8
_MOST_BYTES = 2**59


@dataclass(frozen=True)
class _Group:
    """The attached group."""

    epoch: int
    role: str
    hardware: RankHardware
    costs: Costs
    num_experts_L: IntArray
    expert_bytes: int

    @property
    def ranks(self) -> int:
        return len(self.hardware.node_R)


class Controller:
    """Decides which rank holds which experts.

    Args:
        clock: seconds, to measure the planning; no decision depends on it.
        share: part of a step's time that fetches for a placement may take.
        planner: plans a placement; another one in tests.
        forecast: gives the group its way to the forecast of its role; None = to a new one of its own.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        share: float = SHARE,
        planner: Propose = propose,
        forecast: FindForecast | None = None,
    ) -> None:
        self._clock, self._share, self._planner = clock, share, planner
        self._find_forecast = forecast or (lambda _role, _experts: PooledForecast().of(0))
        self._forecast: GroupForecast | None = None
        self._speeds = RankSpeeds(0)
        self._group: _Group | None = None
        self._current: Placement | None = None
        """The newest placement of the group, whether or not its ranks follow it yet."""
        self._newest = -1
        self._followed = -1
        self._pending_migrations = 0
        self._windows_since = 0
        """Windows since the last placement was published."""
        self._frozen = False
        self._gathered: dict[int, dict[int, LoadWindow]] = {}
        """Incomplete windows, by number and rank."""
        self._last_learned = 0
        """Number of the last window that was learned from; reports of earlier ones are too late."""
        self._replanner: Replanner | None = None
        self._step_s = 0.0
        self._windows = self._incomplete = self._dropped = self._refused = 0
        self._refusals: deque[str] = deque(maxlen=_MOST_REFUSALS)
        self._published: Judgement | None = None
        self._latest: Judgement | None = None

    @property
    def state(self) -> ControllerState:
        """The controller's activity for this group."""
        if self._group is None or self._current is None:
            return ControllerState.WAITING
        if self._frozen:
            return ControllerState.FROZEN
        there = self._followed >= self._current.version and not self._pending_migrations
        return ControllerState.WATCHING if there else ControllerState.MOVING

    def answer(self, order: Order) -> Reply:
        """Carry out an order.

        Raises:
            ConfigError: the attached group's state is impossible.
        """
        set_placement = explanation = None
        match order:
            case Attach():
                self._attach(order)
            case Learn():
                set_placement = self._learn(order)
            case Rebalance():
                set_placement = self._plan(asked=True)
                explanation = self._explain()
            case Freeze(frozen):
                self._frozen = frozen
            case Explain():
                explanation = self._explain()
        speeds = tuple(self._speeds.speed_R.tolist())
        return Reply(self.state, self._newest, self._windows, set_placement, explanation, speeds)

    def _attach(self, order: Attach) -> None:
        """Start over with a group, but keep what was learned of the traffic, which doesn't depend on the ranks."""
        group = order.group
        followed = unpack(group.placement)
        placement = followed if order.offered is None else unpack(order.offered)
        layers, ranks = placement.quota_LR.shape
        if not len(group.expert_bytes) == len(group.pools) == layers or min(group.expert_bytes) < 1:
            raise ConfigError(
                f"a group's state has experts of {group.expert_bytes} bytes in pools {group.pools}; allowed: one number for "
                f"each of {layers} layers"
            )
        if len(group.nodes) != ranks or followed.ranks != ranks:
            raise ConfigError(f"a group of {len(group.nodes)} ranks has placements for {followed.ranks} and {ranks}")
        pools = np.array(group.pools)
        _, node_R = np.unique(group.nodes, return_inverse=True)
        members = [np.flatnonzero(pools == pool).tolist() for pool in np.unique(pools)]
        known = self._replanner
        if known is None or known.num_experts_L.tolist() != placement.num_experts_L.tolist():
            self._forecast = self._find_forecast(order.role, tuple(placement.num_experts_L.tolist()))
            self._replanner = Replanner(placement.num_experts_L, members, planner=self._planner, forecast=self._forecast)
        self._speeds = RankSpeeds(ranks)  # they may be other ranks
        self._group = _Group(
            epoch=group.epoch,
            role=order.role,
            hardware=RankHardware(node_R=node_R, speed_R=self._speeds.speed_R, costs=group.costs),
            costs=group.costs,
            num_experts_L=placement.num_experts_L,
            expert_bytes=max(group.expert_bytes),
        )
        self._current, self._followed, self._pending_migrations = placement, followed.version, group.pending_migrations
        self._newest = max(self._newest, order.published, placement.version)
        self._frozen = order.frozen
        self._gathered, self._last_learned, self._windows_since = {}, 0, 0

    # Load reports.

    def _learn(self, order: Learn) -> SetPlacement | None:
        """Take load reports; plan a placement if a window is complete with them, and if it is time for that."""
        self._dropped += order.dropped
        if self._group is None:
            return None
        learned = False
        for report in order.reports:
            if report.epoch != self._group.epoch:
                continue  # of a group that was attached before
            try:
                self._take(report, self._group)
            except (ConfigError, msgspec.MsgspecError) as error:
                self._refused += 1
                self._refusals.append(f"window {report.number} of rank {report.rank}: {error}")
            else:
                learned |= self._complete(report.number, self._group)
        if not learned:
            return None
        state = self.state
        overdue = state is ControllerState.MOVING and self._windows_since > OVERDUE
        return self._plan(asked=False) if state is ControllerState.WATCHING or overdue else None

    def _take(self, report: LoadReport, group: _Group) -> None:
        """Put a rank's window together with those of the other ranks.

        Raises:
            ConfigError, msgspec.MsgspecError: its contents are impossible.
        """
        if not 0 <= report.rank < group.ranks:
            raise ConfigError(f"allowed: ranks 0 to {group.ranks - 1}")
        window = msgspec.msgpack.decode(report.window, type=LoadWindow)
        window.check(group.num_experts_L)
        if window.placement > self._newest:
            raise ConfigError(f"placement is {window.placement}, and the newest that was published is {self._newest}")
        self._dropped += window.dropped
        if report.number <= self._last_learned:
            return  # that window was learned from, or dropped as incomplete
        others = self._gathered.setdefault(report.number, {})
        if report.rank in others:
            raise ConfigError("it was reported twice")
        others[report.rank] = window

    def _complete(self, number: int, group: _Group) -> bool:
        """Learn from a window if all ranks have reported it; returns whether it was learned from."""
        windows = self._gathered.get(number, {})
        complete = len(windows) == group.ranks
        if complete:
            self._last_learned = number
            del self._gathered[number]
        self._drop_incomplete()
        return complete and self._learn_from(windows, group)

    def _drop_incomplete(self) -> None:
        """Drop windows older than the last one that was learned from, and the oldest of too many."""
        dropped = [old for old in self._gathered if old <= self._last_learned]
        if len(self._gathered) > _MOST_GATHERED:
            dropped.append(next(iter(self._gathered)))
        for old in dropped:
            del self._gathered[old]
        self._incomplete += len(dropped)

    def _learn_from(self, windows: Mapping[int, LoadWindow], group: _Group) -> bool:
        """Learn from the windows of all ranks, by rank; returns False if they have no step."""
        self._followed = min(window.placement for window in windows.values())
        self._pending_migrations = max(window.pending_migrations for window in windows.values())
        steps = max(window.steps for window in windows.values())
        if not steps:
            return False
        self._windows_since += 1
        self._windows += 1
        self._learn_speeds(windows, group)
        self._step_s = max(window.seconds for window in windows.values()) / steps
        layers, experts = len(group.num_experts_L), int(group.num_experts_L.max())
        tokens_LE = sum((w.tokens_LE(layers, experts) for w in windows.values()), np.zeros((layers, experts), np.int64))
        uses_LE = np.maximum.reduce([window.uses_LE(layers, experts) for window in windows.values()])
        assert self._replanner is not None, "it is made with the group"
        self._replanner.learn(tokens_LE, uses_LE, windows[0].reuse_LD(layers, experts), steps)  # all ranks have the same reuse
        return True

    def _learn_speeds(self, windows: Mapping[int, LoadWindow], group: _Group) -> None:
        by_rank = [windows[rank] for rank in range(group.ranks)]
        work_ns_R = np.array([work_ns(window, group.costs) for window in by_rank])
        taken_ns_R = np.array([1e9 * sum(window.compute_s) for window in by_rank])
        calls = len(group.num_experts_L) * max(window.steps for window in by_rank)
        if self._speeds.learn(work_ns_R, taken_ns_R, calls, np.array(list(map(busy_calls, by_rank)))):
            self._group = replace(group, hardware=replace(group.hardware, speed_R=self._speeds.speed_R))

    # Placements.

    def _plan(self, *, asked: bool) -> SetPlacement | None:
        """Plan a placement, compare it with the present one, and publish it if it is better."""
        if self._group is None or self._current is None or self._replanner is None or not self._windows:
            return None
        began = self._clock()
        expected, proposal = self._replanner.weigh(self._current, self._group.hardware, any_gain=asked)
        version = self._current.version if proposal.keep else self._newest + 1
        self._latest = Judgement(
            placement=version,
            kept=proposal.keep,
            asked=asked,
            balance_now=float(proposal.balance_now),
            balance_then=float(proposal.balance_then),
            gain_s=proposal.gain_ns / 1e9,
            migration_s=proposal.migration_ns / 1e9,
            copies=int(proposal.copies),
            trust=float(expected.trust),
            windows=float(expected.windows),
            reasons={name: float(number) for name, number in asdict(proposal.reasons).items()},
            plan_s=self._clock() - began,
        )
        if proposal.keep:
            return None
        placement = replace(proposal.placement, version=version)
        placement.check()
        self._current, self._newest = placement, version
        self._pending_migrations, self._windows_since = int(proposal.copies), 0
        self._published = self._latest
        return SetPlacement(
            epoch=self._group.epoch, version=version, placement=pack(placement), bytes_per_step=self._bytes_per_step()
        )

    def _bytes_per_step(self) -> int:
        """Bytes that each rank may fetch in a step, so that fetches take no more than their share of the step's time."""
        if self._group is None:
            return 0
        budget = movement_budget(self._step_s, self._group.costs, self._group.expert_bytes, self._share)
        return min(budget, _MOST_BYTES)

    def _explain(self) -> Explanation:
        return Explanation(
            state=self.state,
            epoch=-1 if self._group is None else self._group.epoch,
            role="mixed" if self._group is None else self._group.role,
            placement=self._newest,
            followed=self._followed,
            pending_migrations=self._pending_migrations,
            windows=self._windows,
            pooled=0 if self._forecast is None else self._forecast.groups,
            speeds=tuple(self._speeds.speed_R.tolist()),
            incomplete=self._incomplete,
            dropped=self._dropped,
            refused=self._refused,
            refusals=tuple(self._refusals),
            step_s=self._step_s,
            bytes_per_step=self._bytes_per_step(),
            published=self._published,
            latest=self._latest,
        )
