"""Hand-overs: seconds and bytes for a prompt of 2,000 tokens, against computing the prompt once more."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.api import Cluster
from cluster.bench.common import open_cluster
from cluster.bench.group_streams import models, token_ids
from epslots.bench.report import MS, BenchReport, median

_TOKENS, _NEW_TOKENS = 2000, 32


def measure_hand_overs(report: BenchReport, cache_dir: Path, rounds: int) -> None:
    """Hand prompts' caches over, one at a time, between two ranks of one machine."""
    rows = []
    with models() as folders:
        for model, folder in folders.items():
            with open_cluster(cache_dir, path=folder, prefix_cache=False, prefill_ranks=1, decode_ranks=1) as cluster:
                _hand_over(cluster, -1)
                found = [_hand_over(cluster, number) for number in range(rounds)]
                failed = cluster.stats().hand_overs.failed
            seconds, nbytes, prompt_s = (list(values) for values in zip(*found, strict=True))
            rows.append(
                {
                    "model": model,
                    "MiB": nbytes[0] / 2**20,
                    "the request stands still, ms": median(seconds) * MS,
                    "most, ms": max(seconds) * MS,
                    "the prompt is computed, ms": median(prompt_s) * MS,
                    "ratio": median([one / other for one, other in zip(seconds, prompt_s, strict=True)]),
                    "failed": failed,
                }
            )
    report.table(f"a hand-over after a prompt of {_TOKENS} tokens, through shared memory", rows)


def _hand_over(cluster: Cluster, number: int) -> tuple[float, float, float]:
    """Seconds in which the request made no step, bytes of its cache, and seconds from the request to its first token."""
    before, began = cluster.stats().hand_overs, time.perf_counter()
    stream = cluster.submit(token_ids(_TOKENS, number), max_new_tokens=_NEW_TOKENS, stop_tokens=())
    portions = stream.portions()
    next(portions)
    first_s = time.perf_counter() - began
    stream.result()
    after = cluster.stats().hand_overs
    if after.done != before.done + 1:
        raise AssertionError(f"one request was handed over {after.done - before.done} times; {after.failed} failed so far")
    return after.seconds - before.seconds, after.nbytes - before.nbytes, first_s
