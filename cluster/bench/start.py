"""The start of a cluster by stage, and the processor time of an idle one."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from cluster.bench.common import RANKS, open_cluster, pids, prompts
from epslots.bench.report import BenchReport, spread

_IDLE_S = 10.0


def bench_start(report: BenchReport, cache_dir: Path, *, rounds: int = 5) -> None:
    """``rounds`` starts of a cluster, each with one token and a close.

    A first start builds the host store and isn't counted.
    """
    stages: dict[str, list[float]] = {}
    idle: list[dict[str, float | str]] = []
    for number in range(rounds + 1):
        began = time.monotonic()
        cluster = open_cluster(cache_dir)
        serving = time.monotonic()
        _ = list(cluster.generate(prompts(1), max_new_tokens=1))
        first = time.monotonic()
        if number == rounds:
            idle = _idle(pids(cluster))
        closing = time.monotonic()
        cluster.close()
        if not number:
            continue
        ends = [*cluster.timeline.items(), ("serving", serving - began), ("first token", first - began)]
        last = 0.0
        for stage, end in ends:
            stages.setdefault(stage, []).append(end - last)
            last = end
        stages.setdefault("all of it", []).append(last)
        stages.setdefault("(close)", []).append(time.monotonic() - closing)
    title = f"{rounds} starts of {RANKS} ranks from an existing host store, seconds from the stage before"
    report.table(title, [{"stage": stage, **spread(times)} for stage, times in stages.items()])
    report.table(f"processor time of an idle cluster over {_IDLE_S:g} s", idle)


def _idle(ranks: list[int]) -> list[dict[str, float | str]]:
    """Processor seconds of each process while no request runs."""
    processes = {f"rank {n}": psutil.Process(pid) for n, pid in enumerate(ranks)} | {"driver": psutil.Process()}
    others = {child for child in psutil.Process().children(recursive=True) if child.pid not in ranks}

    def seconds(process: psutil.Process) -> float:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    before = {name: seconds(process) for name, process in processes.items()}
    others_before = {process: seconds(process) for process in others}
    time.sleep(_IDLE_S)  # no request runs while the time is measured
    rows: list[dict[str, float | str]] = [
        {"process": name, "seconds": seconds(process) - before[name]} for name, process in processes.items()
    ]
    rows.append({"process": "Ray's own", "seconds": sum(seconds(p) - s for p, s in others_before.items())})
    return rows
