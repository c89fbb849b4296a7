"""How fast one expert gets from the host store into a slot, against a plain copy of as many bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

import epslots
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import Report, alternate, median, ratio_of_rounds
from epslots.runtime import runtime_of


def bench_fetch(report: Report, cache_dir: Path, device: torch.device, *, rounds: int = 300) -> None:
    """Fetches of 4.5 MiB experts, each into a slot that another gives up, and copies between equal buffers in turn.

    On CUDA the plain copy is from pinned memory, which is the ceiling of the link.
    """
    config = random_config(layers=4, hidden=1024, experts=64, top_k=4, width=768)
    with random_checkpoint(config, torch.bfloat16) as folder:
        model = epslots.load(folder, slots=8, device=device, cache_dir=cache_dir)
        runtime = runtime_of(model)
        mover, experts = runtime.movers[0], 64
        pool = mover.pool
        size = pool.layout.nbytes
        runtime.store.verify()  # a first fetch also takes the record's digest; every later one is what is measured
        source = torch.empty(4 * experts, size, dtype=torch.uint8, pin_memory=device.type == "cuda").random_()
        target = torch.empty(32, size, dtype=torch.uint8, device=device)
        turn = itertools.count()
        plain_turn = itertools.count()

        def fetch() -> None:
            number = next(turn)
            layer, expert = number % 4, np.array([number // 4 % experts])
            slot = np.array([pool.window(layer).start + number // 4 % 8])
            if pool.slot_of[layer, expert[0]] < 0:
                mover.fetch(layer, expert, slot, pool.expert_of[slot].copy())

        def copy() -> None:
            number = next(plain_turn)
            target[number % 32].copy_(source[number % 4 * experts + number // 4 % experts], non_blocking=True)

        seconds = alternate({"fetch": fetch, "copy": copy}, rounds, device=device)
        ratio = ratio_of_rounds(seconds["copy"], seconds["fetch"])
        report.table(
            "one expert, host to slot",
            [
                {
                    "expert MiB": size / 2**20,
                    "fetch us": median(seconds["fetch"]) * 1e6,
                    "copy us": median(seconds["copy"]) * 1e6,
                    "fetch GB/s": size / median(seconds["fetch"]) / 1e9,
                    "copy GB/s": size / median(seconds["copy"]) / 1e9,
                    "of copy": ratio["median"],
                    "p25": ratio["p25"],
                    "p75": ratio["p75"],
                }
            ],
        )
