"""What every benchmark shares: alternating timings, a result that says where it was measured, and its table."""

from __future__ import annotations

import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    device: torch.device | None = None,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, one after the other in turn, so that a machine's moods hit all alike.

    Args:
        meet: called before each run, which begins when it returns: ranks wait for each other in it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, rounds):
        for name, run in candidates.items():
            _synchronise(device)
            meet()
            began = time.perf_counter()
            run()
            _synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def contenders(
    candidates: Mapping[str, Callable[[], object]], always: str, within: float = 2.5
) -> dict[str, Callable[[], object]]:
    """``always``, and of the others those that a first look (the second run of each) doesn't find hopelessly slow.

    So the rounds measure the race, and not a loser that takes ten times as long.
    """
    others = {name: run for name, run in candidates.items() if name != always}
    look = {name: seconds[0] for name, seconds in alternate(others, 1, 1).items()}
    fastest = min(look.values())
    return {always: candidates[always]} | {name: others[name] for name in others if look[name] <= within * fastest}


def _synchronise(device: torch.device | None) -> None:
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
    """One benchmark's result: printed as a table, and saved as JSON (beside it a plot, where there is one).

    Args:
        name: the benchmark's name, and the file's.
        device: what was measured.
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

    def save(self) -> None:
        """Write ``<output>/<name>.json``, if there is an output folder."""
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            path = self.output / f"{self.name}.json"
            path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            print(f"saved {path}")

    def plot_path(self) -> Path | None:
        """Where this benchmark's plot goes, if anywhere."""
        if self.output is None:
            return None
        self.output.mkdir(parents=True, exist_ok=True)
        return self.output / f"{self.name}.png"
