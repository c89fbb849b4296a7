"""Shared by all benches: timing candidates in turn, rows of ratios, and a report as tables, JSON and plots.

A bench is a function ``bench_<name>(report, cache_dir, ...)``. It names its candidates (what is compared) and its cases (the
rows), lets ``compare`` time them, and hands each table to the report. ``catalogue.py`` lists all benches.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil
import torch
import transformers
from rich.table import Table

from epslots._version import __version__
from epslots.host_limits import total_memory, usable_cores
from epslots.streams import table_console

Candidates = Mapping[str, Callable[[], object]]
Tables = dict[str, list[dict[str, Any]]]
"""Rows of tables by their titles."""
MS, US = 1e3, 1e6


def alternate(
    candidates: Candidates,
    rounds: int,
    warm_up: int = 2,
    device: torch.device | None = None,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. Candidates take turns, so that other load on the machine hits all alike.

    Args:
        meet: called before each run, which begins when it returns: ranks wait for each other in it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, rounds):
        for name, run in candidates.items():
            synchronise(device)
            meet()
            began = time.perf_counter()
            run()
            synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def contenders(candidates: Candidates, always: str) -> Candidates:
    """``always``, and the other candidates that are at most 2.5 times slower than the fastest of them.

    The second run of each decides. Otherwise most of a bench's time would go to one slow candidate.
    """
    others = {name: run for name, run in candidates.items() if name != always}
    look = {name: seconds[0] for name, seconds in alternate(others, 1, 1).items()}
    fastest = min(look.values())
    return {always: candidates[always]} | {name: others[name] for name in others if look[name] <= 2.5 * fastest}


def synchronise(device: torch.device | None) -> None:
    """Wait for a GPU to finish; nothing on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "p25": float(low), "p75": float(high)}


def ratio_of_rounds(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Our time over theirs, round by round: median and quartiles of the ratios."""
    return spread(np.asarray(ours) / np.asarray(theirs))


def medians(seconds: Mapping[str, Sequence[float]], unit: float) -> dict[str, float]:
    """Each candidate's median time in ``1 / unit`` seconds."""
    return {name: median(values) * unit for name, values in seconds.items()}


def ratio_columns(ours: Sequence[float], theirs: Sequence[float], heading: str = "ratio") -> dict[str, float]:
    """Our time over theirs as three columns of a row: the median under ``heading``, then the quartiles."""
    ratio = ratio_of_rounds(ours, theirs)
    return {heading: ratio["median"], "p25": ratio["p25"], "p75": ratio["p75"]}


def compare(
    candidates: Candidates, ours: str, theirs: str, rounds: int, unit: float, heading: str = "ratio", **timing: Any
) -> dict[str, float]:
    """A row: the median of each candidate, and ``ours`` over ``theirs`` round by round, with quartiles.

    Args:
        unit: ``MS`` or ``US``.
        heading: of the ratio's column.
        timing: further arguments of ``alternate``.
    """
    seconds = alternate(candidates, rounds, **timing)
    return medians(seconds, unit) | ratio_columns(seconds[ours], seconds[theirs], heading)


def machine(device: torch.device) -> dict[str, Any]:
    """Where a result was measured."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_GiB": round(total_memory() / 2**30, 1),
        "device": str(device),
        "temporary_files_on": _file_system(Path(tempfile.gettempdir())),  # checkpoints and stores: tmpfs is memory
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _file_system(folder: Path) -> str:
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[at] for at in (folder.resolve(), *folder.resolve().parents) if at in mounts), "unknown")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class BenchReport:
    """The result of one bench. It is printed as tables and saved as JSON, with a plot beside it where the bench draws one.

    Args:
        name: the bench's name, and the file's.
        device: the device that is measured.
        output: a folder to save into; nothing is saved without one.
    """

    def __init__(self, name: str, device: torch.device, output: Path | None) -> None:
        self.name = name
        self.output = output
        self.result: dict[str, Any] = {
            "benchmark": name,
            "command": "epslots " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "versions": {
                "epslots": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numba": numba.__version__,
                "python": platform.python_version(),
            },
            "machine": machine(device),
        }

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows under ``title`` to the result, and print them."""
        self.result[title] = [dict(row) for row in rows]
        table = Table(title=title, title_justify="left")
        for heading in rows[0]:
            table.add_column(heading, justify="left" if isinstance(rows[0][heading], str) else "right")
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        table_console(160).print(table)

    def plot(self, draw: Callable[[Path], None]) -> None:
        """Let ``draw`` write ``<output>/<name>.png``, if there is an output folder."""
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            draw(self.output / f"{self.name}.png")

    def save(self) -> None:
        """Write ``<output>/<name>.json``, if there is an output folder."""
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            path = self.output / f"{self.name}.json"
            path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            print(f"saved {path}")


@contextmanager
def axes_of_plot(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Axes [rows, columns] of a figure of ``size`` inches, with a grid and legends. Saved at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
