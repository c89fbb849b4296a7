"""``ClusterControl``: reports and commands of a cluster's user, apart from requests. The base of ``Cluster``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from cluster.driver.controller_client import ControllerClient
from cluster.driver.loop_thread import CLOSED, LoopThread
from cluster.driver.supervisor import Supervisor
from cluster.driver.workers import Worker
from cluster.errors import ClusterError, raised_anew
from cluster.generation import Generation
from cluster.messages.controller import Explanation
from cluster.queue_room import QueueRoom
from cluster.reports import ClusterState, ClusterStats, GroupReport, PlacementReport, placement_report, rank_stats
from epslots.config import check_count
from epslots.errors import ConfigError
from epslots.generation.engine_stats import sum_engines
from epslots.telemetry import Stats, sum_over_ranks


class ClusterControl:
    """State, counters, placement and size of a cluster.

    Args:
        thread: the supervisor's.
        room: the queue's.
    """

    def __init__(self, thread: LoopThread, supervisor: Supervisor, room: QueueRoom) -> None:
        self._thread, self._supervisor, self._room = thread, supervisor, room
        self._closed = False

    def _check_open(self) -> None:
        self._thread.check_process()
        if self._closed:
            raise ClusterError(CLOSED)
        if self._supervisor.failure is not None:
            raise raised_anew(self._supervisor.failure)

    @property
    def ranks(self) -> int:
        """Ranks that serve now."""
        self._thread.check_process()
        return self._supervisor.groups.serving

    def state(self) -> ClusterState:
        """The driver's knowledge, without asking a rank: ranks, requests and room now. Never waits."""
        self._thread.check_process()
        supervisor, room = self._supervisor, self._room
        queued, unfinished = supervisor.router.queued, supervisor.router.unfinished
        return ClusterState(
            ranks=supervisor.groups.serving,
            epoch=supervisor.groups.epoch,
            queued=queued,
            running=max(0, unfinished - queued),
            free=room.free,
            places=room.places,
            failure=CLOSED if self._closed else None if supervisor.failure is None else str(supervisor.failure),
            groups=tuple(
                GroupReport(number, group.role, group.epoch, group.formed, group.serving, group.router.handing_over)
                for number, group in enumerate(supervisor.groups)
            ),
            hand_overs=supervisor.router.hand_overs.counts,
        )

    def group_of(self, generation: Generation) -> int | None:
        """The number of the group that serves a request now; None if none does, because it waits or is done."""
        self._check_open()

        async def ask() -> int | None:
            worker = self._supervisor.router.worker_of(generation.id)
            return worker.group if isinstance(worker, Worker) else None

        return self._thread.call(ask())

    def stats(self, layers: Sequence[int] = ()) -> ClusterStats:
        """Counters of all ranks since each was loaded, at the end of the current step.

        Args:
            layers: numbers of MoE layers, from 0, whose slots ``placement`` is to tell; those that the model hasn't count for
                nothing.
        """
        self._check_open()

        async def ask() -> ClusterStats:
            supervisor, reports = self._supervisor, await self._supervisor.reports(tuple(layers))
            router = supervisor.router
            return ClusterStats(
                epoch=supervisor.groups.epoch,
                queued=router.queued,
                ranks=tuple(
                    rank_stats(
                        worker,
                        report,
                        router.count_served(worker),
                        before=supervisor.groups.ranks_before(worker.group),
                        role=supervisor.groups.role_of(worker.group),
                    )
                    for worker, report in reports
                ),
                total=Stats(()),
                engine=sum_engines(()),
                controllers=tuple(client.stats() for client in supervisor.controllers),
                missing=supervisor.pool.missing(),
                longest_wait_s=router.longest_wait_s,
                placement=placement_report(supervisor.groups.epoch, reports),
                hand_overs=router.hand_overs.counts,
            )

        found = self._thread.call(ask())
        # Sums over many ranks and layers take a while, in which the supervisor's thread has tokens to pass on.
        total, engine = [rank.stats for rank in found.ranks], [rank.engine for rank in found.ranks]
        return replace(found, total=sum_over_ranks(total), engine=sum_engines(engine))

    def placement(self, group: int = 0) -> PlacementReport:
        """Ranks of a group that hold each expert, and those that should, at the end of the current step.

        Raises:
            ConfigError: there is no such group.
        """
        self._check_open()

        async def ask() -> PlacementReport:
            self._check_group(group)
            asked = self._supervisor.groups[group]
            reports = await self._supervisor.reports(group=group)
            if asked not in self._supervisor.groups:
                self._check_group(group)
            return placement_report(asked.epoch, reports)

        return self._thread.call(ask())

    def explain(self, group: int = 0) -> Explanation:
        """The controller's reasons for a group's placement, in numbers; ``str`` of it is text for people.

        Raises:
            ConfigError: there is no such group, or the cluster has no controller (``window_steps=0``).
            ClusterError: no controller answers.
        """
        return self._ask_controller(group, ControllerClient.explain)

    def rebalance(self, group: int = 0) -> Explanation:
        """Plan a group's placement now, and follow it if it gains anything, frozen or not. Requests go on meanwhile.

        Returns:
            The controller's reasons; ``latest`` is this decision. Ranks know the placement then, and migrate step by step.

        Raises:
            ConfigError: there is no such group, or the cluster has no controller (``window_steps=0``).
            ClusterError: no controller answers.
        """
        return self._ask_controller(group, ControllerClient.rebalance)

    def freeze(self) -> None:
        """Keep all groups' placements under any traffic until ``unfreeze``. Pending migrations towards them go on.

        Raises:
            ConfigError: the cluster has no controller (``window_steps=0``).
        """
        self._freeze(True)

    def unfreeze(self) -> None:
        """Let the placements follow the traffic again.

        Raises:
            ConfigError: the cluster has no controller (``window_steps=0``).
        """
        self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        self._check_open()

        async def freeze_all() -> None:
            self._controller_of(0)
            await asyncio.gather(*(client.freeze(frozen) for client in self._supervisor.controllers))

        self._thread.call(freeze_all())

    def _ask_controller(
        self, group: int, question: Callable[[ControllerClient], Coroutine[Any, Any, Explanation]]
    ) -> Explanation:
        self._check_open()

        async def ask() -> Explanation:
            return await question(self._controller_of(group))

        return self._thread.call(ask())

    # For the supervisor's thread: groups come and go there, and not between two lines.

    def _check_group(self, group: int) -> None:
        if type(group) is not int or not 0 <= group < (count := len(self._supervisor.groups)):
            raise ConfigError(f"group={group!r}; allowed: 0 to {count - 1}")

    def _controller_of(self, group: int) -> ControllerClient:
        self._check_group(group)
        if not self._supervisor.controllers:
            raise ConfigError("window_steps=0, so there is no controller; allowed for this: at least 1")
        return self._supervisor.controllers[group]

    def scale(self, ranks: int | None = None, *, groups: int | None = None) -> None:
        """Change the number of ranks, of groups, or of a group's ranks, while requests go on. Returns when that many serve.

        Groups of several are of one size. With ``ranks`` alone or ``groups`` alone whole groups come and go; with both, groups
        change their size, too: each forms anew with its new ranks, whenever these are there. Those that came last go first. Of
        one group that was started alone, ``ranks`` is the number of its ranks, and others that come have as many each.

        Args:
            ranks: that there are to be, in all groups.
            groups: that there are to be.

        Raises:
            ConfigError: a number is less than 1; the ranks make no whole groups; groups would have fewer ranks than they were
                started with; or their size would change, or one that was started alone wouldn't be alone, in a cluster whose
                ranks outlive this process.
            ClusterError: the new ranks find no devices, or don't come up; the others go on.
        """
        self._check_open()
        for name, count in (("ranks", ranks), ("groups", groups)):
            if count is not None:
                check_count(name, count)
        self._thread.call(self._supervisor.scale(ranks, groups))
