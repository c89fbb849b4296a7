"""The service: its throughput over ``Cluster.generate``'s, the time that it adds to a first token, and what kills cost."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.bench.common import RANKS, open_cluster, pids, prompts
from cluster.bench.http_load import HttpLoad, Reached, WaveAnswers, wave_of
from cluster.bench.serve_alone import measure_driver_kills, measure_idle
from cluster.bench.serve_gcs import measure_gcs_restarts
from cluster.bench.serve_here import bodies_of, serving_here
from epslots.bench.report import MS, US, BenchReport, ratio_of_rounds, spread
from epslots.errors import ConfigError

_PROMPTS = 64
_NEW_TOKENS = 64
_CONCURRENCIES = (16, 64)
_FIRST_TOKENS = 40
_KILLED_REQUESTS, _KILLED_TOKENS = 16, 200
_PARTS_BEFORE = 10  # of every stream, when a rank is killed
_NO_STOP: dict[str, Any] = {"stop_tokens": ()}


def bench_serve(
    report: BenchReport,
    cache_dir: Path,
    *,
    rounds: int = 5,
    parts: str = "throughput,first,ranks,driver,idle,gcs",
    redis: str = "",
) -> None:
    """The figures of the service on two ranks, in parts.

    Args:
        rounds: of the throughput; and as many kills of the driver, and twice as many of ranks.
        parts: "throughput" (tokens/s over HTTP, and in Python), "first" (time to the first token), "ranks" (SIGKILLs of ranks
            under load), "driver" (SIGKILLs of the driver), "idle" (processor time without requests), "gcs" (restarts of Ray's
            GCS under load, with its fault tolerance).
        redis: program of a Redis server, for the part "gcs": the GCS keeps its state there, and not in RocksDB.

    Raises:
        AssertionError: a request was lost, or has another text than in Python.
        ConfigError: there is no such part.
    """
    here: dict[str, Callable[[BenchReport, Cluster, HttpLoad], None]] = {
        "throughput": lambda *given: _throughput(*given, rounds=rounds),
        "first": _first_token,
        "ranks": lambda *given: _kill_ranks(*given, kills=2 * rounds),
    }
    alone: dict[str, Callable[[BenchReport, Path], None]] = {
        "driver": lambda *given: measure_driver_kills(*given, kills=rounds),
        "idle": measure_idle,
        "gcs": lambda *given: measure_gcs_restarts(*given, redis=redis),
    }
    chosen = parts.split(",")
    if unknown := sorted(set(chosen) - {*here, *alone}):
        raise ConfigError(f"parts={','.join(unknown)}; allowed: {', '.join([*here, *alone])}")
    if set(chosen) & set(here):
        with open_cluster(cache_dir) as cluster, serving_here(cluster) as (url, _), HttpLoad(url) as load:
            for part in chosen:
                if part in here:
                    here[part](report, cluster, load)
    for part in chosen:
        if part in alone:
            alone[part](report, cache_dir)


def _throughput(report: BenchReport, cluster: Cluster, load: HttpLoad, *, rounds: int) -> None:
    """Waves of 16 or 64 prompts at once, in turn through Python, as streams, and whole."""
    rows = []
    for concurrency in _CONCURRENCIES:
        ways: dict[str, Callable[[Sequence[str]], tuple[list[str], float]]] = {
            "Cluster.generate": lambda some: (_texts_of(cluster, some, _NEW_TOKENS), 0.0),
            "HTTP, streamed": lambda some: _over_http(load, some, stream=True),
            "HTTP, whole": lambda some: _over_http(load, some, stream=False),
        }
        runs: dict[str, list[_Run]] = {way: [] for way in ways}
        for number in range(-1, rounds):
            texts = set()
            for way, ask in ways.items():
                run = _timed(ask, concurrency)
                texts.add(run.texts)
                if number >= 0:
                    runs[way].append(run)
            assert len(texts) == 1, "texts differ between the ways"
        rows += [_row(concurrency, way, runs) for way in runs]
    title = f"{_PROMPTS} prompts of {_NEW_TOKENS} new tokens, {RANKS} ranks; the driver has the service, the clients a process"
    report.table(title, rows)


class _Run:
    """One way through all prompts: its texts, and what it took."""

    def __init__(self, texts: tuple[str, ...], took_s: float, driver_s: float, clients_s: float) -> None:
        self.texts, self.took_s, self.driver_s, self.clients_s = texts, took_s, driver_s, clients_s


def _timed(ask: Callable[[Sequence[str]], tuple[list[str], float]], concurrency: int) -> _Run:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    texts, clients_s, asked = list[str](), 0.0, prompts(_PROMPTS)
    for first in range(0, _PROMPTS, concurrency):
        found, spent_s = ask(asked[first : first + concurrency])
        texts += found
        clients_s += spent_s
    return _Run(tuple(texts), time.perf_counter() - began_s, time.process_time() - cpu_s, clients_s)


def _texts_of(cluster: Cluster, some: Sequence[str], new_tokens: int) -> list[str]:
    results = cluster.generate(some, max_new_tokens=new_tokens, **_NO_STOP)
    return [result.text or "" for result in sorted(results, key=lambda result: result.index)]


def _over_http(load: HttpLoad, some: Sequence[str], *, stream: bool) -> tuple[list[str], float]:
    found = load.ask(bodies_of(some, _NEW_TOKENS, stream=stream))
    for answer in found.answers:
        assert answer.whole and answer.tokens == _NEW_TOKENS, f"an answer failed: {answer.status} {answer.error}"
    return [answer.text for answer in found.answers], found.cpu_s


def _row(concurrency: int, way: str, runs: dict[str, list[_Run]]) -> dict[str, Any]:
    tokens, mine = _PROMPTS * _NEW_TOKENS, runs[way]
    python = [run.took_s for run in runs["Cluster.generate"]]
    ratio = ratio_of_rounds(python, [run.took_s for run in mine])
    return {
        "at once": concurrency,
        "way": way,
        "tokens/s": statistics.median(tokens / run.took_s for run in mine),
        "over generate": ratio["median"],
        "p25": ratio["p25"],
        "p75": ratio["p75"],
        "driver us/token": statistics.median(run.driver_s for run in mine) / tokens * US,
        "clients us/token": statistics.median(run.clients_s for run in mine) / tokens * US,
    }


def _first_token(report: BenchReport, cluster: Cluster, load: HttpLoad) -> None:
    """One request at a time, in turn through Python and HTTP."""
    asked, seconds = prompts(_FIRST_TOKENS), {"Cluster.submit": list[float](), "HTTP": list[float]()}
    for number, prompt in enumerate([*asked[:4], *asked]):  # the first ones again: they aren't counted
        began_s = time.perf_counter()
        with cluster.submit(prompt, max_new_tokens=8, **_NO_STOP) as generation:
            next(iter(generation))
            python_s = time.perf_counter() - began_s
            generation.result()
        (answer,) = load.ask(bodies_of([prompt], 8, stream=True)).answers
        assert answer.whole, answer.error
        if number >= 4:
            seconds["Cluster.submit"].append(python_s)
            seconds["HTTP"].append(answer.parts_s[0])
    rows = [{"milliseconds to the first text": way, **_in_ms(times)} for way, times in seconds.items()]
    added = [http - python for python, http in zip(*seconds.values(), strict=True)]
    rows.append({"milliseconds to the first text": "added by HTTP, request by request", **_in_ms(added)})
    report.table(f"{_FIRST_TOKENS} requests, one at a time", rows)


def _in_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {name: value * MS for name, value in spread(seconds).items()}


def _kill_ranks(report: BenchReport, cluster: Cluster, load: HttpLoad, *, kills: int) -> None:
    """SIGKILLs of the ranks in turn, each amid streams; before each, the one that was killed last has been replaced."""
    asked = prompts(_KILLED_REQUESTS)
    right = _texts_of(cluster, asked, _KILLED_TOKENS)
    gaps_s, usual_s, lost, different = [], [], 0, 0
    wave = wave_of(bodies_of(asked, _KILLED_TOKENS, stream=True), tell_at=_PARTS_BEFORE)
    for number in range(kills):
        usual_s.append(_longest_gap_s(load.ask(bodies_of(asked, _NEW_TOKENS, stream=True))))
        load.tell(wave)
        assert isinstance(load.hear(), Reached)
        os.kill(pids(cluster)[number % RANKS], signal.SIGKILL)
        found = load.hear()
        assert isinstance(found, WaveAnswers)
        gaps_s.append(_longest_gap_s(found))
        lost += sum(not answer.whole for answer in found.answers)
        different += sum(answer.text != text for answer, text in zip(found.answers, right, strict=True))
        cluster.scale(RANKS)
        print(f"kill {number + 1} of {kills}: longest gap {gaps_s[-1]:.2f} s", flush=True)
    gaps = {"longest gap in any stream, without a kill": usual_s, "with one": gaps_s}
    title = f"{kills} SIGKILLs of one of {RANKS} ranks amid {_KILLED_REQUESTS} streams of {_KILLED_TOKENS} tokens, seconds"
    report.table(title, [{"": name, **spread(times), "most": max(times)} for name, times in gaps.items()])
    report.table("requests", [{"requests": kills * _KILLED_REQUESTS, "lost": lost, "texts different": different}])
    assert not lost and not different, f"{lost} requests lost, {different} texts different"


def _longest_gap_s(found: WaveAnswers) -> float:
    return max(answer.longest_gap_s for answer in found.answers)
