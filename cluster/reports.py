"""What a cluster tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.driver.controller_client import ControllerStats
from cluster.driver.workers import LiveWorker
from cluster.messages.rank import LayerPlace, RankReport
from epslots.telemetry import Stats


@dataclass(frozen=True)
class RankStats:
    """One rank's counters since it was loaded.

    Attributes:
        where: node and process.
        steps: of the current epoch.
        requests: that it has now.
        memory_bytes, descriptors, threads: of its process.
    """

    rank: int
    where: str
    stats: Stats
    steps: int
    requests: int
    memory_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class ClusterStats:
    """All ranks' counters, and their sums.

    Attributes:
        epoch: number of the group; it grows with every loss and every join.
        queued: requests that wait for a rank with room.
        total: sums over ranks (``slots`` too; ``steps`` and ``passes`` are the largest).
        controller: None if there is to be none (``window_steps=0``).
        missing: what keeps wanted ranks from serving, and what is done about it, for people; empty if all serve.
    """

    epoch: int
    queued: int
    ranks: tuple[RankStats, ...]
    total: Stats
    controller: ControllerStats | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlacementReport:
    """Which rank holds which expert and which should, and where ranks are.

    Attributes:
        epoch: number of the group.
        ranks: node and process of each.
        placement_version: of the placement that the ranks follow; 0 = as dealt at the start.
        pending_migrations: copies and slots that all ranks together have yet to move to get there.
    """

    epoch: int
    ranks: tuple[str, ...]
    layers: tuple[LayerPlace, ...]
    placement_version: int
    pending_migrations: int


def rank_stats(worker: LiveWorker, report: RankReport, requests: int) -> RankStats:
    """One rank's counters, from its report."""
    return RankStats(
        rank=worker.rank,
        where=worker.handle.where,
        stats=report.stats,
        steps=report.steps,
        requests=requests,
        memory_bytes=report.memory_bytes,
        descriptors=report.descriptors,
        threads=report.threads,
    )
