"""``kv_tokens="auto"`` against fixed divisions of the same memory, on a load that changes: many requests, then few."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from epslots.bench.batch_speed import batch_checkpoint
from epslots.bench.engines import Served, close, open_engine, random_requests
from epslots.bench.models import load_fp32, random_config, use_sums
from epslots.bench.report import Tables, median, ratio_columns
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.progress import Advance
from epslots.runtime import runtime_of

CONFIG = random_config(layers=4, hidden=256, experts=32, top_k=4, width=128, heads=4)
LINK = "2GB/s,100us"
MANY, TOGETHER, PROMPT, NEW = 64, 16, 192, 64
FEW, LONG = 3, 192
"""Requests of the quiet part, which come one after the other, and their new tokens."""
SLOTS, LEVELS = 24, 8
"""Slots of each layer beside the small cache; of these, levels that hold the large one."""
MEMORY_ROWS = 6
_STEP_TOKENS = 512


def measure_memory(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Tokens a second of the three divisions, part by part in turn; each engine goes through the load again and again."""
    with batch_checkpoint(CONFIG) as folder:
        engines = _engines(folder, cache_dir)
        rates: dict[str, dict[str, list[float]]] = {kind: {"many": [], "few": [], "both": []} for kind in engines}
        hits, levels = dict.fromkeys(engines, 0.0), []
        for number in range(1 + rounds):  # the first to warm up
            for kind, engine in engines.items():
                before = use_sums(engine.model)
                found = _one_round(engine, number)
                if number:
                    sums = use_sums(engine.model, before)
                    hits[kind] += sums["hits"] / sums["uses"] / rounds
                    for part, rate in found.items():
                        rates[kind][part].append(rate)
                if kind == "auto":
                    levels.append(engine.batcher.stats().ceded_slots // CONFIG.num_hidden_layers)
        rows: list[dict[str, Any]] = []
        for part in ("many", "few", "both"):
            for other in ("small cache", "large cache"):
                ours, theirs = rates["auto"][part], rates[other][part]
                row = {"requests": part, "against": other, "auto": median(ours), "theirs": median(theirs)}
                rows.append(row | ratio_columns(ours, theirs, "auto / theirs"))
                advance(1)
        close(engines)
    title = f"tokens/s by division of memory; {MANY} requests, at most {TOGETHER} at a time, then {FEW} one by one; {LINK}"
    sizes = [{"division": kind, "hit rate": hits[kind]} for kind in hits]
    return {title: rows, f"hit rates; levels of auto after each round: {levels}": sizes}


def _engines(folder: Path, cache_dir: Path) -> dict[str, Engine]:
    """With as many bytes of slots and cells each."""
    room = {"max_requests": TOGETHER, "max_batch_tokens": _STEP_TOKENS, "cache": "rows", "link": LINK, "prefetch": "off"}
    auto = load_fp32(folder, cache_dir, slots=SLOTS, kv_tokens="auto", **room)
    sizes = runtime_of(auto).plan.cache_slots
    assert sizes is not None
    divided = {"small cache": (SLOTS, sizes.tokens(0)), "large cache": (SLOTS - LEVELS, sizes.tokens(LEVELS))}
    engines = {"auto": open_engine(auto)}
    for kind, (slots, tokens) in divided.items():
        engines[kind] = open_engine(load_fp32(folder, cache_dir, slots=slots, kv_tokens=tokens, **room))
    return engines


def _one_round(engine: Engine, number: int) -> dict[str, float]:
    """Tokens a second of each part."""
    began = time.perf_counter()
    many = Served(engine, random_requests(engine.model, MANY, PROMPT, NEW, seed=1 + number))
    tokens, few_s = MANY * NEW, 0.0
    for request in random_requests(engine.model, FEW, PROMPT, LONG, seed=100 + number):
        few_s += Served(engine, [Request(request.id, request.prompt, LONG)]).seconds
    few = FEW * LONG
    return {"many": many.rate, "few": few / few_s, "both": (tokens + few) / (time.perf_counter() - began)}
