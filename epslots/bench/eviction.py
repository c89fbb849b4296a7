"""Eviction policies without prefetch: hits as a share of Belady's optimum, over models, texts and made-up traffic.

The simulator replays caches by the policies that the model runs (``cache_replay.py``). The example model has learned its
routing from text; models of other families and sizes have random weights, and route only by the token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import epslots
from epslots.arrays import IntArray
from epslots.bench.models import load_fp32, random_checkpoint, random_config
from epslots.bench.report import BenchReport
from epslots.bench.workloads import DRAWN, PASSAGE_TOKENS, PATTERNS, passages_of_kinds, record_routing
from epslots.example import example_model
from epslots.planner.cache_policy import POLICIES
from epslots.progress import counting
from epslots.simulation.cache_replay import belady, replay, steps_of
from epslots.simulation.lanes import deal_once
from epslots.trace import Trace

SHARES = (0.125, 0.25, 0.5)
BATCHES = (1, 4, 16)
PROMPT = 64  # tokens of a passage that one step computes, where a passage is a prompt and an answer
TEXT, RANDOM_TEXT, MADE_UP = "text of the example model", "text of random models", "made up"
ALL_KINDS = "all kinds in turn"
# Random models by experts, top k and layers.
RANDOM = {"random 64, top 6": (64, 6, 3), "random 128, top 8": (128, 8, 2), "random 128, top 1": (128, 1, 3)}
# Experts and choices of made-up traffic, by the shapes of DeepSeek-V2-Lite, Llama-4 Maverick and the example model; and one
# of few experts, where each mistake counts most.
SHAPES = ((64, 6), (128, 1), (32, 4), (64, 1))


@dataclass(frozen=True)
class Question:
    """Steps that policies are judged on.

    Attributes:
        kind: ``TEXT``, ``RANDOM_TEXT`` or ``MADE_UP``.
        name: of the text or the pattern.
        batch: tokens of a step.
        ids_TLN: choices of each step and layer, -1 for none.
        num_experts_L: experts of each layer.
    """

    kind: str
    name: str
    batch: int
    ids_TLN: NDArray[np.integer]
    num_experts_L: IntArray


def bench_eviction(report: BenchReport, cache_dir: Path, *, steps: int = 2000, passages: int = 24) -> None:
    """A row for each trace, batch and share of slots; then means and the worst by kind of traffic.

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

    There is "no choice" where every policy hits as often as the optimum, such as where a step fills all slots.
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
                "adaptive - better of LRU and LFU": shares["adaptive"] - _better(shares),
                "no choice": bool((np.array([hits_C[cache] for hits_C in found.values()]) == best_C[cache]).all()),
            }
        )
    return rows


def _better(shares: Mapping[str, Any]) -> float:
    return max(shares["lru"], shares["lfu"])


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each policy's share less that of the better of LRU and LFU. Mean and worst, by kind of traffic and over all."""
    found: list[dict[str, Any]] = []
    for kind, policy in product((*dict.fromkeys(row["kind"] for row in rows), "all"), POLICIES):
        gains = [row[policy] - _better(row) for row in rows if kind in (row["kind"], "all")]
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
    kinds = {kind: ids for kind, ids in passages_of_kinds(passages).items() if len(ids) >= max(BATCHES)}
    mixed = [ids for turn in zip(*kinds.values(), strict=False) for ids in turn]
    model = load_fp32(example_model(), cache_dir)
    for name, texts in (kinds | {ALL_KINDS: mixed}).items():
        yield from _questions(TEXT, name, record_routing(model, texts), steps, prompts=name == ALL_KINDS)
    vocabulary = int(model.config.vocab_size)
    for name, (experts, top_k, layers) in RANDOM.items():
        config = random_config(layers=layers, hidden=64, experts=experts, top_k=top_k, width=16, vocab=vocabulary, heads=4)
        with random_checkpoint(config, torch.float32) as folder:
            model = epslots.load(folder, slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
            trace = record_routing(model, mixed)
        yield from _questions(RANDOM_TEXT, name, trace, steps, prompts=True)


def _questions(kind: str, name: str, trace: Trace, steps: int, *, prompts: bool) -> Iterator[Question]:
    """A trace in batches; and, with ``prompts``, as a prompt and an answer of each passage."""
    for batch in BATCHES:
        rows_SB = deal_once(trace.starts, len(trace.expert_ids), batch)[:steps]
        yield Question(kind, name, batch, steps_of(trace.expert_ids, rows_SB), trace.num_experts)
    if prompts:
        ids_TLN = steps_of(trace.expert_ids, _prompts_and_answers(trace)[:steps])
        yield Question(kind, f"{name}, with prompts", 1, ids_TLN, trace.num_experts)


def _prompts_and_answers(trace: Trace) -> IntArray:
    """Rows of a trace in each step, -1 for none: a step for a passage's prompt, and one for each later token."""
    answer = PASSAGE_TOKENS - PROMPT
    rows_SB = np.full((len(trace.starts) * (1 + answer), PROMPT), -1)
    for number, start in enumerate(trace.starts.tolist()):
        step = number * (1 + answer)
        rows_SB[step] = np.arange(start, start + PROMPT)
        rows_SB[step + 1 : step + 1 + answer, 0] = np.arange(start + PROMPT, start + PASSAGE_TOKENS)
    return rows_SB


def _made_up(steps: int) -> Iterator[Question]:
    """Every pattern and shape with one token a step; where steps are drawn at random, also with four."""
    for (experts, top_k), (name, pattern), batch in product(SHAPES, PATTERNS.items(), (1, 4)):
        if batch == 1 or name in DRAWN:
            random = np.random.default_rng(zlib.crc32(f"{name} {experts} {batch}".encode()))
            ids_TLN = pattern(random, experts, top_k * batch, steps)[:, None]
            yield Question(MADE_UP, f"{name}, {experts} top {top_k}", batch, ids_TLN, np.array([experts]))
