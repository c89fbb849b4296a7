"""How long a user waits for each token: P50, P95 and P99 over the number of requests in progress, for several shares of slots.

A closed loop through the engine: so many requests are always in progress, and whenever one ends the next begins, its prompt
computed in the same steps as the others' tokens. So the high percentiles contain what a newcomer costs those who are there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import epslots
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import BenchReport
from epslots.engine.engine import Engine
from epslots.engine.requests import Request
from epslots.example import example_model
from epslots.example_text import library_texts
from epslots.progress import ProgressDisplay

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHARES = ("25%", "50%", "100%")
PROMPT_TOKENS, NEW_TOKENS = (16, 64), (24, 56)  # of a request: from, and up to before; so few begin in the same step
# Experts of 1.5 MiB are most of the work and of what moves, as those of large models are.
RANDOM = {"layers": 4, "hidden": 512, "experts": 64, "top_k": 4, "width": 256}
GAIN = 1.25  # what doubling the batch must be worth in tokens/s for the curve not to have turned


@dataclass
class Measured:
    """What one closed loop showed.

    Attributes:
        gaps_s: seconds between a token and the next of its request.
        firsts_s: seconds from a request's beginning to its first token.
        tokens: that were handed out.
        seconds: that it took.
        texts: the tokens of each request that ended, by its number.
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


def closed_loop(
    engine: Engine, requests: Iterator[Request], batch: int, steps: int, now: Callable[[], float] = time.perf_counter
) -> Measured:
    """Keep ``batch`` requests in progress for ``steps`` steps, after those that it takes until each has its first token.

    The first requests are no newcomers: their first tokens aren't counted. At the end all that is in progress is given up.

    Args:
        requests: enough of them.
        now: seconds.
    """
    found = Measured()
    begun_s: dict[str, float] = {}
    last_s: dict[str, float] = {}
    texts: dict[str, list[int]] = {}
    counting = False
    began_s = 0.0

    def begin(at_s: float) -> None:
        request = next(requests)
        engine.batcher.add(request)
        begun_s[request.id], texts[request.id] = at_s, []

    for _ in range(batch):
        begin(now())
    while steps:
        engine.step()
        at_s = now()
        for output in engine.batcher.outputs():
            if output.error is not None:
                raise AssertionError(f"request {output.id} failed: {output.error}")
            texts[output.id] += output.tokens
            if counting:
                found.tokens += len(output.tokens)
                if output.id in last_s:
                    found.gaps_s.append(at_s - last_s[output.id])
                elif output.tokens:
                    found.firsts_s.append(at_s - begun_s[output.id])
            if output.tokens:
                last_s[output.id] = at_s
            if output.finished:
                found.texts[output.id] = tuple(texts.pop(output.id))
                del begun_s[output.id]
                begin(at_s)
        steps -= counting
        if not counting and begun_s.keys() <= last_s.keys():
            counting, began_s = True, now()
    found.seconds = now() - began_s
    for id in begun_s:
        engine.batcher.cancel(id)
    engine.batcher.outputs()
    return found


def row(share: str, batch: int, found: Measured, hit_rate: float) -> dict[str, Any]:
    """A row of the table."""
    p50, p95, p99 = (1000 * np.percentile(found.gaps_s, [50, 95, 99])).tolist()
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
    """Where the curve turns: the number of requests from which on no further ones are worth their wait.

    Args:
        rows: of one share of slots, by growing batch.

    Returns:
        The smallest batch from which on each further one brings less than ``GAIN`` for each doubling; None if even the last
        one brought that.
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
    """The trained example on code that it has never seen, and a larger random model on random tokens; shares in turn.

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
    path = report.plot_path()
    if path is not None:
        plot(curves, path)


def requests_of(ids: Sequence[int], seed: int) -> Iterator[Request]:
    """Requests without end, the same for the same seed: prompts cut from ``ids``, of different lengths."""
    generator = np.random.default_rng(seed)
    for number in itertools.count():
        length = int(generator.integers(*PROMPT_TOKENS))
        begin = int(generator.integers(len(ids) - length))
        yield Request(f"{number}", tuple(ids[begin : begin + length]), int(generator.integers(*NEW_TOKENS)))


def _measure(folder: Path, cache_dir: Path, ids: Sequence[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache_dir": cache_dir}
    engines = {}
    for share in SHARES:
        model = epslots.load(folder, slots=share, **settings)
        engines[share] = Engine(model, kv_tokens=max(BATCHES) * (PROMPT_TOKENS[1] + NEW_TOKENS[1]))
    found = {(share, batch): Measured() for share in SHARES for batch in BATCHES}
    used = dict.fromkeys(found, (0, 0))
    with ProgressDisplay()("requests served", rounds * len(SHARES) * sum(BATCHES)) as advance:
        for number, batch in itertools.product(range(rounds), BATCHES):
            texts: list[dict[str, tuple[int, ...]]] = []
            for share in SHARES:
                before = epslots.stats(engines[share].model)
                once = closed_loop(engines[share], requests_of(ids, number), batch, steps)
                after = epslots.stats(engines[share].model)
                hits, uses = used[share, batch]
                hits += after.hits - before.hits
                used[share, batch] = hits, uses + after.hits - before.hits + after.misses - before.misses
                found[share, batch].add(once)
                texts.append(once.texts)
                advance(batch)
            if folder == example_model():
                check_texts(texts)
    return [row(share, batch, each, used[share, batch][0] / used[share, batch][1]) for (share, batch), each in found.items()]


def check_texts(texts: Iterable[Mapping[str, tuple[int, ...]]]) -> None:
    """The same requests came to the same end, whatever the slots. Raises AssertionError otherwise."""
    first, *others = texts
    for other in others:
        for id in first.keys() & other.keys():
            if first[id] != other[id]:
                raise AssertionError(f"the text of request {id} depends on the slots: {first[id]}, {other[id]}")


def plot(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """A row for each model: percentiles over the batch, and what is waited for against what is served."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(curves), 2, figsize=(10, 3.6 * len(curves)), layout="constrained", squeeze=False)
    for (title, rows), (left, right) in zip(curves, axes, strict=True):
        for number, share in enumerate(dict.fromkeys(each["slots"] for each in rows)):
            mine = [each for each in rows if each["slots"] == share]
            batches = [each["requests in progress"] for each in mine]
            for style, name in (("-", "P50"), ("--", "P95"), (":", "P99")):
                label = f"{share}, {name}" if number == 0 or name == "P50" else None
                left.plot(
                    batches, [each[f"{name} ms/token"] for each in mine], style, color=f"C{number}", marker=".", label=label
                )
            speeds, waits = [each["tokens/s"] for each in mine], [each["P50 ms/token"] for each in mine]
            right.plot(speeds, waits, marker="o", color=f"C{number}", label=f"{share} slots")
            for batch, x, y in zip(batches, speeds, waits, strict=True):
                right.annotate(str(batch), (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7)
        left.set(title=title, xlabel="requests in progress", ylabel="ms per token")
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        right.set(xlabel="tokens/s", ylabel="P50 ms per token", xlim=(0, None), ylim=(0, None))
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
