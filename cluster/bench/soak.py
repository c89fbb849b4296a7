"""A soak: requests, kills, stops, joins and leaves at random. No request may be lost or different, nothing may leak."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.api import Cluster
from cluster.bench.common import open_cluster, pids, prompts
from cluster.errors import ClusterError
from cluster.generation import Result
from epslots.bench.report import BenchReport

RANKS_MAX = 3
_TEXTS = 24
_USERS = 16
_DISTURB_EVERY_S = (2.0, 12.0)
_LOOK_EVERY_S = 5.0
_DRAIN_S = 120.0  # for requests in progress at the end
_GROWTH_MAX = 1.1
# Chance variation that is allowed beside that tenth, by level.
_SLACK = {"MiB": 30.0, "descriptors": 10.0, "threads": 10.0}
# Reasons that requests end for by themselves, or by their user's will; those that are told to come again weren't taken.
_ENDS = {"length", "stop", "cancelled", "whole", "left", "busy"}
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class SoakTally:
    """Events and requests so far.

    Attributes:
        events: disturbances by name.
        requests: ended requests by reason.
        different: requests whose tokens differ from the undisturbed run's.
        hanging: users whose last request didn't end.
        levels: memory, descriptors and threads at each look.
    """

    events: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    different: int = 0
    hanging: int = 0
    levels: list[dict[str, float]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return sum(count for reason, count in self.requests.items() if reason not in _ENDS)


class SoakLeft:
    """Things that a soak leaves behind. Made before anything is started."""

    def __init__(self) -> None:
        self._memory = _shared_memory()
        self._children = set(psutil.Process().children(recursive=True))
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        """Note the processes that live now."""
        self._seen |= set(psutil.Process().children(recursive=True)) - self._children

    def found(self) -> dict[str, int]:
        """The things that are left at the end, by name."""
        _, alive = psutil.wait_procs(self._seen, timeout=10)
        return {
            "processes": len(alive),
            "shared memory": len(_shared_memory() - self._memory),
            "threads of the driver": sum(thread.name.startswith("epslots") for thread in threading.enumerate()),
        }


def bench_soak(report: BenchReport, cache_dir: Path, *, minutes: float = 10.0, seed: int = 0) -> None:
    """Users and disturbances at once for ``minutes``; every text is compared with that of an undisturbed run.

    Raises:
        AssertionError: a request was lost, hangs, or has other tokens; a level grew; or something was left behind.
    """
    left, tally = SoakLeft(), SoakTally()
    cluster = open_cluster(cache_dir, ranks=RANKS_MAX, silence_s=3.0)
    try:
        asked = [_ask(n) for n in range(_TEXTS)]
        undisturbed = {result.index: result.tokens for result in cluster.generate(asked)}
        over = threading.Event()
        users = [
            threading.Thread(target=_use, args=(cluster, asked, undisturbed, random.Random(n), tally, over), daemon=True)
            for n in range(_USERS)
        ]
        for user in users:
            user.start()
        for _ in disturbed_looks(cluster, 60 * minutes, random.Random(seed), tally):
            left.look()
        over.set()
        for user in users:
            user.join(_DRAIN_S)
        tally.hanging = sum(user.is_alive() for user in users)
    finally:
        cluster.close()
    judge_soak(report, f"{minutes:g} minutes, up to {RANKS_MAX} ranks, {_USERS} users", tally, left.found())


def judge_soak(report: BenchReport, title: str, tally: SoakTally, left: dict[str, int]) -> None:
    """Report a soak.

    Raises:
        AssertionError: a request was lost, hangs, or has other tokens; a level grew; or something was left behind.
    """
    levels = _compare(tally.levels)
    grown = [row["level"] for row in levels if row["last"] > row["first"] * _GROWTH_MAX + row["slack"]]
    report.table(title, [dict(sorted(tally.events.items()))])
    report.table("requests", [{**tally.requests, "lost": tally.lost, "different": tally.different}])
    report.table("levels: medians of the first and of the last quarter, and what more is allowed beside a tenth", levels)
    report.table("left behind", [left])
    if tally.lost or tally.hanging or tally.different or grown or any(left.values()):
        raise AssertionError(
            f"the soak failed: {tally.lost} requests lost, {tally.hanging} hang, {tally.different} different; "
            f"levels that grew: {grown}; left behind: {left}"
        )


def disturbed_looks(cluster: Cluster, seconds: float, chance: random.Random, tally: SoakTally) -> Iterator[None]:
    """Disturb the cluster at random for so long; note the levels regularly, and yield after each look."""
    next_disturbance = next_look = time.monotonic()
    ends = next_look + seconds
    while time.monotonic() < ends:
        time.sleep(max(0.0, min(next_disturbance, next_look, ends) - time.monotonic()))
        if time.monotonic() >= next_look:
            next_look += _LOOK_EVERY_S
            tally.levels.append(_levels(cluster))
            yield
        if time.monotonic() >= next_disturbance:
            next_disturbance = time.monotonic() + chance.uniform(*_DISTURB_EVERY_S)
            _disturb(cluster, chance, tally)


def _ask(number: int) -> dict[str, Any]:
    """A request; every second one samples, and lengths differ."""
    return {
        "prompt": prompts(_TEXTS)[number],
        "max_new_tokens": 20 + 17 * number % 150,
        "temperature": 0.8 * (number % 2),
        "seed": number,
        "stop_tokens": (),
    }


def _use(
    cluster: Cluster,
    asked: list[dict[str, Any]],
    undisturbed: dict[int, tuple[int, ...]],
    chance: random.Random,
    tally: SoakTally,
    over: threading.Event,
) -> None:
    """A user: one request after the other, some cancelled halfway."""
    while not over.is_set():
        number = chance.randrange(_TEXTS)
        try:
            generation = cluster.submit(asked[number])
            if chance.random() < 0.1:
                next(iter(generation), None)  # the only reader leaves, which cancels it
            result: Result = generation.result()
        except ClusterError as error:
            tally.requests["error"] += 1
            print(f"lost: {error}", flush=True)
            return
        tally.requests[result.reason] += 1
        right = undisturbed[number]
        if result.tokens != (right[: len(result.tokens)] if result.reason == "cancelled" else right):
            tally.different += 1
            print(f"different: prompt {number}, after {result.reason}", flush=True)


def _disturb(cluster: Cluster, chance: random.Random, tally: SoakTally) -> None:
    """Kill or stop a rank, or change their number."""
    event = chance.choice(["kill", "kill", "stop", "scale"])
    try:
        if event == "scale":
            cluster.scale(chance.randint(1, RANKS_MAX))
        elif found := pids(cluster):
            os.kill(chance.choice(found), signal.SIGKILL if event == "kill" else signal.SIGSTOP)
    except (ProcessLookupError, ClusterError) as error:
        event = f"{event} failed"
        print(f"{event}: {error}", flush=True)
    tally.events[event] += 1


def _levels(cluster: Cluster) -> dict[str, float]:
    """Levels of the driver, and the largest of its ranks. Shared memory includes a host store in memory."""
    driver, ranks = psutil.Process(), cluster.stats().ranks
    return {
        "driver MiB": driver.memory_info().rss / 2**20,
        "driver descriptors": driver.num_fds(),
        "driver threads": driver.num_threads(),
        "rank MiB": max((rank.memory_bytes / 2**20 for rank in ranks), default=0.0),
        "rank descriptors": max((rank.descriptors for rank in ranks), default=0),
        "rank threads": max((rank.threads for rank in ranks), default=0),
        "shared memory MiB": sum(path.stat().st_size for path in _shared_memory() if path.is_file()) / 2**20,
    }


def _compare(levels: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Medians of each level over the first and the last quarter of the looks."""
    quarter = max(1, len(levels) // 4)

    def middle(rows: list[dict[str, float]], name: str) -> float:
        return sorted(row[name] for row in rows)[len(rows) // 2]

    return [
        {
            "level": name,
            "first": middle(levels[:quarter], name),
            "last": middle(levels[-quarter:], name),
            "slack": _SLACK[name.split()[-1]],
        }
        for name in levels[0]
    ]


def _shared_memory() -> set[Path]:
    """Shared memory segments. Folders there are temporary folders of other programs."""
    return {path for path in _SHARED_MEMORY.iterdir() if path.is_file()} if _SHARED_MEMORY.is_dir() else set()
