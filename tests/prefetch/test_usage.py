"""Scores of experts to their predicted usage: torch's operations against the definition, and Triton's kernel against torch's.

The latter by Triton's interpreter, in the process of ``tests/cuda_graph/test_triton_kernels.py``.
"""

from __future__ import annotations

import math

import pytest
import torch

from epslots.prefetch.usage import UsageKernel, usage_by_torch
from tests.support.interpreter import INTERPRETER


def kernel() -> UsageKernel:
    if not INTERPRETER:
        return usage_by_torch
    from epslots.prefetch.usage_triton import usage_by_triton

    return usage_by_triton


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 0), (1, 8, 2), (3, 20, 4), (18, 33, 1), (5, 16, 16)])
def test_usage_is_the_chance_that_some_token_chooses(tokens: int, experts: int, top_k: int):
    """In 256ths, of the first experts alone; equal scores share a place among the k."""
    score_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)).mul_(2).round_(decimals=1)
    found = kernel()(score_TE, top_k, experts - 1)
    assert found.dtype == torch.int32 and found.shape == (experts - 1,)
    unused = [1.0] * experts
    for row in score_TE.double().tolist():
        least, unit = 0.0, 1.0
        if top_k:
            mean = sum(row) / experts
            least = sorted(row, reverse=True)[top_k - 1]
            unit = 0.25 * math.sqrt(sum((x - mean) ** 2 for x in row) / experts)
        for expert, score in enumerate(row):
            unused[expert] /= 1 + math.exp((score - least) / unit)
    expected = [min(256 * (1 - chance) + 0.5, 255) for chance in unused[:-1]]
    assert all(abs(got - want + 0.5) <= 0.51 for got, want in zip(found.tolist(), expected, strict=True))


def test_half_precision_scores_are_widened():
    score_TE = torch.tensor([[0.0, 4.0, -4.0], [1.0, 1.0, 1.0]]).bfloat16()
    assert kernel()(score_TE, 0, 3).tolist() == usage_by_torch(score_TE.float(), 0, 3).tolist()
