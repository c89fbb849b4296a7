"""A rank of one group is killed under load.

Measured: gaps in the streams of the others, requests lost, and tokens that differ.

Half of the kills are amid decoding, of a rank of two, in one of two groups that do all. The other half are amid hand-overs: in
turn of the rank that computes prompts, and of one of the two that decode. Of these, a kill counts that has cut a hand-over: it
was under way when the rank was stopped for the kill, and failed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.bench.common import compare, open_cluster, pids
from cluster.bench.group_streams import WatchedStream, p99, token_ids
from cluster.generation import Result
from epslots.bench.report import MS, BenchReport, median

_STREAMS, _STREAM_PROMPT, _STREAM_TOKENS = 8, 64, 400
_PROMPTS, _PROMPT_TOKENS, _PROMPT_NEW_TOKENS = 4, 1500, 32
_ARRIVALS_BEFORE = 60
_WINDOW_S = 1.0
"""Gaps are compared in as many seconds before a kill and after it: later, a new rank loads on the same two cores."""
_PATIENCE_S = 60.0
_MOST_TRIES = 3
"""Times as many kills as are wanted, at most, if some cut nothing."""
_MIXED: dict[str, Any] = {"ranks": 4, "groups": 2}
_SPLIT: dict[str, Any] = {"ranks": 3, "prefill_ranks": 1}
_PREFILL, _DECODE = (0,), (1, 2)


@dataclass(frozen=True)
class Victim:
    """The rank that is about to be killed: its group, and its process. It may be stopped already."""

    group: int
    pid: int


_Choose = Callable[[Cluster, Sequence[Sequence[int]], Callable[[], None]], Victim]
"""Waits for the moment of a kill. Takes the groups' process ids, and a function that has a prompt computed if none is."""


@dataclass
class _Tally:
    """The kills of one kind: gaps around them, in seconds, and requests.

    Attributes:
        kills: in words.
        wanted: number of them.
        amid_hand_overs: those count that have cut one.
        before, after: gaps of the other groups' streams, by kill.
        own: longest gap of each stream of a group that lost a rank.
        requests, lost, different: of all kills.
        cut: hand-overs that were under way at a kill, and failed.
        cutting: kills that have cut one.
    """

    kills: str
    wanted: int
    amid_hand_overs: bool = True
    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    requests: int = 0
    lost: int = 0
    different: int = 0
    cut: int = 0
    cutting: int = 0

    @property
    def left(self) -> int:
        """Kills that are yet to be made."""
        return self.wanted - (self.cutting if self.amid_hand_overs else len(self.after))

    def row(self) -> dict[str, Any]:
        before, after = ([gap for gaps in each for gap in gaps] for each in (self.before, self.after))
        return {
            "kills": f"{len(self.after)} {self.kills}",
            "P99 before, ms": p99(before) * MS,
            "P99 after, ms": p99(after) * MS,
            "longest before, ms": median([max(gaps) for gaps in self.before]) * MS,
            "longest after, ms": median([max(gaps) for gaps in self.after]) * MS,
            "most, ms": max(after) * MS,
            "longest in its own group, ms": median(self.own) * MS if self.own else "-",
            "hand-overs cut": self.cut,
            "kills that cut one": self.cutting,
            "requests": self.requests,
            "lost": self.lost,
            "different": self.different,
        }


