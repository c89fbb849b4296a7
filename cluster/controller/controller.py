"""The controller: windows of telemetry in, placements out. It decides, and touches nothing: the driver tells it and takes its
answers to the ranks (``controller_client.py``), and it may be lost and replaced at any moment (``Controller.answer``:
``Attach``).

Pure. Its states (``controller_messages.GroupState``) follow from what it knows:

    waiting    no group has been named
    watching   every complete window (all ranks have told of it) is learned from, and a placement is weighed against the
               present one; it is published if it is expected to save more than moving costs
    moving     published, and the ranks aren't there: windows are learned from. If they aren't there after some windows,
               placements are weighed again, or a change of traffic in the middle of a long move would have to wait
    frozen     windows are learned from; nothing is published but what ``Rebalance`` asks for

Generations of placements only grow, whoever published or carried over the last one.

Legend of shape suffixes: L MoE layers, R ranks, E experts of the largest layer, D = E + 1 stack distances.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import msgspec
import numpy as np

from cluster.messages.controller import (
    Attach,
    Explain,
    Explanation,
    Freeze,
    GroupState,
    Judgement,
    LoadReport,
    LoadReports,
    Order,
    Rebalance,
    Reply,
)
from cluster.messages.placement import SetPlacement
from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.load_window import LoadWindow
from epslots.placement.forecast import Forecast
from epslots.placement.model_planner import movement_budget
from epslots.placement.placement import Placement, pack, unpack
from epslots.placement.planner import RankHardware, propose
from epslots.placement.replanner import OVERDUE, SHARE, Propose, Replanner
from epslots.planner.cost_model import Costs

_MOST_GATHERED = 3
"""LoadReports that some ranks may have told of while others haven't."""
_MOST_REFUSALS = 8
_USUAL_SPEED = 1000
_MOST_BYTES = 2**59


@dataclass(frozen=True)
class _Group:
    """The ranks as they stand."""

    number: int
    fleet: RankHardware
    costs: Costs
    num_experts_L: IntArray
    expert_bytes: int

    @property
    def ranks(self) -> int:
        return len(self.fleet.node_R)


