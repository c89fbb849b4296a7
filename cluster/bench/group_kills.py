"""A rank of one group is killed under load: gaps in the streams of the others; requests lost, and tokens that differ.

Half of the kills are amid decoding, of a rank of two, in one of two groups that do all. The other half are amid hand-overs: in
turn of the rank that computes prompts, and of one of the two that decode.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.bench.common import compare, open_cluster, pids
from cluster.bench.group_streams import WatchedStream, p99, token_ids
from epslots.bench.report import MS, BenchReport, median

_STREAMS, _STREAM_PROMPT, _STREAM_TOKENS = 8, 64, 400
_PROMPTS, _PROMPT_TOKENS, _PROMPT_NEW_TOKENS = 4, 1500, 32
_ARRIVALS_BEFORE = 60
_WINDOW_S = 1.0
"""Gaps are compared in as many seconds before a kill and after it: later, a new rank loads on the same two cores."""
_PATIENCE_S = 60.0
_MIXED: dict[str, Any] = {"ranks": 4, "groups": 2}
_SPLIT: dict[str, Any] = {"ranks": 3, "prefill_ranks": 1}
_PREFILL, _DECODE = (0,), (1, 2)

_Choose = Callable[[Cluster], int]
"""Waits for the moment of a kill; returns the number of the group that loses a rank."""


@dataclass
class _Tally:
    """Gaps around kills, in seconds, and requests.

    Attributes:
        before, after: of the other groups' streams, by kill.
        own: longest gap of each stream of a group that lost a rank.
        requests, lost, different: of all kills.
        cut: hand-overs that failed.
    """

    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    requests: int = 0
    lost: int = 0
    different: int = 0
    cut: int = 0

    def row(self, kills: str) -> dict[str, Any]:
        before, after = ([gap for gaps in each for gap in gaps] for each in (self.before, self.after))
        return {
            "kills": f"{len(self.after)} {kills}",
            "P99 before, ms": p99(before) * MS,
            "P99 after, ms": p99(after) * MS,
            "longest before, ms": median([max(gaps) for gaps in self.before]) * MS,
            "longest after, ms": median([max(gaps) for gaps in self.after]) * MS,
            "most, ms": max(after) * MS,
            "longest in its own group, ms": median(self.own) * MS if self.own else "-",
            "hand-overs cut": self.cut,
            "requests": self.requests,
            "lost": self.lost,
            "different": self.different,
        }


def measure_kills(report: BenchReport, cache_dir: Path, rounds: int) -> None:
    """Kill ranks one after the other; before each kill, the rank that was killed last has been replaced.

    Raises:
        AssertionError: a request was lost, or has other tokens than without a kill.
    """
    kills = -(-10 * rounds // 3)
    mixed, sources, targets = tallies = _Tally(), _Tally(), _Tally()
    with open_cluster(cache_dir, **_MIXED) as cluster:
        _kill_often(cluster, [(_now(number % 2), mixed) for number in range(kills)], prompts=0)
    with open_cluster(cache_dir, prefix_cache=False, **_SPLIT) as cluster:
        turns = ((_amid_hand_over(_PREFILL), sources), (_amid_hand_over(_DECODE), targets))
        _kill_often(cluster, [turns[number % 2] for number in range(kills)], prompts=_PROMPTS)
    title = f"SIGKILLs of a rank amid {_STREAMS} streams; gaps of other groups' streams, {_WINDOW_S:g} s before and after"
    kinds = ("amid decoding, 2 groups of 2", "amid hand-overs, 1 + 2: prefill", "amid hand-overs, 1 + 2: decode")
    report.table(title, [tally.row(kind) for tally, kind in zip(tallies, kinds, strict=True) if tally.after])
    if any(tally.lost or tally.different for tally in tallies):
        raise AssertionError(f"requests lost, tokens different: {[(one.lost, one.different) for one in tallies]}")


def _now(group: int) -> _Choose:
    return lambda _: group


def _amid_hand_over(groups: Iterable[int]) -> _Choose:
    """While one of these groups hands a request over, or takes one over."""

    def choose(cluster: Cluster) -> int:
        ends = time.perf_counter() + _PATIENCE_S
        while time.perf_counter() < ends:
            state = cluster.state()
            for group in groups:
                if state.groups[group].handing_over:
                    return group
            time.sleep(0.0005)  # the state has no event to wait for, and a hand-over takes some milliseconds
        raise TimeoutError(f"no hand-over began within {_PATIENCE_S:g} s")

    return choose


def _kill_often(cluster: Cluster, kills: Sequence[tuple[_Choose, _Tally]], *, prompts: int) -> None:
    """Kill again and again, each time amid the same streams and ``prompts`` long prompts that come then."""
    asked = [(token_ids(_STREAM_PROMPT, number), _STREAM_TOKENS) for number in range(_STREAMS)]
    asked += [(token_ids(_PROMPT_TOKENS, 100 + number), _PROMPT_NEW_TOKENS) for number in range(prompts)]
    undisturbed = [cluster.submit(ids, max_new_tokens=new, stop_tokens=()).result().tokens for ids, new in asked]
    ranks = cluster.ranks
    for number, (choose, tally) in enumerate(kills):
        cut = cluster.stats().hand_overs.failed
        streams = [WatchedStream(cluster, ids, new) for ids, new in asked[:_STREAMS]]
        for stream in streams:
            stream.wait_for(_ARRIVALS_BEFORE)
        groups = [cluster.group_of(stream.generation) for stream in streams]
        pids_of = [pids(cluster, group) for group in range(len(cluster.state().groups))]
        further = [WatchedStream(cluster, ids, new) for ids, new in asked[_STREAMS:]]
        victim = choose(cluster)
        os.kill(pids_of[victim][number // 2 % len(pids_of[victim])], signal.SIGKILL)
        killed_s = time.perf_counter()
        for stream in (*streams, *further):
            stream.join()
        _note_gaps(tally, [s for s, group in zip(streams, groups, strict=True) if group != victim], killed_s)
        tally.own += [max(s.gaps(killed_s)) for s, group in zip(streams, groups, strict=True) if group == victim]
        results = [replace(each.generation.result(), index=index) for index, each in enumerate((*streams, *further))]
        lost, different = compare(results, undisturbed)
        tally.requests += len(results)
        tally.lost, tally.different = tally.lost + lost, tally.different + different
        cluster.scale(ranks)  # returns when the next one serves
        tally.cut += cluster.stats().hand_overs.failed - cut
        print(f"kill {number + 1} of {len(kills)}: longest gap {max(tally.after[-1]):.3f} s", flush=True)


def _note_gaps(tally: _Tally, streams: Sequence[WatchedStream], killed_s: float) -> None:
    tally.before.append([gap for stream in streams for gap in stream.gaps(killed_s - _WINDOW_S, killed_s)])
    tally.after.append([gap for stream in streams for gap in stream.gaps(killed_s, killed_s + _WINDOW_S)])
