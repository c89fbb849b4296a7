"""``epslots bench``: the project's figures, measured on this machine."""

from __future__ import annotations

import signal
import tempfile
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Optional

import typer

from epslots.bench.catalogue import BENCHES
from epslots.cli.options import DeviceOption
from epslots.errors import ConfigError

# Benches of packages beside epslots, such as cluster; called alike.
FURTHER_BENCHES = {entry.name: entry for entry in entry_points(group="epslots.benchmarks")}
NAMES = (*BENCHES, *FURTHER_BENCHES)

_OWN_BENCHES = "\n\n".join(one.help_line for one in BENCHES.values())
HELP = f"""Run a benchmark: ratios measured within one run.

On the CPU, but for those that take --device.

{_OWN_BENCHES}

With Ray, on a cluster of 2 ranks of this machine (CPU):

cluster-start: Seconds until a cluster serves, by stage; processor time of an idle cluster.

throughput: Cluster.generate against the same ranks without Ray.

recovery: Seconds from the SIGKILL of a busy rank to the next token; requests lost, tokens different.

soak: Requests, kills, stops, joins and leaves at random, for minutes; requests lost or different, and leaks.

groups: Groups of ranks: streams beside long prompts with roles and without, kills, hand-overs, two groups against one; and
routing over 1,024 ranks, nothing computed. Takes --parts.

simulated-groups: SIMULATED, 1,024 ranks in 16 groups: times to the first and to each token over load, with roles and without.

serve: The service: tokens/s over HTTP against Cluster.generate, time to the first token, SIGKILLs of ranks and of the driver,
restarts of Ray's GCS, processor time when idle. Takes --parts and --redis.

serve-soak: Users over HTTP who ask, leave and read slowly, while ranks are killed, for minutes; requests lost, and leaks.

The recorded figures, and what bounds them: examples/benchmarks/RESULTS.md
"""


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder to save the result (JSON) and its plot (PNG) in.")
    ] = None,
    rounds: Annotated[Optional[int], typer.Option(min=1, help="Timed rounds; default: the benchmark's own.")] = None,
    minutes: Annotated[
        Optional[float], typer.Option(min=0.0, help="gpu, soak, serve-soak: how long; default: 8, 10, 10.")
    ] = None,
    threads: Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    parts: Annotated[
        Optional[str],
        typer.Option(
            help="Names of parts, with commas between them; default: all. batch: throughput, generate, caches, latents, "
            "arrivals, grammars; groups: routing, bursts, kills, hand-over, division; packed: cpu, formats, peer, memory, "
            "quality; serve: throughput, first, ranks, driver, idle, gcs."
        ),
    ] = None,
    redis: Annotated[
        Optional[str], typer.Option(help="serve: program of a Redis server, for the state of Ray's GCS; default: RocksDB.")
    ] = None,
    gpu: Annotated[
        Optional[str], typer.Option(help="timeline: h100 (default), h200, a100, b200, 4090, 5090; several with commas.")
    ] = None,
    model: Annotated[Optional[str], typer.Option(help="timeline: a known model; default: qwen3-30b-a3b.")] = None,
    slots: Annotated[Optional[str], typer.Option(help="timeline: shares of slots; default: 25%,50%,100%.")] = None,
    device: DeviceOption = None,
) -> None:
    """Run the bench ``name``; ``HELP`` is the command's help."""
    if name not in NAMES:
        raise ConfigError(f"benchmark {name!r}: allowed: {', '.join(NAMES)}")

    import torch

    from epslots.bench.report import BenchReport
    from epslots.compiled import prepare
    from epslots.devices import resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    one = BENCHES.get(name)
    takes_device = one is not None and one.takes_device
    target = resolve_device(device if takes_device else "cpu")
    report = BenchReport(name, target, output)
    run = FURTHER_BENCHES[name].load() if one is None else resolve_name(f"epslots.bench.{one.module}:bench_{name}")
    given = {"rounds": rounds, "minutes": minutes, "parts": parts, "redis": redis, "gpu": gpu, "model": model, "slots": slots}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if unknown := [key for key in settings if key not in signature(run).parameters]:
        raise ConfigError(f"--{unknown[0]}: benchmark {name} takes none")
    prepare()
    signal.signal(signal.SIGTERM, _stop)  # as after Ctrl-C, no folder stays behind
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as folder:
        run(report, Path(folder) / "cache", *((target,) if takes_device else ()), **settings)
    report.save()


def _stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)
