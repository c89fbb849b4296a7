"""Engines of models that are loaded with ``kv_tokens="auto"``, and their steps, after each of which all tables are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import epslots
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.slot_exchange import SlotExchange
from epslots.runtime import runtime_of

AUTO: dict[str, Any] = {"kv_tokens": "auto", "max_batch_tokens": 16, "max_requests": 4}


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    given = {"slots": "75%", "device": "cpu", "dtype": "float32", "progress": False, **AUTO} | settings
    return epslots.load(folder, cache_dir=cache_dir, **given)


def rows_of(engine: Engine) -> RowBatcher:
    assert isinstance(engine.batcher, RowBatcher)
    return engine.batcher


def exchange_of(engine: Engine) -> SlotExchange:
    exchange = rows_of(engine).admission.exchange
    assert exchange is not None
    return exchange


def serve(engine: Engine, requests: list[Request], before_step: Callable[[], object] = lambda: None) -> dict[str, list[int]]:
    """The tokens of each request; each step's tables are checked."""
    for request in requests:
        engine.batcher.add(request)
    tokens: dict[str, list[int]] = {}
    while step(engine, tokens, before_step):
        pass
    return tokens


def step(engine: Engine, tokens: dict[str, list[int]], before_step: Callable[[], object]) -> bool:
    """One step, whose new tokens are added; whether any rank had work."""
    before_step()
    work = engine.step().work
    for output in engine.batcher.outputs():
        assert output.error is None
        tokens.setdefault(output.id, []).extend(output.tokens)
    check(engine)
    return work


def check(engine: Engine) -> None:
    rows_of(engine).cache.check()
    for loader in runtime_of(engine.model).loaders:
        loader.pool.check_integrity()
