"""``bench gpu``: the timeline's predictions for the measured decoding, by the data sheet and by the measured costs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedConfig

from epslots.bench.gpu_kit import GpuKit
from epslots.bench.predicted_steps import predicted_steps
from epslots.bench.report import MS, Tables
from epslots.simulated_gpu.gpu_spec import GPUS, GpuSpec

Runs = Sequence[tuple[float, float, int]]
"""Share of slots, hit rate, and requests of each run."""


def predict(kit: GpuKit, *, apart: bool = True) -> None:
    """Predict every measured row of decoding.

    Args:
        apart: in a process of its own: a simulated GPU stands in the place of torch's.
    """
    kit.step("predictions", 90 if kit.on_gpu else 5, lambda: _predict(kit, _in_a_process if apart else predicted_ms))


def _predict(kit: GpuKit, run: Callable[..., list[float]]) -> Tables:
    measured = [row for row in kit.facts.get("decoding", []) if row["share"] is not None]
    if not measured:
        raise RuntimeError("no decoding was measured")
    runs = [(row["share"], row["hit rate"], row["batch"]) for row in measured]
    sheet = kit.facts.get("sheet") or GPUS["h100"]
    by_sheet = run(sheet, kit.sizes.model, runs)
    spec = kit.facts.get("spec")
    by_costs = run(spec, kit.sizes.model, runs) if spec is not None else [None] * len(runs)
    rows = [
        {"what": row["what"], "batch": row["batch"], "measured ms": row["ms a step"]}
        | _columns(f"predicted for {sheet.name}", row["ms a step"], first)
        | _columns("predicted by measured costs", row["ms a step"], second)
        for row, first, second in zip(measured, by_sheet, by_costs, strict=True)
    ]
    return {"measured and predicted": rows}


def _columns(title: str, measured: float, predicted: float | None) -> dict[str, Any]:
    over = None if predicted is None else measured / predicted
    return {f"{title}, ms": predicted, f"measured over {title}": over}


def _in_a_process(*arguments: Any) -> list[float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(predicted_ms, *arguments).result()


def predicted_ms(spec: GpuSpec, config: PreTrainedConfig, runs: Runs) -> list[float]:
    """Milliseconds of a step in each run."""
    with TemporaryDirectory(prefix="epslots-predicted-") as folder, predicted_steps(config, Path(folder)) as run:
        return [
            run(spec, share, hit_rate=hit_rate if share < 1 else 1.0, requests=requests, captured=True).step_s * MS
            for share, hit_rate, requests in runs
        ]
