"""The distributed cache: hits of ranks that share one, measured; and ways to serve a miss, modelled.

``bench_ranks`` runs gloo ranks. ``bench_misses`` measures nothing: recorded routing of the example model drives the planner
that ranks run, and the cost model gives the time of each step over emulated links.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import epslots
from epslots.arrays import IntArray
from epslots.bench.models import LARGE_EXPERT_BYTES, LARGE_EXPERTS, LARGE_ROW_BYTES, PROMPTS, load_fp32
from epslots.bench.processes import run_ranks
from epslots.bench.report import BenchReport
from epslots.example import example_model
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.placement.placement import default_homes
from epslots.planner.assignment import Assign, assign, holder_only, own_only
from epslots.planner.cache_policy import POLICIES
from epslots.planner.cost_model import Costs, layer_time
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.use_history import UseHistory, note_use
from epslots.transport.torch_transport import TorchTransport

EXPERTS = 32  # of each layer of the example model
SLOTS = 8
SIZES = (1, 2, 4)


def bench_ranks(report: BenchReport, cache_dir: Path, *, new_tokens: int = 64) -> None:
    """Greedy text after a prompt of its own on each of 1, 2 and 4 gloo ranks.

    By the measured costs of the example's tiny experts, no rank would send a token where it can fetch. So ranks plan with the
    costs of large experts, and once more with the measured ones.

    Raises:
        AssertionError: the texts depend on the ranks.
    """
    rows = []
    for size in SIZES:
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
    report.table(f"one prompt per rank, {SLOTS} slots a layer and rank, of {EXPERTS} experts", rows)


def _together(transport: TorchTransport, cache_dir: str, new_tokens: int, costs: Costs | None) -> dict[str, Any]:
    group = transport if transport.size > 1 else None
    return _serve(SLOTS, cache_dir, [transport.rank], new_tokens, group=group, costs=costs)


def _alone(transport: TorchTransport, cache_dir: str, new_tokens: int) -> dict[str, Any]:
    return _serve(SLOTS, cache_dir, [transport.rank], new_tokens, group=_group_of_one())


def _all_on_one(transport: TorchTransport, cache_dir: str, new_tokens: int, size: int) -> dict[str, Any]:
    return _serve(SLOTS * size, cache_dir, list(range(size)), new_tokens, group=_group_of_one())


def _group_of_one() -> dist.ProcessGroup:
    """A group of this process alone. All ranks call it together."""
    group: dist.ProcessGroup = dist.new_subgroups(group_size=1)[0]
    return group


def _serve(slots: int, cache_dir: str, prompts: list[int], new_tokens: int, **ranks: Any) -> dict[str, Any]:
    model = load_fp32(example_model(), cache_dir, slots=slots, **ranks)
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


# --- misses

MODELLED_RANKS = 4
MODELLED_SLOTS = (4, 6, 12, 20)
MODELLED_BATCHES = (1, 8, 64, 448)  # tokens of a rank in one step: decoding one sequence, batches, a prompt
# GB/s between ranks, GB/s to the host, and ns of latency.
LINKS = {
    "fast peers (200 GB/s), slow host (8 GB/s)": (200, 8, 30_000),
    "slow peers (1 GB/s), fast host (50 GB/s)": (1, 50, 200_000),
}
BY_COST = "chosen by cost"
RULES: dict[str, Assign] = {BY_COST: assign, "always the host": own_only, "always a holder": holder_only}


def bench_misses(report: BenchReport, cache_dir: Path, *, new_tokens: int = 450) -> None:
    """The plan's choice against two fixed rules, on four ranks with text of their own: modelled time, and bytes."""
    ids_STLK = _routing_of_ranks(cache_dir, new_tokens)
    for name, (peer, host, latency) in LINKS.items():
        costs = Costs(
            host_fetch=LARGE_EXPERT_BYTES // host,
            peer_fetch=LARGE_EXPERT_BYTES // peer,
            pair_transfer=max(1, LARGE_ROW_BYTES // peer),
            pair_compute=30,
            expert_compute=3_000,
            exchange=latency,
            gather=latency,
        )
        rows: list[dict[str, Any]] = []
        for slots, batch in itertools.product(MODELLED_SLOTS, MODELLED_BATCHES):
            runs = {rule: _model_steps(ids_STLK, slots, batch, costs, RULES[rule]) for rule in RULES}
            best = min(run["ms per step and layer"] for rule, run in runs.items() if rule != BY_COST)
            for rule, run in runs.items():
                ratio = run["ms per step and layer"] / best
                rows.append({"slots": slots, "tokens per rank": batch, "rule": rule, **run, "time / best fixed": ratio})
        report.table(name, rows)


def _routing_of_ranks(cache_dir: Path, new_tokens: int) -> np.ndarray:
    """Routing of one sampled text per rank, int64 [ranks, tokens, layers, k]."""
    model = load_fp32(example_model(), cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    texts = []
    for number, prompt in enumerate(PROMPTS[:MODELLED_RANKS]):
        torch.manual_seed(number)
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": None, "do_sample": True, "temperature": 0.8}
        with epslots.record_trace(model) as recorder:
            model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)
        texts.append(recorder.trace().expert_ids[-(new_tokens - 1) :].astype(np.int64))
    return np.stack(texts)


def _model_steps(ids_STLK: np.ndarray, slots: int, batch: int, costs: Costs, rule: Assign) -> dict[str, float]:
    """Time and bytes of the ranks' steps, one layer after another, where ``rule`` assigns the pairs."""
    ranks, tokens, layers, _ = ids_STLK.shape
    quota_R = np.full(ranks, slots)
    time_ns, host, peer, rows = 0, 0, 0, 0
    for layer in range(layers):
        history = UseHistory.empty(1, EXPERTS).layer(0, EXPERTS)
        homes = default_homes(EXPERTS, quota_R, layer)
        shared = LayerPlanner(0, LayerState(np.zeros((ranks, EXPERTS), bool), quota_R, homes), costs, rule)
        for step, start in enumerate(range(0, tokens - batch + 1, batch), start=1):
            counts_RE = _pair_counts(ids_STLK[:, start : start + batch, layer])
            note_use(history, counts_RE.sum(0) > 0, step)
            plan = shared.decide(counts_RE, partial(POLICIES["lrfu"], history)).assignment
            time_ns += layer_time(costs, plan.counts_RU, plan.computed_RU, plan.fetch_ranks, plan.fetch_sources)
            from_peer = int((plan.fetch_sources >= 0).sum())
            peer += from_peer
            host += len(plan.fetch_sources) - from_peer
            rows += int(plan.counts_RU.sum() - np.minimum(plan.counts_RU, plan.computed_RU).sum())
    steps = layers * (tokens // batch)
    return {
        "ms per step and layer": time_ns / steps / 1e6,
        "MB from host": host * LARGE_EXPERT_BYTES / steps / 1e6,
        "MB from peers": peer * LARGE_EXPERT_BYTES / steps / 1e6,
        "MB of tokens": 2 * rows * LARGE_ROW_BYTES / steps / 1e6,
    }


def _pair_counts(ids_RTK: np.ndarray) -> IntArray:
    """Pairs of each rank for each expert, int64 [ranks, experts]."""
    return np.stack([np.bincount(ids.ravel(), minlength=EXPERTS) for ids in ids_RTK]).astype(np.int64)
