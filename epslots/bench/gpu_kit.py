"""``GpuKit``: the device, the deadline and the results of all steps of ``bench gpu``."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import epslots
from epslots.bench.models import random_config, release
from epslots.bench.report import Tables

Rows = Sequence[Mapping[str, Any]]
# A whole expert of Qwen3-30B-A3B's layers is 9.4 MB: a layer of 128 takes 1.2 GB, and all 48 take too long to make.
_MOST_LAYERS, _LAYER_BYTES, _SPARE_BYTES = 12, 128 * 9_437_184, 5 << 30


@dataclass(frozen=True)
class KitSizes:
    """How much is measured.

    Attributes:
        model: whose decoding is timed.
        steps: decoding steps of a measurement.
        repeats: of a short measurement.
        copy_bytes: of a large copy.
        rows: of a large matrix product.
        drawn_on_device: whether the device draws random weights: a CPU takes minutes for many.
    """

    model: Qwen3MoeConfig
    steps: int
    repeats: int
    copy_bytes: int
    rows: int
    drawn_on_device: bool = False


def sizes_for(device: torch.device, free_bytes: int) -> KitSizes:
    """Experts of Qwen3-30B-A3B, in as many layers as fit; on the CPU a small model, to try the code."""
    if device.type != "cuda":
        return tiny_sizes()
    layers = max(2, min(_MOST_LAYERS, (free_bytes - _SPARE_BYTES) // _LAYER_BYTES))
    shape = {"hidden": 2048, "experts": 128, "top_k": 8, "width": 768, "vocab": 151_936, "heads": 16}
    return KitSizes(
        random_config(layers=layers, **shape), steps=32, repeats=20, copy_bytes=1 << 28, rows=8192, drawn_on_device=True
    )


def tiny_sizes() -> KitSizes:
    """Enough to try the code."""
    shape = {"hidden": 64, "experts": 16, "top_k": 4, "width": 32, "vocab": 320, "heads": 4}
    return KitSizes(random_config(layers=2, **shape), steps=2, repeats=2, copy_bytes=1 << 16, rows=64)


@dataclass
class StepOutcome:
    """How one step went.

    Attributes:
        state: "done", "skipped" or "failed".
        why: the reason of the last two.
        seconds: taken.
        tables: found, by title.
    """

    step: str
    state: str
    why: str = ""
    seconds: float = 0.0
    tables: Tables = field(default_factory=dict)


def load_plain(folder: Path, device: torch.device) -> PreTrainedModel:
    """Plain transformers on the device, in the checkpoint's dtype."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device}).eval()


@dataclass
class GpuKit:
    """One run of the kit.

    Attributes:
        device: that is measured.
        cache_dir: of host stores.
        sizes: how much is measured.
        budget_s: seconds for all steps.
        load, plain: load a checkpoint by ``epslots.load``, and by transformers; tests replace them.
        facts: numbers that later steps read: the measured costs, hit rates, seconds a step.
        outcomes: of the steps so far.
        running: the name of the step that runs; of several, the innermost.
    """

    device: torch.device
    cache_dir: Path
    sizes: KitSizes
    budget_s: float
    load: Callable[..., PreTrainedModel] = epslots.load
    plain: Callable[[Path, torch.device], PreTrainedModel] = load_plain
    clock: Callable[[], float] = time.monotonic
    facts: dict[str, Any] = field(default_factory=dict)
    outcomes: list[StepOutcome] = field(default_factory=list)
    running: str = ""

    def __post_init__(self) -> None:
        self._began_s = self.clock()

    @property
    def left_s(self) -> float:
        """Seconds that are left of the budget."""
        return self.budget_s - (self.clock() - self._began_s)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def step(self, name: str, needs_s: float, run: Callable[[], Tables], *, gpu_only: bool = False) -> bool:
        """Make one step if there is time for it; returns whether it was done. Its errors are part of the result.

        Args:
            needs_s: seconds that it takes at most on any GPU that it is made for.
        """
        if gpu_only and not self.on_gpu:
            return self._skip(name, "needs a GPU")
        if needs_s > self.left_s:
            return self._skip(name, f"{max(0.0, self.left_s):.0f} s are left, and it may take {needs_s:.0f}")
        began_s = self.clock()
        outcome = StepOutcome(name, "done")
        around, self.running = self.running, name
        try:
            outcome.tables = run()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            why = " ".join(str(error).split())[:300]
            outcome.state = "failed"
            outcome.why = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {why}"
        self.running = around
        release()
        outcome.seconds = self.clock() - began_s
        self.outcomes.append(outcome)
        print(f"{name}: {outcome.state} in {outcome.seconds:.1f} s {outcome.why}", flush=True)
        return outcome.state == "done"

    def _skip(self, name: str, why: str) -> bool:
        self.outcomes.append(StepOutcome(name, "skipped", why))
        return False
