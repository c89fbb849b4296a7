"""The bounds of a run of operations: each moment of a device's computing time goes to one reason. Pure.

``bounds_of`` walks along the kernels of a device in the order in which they ran:

    HBM, compute   a kernel runs, and as long as its bytes, or its products, take
    floor          a kernel runs, and is over sooner than any kernel can be
    link           a kernel reads the host's memory, or the next one waits for a copy
    sync           the host waited for the device, and so has queued nothing yet
    host           the host was busy, and has queued nothing yet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.timeline import Operation


@dataclass(frozen=True)
class Bounds:
    """Seconds by reason; their sum is the time from the first moment to the last.

    Attributes:
        link_busy: seconds in which a copy to the device was in progress, alone or beside other work.
    """

    hbm: float
    compute: float
    floor: float
    link: float
    sync: float
    host: float
    link_busy: float

    @property
    def total(self) -> float:
        return sum(self.by_reason.values())

    @property
    def by_reason(self) -> dict[str, float]:
        """Seconds by the reason's name."""
        names = {"HBM": self.hbm, "compute": self.compute, "floor": self.floor}
        return names | {"link": self.link, "sync": self.sync, "host": self.host}

    @property
    def largest(self) -> str:
        """The reason with the most seconds."""
        return max(self.by_reason, key=self.by_reason.__getitem__)


def bounds_of(
    operations: Sequence[Operation], waits: Sequence[tuple[float, float]], spec: GpuSpec, began_s: float, ended_s: float
) -> Bounds:
    """Divide the time from ``began_s`` to ``ended_s`` among the reasons.

    Args:
        operations: of one device, all served.
        waits: when the host waited in the driver: begin and end, in order.
    """
    seconds = dict.fromkeys(("hbm", "compute", "floor", "link", "sync", "host"), 0.0)
    free_s = began_s
    kernels = sorted((o for o in operations if o.engine.startswith("SM")), key=lambda o: o.start_s or 0.0)
    for kernel in kernels:
        assert kernel.start_s is not None and kernel.end_s is not None
        start_s, end_s = max(kernel.start_s, free_s), min(kernel.end_s, ended_s)
        if start_s >= ended_s:
            break
        _divide_gap(seconds, free_s, start_s, kernel, waits)
        if end_s > start_s:
            seconds[_kind(kernel, spec)] += end_s - start_s
            free_s = end_s
    _add_wait(seconds, free_s, ended_s, waits)  # the host's last words
    copies = [o for o in operations if o.engine.startswith("H2D") or (o.over_link and _kind(o, spec) == "link")]
    busy = sum(max(0.0, min(o.end_s or 0.0, ended_s) - max(o.start_s or 0.0, began_s)) for o in copies)
    return Bounds(**seconds, link_busy=busy)


def _divide_gap(
    seconds: dict[str, float], free_s: float, start_s: float, kernel: Operation, waits: Sequence[tuple[float, float]]
) -> None:
    """Give the time before a kernel to what it came last of: the host, which queued it, or a copy."""
    if start_s <= free_s:
        return
    queued_s = min(max(kernel.queued_s, free_s), start_s)
    _add_wait(seconds, free_s, queued_s, waits)
    # Queued, and yet not begun with a free device: it follows a copy, by an event or on its own stream.
    seconds["link"] += start_s - queued_s


def _add_wait(seconds: dict[str, float], begin_s: float, end_s: float, waits: Sequence[tuple[float, float]]) -> None:
    if end_s <= begin_s:
        return
    waited = sum(max(0.0, min(end_s, stop) - max(begin_s, start)) for start, stop in waits)
    seconds["sync"] += waited
    seconds["host"] += end_s - begin_s - waited


def _kind(kernel: Operation, spec: GpuSpec) -> str:
    reads_link = kernel.over_link and kernel.duration_s > spec.kernel_s + spec.node_s
    if reads_link and kernel.duration_s > kernel.nbytes / spec.memory_rate:
        return "link"
    if kernel.duration_s <= (spec.kernel_s + spec.node_s) * (1 + 1e-9):  # of a graph or not
        return "floor"
    by_bytes_s = kernel.nbytes / spec.memory_rate + spec.node_s
    return "hbm" if by_bytes_s >= kernel.duration_s * (1 - 1e-9) else "compute"
