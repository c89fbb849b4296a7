"""The layer's cost when nothing is missing: all experts resident, against plain transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

import epslots
from epslots.bench.models import LARGE_EXPERTS, random_checkpoint, random_config
from epslots.bench.processes import run_ranks
from epslots.bench.report import MS, US, BenchReport, alternate, contenders, median, medians, ratio_columns
from epslots.transport.torch_transport import TorchTransport

OURS, PRODUCTS = "epslots", "raw"
# Every implementation of experts that transformers has for the CPU; ours is held against the fastest in each scenario.
THEIRS = ("eager", "grouped_mm", "batched_mm")
# batched_mm copies the weights of every (token, k) pair: 19 GB for 512 tokens. It takes part only in decoding.
COPIED_PAIRS_MAX = 64
# Prediction is on, and finds nothing to fetch.
SETTINGS: dict[str, Any] = {"slots": "100%", "device": "cpu", "link": "1000GB/s", "prefetch": "auto"}
# Batch and tokens of each sequence; a single token follows a prompt of 32.
STEPS = {"decode, batch 1": (1, 1), "decode, batch 8": (8, 1), "prefill, 512 tokens": (1, 512)}


def bench_overhead(report: BenchReport, cache_dir: Path, *, rounds: int = 40, layers: int = 8) -> None:
    """Whole steps, one MoE layer alone, and whole steps on two ranks.

    Steps are decoding of batch 1 and 8, and a prefill of 512 tokens.
    """
    config = random_config(layers=layers, hidden=1024, experts=32, top_k=4, width=768)
    with random_checkpoint(config, torch.float32) as folder, torch.no_grad():
        plain, ours = _plain(folder), epslots.load(folder, cache_dir=cache_dir, **SETTINGS)
        report.result["settings"] = SETTINGS
        whole = [_step_row(name, plain, ours, shape, rounds) for name, shape in STEPS.items()]
        report.table("whole model, ms a step", whole)
        layer = [_layer_row(name, plain, ours, batch * length, rounds) for name, (batch, length) in STEPS.items()]
        report.table("one MoE layer, us", layer)
        assert epslots.stats(ours).misses == 0
        del plain, ours  # two of each have to fit
        fastest = {row["scenario"]: row["fastest"] for row in whole}
        results = run_ranks(_two_ranks, 2, str(folder), str(cache_dir), fastest, rounds)
    report.table("whole model on each of 2 gloo ranks at once, ms a step", results[0])


def _plain(folder: str | Path) -> PreTrainedModel:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@torch.no_grad()
def _two_ranks(
    transport: TorchTransport, folder: str, cache_dir: str, fastest: dict[str, str], rounds: int
) -> list[dict[str, Any]]:
    """All experts on both ranks, each with a batch of its own; against plain transformers on both at once."""
    plain, ours = _plain(folder), epslots.load(folder, cache_dir=cache_dir, group=transport, costs=LARGE_EXPERTS, **SETTINGS)
    rows = []
    for name, shape in STEPS.items():
        candidates = {OURS: _step(ours, None, shape), fastest[name]: _step(plain, fastest[name], shape)}
        seconds = alternate(candidates, _rounds_of(shape, rounds), meet=lambda: transport.gather_bytes(b""))
        rows.append(_row(name, seconds, MS))
    return rows


def _rounds_of(shape: tuple[int, int], rounds: int) -> int:
    return rounds if shape[1] == 1 else max(5, rounds // 5)


def _step_row(name: str, plain: PreTrainedModel, ours: PreTrainedModel, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Forward passes of [batch, length] tokens; a single token follows a prompt of 32 in a KV cache."""
    theirs = _theirs(shape[0] * shape[1] * plain.config.num_experts_per_tok)
    candidates = {OURS: _step(ours, None, shape)} | {each: _step(plain, each, shape) for each in theirs}
    return _row(name, alternate(contenders(candidates, OURS), _rounds_of(shape, rounds)), MS)


def _step(model: PreTrainedModel, implementation: str | None, shape: tuple[int, int]) -> Callable[[], object]:
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, shape)
    prompt = torch.randint(0, model.config.vocab_size, (shape[0], 32))
    cache = model(prompt, use_cache=True).past_key_values if shape[1] == 1 else None

    def run() -> object:
        if implementation is not None:
            model.config._experts_implementation_internal = implementation
        if cache is None:
            return model(ids, use_cache=False)
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return run


def _theirs(pairs: int) -> tuple[str, ...]:
    return THEIRS if pairs <= COPIED_PAIRS_MAX else THEIRS[:2]


def _row(scenario: str, seconds: dict[str, list[float]], unit: float) -> dict[str, Any]:
    """Medians, and our time over the fastest of theirs, round by round."""
    fastest = min(seconds.keys() & THEIRS, key=lambda name: median(seconds[name]))
    columns = dict.fromkeys((OURS, *THEIRS)) | medians(seconds, unit)
    return {"scenario": scenario, **columns, "fastest": fastest, **ratio_columns(seconds[OURS], seconds[fastest])}


def _layer_row(scenario: str, plain: PreTrainedModel, ours: PreTrainedModel, tokens: int, rounds: int) -> dict[str, Any]:
    """The experts of one layer on random tokens and random routing; "raw" is their matrix products and nothing else."""
    torch.manual_seed(2)
    config = plain.config
    hidden = torch.randn(tokens, config.hidden_size)
    index = torch.rand(tokens, config.num_experts).topk(config.num_experts_per_tok).indices
    weights = torch.softmax(torch.rand(tokens, config.num_experts_per_tok), -1)
    theirs, mine = plain.model.layers[0].mlp.experts, ours.model.layers[0].mlp.experts

    def run(module: torch.nn.Module, implementation: str | None) -> Callable[[], object]:
        def call() -> object:
            if implementation is not None:
                config._experts_implementation_internal = implementation
            return module(hidden, index, weights)

        return call

    groups = [
        (hidden[(index == e).nonzero()[:, 0]].contiguous(), theirs.gate_up_proj[e].t(), theirs.down_proj[e].t())
        for e in index.unique().tolist()
    ]
    width = config.moe_intermediate_size

    def products() -> None:
        for rows, up, down in groups:
            torch.mm(torch.mm(rows, up)[:, :width], down)

    candidates = {OURS: run(mine, None)} | {name: run(theirs, name) for name in _theirs(index.numel())}
    racing = {**contenders(candidates, OURS), PRODUCTS: products}
    row = _row(scenario, alternate(racing, rounds * 2 if tokens < 100 else max(5, rounds // 2)), US)
    return row | {"over raw": row[OURS] - row[PRODUCTS]}
