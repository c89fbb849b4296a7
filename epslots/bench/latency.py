"""Latency of each token over the number of requests in progress, for several shares of slots: P50, P95 and P99.

A closed loop through the engine keeps a number of requests in progress: when one ends the next begins, its prompt computed
in the same steps as the others' tokens. So the high percentiles contain the cost of newcomers to running requests.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from epslots.bench.models import load_fp32, random_checkpoint, random_config, use_sums
from epslots.bench.report import MS, BenchReport, axes_of_plot
from epslots.example import example_model
from epslots.example_text import library_texts
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.progress import counting

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHARES = ("25%", "50%", "100%")
# Ranges of a request's tokens (the end excluded), so that few requests begin in the same step.
PROMPT_TOKENS, NEW_TOKENS = (16, 64), (24, 56)
# Experts of 1.5 MiB are most of the work and of the bytes that move, as in large models.
RANDOM = {"layers": 4, "hidden": 512, "experts": 64, "top_k": 4, "width": 256}
GAIN = 1.25  # the curve has turned where doubling the batch brings less than this factor in tokens/s


@dataclass
class Measured:
    """Results of closed loops.

    Attributes:
        gaps_s: seconds between a token and the next of its request.
        firsts_s: seconds from a request's beginning to its first token.
        tokens: delivered.
        seconds: taken.
        texts: the tokens of each request that ended, by its id.
    """

    gaps_s: list[float] = field(default_factory=list)
    firsts_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    texts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        """Count another loop's figures with these."""
        self.gaps_s += other.gaps_s
        self.firsts_s += other.firsts_s
        self.tokens += other.tokens
        self.seconds += other.seconds


@dataclass
class _Running:
    """A request in progress.

    Attributes:
        last_s: when its newest token came; None before the first.
    """

    begun_s: float
    last_s: float | None = None
    tokens: list[int] = field(default_factory=list)


def closed_loop(
    engine: Engine, requests: Iterator[Request], batch: int, steps: int, now: Callable[[], float] = time.perf_counter
) -> Measured:
    """Keep ``batch`` requests in progress for ``steps`` steps, which count from when each has its first token.

    The first requests are no newcomers: their first tokens aren't counted. At the end all that is in progress is cancelled.

    Args:
        requests: enough of them.
        now: seconds.
    """
    found = Measured()
    running: dict[str, _Running] = {}
    counts = False
    began_s = 0.0

    def begin(at_s: float) -> None:
        request = next(requests)
        engine.batcher.add(request)
        running[request.id] = _Running(at_s)

    for _ in range(batch):
        begin(now())
    while steps:
        engine.step()
        at_s = now()
        for output in engine.batcher.outputs():
            if output.error is not None:
                raise AssertionError(f"request {output.id} failed: {output.error}")
            request = running[output.id]
            request.tokens += output.tokens
            if counts:
                _count(found, request, len(output.tokens), at_s)
            if output.tokens:
                request.last_s = at_s
            if output.finished:
                found.texts[output.id] = tuple(running.pop(output.id).tokens)
                begin(at_s)
        steps -= counts
        if not counts and all(request.last_s is not None for request in running.values()):
            counts, began_s = True, now()
    found.seconds = now() - began_s
    for id in running:
        engine.batcher.cancel(id)
    engine.batcher.outputs()
    return found


def _count(found: Measured, request: _Running, tokens: int, at_s: float) -> None:
    found.tokens += tokens
    if request.last_s is not None:
        found.gaps_s.append(at_s - request.last_s)
    elif tokens:
        found.firsts_s.append(at_s - request.begun_s)


def row(share: str, batch: int, found: Measured, hit_rate: float) -> dict[str, Any]:
    """A row of the table."""
    p50, p95, p99 = (MS * np.percentile(found.gaps_s, [50, 95, 99])).tolist()
    return {
        "slots": share,
        "requests in progress": batch,
        "P50 ms/token": p50,
        "P95 ms/token": p95,
        "P99 ms/token": p99,
        "P50 ms to the first token": float(1000 * np.median(found.firsts_s)) if found.firsts_s else None,
        "tokens/s": found.tokens / found.seconds,
        "hit rate": hit_rate,
        "tokens timed": len(found.gaps_s),
    }


