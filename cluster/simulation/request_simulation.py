"""``RequestSimulation``: requests that arrive at a simulated cluster of groups, event by event.

    arrival -> Scheduler -> a rank's admission and batches -> HandOvers, where groups have roles -> tokens -> end

The decisions are the cluster's own: ``driver/scheduler.py``, ``driver/hand_overs.py`` with its costs, the admission and
batches of ``simulated_rank.py``, the planner and caches of ``SimulatedGroup``, and the controller with its messages. Times are
modelled: of steps (``epslots/simulation/timing.py``), and of hand-overs by their bytes and both ranks' steps. Messages between
driver and ranks take none; but ranks send outputs in batches, and the driver assigns requests together, as in a cluster.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

import numpy as np

from cluster.driver.hand_overs import HandOvers
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.request_router import TOGETHER_S
from cluster.driver.scheduler import Scheduler
from cluster.messages.hand_over import Forget, GoOn, HandedOver, HandOver, PromptProgress, Release, TakeOver
from cluster.messages.rank import Command, Submit
from cluster.rank.event_pace import EVENTS_EVERY_S
from cluster.simulation.arrivals import Arrival
from cluster.simulation.cache_transfers import CacheTransfers
from cluster.simulation.group_windows import GroupWindows
from cluster.simulation.lockstep_group import LockstepGroup
from cluster.simulation.simulated_rank import SimulatedRank
from cluster.simulation.trace_counts import TraceCounts
from epslots.generation.requests import Output
from epslots.placement.rank_speeds import USUAL
from epslots.rank_groups import Role
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.simulate import RecordedTraffic

_DEADLINE_S = 60.0  # of hand-overs; none passes here


@dataclass(eq=False)
class RequestTimes:
    """The times of a request as its reader sees them, in simulated seconds.

    Attributes:
        at_s: it arrived.
        first_s, last_s: its first and its latest token came; NaN = none yet.
        tokens: that came.
        done: it has ended.
    """

    at_s: float
    first_s: float = math.nan
    last_s: float = math.nan
    tokens: int = 0
    done: bool = False


class RequestSimulation:
    """A simulated cluster, and the requests that it serves.

    Args:
        cluster: its settings.
        traffic: the routing of tokens.

    Attributes:
        now_s: simulated seconds since the start.
        ranks: of all groups, in the order of their numbers.
        groups: the first ones compute prompts, where there are roles.
        hand_overs: of the driver.
        windows: of load; None without a controller.
        times: by the request's id.
        hand_over_s: seconds of each hand-over that ended well.

    Raises:
        ConfigError: a setting is out of range, or the trace holds no token.
    """

    def __init__(self, cluster: GroupedCluster, traffic: RecordedTraffic) -> None:
        cluster.check(traffic.num_experts_L)
        self._cluster = cluster
        self.now_s = 0.0
        self.times: dict[str, RequestTimes] = {}
        self.hand_over_s: list[float] = []
        self._handed_tokens = 0
        self._progress: dict[int, list[PromptProgress]] = {}
        """Of prompts, by the rank that hasn't sent it yet."""
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._first_rows: dict[str, int] = {}
        self.ranks = [SimulatedRank(cluster.engine) for _ in range(cluster.ranks)]
        self.groups = self._open_groups(traffic)
        self.windows = GroupWindows(cluster, self.groups) if cluster.window_steps else None
        self._scheduler = Scheduler()
        for group in range(len(self.groups)):
            self._serve(group, (USUAL,) * cluster.group_size)
        self.hand_overs = HandOvers(self._scheduler, self._send, form_s=_DEADLINE_S, deadline_s=_DEADLINE_S)
        self._transfers = CacheTransfers(cluster, self.ranks, self._put, self._at, self._report, now=lambda: self.now_s)
        self._assignment_due = False
        self._busy = [False] * len(self.groups)
        """By group: a step is under way, or about to begin."""
        self._sent_s_GR = np.full((len(self.groups), cluster.group_size), -math.inf)
        """When each rank of each group has sent its outputs last."""

    def _open_groups(self, traffic: RecordedTraffic) -> list[LockstepGroup]:
        cluster, size = self._cluster, self._cluster.group_size
        counts = TraceCounts(traffic, size)
        return [
            LockstepGroup(
                self.ranks[number * size : (number + 1) * size],
                experts,
                counts,
                self._first_rows,
                most_requests=cluster.engine.max_requests,
                depth=cluster.depth,
            )
            for number, experts in enumerate(cluster.expert_groups(traffic.num_experts_L))
        ]

    def _serve(self, group: int, speeds: Sequence[int]) -> None:
        """Give a group's ranks requests by these speeds."""
        first = group * self._cluster.group_size
        self._scheduler.serve({first + rank: self._capacity(first + rank, speed / USUAL) for rank, speed in enumerate(speeds)})

    def _capacity(self, rank: int, speed: float) -> RankCapacity:
        engine = self._cluster.engine
        return RankCapacity(
            engine.planned_tokens,
            engine.max_requests,
            self.ranks[rank].shares_prefixes,
            speed=speed,
            role=self._cluster.role_of(rank),
            machine=f"node {self._cluster.node_of(rank)}",
        )

    def run(self, arrivals: Iterable[Arrival], until: Callable[[], bool] = lambda: False) -> None:
        """Serve requests until all have ended, or as long as it takes.

        Args:
            arrivals: in the order of their times.
            until: asked before each event; True ends the simulation.
        """
        coming = iter(arrivals)
        self._await(coming)
        while self._events and not until():
            self.now_s, _, event = heappop(self._events)
            event(self.now_s)

    # Results.

    def role_of(self, rank: int) -> Role:
        """The role of a rank's group."""
        return self._cluster.role_of(rank)

    def expert_uses(self) -> tuple[int, int]:
        """Hits and misses of all ranks."""
        tallies = [group.experts.tally for group in self.groups]
        return sum(int(one.hits.sum()) for one in tallies), sum(int(one.misses.sum()) for one in tallies)

    @property
    def reused_of_prompts(self) -> int:
        """Tokens of prompts that weren't computed, because a rank's cache held them; but for those of hand-overs."""
        return sum(rank.counters.reused_tokens for rank in self.ranks) - self._handed_tokens

    def check(self) -> None:
        """Assert that nothing is left once all requests have ended."""
        self._scheduler.check()
        assert not len(self._scheduler) and not len(self.hand_overs)
        for rank in self.ranks:
            rank.check()

    # Events.

    def _at(self, at_s: float, event: Callable[[float], None]) -> None:
        heappush(self._events, (max(at_s, self.now_s), next(self._order), event))

    def _await(self, coming: Iterable[Arrival]) -> None:
        arrival = next(iter(coming), None)
        if arrival is not None:
            self._at(arrival.at_s, partial(self._arrive, arrival, coming))

    def _arrive(self, arrival: Arrival, coming: Iterable[Arrival], now_s: float) -> None:
        request = arrival.request
        self._first_rows[request.id] = arrival.first_row
        self.times[request.id] = RequestTimes(now_s)
        self._scheduler.add([request], now_s)
        self._assign_soon()
        self._await(coming)

    # The driver.

    def _assign_soon(self) -> None:
        if not self._assignment_due:
            self._assignment_due = True
            self._at(self.now_s + TOGETHER_S, self._assign)

    def _assign(self, now_s: float) -> None:
        self._assignment_due = False
        assigned = defaultdict(list)
        for rank, request in self._scheduler.assign():
            assigned[rank].append(request)
        for rank, requests in assigned.items():
            self._send(rank, Submit(tuple(requests)))

    def _send(self, worker: object, command: Command) -> None:
        """Send a command to a rank, which carries it out before its next step."""
        assert isinstance(worker, int)
        rank = self.ranks[worker]
        match command:
            case Submit(requests):
                for request in requests:
                    self._put(worker, partial(rank.add, request))
            case TakeOver(id, connection):
                self._transfers.take(connection.number, worker)
            case HandOver(id, connection):
                self._transfers.give(connection.number, id, worker, self.now_s)
            case Release(id):
                self._put(worker, partial(rank.release, id))
            case GoOn(id):
                self._put(worker, partial(rank.resume, id))
            case Forget(id):
                self._put(worker, partial(rank.forget, id))
            case _:
                raise AssertionError(f"{type(command).__name__} isn't simulated")

    def _report(self, source: int, event: HandedOver) -> None:
        before = self.hand_overs.counts.done
        self.hand_overs.take(source, event)
        if self.hand_overs.counts.done > before:
            self.hand_over_s.append(event.seconds)
            self._handed_tokens += event.tokens
        self._assign_soon()

    def _take(self, rank: int, outputs: list[Output]) -> None:
        """Take a rank's outputs, like ``RequestRouter.take``."""
        for output in outputs:
            if self._scheduler.count(rank, output) is None:
                continue
            times = self.times[output.id]
            if output.tokens:
                times.first_s = self.now_s if not times.tokens else times.first_s
                times.last_s = self.now_s
                times.tokens += len(output.tokens)
            times.done = output.finished
            if not output.finished:
                self.hand_overs.consider(output.id)
        if any(output.finished for output in outputs):
            self._assign_soon()

    # Ranks and groups.

    def _put(self, rank: int, command: Callable[[], None]) -> None:
        group, number = divmod(rank, self._cluster.group_size)
        self.groups[group].put(number, command)
        if not self._busy[group]:
            self._busy[group] = True
            self._at(self.now_s, partial(self._begin_step, group))

    def _begin_step(self, group: int, now_s: float) -> None:
        seconds = self.groups[group].begin(now_s)
        self._busy[group] = seconds is not None
        if seconds is not None:
            self._at(now_s + seconds, partial(self._end_step, group, seconds))

    def _end_step(self, group: int, seconds: float, now_s: float) -> None:
        one, first_rank = self.groups[group], group * self._cluster.group_size
        first, ended = one.end(now_s, seconds)
        self._transfers.observe_step(range(first_rank, first_rank + self._cluster.group_size), seconds)
        if self.windows is not None and (speeds := self.windows.step(group, seconds / self._cluster.depth)) is not None:
            self._serve(group, speeds)
        if self.role_of(first_rank) == "prefill":
            self._follow_prompts(group)
        due_R = one.news_R & (now_s >= self._sent_s_GR[group] + EVENTS_EVERY_S)
        for rank in {*first, *np.flatnonzero(due_R).tolist()}:
            self._deliver(group, rank, now_s)
        for rank in ended:
            if one.news_R[rank]:
                self._at(float(self._sent_s_GR[group, rank]) + EVENTS_EVERY_S, partial(self._deliver, group, rank))
        self._begin_step(group, now_s)

    def _deliver(self, group: int, rank: int, now_s: float) -> None:
        """Send a rank's outputs to the driver: as ``rank/event_pace.py`` decides, first tokens at once, others in batches."""
        if self.groups[group].news_R[rank]:
            self._sent_s_GR[group, rank] = now_s
            number = group * self._cluster.group_size + rank
            for progress in self._progress.pop(number, ()):
                self.hand_overs.consider_early(number, progress)
            self._take(number, self.groups[group].outputs(rank))

    def _follow_prompts(self, group: int) -> None:
        """Note how far prompts are: for the driver, and for hand-overs that have begun."""
        for rank in self.groups[group].stepped:
            number = group * self._cluster.group_size + rank
            self._transfers.follow(number)
            if prompts := self.ranks[number].prompts():
                self._progress.setdefault(number, []).extend(PromptProgress(*prompt) for prompt in prompts)
                self.groups[group].news_R[rank] = True
