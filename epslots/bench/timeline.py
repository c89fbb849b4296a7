"""Predicted time a token on GPUs that aren't here: the real sequence of operations, timed by a simulated device's clock.

The model has the true layers, experts and choices, and tiny widths; kernels and copies take the time of the true widths by
data sheets (``gpu_spec.py``). Routing has the hit rates of recorded traces. A prediction is no measurement: kernels that reach
less than the data sheet's rates, and a slower or faster host, change it.

One rank and two ranks of each kind of GPU have processes of their own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from epslots.bench.needed_hits import TokenTimes
from epslots.bench.predicted_ranks import RankRun, predicted_ranks
from epslots.bench.predicted_steps import PLAN_MISSES_S, PLAN_S, RECALL, PredictedSteps, StepTimes, predicted_steps
from epslots.bench.report import MS, BenchReport, Tables
from epslots.errors import ConfigError
from epslots.host_limits import usable_cores
from epslots.models.known_shapes import known_model
from epslots.simulated_gpu.gpu_spec import GPUS, GpuSpec

# Hit rates of the default policy, without prefetching, by share of slots: the shipped model on text (``bench sweep``), and
# DeepSeek-V2-Lite's 64 experts, top-6, on a recorded routing trace.
HIT_RATES = {
    "shipped model": {0.125: 0.308, 0.25: 0.701, 0.5: 0.924, 0.75: 0.967},
    "DeepSeek-V2-Lite": {0.125: 0.335, 0.25: 0.512, 0.5: 0.741, 0.75: 0.902},
}

# Tokens/s with half of the slots, over those with all of them.
AIM_SLOTS, AIM = 0.5, 0.85
# Bits of a weight in a record, with its share of scales: bf16, and 4 bits with a scale for each 32.
BF16_BITS, PACKED_BITS = 16.0, 4.5
# The share of experts in slots whose memory is spent on packed slots, too.
SAME_MEMORY = 0.25
# Layers that two ranks run: all of them would take minutes.
RANKS_LAYERS = 8

Rows = list[dict[str, Any]]


def bench_timeline(
    report: BenchReport,
    cache_dir: Path,
    *,
    gpu: str = "h100",
    model: str = "qwen3-30b-a3b",
    slots: str = "25%,50%,100%",
    rounds: int = 3,
    layers: int | None = None,
) -> None:
    """Decoding of one request with each share of slots, on simulated GPUs.

    Args:
        gpu: of ``GPUS``; several with commas between them.
        model: a known model of one of ``tiny_twin.ARCHITECTURES``.
        slots: shares of the experts, with commas between them.
        rounds: steps that are timed.
        layers: of the model that is run; None = as many as it has.

    Raises:
        ConfigError: an argument is not one of those allowed.
    """
    specs = [_spec(name.strip()) for name in gpu.split(",")]
    shares = [_share(part) for part in slots.split(",")]
    report.result.update(predicted=True, model=model)
    report.table("costs, by data sheets and estimates", [_costs_row(spec) for spec in specs])
    arguments: dict[str, Any] = {"model": model, "shares": shares, "cache_dir": cache_dir, "steps": rounds, "layers": layers}
    parts: tuple[Callable[..., Tables], ...] = _one_rank, _two_ranks
    tasks = [(part, spec) for part in parts for spec in specs]  # the long ones first
    with ProcessPoolExecutor(min(len(tasks), usable_cores()), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(part, spec, **arguments) for part, spec in tasks]
        tables = [one.result() for one in found]
    for number in range(len(specs)):
        for title, rows in [table for one in tables[number :: len(specs)] for table in one.items()]:
            report.table(title, rows)


def _one_rank(spec: GpuSpec, *, model: str, shares: list[float], cache_dir: Path, steps: int, layers: int | None) -> Tables:
    """The tables of one kind of GPU; in a process of its own."""
    config, folder = _begin(model, cache_dir)
    with predicted_steps(config, folder, layers=layers, steps=steps) as run:
        return _tables(spec, model, run, shares)


def _two_ranks(spec: GpuSpec, *, model: str, cache_dir: Path, steps: int, layers: int | None, **_: Any) -> Tables:
    """The table of two GPUs of one kind; in a process of its own."""
    config, folder = _begin(model, cache_dir)
    few = min(RANKS_LAYERS, layers or config.num_hidden_layers)
    with predicted_ranks(config, folder, layers=few, steps=steps) as run:
        return _tables_of_ranks(spec, model, run)


def _begin(model: str, cache_dir: Path) -> tuple[PreTrainedConfig, Path]:
    """The model's configuration, and a folder for this process."""
    torch.set_num_threads(1)  # tiny tensors gain nothing by more
    _, skeleton = known_model(model)
    return skeleton.config, cache_dir / str(os.getpid())


def _tables(spec: GpuSpec, model: str, run: PredictedSteps, shares: list[float]) -> Tables:
    rows: Rows = []
    reasons: Rows = []
    captured_resident = run(spec, 1.0, captured=True)
    for path, captured in (("captured", True), ("usual", False)):
        resident = captured_resident if captured else run(spec, 1.0)
        for share in [*shares, *_packed_shares(shares)] if captured else shares:
            cases = _cases(share, captured=captured)
            found = [resident] if share == 1 else run.each(spec, share, [case for _, case in cases], captured=captured)
            for (source, (_, bits)), times in zip(cases, found, strict=True):
                slots = f"{100 * share:.3g}%"
                name: dict[str, Any] = {"path": path, "slots": slots, "routing of": source, "record bits": bits}
                rows.append(name | _row(times, resident))
                reasons.append(name | {"ms a token": times.step_s * MS} | _reasons(times))
    return {
        f"PREDICTED: one request of {model} on one {spec.name}": rows,
        f"PREDICTED: ms a token on {spec.name}, by what bounds them": reasons,
        f"PREDICTED: hit rate that {AIM:g} of all resident needs on {spec.name}": _needed(spec, captured_resident),
    }


