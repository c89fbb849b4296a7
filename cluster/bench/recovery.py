"""Recovery: from the SIGKILL of a rank in the middle of its work to the next token, and what became of the requests."""

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

from cluster.bench.common import RANKS, compare, open_cluster, pids, prompts
from cluster.generation import Generation
from epslots.bench.report import BenchReport, spread

_REQUESTS = 16
_NEW_TOKENS = 200
_PIECES_BEFORE = 20
"""TextPieces of text of every request that are there when the rank is killed."""


def bench_recovery(report: BenchReport, cache_dir: Path, *, rounds: int = 10) -> None:
    """``rounds`` kills, of the ranks in turn; before each, the rank that was killed last has been replaced."""
    settings = {"max_new_tokens": _NEW_TOKENS, "stop_tokens": ()}
    any_s, every_s, joined_s, pause_s, lost, differing = [], [], [], [], 0, 0
    with open_cluster(cache_dir) as cluster, _served_again() as served_s:
        results = sorted(cluster.generate(prompts(_REQUESTS), **settings), key=lambda result: result.index)
        undisturbed = [result.tokens for result in results]
        for number in range(rounds):
            victim = pids(cluster)[number % RANKS]
            generations = [cluster.submit(prompt, **settings) for prompt in prompts(_REQUESTS)]
            clocks = [_Clock(generation) for generation in generations]
            for clock in clocks:
                clock.wait_for(_PIECES_BEFORE)
            os.kill(victim, signal.SIGKILL)
            killed_s = time.monotonic()
            for clock in clocks:
                clock.thread.join()
            cluster.scale(RANKS)
            joined_s.append(time.monotonic() - killed_s)
            # What was on its way when the rank was killed doesn't count: only what came once a group stood again.
            again_s = next(t for t in served_s if t > killed_s)
            firsts = [min(t for t in clock.times_s if t > again_s) for clock in clocks]
            any_s.append(min(firsts) - killed_s)
            every_s.append(max(firsts) - killed_s)
            all_s = sorted(t for clock in clocks for t in clock.times_s if t > again_s)
            pause_s.append(max(later - earlier for earlier, later in pairwise(all_s)))
            found = [dataclasses.replace(g.result(), index=index) for index, g in enumerate(generations)]
            now = compare(found, undisturbed)
            lost, differing = lost + now[0], differing + now[1]
            print(f"kill {number + 1} of {rounds}: {any_s[-1]:.2f} s", flush=True)
    title = f"{rounds} kills of one of {RANKS} ranks in the middle of {_REQUESTS} requests of {_NEW_TOKENS} tokens, seconds"
    rows = {
        "the next token of any request": any_s,
        "the next token of the last request to go on": every_s,
        "the replacement has joined, and all requests are done": joined_s,
        "(longest time without a token while the replacement loads and joins)": pause_s,
    }
    report.table(title, [{"from SIGKILL to": name, **spread(times), "most": max(times)} for name, times in rows.items()])
    report.table("requests", [{"requests": rounds * _REQUESTS, "lost": lost, "tokens different": differing}])


class _Clock:
    """Notes when pieces of a request's text arrive."""

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
    """When each group stood, as the supervisor says it."""
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
