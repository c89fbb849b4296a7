"""``epslots bench batch``: every part measures what it says, on tiny models; tokens are held against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from epslots.bench import batch_arrivals, batch_grammars, batch_latents, batch_memory, batch_speed
from epslots.bench.batch import PARTS, bench_batch
from epslots.bench.engines import Decoding, Served
from epslots.bench.models import random_config
from epslots.bench.report import BenchReport
from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.generation.requests import Output, Request
from epslots.generation.text import load_tokenizer


def report() -> BenchReport:
    return BenchReport("batch", torch.device("cpu"), None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models, prompts and batches of a hundredth of their size."""
    hybrid = batch_speed.hybrid_config(layers=4, hidden=64, experts=8, width=16)
    attention = random_config(layers=2, hidden=64, experts=8, top_k=2, width=16, heads=4)
    contenders = {
        batch_speed.HYBRID: (hybrid, "rows", (None, None)),
        batch_speed.ATTENTION: (attention, "pages", (None, None)),
    }
    for module in (batch_speed, batch_arrivals):
        monkeypatch.setattr(module, "CONTENDERS", contenders)
    settings = {"PROMPT": 8, "NEW": 16, "MANY": 4, "ALONE": 2, "CONTEXTS": (16,), "BATCHES": (4, 1)}
    for name, value in (settings | {"GENERATED": (2,), "IMPLEMENTATIONS": ("eager", "grouped_mm")}).items():
        monkeypatch.setattr(batch_speed, name, value)
    monkeypatch.setattr(batch_speed, "random_config", lambda **_: attention)
    for name, value in {"PROMPT": 60, "DECODING": 2, "PAST": 5, "PROMPTS": 2}.items():
        monkeypatch.setattr(batch_arrivals, name, value)
    config = batch_latents.latent_config()
    config.hidden_size, config.vocab_size = 64, 300
    monkeypatch.setattr(batch_latents, "latent_config", lambda: config)
    monkeypatch.setattr(batch_latents, "CONTEXT", 40)
    monkeypatch.setattr(batch_latents, "LARGE_MODELS", {"small": (config, None)})
    sizes = {
        "CONFIG": attention,
        "MANY": 3,
        "TOGETHER": 2,
        "PROMPT": 8,
        "NEW": 6,
        "FEW": 1,
        "LONG": 9,
        "SLOTS": 6,
        "LEVELS": 2,
    }
    for name, value in (sizes | {"_STEP_TOKENS": 16}).items():
        monkeypatch.setattr(batch_memory, name, value)
    monkeypatch.setattr(batch_grammars, "train_tokenizer", lambda: load_tokenizer(example_model()))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures(part: str, small: None, cache_dir: Path):
    result = report()
    bench_batch(result, cache_dir, rounds=1, parts=part)
    tables = [rows for rows in result.result.values() if isinstance(rows, list)]
    assert tables and all(tables)
    for row in (row for rows in tables for row in rows):
        numbers = {heading: value for heading, value in row.items() if isinstance(value, float)}
        assert numbers and all(value > 0 for value in numbers.values())
        assert not row.get("different")


def test_an_unknown_part_is_refused(cache_dir: Path):
    with pytest.raises(ConfigError, match=r"'speed': allowed: throughput, "):
        bench_batch(report(), cache_dir, parts="throughput,speed")


class FakeEngine:
    """Two steps for a prompt, then a token a step."""

    def __init__(self, fails: bool = False) -> None:
        self.batcher = self
        self.fails = fails
        self.left: dict[str, list[int]] = {}
        self.ready: list[Output] = []

    def add(self, request: Request) -> None:
        self.left[request.id] = [2 * len(self.left), request.max_new_tokens]

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def step(self) -> None:
        for id, state in list(self.left.items()):
            state[0] -= 1
            if state[0] < 0:
                state[1] -= 1
                end = state[1] == 0
                error = "it broke" if self.fails else None
                self.ready.append(Output(id, (7,), end, "length" if end else None, error))
                if end:
                    del self.left[id]

    def cancel(self, id: str) -> None:
        del self.left[id]

    def outputs(self) -> list[Output]:
        ready, self.ready = self.ready, []
        return ready


def test_only_steps_in_which_all_decode_are_decoding():
    """The first request has its tokens in steps 1 to 6, the second in steps 3 to 8: all decode in steps 4, 5 and 6."""
    engine: Any = FakeEngine()
    served = Served(engine, [Request("a", (1,), 6), Request("b", (1,), 6)])
    assert served.tokens == {"a": [7] * 6, "b": [7] * 6}
    assert len(served.decoding_s) == 3
    assert sum(served.decoding_s) < served.seconds


def test_decoding_begins_when_all_prompts_are_done():
    engine: Any = FakeEngine()
    decoding = Decoding(engine, [Request("a", (1,), 9), Request("b", (1,), 9)])
    assert decoding.tokens == {"a": [7, 7, 7], "b": [7]}
    decoding.step()
    assert decoding.tokens == {"a": [7] * 4, "b": [7] * 2}
    decoding.stop(keep=1)
    assert engine.left.keys() == decoding.tokens.keys() == {"a"}


def test_a_failed_request_is_not_timed():
    engine: Any = FakeEngine(fails=True)
    with pytest.raises(AssertionError, match="request a failed: it broke"):
        Served(engine, [Request("a", (1,), 2)])