def _tables_of_ranks(spec: GpuSpec, model: str, run: RankRun) -> Tables:
    """Two ranks that hold everything each, everything together, and as much as one rank with half of the slots."""
    rows: Rows = []
    source, rates = next(iter(HIT_RATES.items()))
    for path, captured in (("in pieces", True), ("usual", False)):
        resident = run(spec, 1.0, captured=captured)
        for share, routing, hit_rate in ((1.0, "any", 1.0), (0.5, "any", 1.0), (0.25, source, _hit_rate(rates, 0.5))):
            found = resident if share == 1 else run(spec, share, hit_rate=hit_rate, captured=captured)
            name: dict[str, Any] = {"path": path, "slots of each": f"{100 * share:g}%", "routing of": routing}
            rows.append(name | {"layers": found.layers} | _row(found, resident) | _reasons(found))
    return {f"PREDICTED: two ranks with a request of {model} each, on two {spec.name}": rows}


def _cases(share: float, *, captured: bool) -> list[tuple[str, tuple[float, float]]]:
    """Each run with a share of slots: its hit rate and where that is from, and bits of a weight in the records.

    The usual path is run by one of the hit rates, and with records as they are.
    """
    if share == 1:
        return [("any", (1.0, BF16_BITS))]
    sources = list(HIT_RATES.items())[: None if captured else 1]
    bits_of_runs: tuple[float, ...] = (BF16_BITS, PACKED_BITS) if captured and share == AIM_SLOTS else (BF16_BITS,)
    if share in _packed_shares([SAME_MEMORY]):
        bits_of_runs = (PACKED_BITS,)
    return [(source, (_hit_rate(rates, share), bits)) for bits in bits_of_runs for source, rates in sources]


def _packed_shares(shares: list[float]) -> list[float]:
    """Of the experts, what packed slots hold in the memory of ``SAME_MEMORY`` unpacked ones, if that is among the shares."""
    return [SAME_MEMORY * BF16_BITS / PACKED_BITS] if SAME_MEMORY in shares else []


def _needed(spec: GpuSpec, resident: StepTimes) -> Rows:
    """For each way to fetch, the hit rate that the aim takes, and what the recorded ones come to."""
    rows: Rows = []
    for bits in (BF16_BITS, PACKED_BITS):
        record_s = resident.expert_bytes * bits / BF16_BITS / spec.link_rate
        for way, recall in (("on demand", None), (f"ahead, {RECALL:.1%} predicted", RECALL)):
            times = TokenTimes(resident.step_s, resident.uses, record_s, recall)
            row: dict[str, Any] = {"record bits": bits, "missing experts come": way, "needed": times.needed_hit_rate(AIM)}
            for source, rates in HIT_RATES.items():
                hit_rate = _hit_rate(rates, AIM_SLOTS)
                row[f"over all resident at {hit_rate:.1%}: {source}"] = resident.step_s / times.seconds(hit_rate)
            rows.append(row)
    return rows


def _spec(name: str) -> GpuSpec:
    if name not in GPUS:
        raise ConfigError(f"gpu={name!r}: allowed: {', '.join(GPUS)}")
    return GPUS[name]


def _share(text: str) -> float:
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = 0.0
    if not percent or rest or not 0 < share <= 1:
        raise ConfigError(f"slots={text!r}: allowed: shares of the experts, such as 25%,50%,100%")
    return share


def _hit_rate(rates: dict[float, float], share: float) -> float:
    """Between the recorded shares, on a straight line; 0 without slots, 1 with all."""
    return float(np.interp(share, [0, *rates, 1], [0, *rates.values(), 1]))


def _costs_row(spec: GpuSpec) -> dict[str, Any]:
    return {
        "GPU": spec.name,
        "HBM GB/s": spec.memory_rate / 1e9,
        "bf16 TFLOPS": spec.flops / 1e12,
        "link GB/s": spec.link_rate / 1e9,
        "launch us": spec.launch_s * 1e6,
        "shortest kernel us": spec.kernel_s * 1e6,
        "wake us": spec.wake_s * 1e6,
        "plan us": PLAN_S * 1e6,
        "plan with misses us": PLAN_MISSES_S * 1e6,
    }


def _row(found: StepTimes, resident: StepTimes) -> dict[str, Any]:
    return {
        "hit rate": found.hit_rate,
        "ms a token": found.step_s * MS,
        "tokens/s": 1 / found.step_s,
        "over all resident": resident.step_s / found.step_s,
        "bound by": found.bound_by,
        "host-bound": (found.by_reason["host"] + found.by_reason["sync"]) / found.step_s,
        "our share of host": found.our_host_s / found.host_s,
        "our kernels a layer": found.kernels.get("epslots", 0.0) / found.layers,
        "syncs a layer": found.syncs / found.layers,
        "MB of experts that arrived": found.fetches * found.expert_bytes / 1e6,
        "link busy": found.link_busy_s / found.step_s,
    }


def _reasons(found: StepTimes) -> dict[str, float]:
    return {name: seconds * MS for name, seconds in found.by_reason.items()}
