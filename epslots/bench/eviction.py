"""Eviction policies alone, without prefetch: hits as a share of Belady's optimum, over models, texts and made-up traffic.

Caches are replayed (``cache_replay.py``) by the very policies that the model runs. The example model has learned its
routing from
text; other families and sizes have random weights, and route by the token at hand. Made-up traffic is what single reasons for
reuse look like when nothing else is mixed in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

import epslots
from epslots.arrays import IntArray
from epslots.bench.drift import kinds_of_text
from epslots.bench.made_up import DRAWN, PATTERNS
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import BenchReport
from epslots.example import example_model
from epslots.planner.cache_policy import POLICIES
from epslots.progress import counting
from epslots.simulation.cache_replay import belady, replay, steps_of
from epslots.simulation.lanes import deal_once
from epslots.trace import Trace

SHARES = (0.125, 0.25, 0.5)
BATCHES = (1, 4, 16)
TOKENS = 192  # of each passage
PROMPT = 64  # of these, where a passage is a prompt that one step computes, and then an answer
# Random models by experts, top k and layers.
RANDOM = {"random 64, top 6": (64, 6, 3), "random 128, top 8": (128, 8, 2), "random 128, top 1": (128, 1, 3)}
# Experts and choices of made-up traffic: as DeepSeek-V2-Lite, Llama-4 Maverick and the example model have them; and of few
# experts one, where each mistake counts most.
SHAPES = ((64, 6), (128, 1), (32, 4), (64, 1))


@dataclass(frozen=True)
class Question:
    """Steps that policies are judged on.

    Attributes:
        kind: "text of the example model", "text of random models" or "made up".
        ids_TLN: as ``replay`` takes them.
    """

    kind: str
    name: str
    batch: int
    ids_TLN: NDArray[np.integer]
    num_experts_L: IntArray


def bench_eviction(report: BenchReport, cache_dir: Path, *, steps: int = 2000, passages: int = 24) -> None:
    """A row for each trace, batch and share of slots; then means over kinds of traffic, and the worst of each.

    Args:
        steps: of a trace, at the most.
        passages: of each kind of text.
    """
    questions = [*_text_questions(cache_dir, passages, steps), *_made_up(steps)]
    layers = sum(len(q.ids_TLN) * len(q.num_experts_L) for q in questions)
    rows: list[dict[str, Any]] = []
    with counting("caches", layers * (len(POLICIES) + 1)) as advance:
        for question in questions:
            rows += judge(question, advance)
    report.table("Belady's hit rate, %, and hits as a share of its own, %", rows)
    judged = [row for row in rows if not row["no choice"]]
    report.table("against the better of LRU and LFU, points", summary(judged))


def judge(question: Question, advance: Callable[[int], object]) -> list[dict[str, Any]]:
    """A row for each share of slots.

    There is no choice where every policy and the optimum hit alike, such as where a step fills all slots.
    """
    experts_L = question.num_experts_L
    quota_CL = np.stack([np.maximum(1, (experts_L * share).astype(np.int64)) for share in SHARES])
    ids_TLN = question.ids_TLN
    best = belady(ids_TLN, experts_L, quota_CL, advance)
    best_C = best.hits_CL.sum(1)
    found = {name: replay(ids_TLN, experts_L, quota_CL, policy, advance).hits_CL.sum(1) for name, policy in POLICIES.items()}
    rows: list[dict[str, Any]] = []
    for cache, share in enumerate(SHARES):
        shares = {name: 100 * float(hits_C[cache] / max(1, best_C[cache])) for name, hits_C in found.items()}
        rows.append(
            {
                "kind": question.kind,
                "trace": question.name,
                "batch": question.batch,
                "slots": f"{share:.1%}",
                "Belady": 100 * best.hit_rates[cache],
                **shares,
                "adaptive - better of LRU and LFU": shares["adaptive"] - max(shares["lru"], shares["lfu"]),
                "no choice": bool((np.array([hits_C[cache] for hits_C in found.values()]) == best_C[cache]).all()),
            }
        )
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each policy's share less that of the better of LRU and LFU: mean and worst, by kind of traffic and over all."""
    found: list[dict[str, Any]] = []
    for kind in (*dict.fromkeys(row["kind"] for row in rows), "all"):
        for policy in POLICIES:
            gains = [row[policy] - max(row["lru"], row["lfu"]) for row in rows if kind in (row["kind"], "all")]
            found.append(
                {
                    "kind": kind,
                    "policy": policy,
                    "settings": len(gains),
                    "mean": float(np.mean(gains)),
                    "median": float(np.median(gains)),
                    "worst": min(gains),
                    "below by over 0.1": sum(gain < -0.1 for gain in gains),
                }
            )
    return found


