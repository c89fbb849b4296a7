"""What the layer costs when nothing is missing: all experts resident, against plain transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

import epslots
from epslots.bench.models import LARGE_EXPERTS, random_checkpoint, random_config
from epslots.bench.processes import run_ranks
from epslots.bench.report import BenchReport, alternate, contenders, median, ratio_of_rounds, spread
from epslots.transport.torch_transport import TorchTransport

OURS = "epslots"
# Every implementation of experts that transformers has for the CPU; the fastest of each scenario is what we are held to.
THEIRS = ("eager", "grouped_mm", "batched_mm")
# batched_mm copies the weights of every (token, k) pair: 19 GB for 512 tokens. It takes part in decoding alone.
COPIED_PAIRS_MAX = 64


# Behind a link experts are predicted and fetched ahead, where any are missing.
SETTINGS: dict[str, Any] = {"slots": "100%", "device": "cpu", "link": "1000GB/s", "prefetch": "auto"}


def bench_overhead(report: BenchReport, cache_dir: Path, *, rounds: int = 40, layers: int = 8) -> None:
    """Whole steps (decode of batch 1 and 8, prefill of 512 tokens), then one MoE layer alone, in microseconds; two ranks."""
    config = random_config(layers=layers, hidden=1024, experts=32, top_k=4, width=768)
    steps = {"decode, batch 1": (1, 1), "decode, batch 8": (8, 1), "prefill, 512 tokens": (1, 512)}
    with random_checkpoint(config, torch.float32) as folder, torch.no_grad():
        plain = _plain(folder)
        ours = epslots.load(folder, cache_dir=cache_dir, **SETTINGS)
        report.result["settings"] = SETTINGS
        report.table(
            "whole model, ms a step",
            [_row(name, _time_steps(plain, ours, *shape, rounds), 1e3) for name, shape in steps.items()],
        )
        report.table(
            "one MoE layer, us",
            [_layer_row(name, plain, ours, batch * length, rounds) for name, (batch, length) in steps.items()],
        )
        assert epslots.stats(ours).misses == 0
        del plain, ours  # two of each have to fit
        fastest = {row["scenario"]: row["fastest"] for row in report.result["whole model, ms a step"]}
        shapes = [(name, *shape, fastest[name]) for name, shape in steps.items()]
        results = run_ranks(_two_ranks, 2, str(folder), str(cache_dir), shapes, rounds)
    report.table("whole model on each of 2 gloo ranks at once, ms a step", results[0])


def _plain(folder: str | Path) -> PreTrainedModel:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@torch.no_grad()
def _two_ranks(
    transport: TorchTransport, folder: str, cache_dir: str, shapes: list[tuple[str, int, int, str]], rounds: int
) -> list[dict[str, Any]]:
    """All experts on both ranks, each of which has its own batch; against plain transformers on both at once."""
    plain, ours = _plain(folder), epslots.load(folder, cache_dir=cache_dir, group=transport, costs=LARGE_EXPERTS, **SETTINGS)
    rows = []
    for name, batch, length, fastest in shapes:
        candidates = {OURS: _step(ours, None, batch, length), fastest: _step(plain, fastest, batch, length)}
        most = rounds if length == 1 else max(5, rounds // 5)
        rows.append(_row(name, alternate(candidates, most, meet=lambda: transport.gather_bytes(b"")), 1e3))
    return rows


def _time_steps(plain: PreTrainedModel, ours: PreTrainedModel, batch: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Forward passes of [batch, length] tokens; a single token follows a prompt of 32 held in a KV cache."""
    candidates = {OURS: _step(ours, None, batch, length)} | {
        name: _step(plain, name, batch, length) for name in _theirs(batch * length * plain.config.num_experts_per_tok)
    }
    return alternate(contenders(candidates, OURS), rounds if length == 1 else max(5, rounds // 5))


def _step(model: PreTrainedModel, implementation: str | None, batch: int, length: int) -> Callable[[], object]:
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    prompt = torch.randint(0, model.config.vocab_size, (batch, 32))
    cache = model(prompt, use_cache=True).past_key_values if length == 1 else None

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
    ratio = ratio_of_rounds(seconds[OURS], seconds[fastest])
    medians = {name: median(seconds[name]) * unit if name in seconds else None for name in (OURS, *THEIRS, "raw")}
    if "raw" not in seconds:
        del medians["raw"]
    return {
        "scenario": scenario,
        **medians,
        "fastest": fastest,
        "ratio": ratio["median"],
        "p25": ratio["p25"],
        "p75": ratio["p75"],
    }


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
                plain.config._experts_implementation_internal = implementation
            return module(hidden, index, weights)

        return call

    groups = [
        (hidden[(index == e).nonzero()[:, 0]].contiguous(), theirs.gate_up_proj[e].t(), theirs.down_proj[e].t())
        for e in index.unique().tolist()
    ]
    width = config.moe_intermediate_size

    def raw() -> None:
        for rows, up, down in groups:
            torch.mm(torch.mm(rows, up)[:, :width], down)

    candidates = {OURS: run(mine, None)} | {name: run(theirs, name) for name in _theirs(index.numel())}
    seconds = alternate(contenders(candidates, OURS) | {"raw": raw}, rounds * 2 if tokens < 100 else max(5, rounds // 2))
    return _row(scenario, seconds, 1e6) | {"over raw": spread(seconds[OURS])["median"] * 1e6 - median(seconds["raw"]) * 1e6}
