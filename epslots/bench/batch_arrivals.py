"""Newcomers' effect on running requests: time per token of 8 that decode while long prompts arrive one after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from epslots.bench.batch_speed import ATTENTION, CONTENDERS, HYBRID, batch_checkpoint
from epslots.bench.engines import Decoding, close, open_engine, random_prompt, random_requests, step
from epslots.bench.models import load_fp32
from epslots.bench.report import MS, Tables, alternate, median
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.progress import Advance

DECODING, PAST, PROMPT = 8, 64, 1000
PROMPTS = 3  # of a round
TARGET = 3  # the target time of a step, over that of a step that only decodes
ARRIVAL_ROWS = 4


@dataclass
class _TokenGaps:
    """Seconds between tokens of a running request, and until the first token of a newcomer."""

    gaps_s: list[float] = field(default_factory=list)
    firsts_s: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        p50, p99 = (MS * np.percentile(self.gaps_s, [50, 99])).tolist()
        return {"P50 ms/token": p50, "P99 ms/token": p99, "s to a newcomer's first token": median(self.firsts_s)}


def measure_arrivals(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """The same prompts with and without ``step_target_ms``, in turn."""
    rows = []
    for name in (HYBRID, ATTENTION):
        config, cache, _ = CONTENDERS[name]
        with batch_checkpoint(config) as folder:
            models = [load_fp32(folder, cache_dir) for _ in range(2)]
            alone_s = _decoding_alone(open_engine(models[0], **_settings(cache, None)))
            targets = {"without": None, "with": round(MS * TARGET * alone_s, 1)}
            engines = {
                kind: open_engine(model, **_settings(cache, target))
                for model, (kind, target) in zip(models, targets.items(), strict=True)
            }
            models.clear()
            times = {kind: _TokenGaps() for kind in engines}
            for number in range(rounds):
                for kind, engine in engines.items():
                    _arrive(engine, number, times[kind])
            p99 = {kind: each.row()["P99 ms/token"] for kind, each in times.items()}
            for kind, each in times.items():
                row = {"model": name, "cache": cache, "step_target_ms": targets[kind], "decoding alone": MS * alone_s}
                rows.append(row | each.row() | {"P99 over without": p99[kind] / p99["without"], "tokens": len(each.gaps_s)})
                advance(1)
            close(engines)
    return {f"{DECODING} requests that decode while prompts of {PROMPT} tokens arrive, one after the other": rows}


def _settings(cache: str, target_ms: float | None) -> dict[str, Any]:
    room = DECODING * (PAST + PROMPTS * PROMPT) + 2 * PROMPT
    return {"cache": cache, "kv_tokens": room, "max_requests": DECODING + 1, "step_target_ms": target_ms}


def _decoding_alone(engine: Engine) -> float:
    """Median seconds of a step that decodes 8 requests; closes the engine."""
    decoding = Decoding(engine, random_requests(engine.model, DECODING, PAST, 64))
    seconds = median(alternate({"decoding": decoding.step}, 16)["decoding"])
    engine.batcher.close()
    return seconds


def _arrive(engine: Engine, number: int, times: _TokenGaps) -> None:
    """Count the gaps between tokens of 8 running requests while prompts are computed, each after the one before."""
    running = Decoding(engine, random_requests(engine.model, DECODING, PAST, PROMPTS * PROMPT, seed=number))
    left = [Request(f"new{i}", random_prompt(engine.model, PROMPT, 77_000 + 100 * number + i), 1) for i in range(PROMPTS)]
    last = dict.fromkeys(running.tokens, time.perf_counter())
    begun_s = 0.0
    while left or "new" in last:
        if "new" not in last:
            engine.batcher.add(left.pop())
            last["new"] = begun_s = time.perf_counter()
        outputs = step(engine)
        now = time.perf_counter()
        for output in outputs:
            if output.id in last:
                times.gaps_s.append(now - last[output.id])
                last[output.id] = now
            else:
                times.firsts_s.append(now - begun_s)
                del last["new"]
    running.stop()