def turn(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of requests at which the curve turns.

    Args:
        rows: of one share of slots, by growing batch.

    Returns:
        The smallest batch from which on each larger one brings less than ``GAIN`` per doubling; None if the last one still
        brought that.
    """
    turned = None
    for before, after in itertools.pairwise(rows):
        doublings = np.log2(after["requests in progress"] / before["requests in progress"])
        if after["tokens/s"] >= before["tokens/s"] * GAIN**doublings:
            turned = None
        elif turned is None:
            turned = before["requests in progress"]
    return turned


def bench_latency(report: BenchReport, cache_dir: Path, *, rounds: int = 3, steps: int = 60) -> None:
    """The trained example on code that it has never seen, and a larger random model.

    The random model gets random tokens; shares of slots take turns.

    Raises:
        AssertionError: the text of the trained model depends on the slots.
    """
    text = "\n".join(library_texts(held_out=True))
    ids = AutoTokenizer.from_pretrained(example_model())(text[: 2**19], verbose=False).input_ids
    curves = [("the trained example, 32 experts of 30 KB, top-4", _measure(example_model(), cache_dir, ids, rounds, steps))]
    config = random_config(**RANDOM)
    noise = np.random.default_rng(0).integers(config.vocab_size, size=2**16).tolist()
    with random_checkpoint(config, torch.float32) as folder:
        curves.append(("random, 64 experts of 1.5 MiB, top-4", _measure(folder, cache_dir, noise, rounds, steps)))
    turns = []
    for title, rows in curves:
        report.table(title, rows)
        for share in SHARES:
            turned = turn([each for each in rows if each["slots"] == share])
            turns.append({"model": title, "slots": share, "turns at": "beyond" if turned is None else turned})
    report.table(f"requests beyond which doubling them brings less than {GAIN:g} times the tokens/s", turns)
    report.plot(partial(plot, curves))


def requests_of(ids: Sequence[int], seed: int) -> Iterator[Request]:
    """Requests without end, the same for the same seed: prompts cut from ``ids``, of different lengths."""
    generator = np.random.default_rng(seed)
    for number in itertools.count():
        length = int(generator.integers(*PROMPT_TOKENS))
        begin = int(generator.integers(len(ids) - length))
        yield Request(f"{number}", tuple(ids[begin : begin + length]), int(generator.integers(*NEW_TOKENS)))


def _measure(folder: Path, cache_dir: Path, ids: Sequence[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    kv_tokens = max(BATCHES) * (PROMPT_TOKENS[1] + NEW_TOKENS[1])
    engines = {
        share: Engine(load_fp32(folder, cache_dir, slots=share), kv_tokens=kv_tokens, max_requests=max(BATCHES))
        for share in SHARES
    }
    found = {(share, batch): Measured() for share in SHARES for batch in BATCHES}
    used: dict[tuple[str, int], Counter[str]] = {key: Counter() for key in found}
    with counting("requests served", rounds * len(SHARES) * sum(BATCHES)) as advance:
        for number, batch in itertools.product(range(rounds), BATCHES):
            texts: list[dict[str, tuple[int, ...]]] = []
            for share, engine in engines.items():
                before = use_sums(engine.model)
                once = closed_loop(engine, requests_of(ids, number), batch, steps)
                used[share, batch].update(use_sums(engine.model, since=before))
                found[share, batch].add(once)
                texts.append(once.texts)
                advance(batch)
            if folder == example_model():
                check_texts(texts)
    hit_rates = {key: counts["hits"] / counts["uses"] for key, counts in used.items()}
    return [row(share, batch, each, hit_rates[share, batch]) for (share, batch), each in found.items()]


def check_texts(texts: Iterable[Mapping[str, tuple[int, ...]]]) -> None:
    """Check that requests with the same id have the same tokens, at all shares of slots. Raises AssertionError otherwise."""
    first, *others = texts
    for other in others:
        for id in first.keys() & other.keys():
            if first[id] != other[id]:
                raise AssertionError(f"the text of request {id} depends on the slots: {first[id]}, {other[id]}")


def plot(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """A row for each model: percentiles over the batch; and latency over throughput."""
    with axes_of_plot(path, len(curves), 2, (10, 3.6 * len(curves))) as axes:
        for (title, rows), (left, right) in zip(curves, axes, strict=True):
            for number, share in enumerate(dict.fromkeys(each["slots"] for each in rows)):
                mine = [each for each in rows if each["slots"] == share]
                batches = [each["requests in progress"] for each in mine]
                for style, name in (("-", "P50"), ("--", "P95"), (":", "P99")):
                    label = f"{share}, {name}" if number == 0 or name == "P50" else None
                    times = [each[f"{name} ms/token"] for each in mine]
                    left.plot(batches, times, style, color=f"C{number}", marker=".", label=label)
                speeds, waits = [each["tokens/s"] for each in mine], [each["P50 ms/token"] for each in mine]
                right.plot(speeds, waits, marker="o", color=f"C{number}", label=f"{share} slots")
                for batch, x, y in zip(batches, speeds, waits, strict=True):
                    right.annotate(str(batch), (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7)
            left.set(title=title, xlabel="requests in progress", ylabel="ms per token")
            left.set_xscale("log", base=2)
            left.set_yscale("log")
            right.set(xlabel="tokens/s", ylabel="P50 ms per token", xlim=(0, None), ylim=(0, None))