def _text_questions(cache_dir: Path, passages: int, steps: int) -> Iterator[Question]:
    """The example model on each kind of text, and on all kinds in turn; random models on all kinds."""
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    ids_of = {
        kind: [ids for text in texts if len(ids := tokenizer(text).input_ids[:TOKENS]) == TOKENS]
        for kind, texts in kinds_of_text(passages).items()
    }
    kinds = {kind: ids for kind, ids in ids_of.items() if len(ids) >= max(BATCHES)}
    mixed = [ids for turn in zip(*kinds.values(), strict=False) for ids in turn]
    example, turns = "text of the example model", "all kinds in turn"
    model = epslots.load(example_model(), slots="100%", device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    for name, texts in (kinds | {turns: mixed}).items():
        trace = _record(model, texts)
        yield from _questions(example, name, trace, steps)
    yield _with_prompts(example, turns, trace, steps)
    for number, (experts, top_k, layers) in enumerate(RANDOM.values()):
        config = random_config(layers=layers, hidden=64, experts=experts, top_k=top_k, width=16, vocab=len(tokenizer), heads=4)
        torch.manual_seed(number)
        with random_checkpoint(config, torch.float32) as folder:
            model = epslots.load(folder, slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
            trace = _record(model, mixed)
        yield from _questions("text of random models", list(RANDOM)[number], trace, steps)
        yield _with_prompts("text of random models", list(RANDOM)[number], trace, steps)


def _record(model: Any, texts: Sequence[Sequence[int]]) -> Trace:
    with epslots.record_trace(model) as recorder, torch.no_grad():
        for ids in texts:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return recorder.trace()


def _questions(kind: str, name: str, trace: Trace, steps: int) -> Iterator[Question]:
    for batch in BATCHES:
        rows_SB = deal_once(trace.starts, len(trace.expert_ids), batch)[:steps]
        yield Question(kind, name, batch, steps_of(trace.expert_ids, rows_SB), trace.num_experts)


def _with_prompts(kind: str, name: str, trace: Trace, steps: int) -> Question:
    """Passages one after the other: a step for the prompt, and one for each later token."""
    rows_SB = np.full((len(trace.expert_ids), PROMPT), -1)
    step = 0
    for start in trace.starts.tolist():
        rows_SB[step] = np.arange(start, start + PROMPT)
        rows_SB[step + 1 : step + 1 + TOKENS - PROMPT, 0] = np.arange(start + PROMPT, start + TOKENS)
        step += 1 + TOKENS - PROMPT
    ids_TLN = steps_of(trace.expert_ids, rows_SB[: min(step, steps)])
    return Question(kind, f"{name}, with prompts", 1, ids_TLN, trace.num_experts)


def _made_up(steps: int) -> Iterator[Question]:
    """Made-up traffic of every pattern and shape, of one token a step; where steps are drawn at random, also of four."""
    for (experts, top_k), (name, pattern), batch in product(SHAPES, PATTERNS.items(), (1, 4)):
        if batch == 1 or name in DRAWN:
            random = np.random.default_rng(zlib.crc32(f"{name} {experts} {batch}".encode()))
            ids_TLN = pattern(random, experts, top_k * batch, steps)[:, None]
            yield Question("made up", f"{name}, {experts} top {top_k}", batch, ids_TLN, np.array([experts]))
