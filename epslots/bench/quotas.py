"""The worth of learned slots per layer. Measured by hit rates on other text, as a share of Belady's optimum.

The example model's routing over kinds of text that differ. Half of the passages of each kind teach, the other half judge.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from epslots.arrays import IntArray
from epslots.bench.models import load_fp32
from epslots.bench.report import BenchReport
from epslots.bench.workloads import passages_of_kinds, record_routing
from epslots.example import example_model
from epslots.placement.slot_quotas import learn_quotas
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.planner.reuse_distance import miss_ratio_curve
from epslots.progress import counting
from epslots.simulation.cache_replay import IdArray, belady, replay, reuse_histogram, steps_of
from epslots.simulation.lanes import deal_once
from epslots.trace import Trace

SHARES = (0.125, 0.25, 0.5)
BATCHES = (1, 4)  # sequences at a time


def bench_quotas(report: BenchReport, cache_dir: Path, *, passages: int = 24) -> None:
    """Hit rates with a token of each sequence a step, and three ways to deal slots to layers.

    Equal slots; slots learned from the first half of the text by recency of uses; and learned by the policy's own scores.
    """
    trace, kinds = record_texts(cache_dir, passages)
    number = np.arange(len(trace.starts))
    taught, held = _part(trace, number[number % 2 == 0]), _part(trace, number[number % 2 == 1])
    report.result["text"] = {"kinds": kinds, "tokens taught": len(taught.expert_ids), "tokens held": len(held.expert_ids)}
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    passes = len(BATCHES) * (len(POLICIES) + len(SHARES) * (1 + len(POLICIES)))
    with counting("caches", passes * len(trace.num_experts) * len(held.expert_ids)) as advance:
        for batch in BATCHES:
            lessons, questions = _steps(taught, batch), _steps(held, batch)

            def count(steps: int, batch: int = batch) -> None:
                advance(steps * batch)

            histograms = {n: reuse_histogram(lessons, trace.num_experts, policy, count) for n, policy in POLICIES.items()}
            curves += [{"batch": batch} | row for row in _curves(histograms[DEFAULT_POLICY], trace.num_experts)]
            for share in SHARES:
                judged = _judge(questions, histograms, trace.num_experts, share, count)
                rows += [{"batch": batch, "slots": f"{share:.1%}"} | row for row in judged]
    report.table("misses per use by the default policy's scores, from the half that taught", curves)
    report.table("hit rates on the other half, as shares of Belady's with equal slots", rows)


def record_texts(cache_dir: Path, passages: int) -> tuple[Trace, dict[str, int]]:
    """Routing of the passages of all kinds of text, kind after kind, and the number of passages of each kind."""
    kinds = passages_of_kinds(passages)
    trace = record_routing(load_fp32(example_model(), cache_dir), [ids for several in kinds.values() for ids in several])
    return trace, {kind: len(several) for kind, several in kinds.items()}


def _curves(histogram_LD: IntArray, experts_L: IntArray) -> list[dict[str, Any]]:
    """Misses per use of each layer, at each share of slots."""
    rows = []
    for layer, histogram_D in enumerate(histogram_LD):
        curve = miss_ratio_curve(histogram_D)
        shares = {f"{share:.1%} slots": float(curve[int(share * experts_L[layer])]) for share in SHARES}
        rows.append({"layer": layer, **shares})
    return rows


def _judge(
    ids_TLN: IdArray, histograms: dict[str, IntArray], experts_L: IntArray, share: float, count: Callable[[int], None]
) -> list[dict[str, Any]]:
    """A row for each policy: hits as shares of Belady's with equal slots."""
    equal_L = (experts_L * share).astype(np.int64)
    learn = partial(learn_quotas, num_experts_L=experts_L, total_slots=int(equal_L.sum()))
    best = belady(ids_TLN, experts_L, equal_L[None], count).hit_rates[0]
    rows = []
    for name, policy in POLICIES.items():
        quotas = {"equal": equal_L, "by recency": learn(histograms["lru"]), "learned": learn(histograms[name])}
        rates = replay(ids_TLN, experts_L, np.stack(list(quotas.values())), policy, count).hit_rates
        shares = {heading: rate / best for heading, rate in zip(quotas, rates, strict=True)}
        learned = " ".join(map(str, quotas["learned"].tolist()))
        rows.append({"policy": name, "Belady": best, **shares, "slots learned": learned})
    return rows


def _part(trace: Trace, sequences: IntArray) -> Trace:
    """Some sequences of a trace."""
    parts = np.split(trace.expert_ids, trace.starts[1:])
    chosen = [parts[number] for number in sequences.tolist()]
    lengths = np.array([len(part) for part in chosen])
    return Trace(np.concatenate(chosen), lengths.cumsum() - lengths, trace.num_experts)


def _steps(trace: Trace, batch: int) -> IdArray:
    return steps_of(trace.expert_ids, deal_once(trace.starts, len(trace.expert_ids), batch))
