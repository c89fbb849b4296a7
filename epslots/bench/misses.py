"""How a miss is served: the plan's choice against always fetching from the host and always sending tokens to a holder.

Nothing is measured here: real routing of the example model drives the very planner, and emulated costs say what a step takes.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import epslots
from epslots.arrays import IntArray
from epslots.bench.ranks import PROMPTS
from epslots.bench.report import BenchReport
from epslots.example import example_model
from epslots.placement.placement import default_homes
from epslots.planner.assignment import Assign, assign, holder_only, own_only
from epslots.planner.cache_policy import POLICIES
from epslots.planner.cost_model import Costs, layer_time
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.use_history import UseHistory, record_use

RANKS, EXPERTS = 4, 32
SLOTS = (4, 6, 12, 20)
EXPERT_BYTES, ROW_BYTES = 9_437_184, 4096  # Qwen3-30B-A3B in bf16: 3 x 2048 x 768, and a hidden state of 2048
LINKS = {
    "fast peers (200 GB/s), slow host (8 GB/s)": (200, 8, 30_000),
    "slow peers (1 GB/s), fast host (50 GB/s)": (1, 50, 200_000),
}
RULES: dict[str, Assign] = {"chosen by cost": assign, "always the host": own_only, "always a holder": holder_only}
# Tokens of a rank in one step: decoding one sequence, a batch, a prompt.
BATCHES = (1, 8, 64, 448)


def bench_misses(report: BenchReport, cache_dir: Path, *, new_tokens: int = 450) -> None:
    """Four ranks with text of their own; the modelled time of all steps, and the bytes by where they came from."""
    ids_STLK = record(cache_dir, new_tokens)
    for name, (peer, host, latency) in LINKS.items():
        costs = Costs(
            host_fetch=EXPERT_BYTES // host,
            peer_fetch=EXPERT_BYTES // peer,
            pair_transfer=max(1, ROW_BYTES // peer),
            pair_compute=30,
            expert_compute=3_000,
            exchange=latency,
            gather=latency,
        )
        rows: list[dict[str, Any]] = []
        for slots, batch in itertools.product(SLOTS, BATCHES):
            runs = {rule: simulate(ids_STLK, slots, batch, costs, RULES[rule]) for rule in RULES}
            best = min(run["ms per step and layer"] for rule, run in runs.items() if rule != "chosen by cost")
            for rule, run in runs.items():
                ratio = run["ms per step and layer"] / best
                rows.append({"slots": slots, "tokens per rank": batch, "rule": rule, **run, "time / best fixed": ratio})
        report.table(name, rows)


def record(cache_dir: Path, new_tokens: int) -> np.ndarray:
    """Routing of one text per rank, int64 [ranks, tokens, layers, k]."""
    model = epslots.load(example_model(), slots="100%", device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    texts = []
    for number, prompt in enumerate(PROMPTS[:RANKS]):
        torch.manual_seed(number)
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": None, "do_sample": True, "temperature": 0.8}
        with epslots.record_trace(model) as recorder:
            model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)
        texts.append(recorder.trace().expert_ids[-(new_tokens - 1) :].astype(np.int64))
    return np.stack(texts)


def simulate(ids_STLK: np.ndarray, slots: int, batch: int, costs: Costs, rule: Assign) -> dict[str, float]:
    """Run the ranks' steps of one layer after another through a rule."""
    ranks, tokens, layers, _ = ids_STLK.shape
    quota_R = np.full(ranks, slots)
    time_ns, host, peer, rows = 0, 0, 0, 0
    for layer in range(layers):
        history = UseHistory.empty(1, EXPERTS).layer(0, EXPERTS)
        homes = default_homes(EXPERTS, quota_R, layer)
        shared = LayerPlanner(0, LayerState(np.zeros((ranks, EXPERTS), bool), quota_R, homes), costs, rule)
        for step, start in enumerate(range(0, tokens - batch + 1, batch), start=1):
            counts_RE = counts_of(ids_STLK[:, start : start + batch, layer])
            record_use(history, counts_RE.sum(0) > 0, step)
            plan = shared.decide(counts_RE, partial(POLICIES["lrfu"], history)).assignment
            time_ns += layer_time(costs, plan.counts_RU, plan.computed_RU, plan.fetch_ranks, plan.fetch_sources)
            from_peer = int((plan.fetch_sources >= 0).sum())
            peer += from_peer
            host += len(plan.fetch_sources) - from_peer
            rows += int(plan.counts_RU.sum() - np.minimum(plan.counts_RU, plan.computed_RU).sum())
    steps = layers * (tokens // batch)
    return {
        "ms per step and layer": time_ns / steps / 1e6,
        "MB from host": host * EXPERT_BYTES / steps / 1e6,
        "MB from peers": peer * EXPERT_BYTES / steps / 1e6,
        "MB of tokens": 2 * rows * ROW_BYTES / steps / 1e6,
    }


def counts_of(ids_STK: np.ndarray) -> IntArray:
    """Pairs of each rank for each expert, int64 [ranks, experts]."""
    return np.stack([np.bincount(ids.ravel(), minlength=EXPERTS) for ids in ids_STK]).astype(np.int64)
