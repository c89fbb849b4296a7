"""The distributed cache: what N ranks of few slots hit together, against N caches apart and one of N times the slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoTokenizer

import epslots
from epslots.bench.models import LARGE_EXPERTS
from epslots.bench.processes import run_ranks
from epslots.bench.report import BenchReport
from epslots.engine.engine import Engine
from epslots.engine.requests import Request
from epslots.example import example_model
from epslots.planner.cost_model import Costs
from epslots.transport.torch_transport import TorchTransport

SLOTS = 8  # a quarter of the example model's 32 experts a layer
PROMPTS = (
    "def read_json(path):\n",
    "import os\nimport sys\n\nclass Parser:\n    def __init__(self, ",
    '"""Utilities for dates and times."""\n\nfrom datetime import ',
    "    for name, value in self.items():\n        if value is None:\n",
)


def bench_ranks(report: BenchReport, cache_dir: Path, *, new_tokens: int = 64) -> None:
    """Greedy text after a prompt of its own on each of 1, 2 and 4 gloo ranks. The texts must be the same everywhere.

    The example's experts are so small that by their own costs no rank would send a token where it can fetch: so ranks plan
    with the costs of large experts, and once more with those measured here.
    """
    rows = []
    for size in (1, 2, 4):
        arguments = (str(cache_dir), new_tokens)
        setups = {
            "ranks together": run_ranks(_together, size, *arguments, LARGE_EXPERTS),
            "ranks together, costs as measured": run_ranks(_together, size, *arguments, None),
            "ranks on their own": run_ranks(_alone, size, *arguments),
            "one rank, all slots": run_ranks(_all_on_one, 1, *arguments, size),
        }
        texts = {str(sorted(text for rank in ranks for text in rank["texts"])) for ranks in setups.values()}
        if len(texts) != 1:
            raise AssertionError(f"the texts depend on the ranks: {texts}")
        for name, ranks in setups.items():
            hits, misses, fetched = (sum(rank[key] for rank in ranks) for key in ("hits", "misses", "bytes"))
            rows.append(
                {
                    "ranks": size,
                    "setup": name,
                    "slots in all": SLOTS * size,
                    "hit rate": hits / (hits + misses),
                    "KiB fetched per token": fetched / 1024 / (new_tokens * size),
                }
            )
    report.table(f"one prompt per rank, {SLOTS} slots a layer and rank, of 32 experts", rows)


def _together(transport: TorchTransport, cache_dir: str, new_tokens: int, costs: Costs | None) -> dict[str, Any]:
    group = transport if transport.size > 1 else None
    return _serve(SLOTS, cache_dir, [transport.rank], new_tokens, group=group, costs=costs)


def _alone(transport: TorchTransport, cache_dir: str, new_tokens: int) -> dict[str, Any]:
    return _serve(SLOTS, cache_dir, [transport.rank], new_tokens, group=_just_me())


def _all_on_one(transport: TorchTransport, cache_dir: str, new_tokens: int, size: int) -> dict[str, Any]:
    return _serve(SLOTS * size, cache_dir, list(range(size)), new_tokens, group=_just_me())


def _just_me() -> dist.ProcessGroup:
    """A group of this process alone. All ranks call it together."""
    group: dist.ProcessGroup = dist.new_subgroups(group_size=1)[0]
    return group


def _serve(slots: int, cache_dir: str, prompts: list[int], new_tokens: int, **ranks: Any) -> dict[str, Any]:
    model = epslots.load(
        example_model(), slots=slots, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False, **ranks
    )
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    engine = Engine(model, kv_tokens=1024)
    found: dict[str, list[int]] = {}
    for number in prompts:
        ids = tokenizer(PROMPTS[number]).input_ids
        engine.batcher.add(Request(str(number), tuple(ids), new_tokens))
        found[str(number)] = []
    for output in engine.run():
        found[output.id] += output.tokens
    stats = epslots.stats(model)
    texts = [tokenizer.decode(tokens) for tokens in found.values()]
    return {"texts": texts, "hits": stats.hits, "misses": stats.misses, "bytes": stats.bytes_fetched}
