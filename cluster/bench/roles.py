"""Groups with roles against groups that do all: streams while long prompts come, and the hand-over of a prompt's cache.

    8 streams decode; prompts of 1,500 tokens arrive at random -> time between a stream's tokens, over the quiet median

``mixed`` and ``split`` run in turn, in clusters of their own: two groups of one rank each, of the same model.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from pathlib import Path

from cluster.api import Cluster
from cluster.bench.common import open_cluster
from cluster.generation import Generation
from epslots.bench.report import BenchReport

_STREAMS, _STREAM_TOKENS = 8, 160
_PROMPT_TOKENS, _BURST_GAP_S = 1500, 1.5
_HANDED_TOKENS = 2000
_WAYS = {
    "mixed": {"groups": 2},
    "mixed, step_target_ms=100": {"groups": 2, "step_target_ms": 100},
    "split, 1 + 1": {"prefill_ranks": 1, "decode_ranks": 1},
}


def bench_roles(report: BenchReport, cache_dir: Path, *, rounds: int = 3) -> None:
    """Serve streams beside bursts of prompts, with roles and without."""
    rows = []
    for name, settings in _WAYS.items():
        with open_cluster(cache_dir, 2, kv_tokens=16384, prefix_cache=False, **settings) as cluster:
            _serve(cluster, 0, bursts=False)
            quiet = [gap for number in range(rounds) for gap in _serve(cluster, number, bursts=False)]
            bursty = [gap for number in range(rounds) for gap in _serve(cluster, number, bursts=True)]
            median = statistics.median(quiet)
            rows.append(
                {"way": name, "quiet P99 / P50": _p99(quiet) / median, "bursty P99 / quiet P50": _p99(bursty) / median}
            )
            if settings.get("prefill_ranks"):
                handed = _hand_over(cluster, rounds)
    report.table(f"{_STREAMS} streams of {_STREAM_TOKENS} tokens; time per output token", rows)
    report.table(f"a hand-over of {_HANDED_TOKENS} tokens", [handed])


def _ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 2000), k=count)


def _serve(cluster: Cluster, number: int, *, bursts: bool) -> list[float]:
    """Seconds between the tokens of all streams."""
    gaps: list[float] = []
    streams = [
        cluster.submit(_ids(64, 100 * number + i), max_new_tokens=_STREAM_TOKENS, stop_tokens=()) for i in range(_STREAMS)
    ]
    readers = [threading.Thread(target=_read, args=(stream, gaps)) for stream in streams]
    for reader in readers:
        reader.start()
    chance, coming = random.Random(number), list[Generation]()
    while bursts and any(reader.is_alive() for reader in readers):
        coming.append(cluster.submit(_ids(_PROMPT_TOKENS, len(coming)), max_new_tokens=8, stop_tokens=()))
        readers[0].join(chance.expovariate(1 / _BURST_GAP_S))
    for reader in readers:
        reader.join()
    for prompt in coming:
        prompt.result()
    return gaps


def _read(stream: Generation, gaps: list[float]) -> None:
    """Tokens that come together count as if they had come one by one."""
    last: float | None = None
    for portion in stream.portions():
        now, tokens = time.perf_counter(), len(portion.tokens)
        if last is not None and tokens:
            gaps += [(now - last) / tokens] * tokens
        last = now


def _hand_over(cluster: Cluster, rounds: int) -> dict[str, float]:
    """A prompt's hand-over against computing the prompt once more."""
    before, first_s = cluster.stats().hand_overs, []
    for number in range(rounds):
        began = time.perf_counter()
        stream = cluster.submit(_ids(_HANDED_TOKENS, 7000 + number), max_new_tokens=32, stop_tokens=())
        next(iter(stream.portions()))
        first_s.append(time.perf_counter() - began)
        stream.result()
    after = cluster.stats().hand_overs
    count = max(1, after.done - before.done)
    seconds = (after.seconds - before.seconds) / count
    return {
        "hand-overs": after.done - before.done,
        "failed": after.failed - before.failed,
        "seconds": seconds,
        "bytes": (after.nbytes - before.nbytes) / count,
        "seconds to the first token": statistics.median(first_s),
        "hand-over / computing the prompt": seconds / statistics.median(first_s),
    }


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]
