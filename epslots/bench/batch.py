"""Requests in an engine's batches, against other ways to serve them.

One request at a time, transformers, and the other kind of cache.

The bench has parts, which can be chosen: ``PARTS``. All candidates are in fp32 on the CPU with every expert resident, so that
nothing but the engine and the model's forward pass is timed. In ``memory``, cache and slots share what is too little for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from epslots.bench.batch_arrivals import ARRIVAL_ROWS, measure_arrivals
from epslots.bench.batch_grammars import GRAMMAR_ROWS, measure_grammars
from epslots.bench.batch_latents import LATENT_ROWS, measure_latents
from epslots.bench.batch_memory import MEMORY_ROWS, measure_memory
from epslots.bench.batch_speed import (
    CACHE_ROWS,
    GENERATE_ROWS,
    THROUGHPUT_ROWS,
    measure_caches,
    measure_generate,
    measure_throughput,
)
from epslots.bench.report import BenchReport, Tables
from epslots.errors import ConfigError
from epslots.progress import Advance, counting


@dataclass(frozen=True)
class Part:
    """One part of the bench.

    Attributes:
        measure: its tables, by their titles; takes a folder for host stores, rounds, and what counts the rows.
        rows: of its tables.
    """

    measure: Callable[[Path, int, Advance], Tables]
    rows: int


PARTS = {
    "throughput": Part(measure_throughput, THROUGHPUT_ROWS),
    "generate": Part(measure_generate, GENERATE_ROWS),
    "caches": Part(measure_caches, CACHE_ROWS),
    "latents": Part(measure_latents, LATENT_ROWS),
    "arrivals": Part(measure_arrivals, ARRIVAL_ROWS),
    "grammars": Part(measure_grammars, GRAMMAR_ROWS),
    "memory": Part(measure_memory, MEMORY_ROWS),
}


def bench_batch(report: BenchReport, cache_dir: Path, *, rounds: int = 5, parts: str = ",".join(PARTS)) -> None:
    """Throughput, latency and memory of requests in batches.

    Steps against ``generate``, rows against pages, latents, newcomers' effect on running requests, grammars, and the exchange
    of memory between cache and slots.

    Args:
        parts: names in ``PARTS``, with commas between them.

    Raises:
        ConfigError: there is no such part.
    """
    chosen = parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]!r}: allowed: {', '.join(PARTS)}")
    report.result["threads"] = torch.get_num_threads()
    for name in chosen:
        with torch.no_grad(), counting(f"batch, {name}: rows", PARTS[name].rows) as advance:
            tables = PARTS[name].measure(cache_dir, rounds, advance)
        for title, rows in tables.items():
            report.table(title, rows)
