"""The price of reaching a new placement: step times with and without movement, on gloo ranks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

import epslots
from epslots.bench.models import load_fp32, random_checkpoint, random_config
from epslots.bench.processes import run_ranks
from epslots.bench.report import BenchReport
from epslots.example import example_model
from epslots.group.rank_group import group_of
from epslots.placement.model_planner import movement_budget
from epslots.placement.placement import Placement
from epslots.transport.torch_transport import TorchTransport

RANKS = 4
SLOTS = 12
SHARE = 0.1  # of a step's time, for migrations: the controller's own value
CONTEXT = 256  # tokens after which a sequence starts again
BATCH = 4  # sequences of each rank


def bench_rebalance(report: BenchReport, cache_dir: Path, *, rounds: int = 16) -> None:
    """Decoding on four ranks; each round offers a placement by which half of the wanted experts move.

    Steps with migrations under way are held against the other steps of the same rounds. Beside it the same without a budget:
    each layer moves as much as it can at once.
    """
    config = random_config(layers=6, hidden=512, experts=32, top_k=4, width=256, heads=8)
    with random_checkpoint(config, torch.float32) as larger:
        for name, folder in {"the example model": example_model(), "random, 1.5 MiB an expert": larger}.items():
            rows = []
            for budget, share in {f"{SHARE:.0%} of a step": SHARE, "none": 1e6}.items():
                ranks = run_ranks(_serve, RANKS, str(folder), str(cache_dir), SLOTS, share, rounds)
                rows.append({"slots of 32": SLOTS, "budget": budget, **_compare(ranks)})
            report.table(f"{name}, {RANKS} gloo ranks, {BATCH} sequences each: step times with movement / without", rows)


def _compare(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks take each step together; the slowest rank's time is the step's."""
    seconds = np.max([rank["seconds"] for rank in ranks], axis=0)
    moving = np.array(ranks[0]["moving"])
    with_, without = seconds[moving], seconds[~moving]
    return {
        "steps with": int(moving.sum()),
        "steps without": int((~moving).sum()),
        "experts moved": sum(rank["migrated"] for rank in ranks),
        "P50": float(np.percentile(with_, 50) / np.percentile(without, 50)),
        "P99": float(np.percentile(with_, 99) / np.percentile(without, 99)),
        "worst": float(with_.max() / without.max()),
        "ms a step": float(np.median(without) * 1e3),
    }


def _serve(transport: TorchTransport, folder: str, cache_dir: str, slots: int, share: float, rounds: int) -> dict[str, Any]:
    model = load_fp32(Path(folder), cache_dir, slots=slots, group=transport)
    group = group_of(model)
    assert group is not None
    decode = _EndlessDecoding(model, transport.rank)
    for _ in range(CONTEXT // 4):
        decode.step()
    # All ranks must have the same budget; the first one's clock decides.
    own_s = np.median([decode.step() for _ in range(50)])
    step_s = float(transport.to_host(transport.all_gather(torch.tensor([own_s])))[0, 0])
    size = group.shared.layers[0].expert_bytes
    budget = movement_budget(step_s, group.costs[0], size, share)
    seconds: list[float] = []
    moving: list[bool] = []
    generator = np.random.default_rng(0)  # the same on all ranks
    for _ in range(rounds):
        group.offer(_other(group.placement, generator), budget)
        steps_with = 0
        while steps_with < 2 or group.pending_migrations:
            seconds.append(decode.step())
            moving.append(True)
            steps_with += 1
        for _ in range(max(60, steps_with)):
            seconds.append(decode.step())
            moving.append(False)
    migrated = sum(layer.migrations for layer in epslots.stats(model).layers)
    return {"seconds": seconds, "moving": moving, "migrated": migrated}


class _EndlessDecoding:
    """A batch of sequences that grow by a token a step, and start again when they are long."""

    def __init__(self, model: PreTrainedModel, rank: int) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(rank)
        self._begin()

    def _begin(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        vocabulary = self._model.config.get_text_config().vocab_size
        self._ids = torch.randint(vocabulary, (BATCH, 1), generator=self._generator)
        self._length = 0

    def step(self) -> float:
        """Seconds of a step."""
        if self._length == CONTEXT:
            self._begin()
        began = time.perf_counter()
        with torch.no_grad():
            logits = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True).logits[:, -1]
        seconds = time.perf_counter() - began
        chance = torch.softmax(logits.float(), -1)
        self._ids = torch.multinomial(chance, 1, generator=self._generator)
        self._length += 1
        return seconds


def _other(last: Placement, generator: np.random.Generator) -> Placement:
    """The next placement: each rank wants as many experts as it has slots, about half of them new to it."""
    layers, ranks, experts = last.wanted_LRE.shape
    wanted_LRE = np.zeros_like(last.wanted_LRE)
    home_LE = last.home_LE.copy()
    for layer in range(layers):
        owner_E = generator.permutation(experts) % ranks
        stays_E = generator.random(experts) < 0.5
        home_LE[layer] = np.where(stays_E, last.home_LE[layer], owner_E)
        for rank in range(ranks):
            mine = np.flatnonzero(home_LE[layer] == rank)[: last.quota_LR[layer, rank]]
            wanted_LRE[layer, rank, mine] = True
    return replace(last, version=last.version + 1, home_LE=home_LE, wanted_LRE=wanted_LRE)