class Controller:
    """Decides where experts should live.

    Args:
        clock: seconds, to tell how long planning takes; nothing depends on it.
        share: of a step's time that fetching for a placement may take.
        planner: ``rebalance.propose``, or another one in tests.
        forecast: makes a new ``Forecast``, or another one in tests.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        share: float = SHARE,
        planner: Propose = propose,
        forecast: Callable[[], Forecast] = Forecast,
    ) -> None:
        self._clock, self._share = clock, share
        self._make_replanner = partial(Replanner, planner=planner, forecast=forecast)
        self._group: _Group | None = None
        self._current: Placement | None = None
        """The newest placement of the group, whether or not its ranks follow it yet."""
        self._newest = -1
        self._adopted = -1
        self._pending_migrations = 0
        self._since = 0
        """LoadReports since the last placement was published."""
        self._frozen = False
        self._gathered: dict[int, dict[int, LoadWindow]] = {}
        """By number and rank, until all ranks have told."""
        self._done = 0
        """Number of the last window that was learned from; earlier ones come too late."""
        self._replanner: Replanner | None = None
        self._step_s = 0.0
        self._windows = self._incomplete = self._dropped = self._refused = 0
        self._refusals: deque[str] = deque(maxlen=_MOST_REFUSALS)
        self._published: Judgement | None = None
        self._latest: Judgement | None = None

    @property
    def state(self) -> GroupState:
        """What it is about; see above."""
        if self._group is None or self._current is None:
            return GroupState.WAITING
        if self._frozen:
            return GroupState.FROZEN
        there = self._adopted >= self._current.version and not self._pending_migrations
        return GroupState.WATCHING if there else GroupState.MOVING

    def answer(self, order: Order) -> Reply:
        """Do as told.

        Raises:
            ConfigError: what a rank said of its group can't be true.
        """
        place = explanation = None
        match order:
            case Attach():
                self._meet(order)
            case LoadReports():
                place = self._learn(order)
            case Rebalance():
                place = self._weigh(asked=True)
                explanation = self._explain()
            case Freeze(frozen):
                self._frozen = frozen
            case Explain():
                explanation = self._explain()
        return Reply(self.state, self._newest, self._windows, place, explanation)

    def _meet(self, meet: Attach) -> None:
        """Start over with a group, but for what was learned of the traffic: that doesn't depend on who serves it."""
        survey = meet.survey
        followed = unpack(survey.placement)
        placement = followed if meet.offered is None else unpack(meet.offered)
        layers, ranks = placement.quota_LR.shape
        if not len(survey.expert_bytes) == len(survey.pools) == layers or min(survey.expert_bytes) < 1:
            raise ConfigError(
                f"a survey tells of experts of {survey.expert_bytes} bytes in pools {survey.pools}; allowed: one number for "
                f"each of {layers} layers"
            )
        if len(survey.nodes) != ranks or followed.ranks != ranks:
            raise ConfigError(f"a group of {len(survey.nodes)} ranks has placements for {followed.ranks} and {ranks}")
        pools = np.array(survey.pools)
        _, node_R = np.unique(survey.nodes, return_inverse=True)
        members = [np.flatnonzero(pools == pool).tolist() for pool in np.unique(pools)]
        known = self._replanner
        if known is None or known.num_experts_L.tolist() != placement.num_experts_L.tolist():
            self._replanner = self._make_replanner(placement.num_experts_L, members)
        self._group = _Group(
            number=survey.group,
            fleet=RankHardware(node_R=node_R, speed_R=np.full(ranks, _USUAL_SPEED), costs=survey.costs),
            costs=survey.costs,
            num_experts_L=placement.num_experts_L,
            expert_bytes=max(survey.expert_bytes),
        )
        self._current, self._adopted, self._pending_migrations = placement, followed.version, survey.pending_migrations
        self._newest = max(self._newest, meet.published, placement.version)
        self._frozen = meet.frozen
        self._gathered, self._done, self._since = {}, 0, 0

    # LoadReports.

    def _learn(self, windows: LoadReports) -> SetPlacement | None:
        """Take what ranks have told; weigh a placement if something was learned from it, and if that is its time."""
        self._dropped += windows.dropped
        if self._group is None or windows.group != self._group.number:
            return None  # of ranks that have left it
        learned = False
        for heard in windows.windows:
            try:
                self._take(heard, self._group)
            except (ConfigError, msgspec.MsgspecError) as error:
                self._refused += 1
                self._refusals.append(f"window {heard.number} of rank {heard.rank}: {error}")
            else:
                learned |= self._add(heard.number, self._group)
        if not learned:
            return None
        state = self.state
        due = state is GroupState.WATCHING or (state is GroupState.MOVING and self._since > OVERDUE)
        return self._weigh(asked=False) if due else None

    def _take(self, heard: LoadReport, group: _Group) -> None:
        """Put a window to those of the other ranks.

        Raises:
            ConfigError, msgspec.MsgspecError: it can't be true.
        """
        if not 0 <= heard.rank < group.ranks:
            raise ConfigError(f"allowed: ranks 0 to {group.ranks - 1}")
        window = msgspec.msgpack.decode(heard.window, type=LoadWindow)
        window.check(group.num_experts_L)
        if window.placement > self._newest:
            raise ConfigError(f"placement is {window.placement}, and the newest that was published is {self._newest}")
        self._dropped += window.dropped
        if heard.number <= self._done:
            return  # the others' were learned from, or given up, before
        others = self._gathered.setdefault(heard.number, {})
        if heard.rank in others:
            raise ConfigError("it was told twice")
        others[heard.rank] = window

    def _add(self, number: int, group: _Group) -> bool:
        """Learn from a window if all ranks have told of it; whether they have."""
        windows = self._gathered.get(number, {})
        complete = len(windows) == group.ranks
        if complete:
            self._done = number
            del self._gathered[number]
        given_up = [old for old in self._gathered if old <= self._done]
        if len(self._gathered) > _MOST_GATHERED:
            given_up.append(next(iter(self._gathered)))
        for old in given_up:
            del self._gathered[old]
        self._incomplete += len(given_up)
        if not complete:
            return False
        self._adopted = min(window.placement for window in windows.values())
        self._pending_migrations = max(window.pending_migrations for window in windows.values())
        steps = max(window.steps for window in windows.values())
        if not steps:
            return False
        self._since += 1
        self._windows += 1
        self._step_s = max(window.seconds for window in windows.values()) / steps
        layers, experts = len(group.num_experts_L), int(group.num_experts_L.max())
        tokens_LE = sum((w.tokens_LE(layers, experts) for w in windows.values()), np.zeros((layers, experts), np.int64))
        uses_LE = np.maximum.reduce([window.uses_LE(layers, experts) for window in windows.values()])
        assert self._replanner is not None, "it comes with the group"
        self._replanner.learn(tokens_LE, uses_LE, windows[0].reuse_LD(layers, experts), steps)  # that, all ranks have alike
        return True

    # Placements.

    def _weigh(self, *, asked: bool) -> SetPlacement | None:
        """Hold the best placement that is found against the present one, and publish it if it is better."""
        if self._group is None or self._current is None or self._replanner is None or not self._windows:
            return None
        began = self._clock()
        expected, proposal = self._replanner.weigh(self._current, self._group.fleet, any_gain=asked)
        version = self._current.version if proposal.keep else self._newest + 1
        self._latest = Judgement(
            placement=version,
            kept=proposal.keep,
            asked=asked,
            balance_now=float(proposal.balance_now),
            balance_then=float(proposal.balance_then),
            gain_s=proposal.gain_ns / 1e9,
            move_s=proposal.move_ns / 1e9,
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
        self._current, self._newest, self._pending_migrations, self._since = placement, version, int(proposal.copies), 0
        self._published = self._latest
        return SetPlacement(
            group=self._group.number, version=version, placement=pack(placement), bytes_per_step=self._bytes_per_step()
        )

    def _bytes_per_step(self) -> int:
        """What each rank may fetch in a step, so that this takes no more than its share of the step's time."""
        if self._group is None:
            return 0
        budget = movement_budget(self._step_s, self._group.costs, self._group.expert_bytes, self._share)
        return min(budget, _MOST_BYTES)

    def _explain(self) -> Explanation:
        return Explanation(
            state=self.state,
            group=-1 if self._group is None else self._group.number,
            placement=self._newest,
            adopted=self._adopted,
            pending_migrations=self._pending_migrations,
            windows=self._windows,
            incomplete=self._incomplete,
            dropped=self._dropped,
            refused=self._refused,
            refusals=tuple(self._refusals),
            step_s=self._step_s,
            bytes_per_step=self._bytes_per_step(),
            published=self._published,
            latest=self._latest,
        )
