"""A soak: requests, kills, stops, joins and leaves at random; nothing may be lost, different, or left behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.api import Cluster
from cluster.bench.common import open_cluster, pids, prompts
from cluster.errors import ClusterError
from cluster.generation import Result
from epslots.bench.report import BenchReport

_MOST_RANKS = 3
_TEXTS = 24
_IN_FLIGHT = 16
_CHAOS_EVERY_S = (2.0, 12.0)
_LOOK_EVERY_S = 5.0
_LAST_S = 120.0  # for requests that are under way at the end
_MOST_GROWTH = 1.1
# What may come and go by chance, beside a tenth: by level.
_SLACK = {"MiB": 30.0, "descriptors": 10.0, "threads": 10.0}
_MEMORY = Path("/dev/shm")


@dataclass
class _Tally:
    """What happened."""

    events: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    different: int = 0
    levels: list[dict[str, float]] = field(default_factory=list)


def bench_soak(report: BenchReport, cache_dir: Path, *, minutes: float = 10.0, seed: int = 0) -> None:
    """Everything at once for ``minutes``. Every text is compared with that of an undisturbed run."""
    chance = random.Random(seed)
    memory_before = _shared_memory()
    children_before = set(psutil.Process().children(recursive=True))
    tally = _Tally()
    cluster = open_cluster(cache_dir, ranks=_MOST_RANKS, silence_s=3.0)
    seen: set[psutil.Process] = set()
    try:
        asked = [_ask(n) for n in range(_TEXTS)]
        undisturbed = {result.index: result.tokens for result in cluster.generate(asked)}
        ends = time.monotonic() + 60 * minutes
        over = threading.Event()
        users = [
            threading.Thread(target=_use, args=(cluster, asked, undisturbed, random.Random(n), tally, over), daemon=True)
            for n in range(_IN_FLIGHT)
        ]
        for user in users:
            user.start()
        next_chaos = next_look = time.monotonic()
        while time.monotonic() < ends:
            over.wait(max(0.0, min(next_chaos, next_look, ends) - time.monotonic()))
            if time.monotonic() >= next_look:
                next_look += _LOOK_EVERY_S
                seen |= set(psutil.Process().children(recursive=True)) - children_before
                tally.levels.append(_levels(cluster))
            if time.monotonic() >= next_chaos:
                next_chaos = time.monotonic() + chance.uniform(*_CHAOS_EVERY_S)
                _disturb(cluster, chance, tally)
        over.set()
        for user in users:
            user.join(_LAST_S)
        hanging = sum(user.is_alive() for user in users)
    finally:
        cluster.close()
    _, alive = psutil.wait_procs(seen, timeout=10)
    levels = _compare(tally.levels)
    grown = [row["level"] for row in levels if row["last"] > row["first"] * _MOST_GROWTH + row["slack"]]
    left = {
        "processes": len(alive),
        "shared memory": len(_shared_memory() - memory_before),
        "threads of the driver": sum(thread.name.startswith("epslots") for thread in threading.enumerate()),
    }
    report.table(f"{minutes:g} minutes, up to {_MOST_RANKS} ranks, {_IN_FLIGHT} users", [dict(sorted(tally.events.items()))])
    lost = sum(count for reason, count in tally.requests.items() if reason not in ("length", "stop", "cancelled"))
    report.table("requests", [{**tally.requests, "lost": lost, "different": tally.different}])
    report.table("levels: medians of the first and of the last quarter, and what more is allowed beside a tenth", levels)
    report.table("left behind", [left])
    if lost or hanging or tally.different or grown or any(left.values()):
        raise AssertionError(
            f"the soak failed: {lost} requests lost, {hanging} hang, {tally.different} different; levels that grew: {grown}; "
            f"left behind: {left}"
        )


def _ask(number: int) -> dict[str, Any]:
    """Every second one samples; lengths differ."""
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
    tally: _Tally,
    over: threading.Event,
) -> None:
    """A user: one request after the other, some given up halfway."""
    while not over.is_set():
        number = chance.randrange(_TEXTS)
        try:
            generation = cluster.submit(asked[number])
            if chance.random() < 0.1:
                next(iter(generation), None)  # which cancels it: its only reader leaves
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


def _disturb(cluster: Cluster, chance: random.Random, tally: _Tally) -> None:
    """Something happens."""
    what = chance.choice(["kill", "kill", "stop", "scale"])
    try:
        if what == "scale":
            cluster.scale(chance.randint(1, _MOST_RANKS))
        elif found := pids(cluster):
            os.kill(chance.choice(found), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    except (ProcessLookupError, ClusterError) as error:
        what = f"{what} failed"
        print(f"{what}: {error}", flush=True)
    tally.events[what] += 1


def _levels(cluster: Cluster) -> dict[str, float]:
    """Of the driver, and of its ranks: of each the most. Shared memory includes the host store, if it is there."""
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
    """Segments: folders there are temporary ones of other programs."""
    return {path for path in _MEMORY.iterdir() if path.is_file()} if _MEMORY.is_dir() else set()
