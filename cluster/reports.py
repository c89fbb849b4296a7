"""Reports for users: ``ClusterStats`` with a ``RankStats`` for each rank, ``ClusterState`` and ``PlacementReport``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.driver.controller_client import ControllerStats
from cluster.driver.hand_overs import NO_HAND_OVERS, HandOverCounts
from cluster.driver.workers import Worker
from cluster.messages.rank import LayerPlacement, RankReport
from epslots.generation.engine_stats import EngineStats, sum_engines
from epslots.rank_groups import Role
from epslots.telemetry import Stats


@dataclass(frozen=True)
class RankStats:
    """One rank's counters since it loaded the model.

    Attributes:
        group: number of its group.
        rank: its number in its group's current epoch, after those of the groups before it.
        where: node and process.
        stats: counters of its layers.
        engine: counters of its requests.
        steps: made in the current epoch.
        requests: number of requests that it serves now.
        memory_bytes, descriptors, threads: resident memory, open file descriptors and threads of its process.
        role: what its group serves.
        placement: version of the placement that it follows; 0 = the default one, -1 = it has no group yet.
        pending_migrations: copies and slots that have yet to be moved for it, over all ranks of the group.
    """

    group: int
    rank: int
    where: str
    stats: Stats
    engine: EngineStats
    steps: int
    requests: int
    memory_bytes: int
    descriptors: int
    threads: int
    role: Role = "mixed"
    placement: int = -1
    pending_migrations: int = 0


@dataclass(frozen=True)
class GroupStats:
    """The counters of a group's ranks.

    Attributes:
        number: the group's, from 0.
        role: what it serves.
        ranks: each rank's counters.
    """

    number: int
    role: Role
    ranks: tuple[RankStats, ...]

    @property
    def engine(self) -> EngineStats:
        """Sums of the ranks' ``engine``; ``steps`` is the largest."""
        return sum_engines([rank.engine for rank in self.ranks])

    @property
    def requests(self) -> int:
        """Requests that the ranks serve now."""
        return sum(rank.requests for rank in self.ranks)

    @property
    def hits(self) -> int:
        return sum(rank.stats.hits for rank in self.ranks)

    @property
    def misses(self) -> int:
        return sum(rank.stats.misses for rank in self.ranks)

    @property
    def placement(self) -> int:
        """Version of the placement that all its ranks follow; -1 if one has no group yet."""
        return min(rank.placement for rank in self.ranks)

    @property
    def pending_migrations(self) -> int:
        """Copies and slots that have yet to be moved for it."""
        return max(rank.pending_migrations for rank in self.ranks)


@dataclass(frozen=True)
class ClusterStats:
    """All ranks' counters, and their sums.

    Attributes:
        epoch: number of the newest process group; it grows with every rank that is lost or joins.
        queued: number of requests that wait for a rank with room.
        ranks: each rank's counters.
        total: sums over ranks (``slots`` too; ``steps`` and ``passes`` are the largest).
        engine: sums of the ranks' ``engine``; ``steps`` is the largest.
        controllers: of each group; empty without a controller (``window_steps=0``).
        missing: a line for each rank that doesn't serve, with the reason and the next step; empty if all serve.
        longest_wait_s: the longest time that a request is without its first token: it grows where lower priorities starve.
        placement: of the layers that were asked for.
        hand_overs: of requests from the ranks that computed their prompts to those that decode, since the start.
    """

    epoch: int
    queued: int
    ranks: tuple[RankStats, ...]
    total: Stats
    engine: EngineStats
    controllers: tuple[ControllerStats, ...]
    missing: tuple[str, ...] = ()
    longest_wait_s: float = 0.0
    placement: PlacementReport | None = None
    hand_overs: HandOverCounts = NO_HAND_OVERS

    @property
    def groups(self) -> int:
        """Number of groups, as far as their ranks answered."""
        return 1 + max((rank.group for rank in self.ranks), default=0)

    def by_group(self) -> tuple[GroupStats, ...]:
        """The ranks' counters, group by group, as far as they answered."""
        ranks: dict[int, list[RankStats]] = {}
        for rank in self.ranks:
            ranks.setdefault(rank.group, []).append(rank)
        return tuple(GroupStats(number, of[0].role, tuple(of)) for number, of in sorted(ranks.items()))

    @property
    def controller(self) -> ControllerStats | None:
        """The first group's controller; None without one."""
        return self.controllers[0] if self.controllers else None


@dataclass(frozen=True)
class GroupReport:
    """A group, as the driver knows it.

    Attributes:
        number: the group's, from 0.
        role: what it serves.
        epoch: number of its process group; -1 before the first.
        formed: it serves now; else its ranks load, or form it.
        ranks: number of its ranks that serve.
        handing_over: hand-overs under way from or to its ranks.
    """

    number: int
    role: Role
    epoch: int
    formed: bool
    ranks: int
    handing_over: int


@dataclass(frozen=True)
class ClusterState:
    """The driver's knowledge, without asking a rank.

    Attributes:
        ranks: number of ranks that serve now.
        epoch: number of the newest process group.
        queued: number of requests that wait for a rank with room.
        running: number of requests that a rank has.
        free: requests that the queue has room for.
        places: requests that it has room for when it is empty.
        failure: why the cluster can't go on; None if it can.
        groups: each group, by its number.
        hand_overs: that have ended, since the start.
    """

    ranks: int
    epoch: int
    queued: int
    running: int
    free: int
    places: int
    failure: str | None
    groups: tuple[GroupReport, ...] = ()
    hand_overs: HandOverCounts = NO_HAND_OVERS


@dataclass(frozen=True)
class PlacementReport:
    """Which ranks hold which expert, and which ranks the placement names for it.

    Attributes:
        epoch: number of the group.
        ranks: node and process of each rank.
        layers: holders and placement of the experts of each MoE layer, or of those that were asked for.
        placement_version: version of the placement that the ranks follow; 0 = the default one.
        pending_migrations: copies and slots that have yet to be moved for it, over all ranks.
    """

    epoch: int
    ranks: tuple[str, ...]
    layers: tuple[LayerPlacement, ...]
    placement_version: int
    pending_migrations: int


def placement_report(epoch: int, reports: Sequence[tuple[Worker, RankReport]]) -> PlacementReport:
    """The placement, from the newest of the ranks' reports that tell slots."""
    newest = max((report for _, report in reports), key=lambda report: (bool(report.layers), report.epoch), default=None)
    return PlacementReport(
        epoch=epoch,
        ranks=tuple(worker.handle.where for worker, _ in reports),
        layers=() if newest is None else newest.layers,
        placement_version=-1 if newest is None else newest.placement,
        pending_migrations=0 if newest is None else newest.pending_migrations,
    )


def rank_stats(worker: Worker, report: RankReport, requests: int, before: int, role: Role) -> RankStats:
    """One rank's counters, from its report; ``before``: ranks of the groups before its own; ``role``: of its own."""
    return RankStats(
        group=worker.group,
        rank=before + worker.rank,
        where=worker.handle.where,
        stats=report.stats,
        engine=report.engine,
        steps=report.steps,
        requests=requests,
        memory_bytes=report.memory_bytes,
        descriptors=report.descriptors,
        threads=report.threads,
        role=role,
        placement=report.placement,
        pending_migrations=report.pending_migrations,
    )