def measure_kills(report: BenchReport, cache_dir: Path, rounds: int) -> None:
    """Kill ranks one after the other; before each kill, the rank that was killed last has been replaced.

    Raises:
        AssertionError: a request was lost, or has other tokens than without a kill; or too few kills have cut a hand-over.
    """
    kills = -(-10 * rounds // 3)
    mixed = _Tally("amid decoding, 2 groups of 2", kills, amid_hand_overs=False)
    sources = _Tally("amid hand-overs, 1 + 2: prefill", -(-kills // 2))
    targets = _Tally("amid hand-overs, 1 + 2: decode", kills // 2)
    with open_cluster(cache_dir, **_MIXED) as cluster:
        _kill_often(cluster, [(_in_turn(), mixed)], prompts=0)
    with open_cluster(cache_dir, prefix_cache=False, **_SPLIT) as cluster:
        turns = [(stop_amid_hand_over(_PREFILL), sources), (stop_amid_hand_over(_DECODE), targets)]
        _kill_often(cluster, turns, prompts=_PROMPTS)
    tallies = (mixed, sources, targets)
    title = f"SIGKILLs of a rank amid {_STREAMS} streams; gaps of other groups' streams, {_WINDOW_S:g} s before and after"
    report.table(title, [tally.row() for tally in tallies if tally.after])
    if any(tally.lost or tally.different for tally in tallies):
        raise AssertionError(f"requests lost, tokens different: {[(one.lost, one.different) for one in tallies]}")
    if any(tally.left for tally in tallies):
        raise AssertionError(f"kills that were wanted and have cut no hand-over: {[tally.left for tally in tallies]}")


def _in_turn() -> _Choose:
    """At once: each group in turn, and each of its ranks."""
    kills = 0

    def choose(_: Cluster, pids_of: Sequence[Sequence[int]], __: Callable[[], None]) -> Victim:
        nonlocal kills
        group, number = kills % len(pids_of), kills // len(pids_of)
        kills += 1
        return Victim(group, pids_of[group][number % len(pids_of[group])])

    return choose


def stop_amid_hand_over(groups: Collection[int]) -> _Choose:
    """Chooses the rank of one of these groups that hands a request over, or takes one over. The groups have one rank each.

    A hand-over takes some milliseconds, and on a busy machine more may pass until the rank is stopped: if it has ended by
    then, the rank goes on, and the next one is waited for.
    """

    def choose(cluster: Cluster, pids_of: Sequence[Sequence[int]], compute_a_prompt: Callable[[], None]) -> Victim:
        ends = time.perf_counter() + _PATIENCE_S
        while time.perf_counter() < ends:
            compute_a_prompt()
            for group in groups:
                if not cluster.state().groups[group].handing_over:
                    continue
                (pid,) = pids_of[group]
                os.kill(pid, signal.SIGSTOP)
                if cluster.state().groups[group].handing_over:
                    return Victim(group, pid)
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.0005)  # the state has no event to wait for
        raise TimeoutError(f"no hand-over was met within {_PATIENCE_S:g} s")

    return choose


class _Requests:
    """The requests around one kill: streams, and long prompts, of which one is always being computed until the kill.

    Args:
        asked: prompt and new tokens of each; the first ones are the streams.
    """

    def __init__(self, cluster: Cluster, asked: Sequence[tuple[list[int], int]]) -> None:
        self._cluster, self._asked = cluster, asked
        self._running = [(number, self._submit(number)) for number in range(_STREAMS)]
        for stream in self.streams:
            stream.wait_for(_ARRIVALS_BEFORE)
        self._prompts = 0

    @property
    def streams(self) -> list[WatchedStream]:
        return [stream for _, stream in self._running[:_STREAMS]]

    def compute_prompts(self) -> None:
        """Ask for every long prompt."""
        for _ in self._asked[_STREAMS:]:
            self._ask_next()

    def compute_a_prompt(self) -> None:
        """Ask for one more, if each of those that were asked for has its first token."""
        if all(stream.times for _, stream in self._running[_STREAMS:]):
            self._ask_next()

    def _ask_next(self) -> None:
        number = _STREAMS + self._prompts % (len(self._asked) - _STREAMS)
        self._running.append((number, self._submit(number)))
        self._prompts += 1

    def _submit(self, number: int) -> WatchedStream:
        prompt, new_tokens = self._asked[number]
        return WatchedStream(self._cluster, prompt, new_tokens)

    def results(self) -> list[Result]:
        """Wait for all; each has the number of its prompt."""
        for _, stream in self._running:
            stream.join()
        return [replace(stream.generation.result(), index=number) for number, stream in self._running]


def _kill_often(cluster: Cluster, turns: Sequence[tuple[_Choose, _Tally]], *, prompts: int) -> None:
    """Kill again and again, in turn, each time amid the same streams and ``prompts`` long prompts that come then."""
    asked = [(token_ids(_STREAM_PROMPT, number), _STREAM_TOKENS) for number in range(_STREAMS)]
    asked += [(token_ids(_PROMPT_TOKENS, 100 + number), _PROMPT_NEW_TOKENS) for number in range(prompts)]
    undisturbed = [cluster.submit(ids, max_new_tokens=new, stop_tokens=()).result().tokens for ids, new in asked]
    ranks, most = cluster.ranks, _MOST_TRIES * sum(tally.wanted for _, tally in turns)
    for number in range(most):
        due = [turn for turn in turns if turn[1].left > 0]
        if not due:
            break
        choose, tally = due[number % len(due)]
        _kill(cluster, _Requests(cluster, asked), choose, tally, undisturbed)
        cluster.scale(ranks)  # returns when the next one serves
        told = [f"{len(each.after)} {each.kills}, {each.cut} hand-overs cut" for _, each in turns]
        print(f"longest gap {max(tally.after[-1]):.3f} s; kills: {'; '.join(told)}", flush=True)


def _kill(
    cluster: Cluster, requests: _Requests, choose: _Choose, tally: _Tally, undisturbed: Sequence[tuple[int, ...]]
) -> None:
    streams = requests.streams
    groups = [cluster.group_of(stream.generation) for stream in streams]
    pids_of = [pids(cluster, group) for group in range(len(cluster.state().groups))]
    if tally.amid_hand_overs:
        requests.compute_prompts()
    victim = choose(cluster, pids_of, requests.compute_a_prompt)
    before = cluster.state()
    os.kill(victim.pid, signal.SIGKILL)
    killed_s = time.perf_counter()
    results = requests.results()
    _note_gaps(tally, [s for s, group in zip(streams, groups, strict=True) if group != victim.group], killed_s)
    tally.own += [
        max(s.gaps(killed_s), default=0.0) for s, group in zip(streams, groups, strict=True) if group == victim.group
    ]
    lost, different = compare(results, undisturbed)
    tally.requests += len(results)
    tally.lost, tally.different = tally.lost + lost, tally.different + different
    failed = cluster.state().hand_overs.failed - before.hand_overs.failed
    cut = min(failed, before.groups[victim.group].handing_over)
    tally.cut, tally.cutting = tally.cut + cut, tally.cutting + (cut > 0)


def _note_gaps(tally: _Tally, streams: Sequence[WatchedStream], killed_s: float) -> None:
    tally.before.append([gap for stream in streams for gap in stream.gaps(killed_s - _WINDOW_S, killed_s)])
    tally.after.append([gap for stream in streams for gap in stream.gaps(killed_s, killed_s + _WINDOW_S)])
