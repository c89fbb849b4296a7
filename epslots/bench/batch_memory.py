"""``kv_tokens="auto"`` against fixed divisions of the same memory, on a load that changes: many requests, then few."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from epslots.bench.batch_speed import batch_checkpoint
from epslots.bench.engines import close, open_engine, random_requests, step
from epslots.bench.models import load_fp32, random_config, use_sums
from epslots.bench.report import Tables, median, ratio_columns
from epslots.generation.engine import Engine
from epslots.progress import Advance
from epslots.runtime import runtime_of

CONFIG = random_config(layers=4, hidden=256, experts=32, top_k=4, width=128, heads=4)
LINK = "2GB/s,100us"
MANY, TOGETHER, PROMPT, NEW = 40, 16, 192, 64
FEW, LONG = 2, 256
"""Requests of the quiet part, which come one after the other, and their new tokens."""
SLOTS, LEVELS = 24, 8
"""Slots of each layer beside the small cache; of these, levels that hold the large one."""
MEMORY_ROWS = 6
_STEP_TOKENS = 512


def measure_memory(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Tokens a second of the three divisions of memory.

    They make their steps in turn, and each goes through the load again and again.
    """
    with batch_checkpoint(CONFIG) as folder:
        engines = _engines(folder, cache_dir)
        seconds: dict[str, dict[str, list[float]]] = {part: {kind: [] for kind in engines} for part in ("many", "few", "both")}
        hits: dict[str, dict[str, list[float]]] = {part: {kind: [] for kind in engines} for part in ("many", "few")}
        levels = []
        for number in range(1 + rounds):  # the first to warm up
            found = {part: _LoadPart(engines) for part in hits}
            found["many"].serve(MANY, NEW, seed=1 + number)
            levels.append(_levels(engines["auto"]))
            for one in range(FEW):
                found["few"].serve(1, LONG, seed=100 * (1 + number) + one)
            levels.append(_levels(engines["auto"]))
            for kind in engines if number else ():
                for part, each in found.items():
                    seconds[part][kind].append(each.seconds[kind])
                    hits[part][kind].append(each.hit_rate(kind))
                seconds["both"][kind].append(sum(each.seconds[kind] for each in found.values()))
        rows: list[dict[str, Any]] = []
        for part, taken in seconds.items():
            for other in ("small cache", "large cache"):
                row = {
                    "requests": part,
                    "against": other,
                    **ratio_columns(taken[other], taken["auto"], "speed of auto / theirs"),
                }
                if part in hits:
                    row |= {"hit rate of auto": median(hits[part]["auto"]), "theirs": median(hits[part][other])}
                rows.append(row)
                advance(1)
        close(engines)
    what = f"{MANY} requests, at most {TOGETHER} at a time, then {FEW} one by one; {LINK}; levels of auto after each: {levels}"
    return {f"tokens/s with kv_tokens='auto' over fixed divisions of the memory; {what}": rows}


class _LoadPart:
    """One part of a round.

    Attributes:
        seconds: by division.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._engines = engines
        self.seconds = dict.fromkeys(engines, 0.0)
        self._hits, self._uses = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0.0)

    def serve(self, count: int, new: int, *, seed: int) -> None:
        """Serve the same requests by all engines, which make their steps in turn: the machine's other load meets all."""
        before = {kind: use_sums(engine.model) for kind, engine in self._engines.items()}
        for engine in self._engines.values():
            for request in random_requests(engine.model, count, PROMPT, new, seed=seed):
                engine.batcher.add(request)
        while working := {kind: engine for kind, engine in self._engines.items() if engine.batcher.has_work}:
            for kind, engine in working.items():
                began = time.perf_counter()
                step(engine)
                self.seconds[kind] += time.perf_counter() - began
        for kind, engine in self._engines.items():
            sums = use_sums(engine.model, before[kind])
            self._hits[kind] += sums["hits"]
            self._uses[kind] += sums["uses"]

    def hit_rate(self, kind: str) -> float:
        """Hits per use of a division."""
        return self._hits[kind] / self._uses[kind]


def _levels(engine: Engine) -> int:
    """Slots that each layer has ceded."""
    return engine.batcher.stats().ceded_slots // CONFIG.num_hidden_layers


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
