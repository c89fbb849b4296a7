"""``epslots bench``: the project's figures, measured on this machine."""

from __future__ import annotations

import tempfile
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Optional

import typer

from epslots.cli.options import DeviceOption
from epslots.errors import ConfigError

# Each is ``epslots.bench.<name>.bench_<name>``, called with a report, a folder for host stores, and the settings given.
BENCHMARKS = (
    *("overhead", "start", "fetch", "sweep", "offload", "exchange", "ranks", "misses"),
    *("placement", "quotas", "rebalance", "simulate"),
    *("eviction", "predict", "overlap", "latency", "decode", "invariant"),
)
_ON_DEVICE = ("fetch", "offload", "decode")  # these take the device as well; the others measure the CPU
# Of whatever is installed beside epslots; called alike.
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
    exchange: exchange and plan of one layer on 2 ranks, against bare collectives of counts and rows; the plan alone (CPU).
    ranks: hit rate and bytes of 1, 2 and 4 ranks that share one distributed cache, against caches on their own (CPU).
    placement: the planner against EPLB: known loads, their speed, the next window of shifting traffic.
    quotas: hit rates with slots dealt to layers by measured need, against equal ones and the optimum.
    simulate: how fast clusters are simulated, up to 1,024 ranks; the simulator against real ranks.
    eviction: hits of each policy as a share of the optimum's, over models, kinds of text, sizes and batches.
    predict: recall of the next layers' experts, calibration, cost, loss of the approximate mode (CPU).
    latency: P50/P95/P99 per token, to the first token, and tokens/s for 1 to 64 requests at 25, 50 and 100 % slots (CPU).
    decode: tokens/s of captured decoding from 25 % slots to all, against plain transformers resident and accelerate's CPU
    offload; copies into slots against the link. On a GPU a model of Qwen3-30B-A3B's shape, on the CPU a small one.
    invariant: step times with batch_invariant, against those without (CPU).
    overlap: time per token at 25 % slots, fetches hidden behind computing, against waiting for each (emulated link, CPU).
    rebalance: step times of 4 ranks while a new placement is reached, against those of steady steps (CPU).
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

    import torch

    from epslots.bench.report import BenchReport
    from epslots.compiled import prepare
    from epslots.devices import resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    target = resolve_device(device if name in _ON_DEVICE else "cpu")
    report = BenchReport(name, target, output)
    run = MORE[name].load() if name in MORE else resolve_name(f"epslots.bench.{name}:bench_{name}")
    given = {"rounds": rounds, "minutes": minutes}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if unknown := [key for key in settings if key not in signature(run).parameters]:
        raise ConfigError(f"--{unknown[0]}: benchmark {name} takes none")
    prepare()
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as folder:
        run(report, Path(folder) / "cache", *((target,) if name in _ON_DEVICE else ()), **settings)
    report.save()
