"""Loaded models against plain transformers: logits within a tolerance, greedy tokens equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import epslots
from tests.support import zoo
from tests.support.grouped_ranks import Grouped
from tests.support.remembered import Reference

# Logits against the reference's scale, fp32 (DESIGN: at most 1e-4).
TOLERANCE = 2e-5

LAYOUTS = ["qwen3_moe", "gpt_oss", "olmoe_unaligned", "nemotron_h"]
LAYOUTS += ["muse_spark", "longcat_flash", "step3p7", "ernie4_5_vl_moe"]
"""One architecture for each way to store and call experts; tests/equality holds that none is missing."""

SERVED = [name for name, tiny in zoo.ZOO.items() if tiny.served]


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": 3, "device": "cpu", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, **settings)


def greedy_rows(model: PreTrainedModel | Reference, ids: torch.Tensor, new_tokens: int = 12) -> list[list[int]]:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **settings).tolist()


def greedy(model: PreTrainedModel | Reference, ids: torch.Tensor, new_tokens: int = 12) -> list[int]:
    return greedy_rows(model, ids, new_tokens)[0]


@torch.no_grad()
def assert_equal(model: PreTrainedModel, reference: PreTrainedModel | Reference, **inputs: torch.Tensor) -> None:
    inputs = inputs or {"input_ids": zoo.random_ids(2, 40, seed=1)}
    expected, actual = reference(**inputs).logits, model(**inputs).logits
    assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def batch_of(rank: int) -> torch.Tensor:
    """Another batch for each rank; the last of four has none."""
    return zoo.random_ids(1 + rank % 2, (40, 3, 17, 0)[rank], seed=1 + rank)


def compare(grouped: Grouped, reference: PreTrainedModel | Reference) -> None:
    """Logits of a prompt, and greedy tokens of another, of different lengths on each rank."""

    def work(rank: int, model: PreTrainedModel) -> tuple[torch.Tensor | None, list[int]]:
        ids = batch_of(rank)
        logits = model(input_ids=ids).logits if ids.numel() else None
        return logits, greedy(model, zoo.random_ids(1, 9, seed=2 + rank % 2), 4 + 3 * rank)

    for rank, (logits, tokens) in enumerate(grouped.run(work)):
        if logits is not None:
            with torch.no_grad():
                assert_close(logits, reference(input_ids=batch_of(rank)).logits)
        assert tokens == greedy(reference, zoo.random_ids(1, 9, seed=2 + rank % 2), 4 + 3 * rank), rank
    grouped.check()
