"""``epslots bench``: the project's figures, measured on this machine."""

from __future__ import annotations

import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from epslots.cli.options import DeviceOption
from epslots.errors import ConfigError

BENCHMARKS = ("overhead", "start", "fetch", "sweep", "offload", "exchange", "ranks", "misses")
# Of whatever is installed beside epslots: each is called with a report, a folder for host stores, and the settings given.
MORE = {entry.name: entry for entry in entry_points(group="epslots.benchmarks")}


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join((*BENCHMARKS, *MORE))}.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder to save the result (JSON) and its plot (PNG) in.")
    ] = None,
    rounds: Annotated[Optional[int], typer.Option(min=1, help="Timed rounds; default: the benchmark's own.")] = None,
    minutes: Annotated[Optional[float], typer.Option(min=0.0, help="soak: how long; default: 10.")] = None,
    threads: Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    device: DeviceOption = None,
) -> None:
    """Measure one thing, as ratios within one run.

    overhead: all experts resident, against plain transformers on the same weights (CPU).
    start: first and second load of a 1 GiB checkpoint, against from_pretrained; peak memory (CPU).
    fetch: one expert from host store to slot, against a plain copy of as many bytes.
    sweep: hit rate and tokens/s of the example model from 12.5 % slots to all (CPU).
    exchange: exchange and plan of one layer on 2 ranks, against the bare collectives of the same sizes; the plan alone (CPU).
    ranks: hit rate and bytes of 1, 2 and 4 ranks that share one distributed cache, against caches on their own (CPU).
    misses: modelled time and bytes of the ways to serve a miss, with emulated links.
    offload: tokens/s from 25 % slots to all, against plain transformers resident and accelerate's CPU offload; on a GPU a
    model of Qwen3-30B-A3B's shape, on the CPU a small one.

    With Ray, on a cluster of 2 ranks of this machine (CPU):

    cluster-start: seconds until a cluster serves, and where they go; what it costs to stand idle.
    throughput: Cluster.generate against the same ranks without Ray.
    recovery: from the SIGKILL of a rank in the middle of its work to the next token; requests lost, tokens different.
    soak: requests, kills, stops, joins and leaves at random, for minutes; what is lost, different, or left behind.
    """
    if name not in (*BENCHMARKS, *MORE):
        raise ConfigError(f"benchmark {name!r}: allowed: {', '.join((*BENCHMARKS, *MORE))}")
    if minutes is not None and name != "soak":
        raise ConfigError(f"--minutes is for soak; {name} takes --rounds")

    import torch

    from epslots.bench import exchange, fetch, misses, offload, overhead, ranks, start, sweep
    from epslots.bench.report import Report
    from epslots.loading import resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    target = resolve_device(device if name in ("fetch", "offload") else "cpu")
    report = Report(name, target, output)
    given = {"rounds": rounds, "minutes": minutes}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as folder:
        cache_dir = Path(folder) / "cache"
        match name:
            case "overhead":
                overhead.bench_overhead(report, cache_dir, **settings)
            case "start":
                start.bench_start(report, cache_dir, **settings)
            case "fetch":
                fetch.bench_fetch(report, cache_dir, target, **settings)
            case "sweep":
                sweep.bench_sweep(report, cache_dir, **settings)
            case "exchange":
                exchange.bench_exchange(report, cache_dir, **settings)
            case "ranks":
                ranks.bench_ranks(report, cache_dir)
            case "misses":
                misses.bench_misses(report, cache_dir)
            case "offload":
                offload.bench_offload(report, cache_dir, target)
            case _:
                MORE[name].load()(report, cache_dir, **settings)
    report.save()
