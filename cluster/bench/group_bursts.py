"""Streams while long prompts arrive: groups that do all, with and without ``step_target_ms``, against roles.

    8 streams decode; prompts of 1,500 tokens arrive at random -> time per output token: P99 over the quiet P50

All ways have two ranks, each a group of its own.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.bench.common import open_cluster
from cluster.bench.group_streams import WatchedStream, models, p99, token_ids
from cluster.generation import Generation
from epslots.bench.report import MS, BenchReport, median

_STREAMS, _STREAM_PROMPT, _STREAM_TOKENS = 8, 64, 160
_PROMPT_TOKENS, _PROMPT_NEW_TOKENS, _EVERY_S = 1500, 32, 1.5
_ARRIVALS_BEFORE = 8  # of tokens of each stream: all of them decode then, where they are to decode
_TARGET_MS = 50
_WAYS: dict[str, dict[str, Any]] = {
    "mixed": {"groups": 2},
    f"mixed, step_target_ms={_TARGET_MS}": {"groups": 2, "step_target_ms": _TARGET_MS},
    "split, 1 + 1": {"prefill_ranks": 1, "decode_ranks": 1},
}


def measure_bursts(report: BenchReport, cache_dir: Path, rounds: int) -> None:
    """Serve streams alone and beside prompts, in turn, each way."""
    rows = []
    with models() as folders:
        for model, folder in folders.items():
            for way, settings in _WAYS.items():
                row = _measure(cache_dir, folder, rounds, settings)
                rows.append({"model": model, "way": way, **row})
                print(f"{model}, {way}: {row['P99 / quiet P50']:.2f}", flush=True)
    title = (
        f"{_STREAMS} streams of {_STREAM_TOKENS} tokens, and prompts of {_PROMPT_TOKENS}, one every {_EVERY_S:g} s at random: "
        "time per output token"
    )
    report.table(title, rows)


def _measure(cache_dir: Path, folder: Path, rounds: int, settings: dict[str, Any]) -> dict[str, float]:
    with open_cluster(cache_dir, path=folder, prefix_cache=False, **settings) as cluster:
        for bursts in (False, True):  # warm-up: hand-overs have costs then
            _wave(cluster, -1, bursts=bursts)
        quiet, bursty, prompts = list[float](), list[float](), 0
        for number in range(rounds):
            quiet += _wave(cluster, number, bursts=False)[0]
            seconds, sent = _wave(cluster, number, bursts=True)
            bursty, prompts = bursty + seconds, prompts + sent
        hand_overs = cluster.stats().hand_overs
    return {
        "quiet P50, ms": median(quiet) * MS,
        "quiet P99 / P50": p99(quiet) / median(quiet),
        "P50 / quiet P50": median(bursty) / median(quiet),
        "P99 / quiet P50": p99(bursty) / median(quiet),
        "P99 / quiet P99": p99(bursty) / p99(quiet),
        "longest / quiet P50": max(bursty) / median(quiet),
        "prompts": prompts,
        "hand-overs": hand_overs.done,
        "failed": hand_overs.failed,
    }


def _wave(cluster: Cluster, number: int, *, bursts: bool) -> tuple[list[float], int]:
    """Seconds of the streams' tokens, and the number of prompts that came meanwhile."""
    streams = [WatchedStream(cluster, token_ids(_STREAM_PROMPT, 1000 * number + i), _STREAM_TOKENS) for i in range(_STREAMS)]
    for stream in streams:
        stream.wait_for(_ARRIVALS_BEFORE)
    began_s = time.perf_counter()
    chance, coming = random.Random(number), list[Generation]()
    while bursts and streams[0].running:
        prompt = token_ids(_PROMPT_TOKENS, 1000 * number + 100 + len(coming))
        coming.append(cluster.submit(prompt, max_new_tokens=_PROMPT_NEW_TOKENS, stop_tokens=()))
        streams[0].join(chance.expovariate(1 / _EVERY_S))
    for stream in streams:
        stream.join()
    for generation in coming:
        generation.result()
    return [seconds for stream in streams for seconds in stream.token_seconds(began_s)], len(coming)
