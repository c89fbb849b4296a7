"""Four ranks as one group, and as two groups of two. Tokens a second and hit rate, with as many slots on each rank.

A fetch takes as long as that of a large expert, on an emulated link, as the costs say that the ranks plan with.
"""

from __future__ import annotations

import time
from pathlib import Path

from cluster.api import Cluster
from cluster.bench.common import SLOTS, open_cluster, prompts
from epslots.bench.report import BenchReport, ratio_of_rounds, spread

_RANKS, _PROMPTS, _NEW_TOKENS = 4, 32, 32
_LINK = "1GB/s,1120us"
_WAYS = {"1 group of 4": 1, "2 groups of 2": 2}


def measure_division(report: BenchReport, cache_dir: Path, rounds: int) -> None:
    """Waves of prompts in turn on two clusters, whose ranks sleep while the other one's serve."""
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    rows = []
    with (
        open_cluster(cache_dir, _RANKS, groups=1, link=_LINK) as one,
        open_cluster(cache_dir, _RANKS, groups=2, link=_LINK) as two,
    ):
        clusters = dict(zip(_WAYS, (one, two), strict=True))
        before = {}
        for number in range(-1, rounds):
            for way, cluster in clusters.items():
                taken = _wave(cluster)
                if number >= 0:
                    seconds[way].append(taken)
                else:
                    before[way] = cluster.stats().total
        for way, cluster in clusters.items():
            total = cluster.stats().total
            hits, misses = total.hits - before[way].hits, total.misses - before[way].misses
            speeds = spread([_PROMPTS * _NEW_TOKENS / taken for taken in seconds[way]])
            rows.append({"way": way, **speeds, "hit rate": hits / (hits + misses)})
    report.table(
        f"tokens/s: {_PROMPTS} prompts of {_NEW_TOKENS} new tokens, {_RANKS} ranks with {SLOTS} of 32 slots a layer", rows
    )
    faster = ratio_of_rounds(seconds["1 group of 4"], seconds["2 groups of 2"])
    report.table("tokens/s of two groups over one group's, round by round", [faster])


def _wave(cluster: Cluster) -> float:
    """Seconds for all prompts."""
    began = time.perf_counter()
    for _ in cluster.generate(prompts(_PROMPTS), max_new_tokens=_NEW_TOKENS, stop_tokens=()):
        pass
    return time.perf_counter() - began
