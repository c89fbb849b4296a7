"""``ClusterControl``: what a cluster's user sees of it and does to it, apart from requests. The base of ``Cluster``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.driver.controller_client import ControllerClient
from cluster.driver.loop_thread import CLOSED, LoopThread
from cluster.driver.supervisor import Supervisor
from cluster.errors import ClusterError, raised_anew
from cluster.messages.controller import Explanation
from cluster.queue_room import QueueRoom
from cluster.reports import ClusterState, ClusterStats, PlacementReport, placement_report, rank_stats
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
        return self._supervisor.group.serving

    def state(self) -> ClusterState:
        """The driver's knowledge, without asking a rank: ranks, requests and room now. Never waits."""
        self._thread.check_process()
        supervisor, room = self._supervisor, self._room
        queued, unfinished = supervisor.router.queued, supervisor.router.unfinished
        return ClusterState(
            ranks=supervisor.group.serving,
            epoch=supervisor.group.epoch,
            queued=queued,
            running=max(0, unfinished - queued),
            free=room.free,
            places=room.places,
            failure=CLOSED if self._closed else None if supervisor.failure is None else str(supervisor.failure),
        )

    def stats(self, layers: Sequence[int] = ()) -> ClusterStats:
        """Counters of all ranks since each was loaded, at the end of the current step.

        Args:
            layers: numbers of MoE layers, from 0, whose slots ``placement`` is to tell; those that the model hasn't count for
                nothing.
        """
        self._check_open()

        async def ask() -> ClusterStats:
            supervisor, reports = self._supervisor, await self._supervisor.reports(tuple(layers))
            router, client = supervisor.router, supervisor.controller_client
            return ClusterStats(
                epoch=supervisor.group.epoch,
                queued=router.queued,
                ranks=tuple(rank_stats(worker, report, router.count_served(worker)) for worker, report in reports),
                total=Stats(()),
                engine=sum_engines(()),
                controller=None if client is None else client.stats(),
                missing=supervisor.pool.missing(),
                longest_wait_s=router.longest_wait_s,
                placement=placement_report(supervisor.group.epoch, reports),
            )

        found = self._thread.call(ask())
        # Sums over many ranks and layers take a while, in which the supervisor's thread has tokens to pass on.
        total, engine = [rank.stats for rank in found.ranks], [rank.engine for rank in found.ranks]
        return replace(found, total=sum_over_ranks(total), engine=sum_engines(engine))

    def placement(self) -> PlacementReport:
        """Ranks that hold each expert, and those that should, at the end of the current step."""
        self._check_open()
        return placement_report(self._supervisor.group.epoch, self._thread.call(self._supervisor.reports()))

    def explain(self) -> Explanation:
        """The controller's reasons for the placement, in numbers; ``str`` of it is text for people.

        Raises:
            ConfigError: the cluster has no controller (``window_steps=0``).
            ClusterError: no controller answers.
        """
        return self._thread.call(self._need_controller().explain())

    def rebalance(self) -> Explanation:
        """Plan a placement now, and adopt it if it gains anything, frozen or not. Requests go on meanwhile.

        Returns:
            The controller's reasons; ``latest`` is this decision. Ranks know the placement then, and migrate step by step.

        Raises:
            ConfigError: the cluster has no controller (``window_steps=0``).
            ClusterError: no controller answers.
        """
        return self._thread.call(self._need_controller().rebalance())

    def freeze(self) -> None:
        """Keep the placement under any traffic until ``unfreeze``. Pending migrations towards it go on.

        Raises:
            ConfigError: the cluster has no controller (``window_steps=0``).
        """
        self._thread.call(self._need_controller().freeze(True))

    def unfreeze(self) -> None:
        """Let the placement follow the traffic again.

        Raises:
            ConfigError: the cluster has no controller (``window_steps=0``).
        """
        self._thread.call(self._need_controller().freeze(False))

    def _need_controller(self) -> ControllerClient:
        self._check_open()
        if self._supervisor.controller_client is None:
            raise ConfigError("window_steps=0, so there is no controller; allowed for this: at least 1")
        return self._supervisor.controller_client

    def scale(self, ranks: int) -> None:
        """Change the number of ranks while requests go on; returns when that many serve.

        Raises:
            ConfigError: ``ranks`` is less than 1.
            ClusterError: the new ranks find no devices, or don't come up; the others go on.
        """
        check_count("ranks", ranks)
        self._check_open()
        self._thread.call(self._supervisor.scale(ranks))
