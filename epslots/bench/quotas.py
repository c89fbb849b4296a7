"""What learned slots of layers are worth: hit rates on text that they weren't learned from, as a share of Belady's optimum.

The example model's routing over kinds of text that differ. Half of the passages of each kind teach, the other half judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import epslots
from epslots.arrays import IntArray
from epslots.bench.drift import kinds_of_text
from epslots.bench.report import BenchReport
from epslots.example import example_model
from epslots.placement.slot_quotas import learn_quotas
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.planner.reuse_distance import miss_ratio_curve
from epslots.progress import counting
from epslots.simulation.cache_replay import belady, replay, reuse_histogram, steps_of
from epslots.simulation.lanes import deal_once
from epslots.trace import Trace

SHARES = (0.125, 0.25, 0.5)
BATCHES = (1, 4)  # sequences at a time
TOKENS = 192


def bench_quotas(report: BenchReport, cache_dir: Path, *, passages: int = 24) -> None:
    """A token of each sequence a step; slots are dealt equally, or as half of the text taught: by how recent uses were, and by
    the policy's own scores.
    """
    trace, kinds = record_texts(cache_dir, passages)
    number = np.arange(len(trace.starts))
    taught, held = _part(trace, number[number % 2 == 0]), _part(trace, number[number % 2 == 1])
    report.result["text"] = {"kinds": kinds, "tokens taught": len(taught.expert_ids), "tokens held": len(held.expert_ids)}
    experts_L, layers = trace.num_experts, len(trace.num_experts)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    passes = len(BATCHES) * (len(POLICIES) + len(SHARES) * (1 + len(POLICIES)))
    with counting("caches", passes * layers * len(held.expert_ids)) as advance:
        for batch in BATCHES:
            lessons, questions = (_steps(part, batch) for part in (taught, held))

            def tell(steps: int, batch: int = batch) -> None:
                advance(steps * batch)

            histograms = {name: reuse_histogram(lessons, experts_L, policy, tell) for name, policy in POLICIES.items()}
            for layer in range(layers):
                curve = miss_ratio_curve(histograms[DEFAULT_POLICY][layer])
                shares = {f"{share:.1%} slots": float(curve[int(share * experts_L[layer])]) for share in SHARES}
                curves.append({"batch": batch, "layer": layer, **shares})
            for share in SHARES:
                equal_L = (experts_L * share).astype(np.int64)
                total = int(equal_L.sum())
                best = belady(questions, experts_L, equal_L[None], tell).hit_rates[0]
                by_recency_L = learn_quotas(histograms["lru"], experts_L, total)
                for name, policy in POLICIES.items():
                    learned_L = learn_quotas(histograms[name], experts_L, total)
                    quota_CL = np.stack([equal_L, by_recency_L, learned_L])
                    equal, by_recency, learned = (
                        r / best for r in replay(questions, experts_L, quota_CL, policy, tell).hit_rates
                    )
                    rows.append(
                        {
                            "batch": batch,
                            "slots": f"{share:.1%}",
                            "policy": name,
                            "Belady": best,
                            "equal": equal,
                            "by recency": by_recency,
                            "learned": learned,
                            "slots learned": " ".join(map(str, learned_L.tolist())),
                        }
                    )
    report.table("misses per use by the default policy's scores, from the half that taught", curves)
    report.table("hit rates on the other half, as shares of Belady's with equal slots", rows)


def record_texts(cache_dir: Path, passages: int) -> tuple[Trace, dict[str, int]]:
    """Routing of the passages of all kinds of text, kind after kind, and how many passages each kind has."""
    texts = kinds_of_text(passages)
    model = epslots.load(example_model(), slots="100%", device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    kinds: dict[str, int] = {}
    bar = counting("routing of texts", sum(map(len, texts.values())))
    with epslots.record_trace(model) as recorder, torch.no_grad(), bar as advance:
        for kind, several in texts.items():
            for text in several:
                ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
                advance(1)
                if ids.shape[1] == TOKENS:
                    model(input_ids=ids, use_cache=False)
                    kinds[kind] = kinds.get(kind, 0) + 1
    return recorder.trace(), kinds


def _part(trace: Trace, sequences: IntArray) -> Trace:
    """Some sequences of a trace."""
    ends = np.append(trace.starts[1:], len(trace.expert_ids))
    lengths = (ends - trace.starts)[sequences]
    rows = np.concatenate([np.arange(start, start + n) for start, n in zip(trace.starts[sequences], lengths, strict=True)])
    return Trace(trace.expert_ids[rows], lengths.cumsum() - lengths, trace.num_experts)


def _steps(trace: Trace, batch: int) -> Any:
    return steps_of(trace.expert_ids, deal_once(trace.starts, len(trace.expert_ids), batch))
