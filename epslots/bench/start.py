"""Time and memory of a start: first load, second load, plain ``from_pretrained``, each in a fresh process."""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import BenchReport, median

SLOTS = "25%"


def bench_start(report: BenchReport, cache_dir: Path, *, rounds: int = 5) -> None:
    """Loads of a checkpoint of 1 GiB that is in the page cache; imports are not counted."""
    config = random_config(layers=7, hidden=1024, experts=32, top_k=4, width=768)
    with random_checkpoint(config, torch.bfloat16) as folder:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        _in_fresh_process(_plain, folder, cache_dir)  # reads the files into the page cache
        runs: dict[str, list[dict[str, float]]] = {"plain": [], "first load": [], "second load": []}
        for _ in range(rounds):
            shutil.rmtree(cache_dir, ignore_errors=True)
            runs["plain"].append(_in_fresh_process(_plain, folder, cache_dir))
            runs["first load"].append(_in_fresh_process(_ours, folder, cache_dir))
            runs["second load"].append(_in_fresh_process(_ours, folder, cache_dir))
    plain = median([run["seconds"] for run in runs["plain"]])
    rows = []
    for name, results in runs.items():
        seconds = median([run["seconds"] for run in results])
        row: dict[str, Any] = {"load": name, "seconds": seconds, "over plain": seconds / plain}
        row["peak anonymous MiB"] = median([run["peak_anonymous_bytes"] for run in results]) / 2**20
        row["dense + slots MiB"] = median([run["dense_and_slots_bytes"] for run in results]) / 2**20
        row["beyond MiB"] = row["peak anonymous MiB"] - row["dense + slots MiB"] if name != "plain" else None
        rows.append(row)
    report.result["checkpoint_bytes"] = size
    report.result["slots"] = SLOTS
    report.table("start", rows)


def _plain(folder: Path, cache_dir: Path) -> int:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return sum(p.nbytes for p in model.parameters())


def _ours(folder: Path, cache_dir: Path) -> int:
    import epslots
    from epslots.runtime import runtime_of

    model = epslots.load(folder, slots=SLOTS, device="cpu", cache_dir=cache_dir, progress=False)
    return sum(p.nbytes for p in model.parameters()) + sum(loader.pool.nbytes for loader in runtime_of(model).loaders)


def _in_fresh_process(load: Callable[[Path, Path], int], folder: Path, cache_dir: Path) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, load, folder, cache_dir).result()


def _measure(load: Callable[[Path, Path], int], folder: Path, cache_dir: Path) -> dict[str, float]:
    """Seconds of a load, the peak of anonymous memory during it, and the bytes that it holds afterwards."""
    # Imports are the same for all, and are not measured; transformers imports a model when it is first named.
    for module in ("epslots.loading", "transformers.models.qwen3_moe.modeling_qwen3_moe"):
        importlib.import_module(module)
    before = _anonymous_bytes()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(max(peak.pop(), _anonymous_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    loaded_bytes = load(folder, cache_dir)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak_anonymous_bytes": peak[0] - before, "dense_and_slots_bytes": loaded_bytes}


def _anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
