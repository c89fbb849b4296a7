"""The price of batch invariance: an engine's steps with ``batch_invariant`` over the same steps without it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import epslots
from epslots.bench.engines import Decoding, random_prompt, random_requests, step
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import MS, BenchReport, compare
from epslots.example import example_model
from epslots.generation.engine import Engine
from epslots.generation.requests import Request

PROMPT_TOKENS = 256
PAST_TOKENS = 100  # of the prompts that decoding follows
BATCHES = (1, 8, 32)

EngineStep = tuple[Engine, Callable[[], object]]


def bench_invariant(report: BenchReport, cache_dir: Path, *, rounds: int = 20) -> None:
    """Decoding steps of 1, 8 and 32 requests, and steps of a prompt of 256 tokens. Two models, in two dtypes."""
    large = random_config(layers=4, hidden=1024, experts=32, top_k=4, width=768)
    with torch.no_grad(), random_checkpoint(large, torch.bfloat16) as folder:
        for dtype in ("bfloat16", "float32"):
            for name, source in (("shipped model", example_model()), ("random, experts of 4.5 MiB in bfloat16", folder)):
                report.table(f"{name}, {dtype}: ms a step", _rows(source, cache_dir, dtype, rounds))


def _rows(source: Path, cache_dir: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"slots": "100%", "device": "cpu", "dtype": dtype, "cache_dir": cache_dir}
    models = {name: epslots.load(source, batch_invariant=name == "with", **settings) for name in ("with", "without")}

    def row(what: str, prepare: Callable[[PreTrainedModel], EngineStep]) -> dict[str, Any]:
        engines = {name: prepare(model) for name, model in models.items()}
        times = compare({name: run for name, (_, run) in engines.items()}, "with", "without", rounds, MS)
        for engine, _ in engines.values():
            engine.batcher.close()
        return {"step": what, **times}

    decoding = [row(f"decode, batch {n}", lambda model, n=n: _decoding(model, n, rounds)) for n in BATCHES]  # type: ignore[misc]
    return [*decoding, row(f"prompt of {PROMPT_TOKENS} tokens", _prompts)]


def _decoding(model: PreTrainedModel, batch: int, rounds: int) -> EngineStep:
    """Steps in which each of ``batch`` requests gets a token; their prompts are done."""
    steps = rounds + 16
    engine = Engine(model, kv_tokens=batch * (PAST_TOKENS + steps + 16), max_requests=batch)
    return engine, Decoding(engine, random_requests(model, batch, PAST_TOKENS, steps)).step


def _prompts(model: PreTrainedModel) -> EngineStep:
    """Steps that compute a prompt each, always a new one: pages of a known prompt would be shared."""
    engine, numbers = Engine(model, kv_tokens=2 * PROMPT_TOKENS), itertools.count(1000)

    def compute_prompt() -> object:
        number = next(numbers)
        engine.batcher.add(Request(str(number), random_prompt(model, PROMPT_TOKENS, number), 1))
        (output,) = step(engine)
        assert output.finished
        return output

    return engine, compute_prompt
