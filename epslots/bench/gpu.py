"""The kit for a GPU: one command that checks, measures and compares with the predictions, in eight minutes at most.

Steps run in the order of their worth, each if the time that is left covers it; those that don't fit are named in the result.
What a step raises is named, too, and the next one begins. One that never ends is ended with the process, after all that was
found before is written.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from epslots.bench.gpu_checks import check, run_tests
from epslots.bench.gpu_costs import measure_costs
from epslots.bench.gpu_decode import measure_decoding
from epslots.bench.gpu_kit import GpuKit, StepOutcome, sizes_for
from epslots.bench.gpu_page import page
from epslots.bench.gpu_predictions import predict
from epslots.bench.gpu_ranks import measure_ranks
from epslots.bench.report import BenchReport
from epslots.devices import memory_limit

PAGE_NAME = "gpu.md"


def bench_gpu(report: BenchReport, cache_dir: Path, device: torch.device, *, minutes: float = 8.0) -> None:
    """All steps on a GPU; on the CPU, at tiny sizes, those that need none.

    Args:
        minutes: for all of them.
    """
    kit = GpuKit(device, cache_dir, sizes_for(device, memory_limit(device).free_bytes), 60 * minutes)
    with ended_in_time(kit, report):
        run_kit(kit, report)


@contextmanager
def ended_in_time(kit: GpuKit, report: BenchReport, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """Within the context, the process ends when the kit's time is over, with a report. A hanging GPU would keep it.

    Args:
        end: ends the process with an exit code.
    """

    def give_up() -> None:
        kit.outcomes.append(StepOutcome(kit.running, "failed", "it didn't end in time, and the process was ended"))
        _report(kit, report)
        report.save()
        for child in multiprocessing.active_children():
            child.kill()
        end(1)

    timer = threading.Timer(kit.budget_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_kit(kit: GpuKit, report: BenchReport) -> None:
    """Make the kit's steps, and report them; the page is beside the JSON."""
    check(kit)
    measure_costs(kit)
    measure_decoding(kit)
    measure_ranks(kit)
    predict(kit, apart=True)
    run_tests(kit)
    _report(kit, report)


def _report(kit: GpuKit, report: BenchReport) -> None:
    report.result["minutes"] = round(kit.budget_s / 60, 1)
    if kit.on_gpu:
        report.result["gpu"] = _gpu_facts(kit.device)
    report.table("steps", [{"step": o.step, "state": o.state, "seconds": o.seconds, "why": o.why} for o in kit.outcomes])
    for outcome in kit.outcomes:
        for title, rows in outcome.tables.items():
            report.table(title, rows)
    if report.output is not None:
        report.output.mkdir(parents=True, exist_ok=True)
        (report.output / PAGE_NAME).write_text(page(report.result, kit.outcomes), encoding="utf-8")


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }
