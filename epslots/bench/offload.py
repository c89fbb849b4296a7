"""Tokens per second when the experts don't all fit: slots, against all resident, and against accelerate's CPU offload."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import epslots
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import BenchReport, median

SHARES = ("25%", "50%", "75%", "100%")


def shape_for(device: torch.device) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's shape (57 GiB in bf16) on a GPU; one a thousand times smaller on the CPU, to try the code."""
    if device.type == "cuda":
        return random_config(layers=48, hidden=2048, experts=128, top_k=8, width=768, vocab=151_936, heads=16)
    return random_config(layers=4, hidden=256, experts=32, top_k=4, width=128)


def bench_offload(
    report: BenchReport, cache_dir: Path, device: torch.device, *, new_tokens: int = 32, repeats: int = 3
) -> None:
    """Greedy decoding of one sequence in bf16; routing of random weights is nearly uniform, the hardest case for a cache."""
    config = shape_for(device)
    rows: list[dict[str, Any]] = []
    with random_checkpoint(config, torch.bfloat16) as folder:
        for share in SHARES:
            model = epslots.load(folder, slots=share, device=device, cache_dir=cache_dir)
            rate = _tokens_per_second(model, device, new_tokens, repeats)
            rows.append({"what": f"epslots, {share} slots", "tokens/s": rate, "hit rate": epslots.stats(model).hit_rate})
            del model
            _release()
        plain = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
        rate = _tokens_per_second(plain, device, new_tokens, repeats)
        rows.append({"what": "transformers, resident", "tokens/s": rate, "hit rate": None})
        resident = rate
        del plain
        _release()
        offloaded = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        cpu_offload(offloaded, execution_device=device)
        rate = _tokens_per_second(offloaded, device, new_tokens, repeats)
        rows.append({"what": "accelerate, CPU offload", "tokens/s": rate, "hit rate": None})
    report.table("decoding", [row | {"of resident": row["tokens/s"] / resident} for row in rows])


@torch.no_grad()
def _tokens_per_second(model: PreTrainedModel, device: torch.device, new_tokens: int, repeats: int) -> float:
    """Median over ``repeats`` generations, after one that warms caches and slots up."""
    torch.manual_seed(3)
    prompt = torch.randint(0, model.config.vocab_size, (1, 32), device=device)
    rates = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens.shape[1] == 32 + new_tokens  # reading the shape is free; generate itself waits for every token
        if number:
            rates.append(new_tokens / (time.perf_counter() - began))
    return median(rates)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
