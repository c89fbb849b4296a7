"""``bench gpu``: the costs that predictions are made of, measured, beside those of the data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from epslots.bench.gpu_kit import GpuKit
from epslots.bench.report import Tables, median
from epslots.device_copy import to_device
from epslots.simulated_gpu.gpu_spec import GPUS, GpuSpec

_SMALL_KERNELS = 500  # queued at a time: fewer than a stream takes before the host waits for it


def measure_costs(kit: GpuKit) -> None:
    """Launches, bandwidths and products; and an upload beside a large copy."""
    kit.step("costs", 20, lambda: _costs(kit), gpu_only=True)
    kit.step("uploads", 10, lambda: _uploads(kit), gpu_only=True)


def known_spec(device: torch.device) -> GpuSpec | None:
    """The data sheet of the GPU that is here; None if there is none of it."""
    name = torch.cuda.get_device_name(device).lower()
    return next((spec for key, spec in GPUS.items() if key in name.replace("-", " ").split() or key in name), None)


def _costs(kit: GpuKit) -> Tables:
    device, repeats = kit.device, kit.sizes.repeats
    small = torch.ones(8, device=device)
    launch_s = median([_launch_seconds(small) for _ in range(repeats)])
    node_s = _graph_node_seconds(small, repeats)
    round_trip_s = _seconds(lambda: small[0].item(), repeats)
    big = torch.empty(kit.sizes.copy_bytes, dtype=torch.uint8, device=device)
    other, host = torch.empty_like(big), torch.empty(big.shape, dtype=torch.uint8, pin_memory=True)
    memory_s = _seconds(lambda: other.copy_(big), repeats)
    link_s = _seconds(lambda: big.copy_(host, non_blocking=True), repeats)
    left = torch.ones(kit.sizes.rows, kit.sizes.rows, dtype=torch.bfloat16, device=device)
    product_s = _seconds(lambda: left @ left, repeats)
    sheet = known_spec(device)
    base = sheet or GPUS["h100"]
    major, minor = torch.cuda.get_device_capability(device)
    measured = msgspec.structs.replace(
        base,
        name=torch.cuda.get_device_name(device),
        capability=(major, minor),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory,
        memory_rate=2 * big.nbytes / memory_s,
        flops=2.0 * kit.sizes.rows**3 / product_s,
        link_rate=big.nbytes / link_s,
        launch_s=launch_s,
        kernel_s=max(node_s - base.node_s, base.node_s),
        wake_s=max(0.0, round_trip_s - 2 * launch_s - base.kernel_s - base.copy_s),
    )
    kit.facts["spec"], kit.facts["sheet"] = measured, sheet
    return {"costs": [_cost_row(*row, measured, sheet) for row in _COSTS]}


_COSTS: tuple[tuple[str, str, float], ...] = (
    ("HBM GB/s", "memory_rate", 1e-9),
    ("bf16 TFLOPS", "flops", 1e-12),
    ("host to device GB/s", "link_rate", 1e-9),
    ("launch us", "launch_s", 1e6),
    ("shortest kernel in a graph us", "kernel_s", 1e6),
    ("wake us", "wake_s", 1e6),
)


def _cost_row(name: str, attribute: str, unit: float, measured: GpuSpec, sheet: GpuSpec | None) -> dict[str, Any]:
    found = getattr(measured, attribute) * unit
    row = {"cost": name, "measured": found, "assumed": None, "measured / assumed": None}
    if sheet is not None:
        assumed = getattr(sheet, attribute) * unit
        row |= {"assumed": assumed, "measured / assumed": found / assumed}
    return row


def _launch_seconds(tensor: torch.Tensor) -> float:
    """The host's time to queue one small kernel."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_SMALL_KERNELS):
        tensor.add_(1)
    seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    return seconds / _SMALL_KERNELS


def _graph_node_seconds(tensor: torch.Tensor, repeats: int) -> float:
    """A small kernel of a graph, with the gap before it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensor.add_(1)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(_SMALL_KERNELS):
            tensor.add_(1)
    return _seconds(graph.replay, repeats) / _SMALL_KERNELS


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time on the device, by events."""
    run()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return median(found)


def _uploads(kit: GpuKit) -> Tables:
    """An upload of 128 numbers on an idle link, and while a large copy is in progress; by us, and by torch."""
    device = kit.device
    host = torch.empty(kit.sizes.copy_bytes, dtype=torch.uint8, pin_memory=True)
    big, numbers = torch.empty(host.shape, dtype=torch.uint8, device=device), torch.arange(128)
    bulk = torch.cuda.Stream()
    pinned = numbers.pin_memory()
    ways = {
        "epslots": lambda: to_device(numbers, device),
        "torch, pinned and non_blocking": lambda: pinned.to(device, non_blocking=True),
    }
    rows = []
    for name, send in ways.items():
        row: dict[str, Any] = {"upload by": name}
        for state in ("idle", "beside a large copy"):
            found = []
            for _ in range(kit.sizes.repeats):
                torch.cuda.synchronize()
                if state != "idle":
                    with torch.cuda.stream(bulk):
                        big.copy_(host, non_blocking=True)
                began = time.perf_counter()
                send()
                torch.cuda.current_stream().synchronize()
                found.append(time.perf_counter() - began)
            row[f"{state}, us"] = median(found) * 1e6
        rows.append(row)
    torch.cuda.synchronize()
    return {"small uploads": rows}
