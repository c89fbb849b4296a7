"""Recovery: seconds from the SIGKILL of a busy rank to the next token; requests lost, and tokens that differ."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.bench.common import RANKS, compare, open_cluster, pids, prompts
from cluster.generation import Generation, Result
from epslots.bench.report import BenchReport, spread

_REQUESTS = 16
_NEW_TOKENS = 200
_SETTINGS: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "stop_tokens": ()}
_PIECES_BEFORE = 20  # of text of every request, when the rank is killed


_STAGES = (
    "the next token of any request",
    "the next token of the last request to go on",
    "the replacement has joined, and all requests are done",
    "(longest time without a token while the replacement loads and joins)",
)


def bench_recovery(report: BenchReport, cache_dir: Path, *, rounds: int = 10) -> None:
    """``rounds`` kills, of the ranks in turn; before each, the rank that was killed last has been replaced."""
    seconds: dict[str, list[float]] = {stage: [] for stage in _STAGES}
    lost, differing = 0, 0
    with open_cluster(cache_dir) as cluster, _served_again() as served_s:
        results = sorted(cluster.generate(prompts(_REQUESTS), **_SETTINGS), key=lambda result: result.index)
        undisturbed = [result.tokens for result in results]
        for number in range(rounds):
            times, found = _kill_one(cluster, number % RANKS, served_s)
            for stage, taken in zip(_STAGES, times, strict=True):
                seconds[stage].append(taken)
            now = compare(found, undisturbed)
            lost, differing = lost + now[0], differing + now[1]
            print(f"kill {number + 1} of {rounds}: {times[0]:.2f} s", flush=True)
    title = f"{rounds} kills of one of {RANKS} ranks in the middle of {_REQUESTS} requests of {_NEW_TOKENS} tokens, seconds"
    rows = [{"from SIGKILL to": stage, **spread(times), "most": max(times)} for stage, times in seconds.items()]
    report.table(title, rows)
    report.table("requests", [{"requests": rounds * _REQUESTS, "lost": lost, "tokens different": differing}])


def _kill_one(cluster: Cluster, rank: int, served_s: list[float]) -> tuple[tuple[float, ...], list[Result]]:
    """Kill a rank amid requests. Returns seconds by ``_STAGES``, and the requests' results."""
    victim = pids(cluster)[rank]
    generations = [cluster.submit(prompt, **_SETTINGS) for prompt in prompts(_REQUESTS)]
    clocks = [_Clock(generation) for generation in generations]
    for clock in clocks:
        clock.wait_for(_PIECES_BEFORE)
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    for clock in clocks:
        clock.thread.join()
    cluster.scale(RANKS)
    joined_s = time.monotonic()
    # Tokens on their way at the kill don't count: only those that came after the group stood again.
    again_s = next(t for t in served_s if t > killed_s)
    firsts_s = [min(t for t in clock.times_s if t > again_s) for clock in clocks]
    all_s = sorted(t for clock in clocks for t in clock.times_s if t > again_s)
    pause_s = max(later - earlier for earlier, later in pairwise(all_s))
    found = [dataclasses.replace(g.result(), index=index) for index, g in enumerate(generations)]
    return (min(firsts_s) - killed_s, max(firsts_s) - killed_s, joined_s - killed_s, pause_s), found


class _Clock:
    """Arrival times of the pieces of a request's text."""

    def __init__(self, generation: Generation) -> None:
        self.times_s: list[float] = []
        self._arrived = threading.Condition()
        self.thread = threading.Thread(target=self._watch, args=(generation,), daemon=True)
        self.thread.start()

    def _watch(self, generation: Generation) -> None:
        for _ in generation:
            with self._arrived:
                self.times_s.append(time.monotonic())
                self._arrived.notify_all()

    def wait_for(self, pieces: int) -> None:
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.times_s) >= pieces, 60):
                raise TimeoutError(f"{pieces} pieces of text did not come within 60 s")


@contextmanager
def _served_again() -> Iterator[list[float]]:
    """Times at which a group serves, from the log of the supervisor."""
    times_s: list[float] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.INFO and "serve" in record.getMessage():
                times_s.append(time.monotonic())

    handler, log = Handler(), logging.getLogger("epslots.cluster")
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield times_s
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
