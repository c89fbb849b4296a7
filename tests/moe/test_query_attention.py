"""Attention of one query a row by compiled loops is torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from epslots.moe import query_attention
from epslots.moe.query_attention import attend, fits

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """In float64, [R, 1, H, D]."""
    shared = query.shape[1] // key.shape[1]
    wide = [states.double().repeat_interleave(shared, 1) for states in (key, value)]
    return F.scaled_dot_product_attention(query.double(), *wide, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups", "span", "size"), [(1, 1, 1, 16), (8, 2, 16, 64), (6, 2, 37, 48), (8, 1, 300, 32)])
def test_results_are_exact_but_for_rounding(
    dtype: torch.dtype, heads: int, groups: int, span: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    """With keys as pages have them, of positions and then heads; some rows shorter than others; by several threads."""
    query = numbers(3, 1, heads, size, dtype=dtype).transpose(1, 2)
    key, value = (numbers(3, span, groups, size, dtype=dtype, seed=seed).transpose(1, 2) for seed in (1, 2))
    wide = numbers(3, groups, span, 2 * size, dtype=dtype, seed=3)
    mask = (torch.arange(span) >= torch.tensor([[0], [span // 2], [span - 1]]))[:, None, None]
    try:
        for threads, values, seen in ((1, value, None), (3, value, mask), (1, wide, mask)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(query_attention, "_ALONE_BYTES", 0 if threads > 1 else 1 << 30)
            assert fits(query, key, values, seen)
            found, wanted = attend(query, key, values, seen, 0.3), exact(query, key, values, seen, 0.3)
            assert found.dtype is dtype and found.shape == wanted.shape
            assert float((found.double() - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE[dtype]
    finally:
        torch.set_num_threads(1)


def test_large_scores_and_strange_numbers():
    """Scores whose exponentials no float holds; what is infinite or NaN spoils its row alone."""
    query, key, value = numbers(3, 2, 1, 16), numbers(3, 1, 20, 16, seed=1), numbers(3, 1, 20, 16, seed=2)
    wanted = exact(100 * query, key, value, None, 1.0)
    assert (attend(100 * query, key, value, None, 1.0).double() - wanted).abs().max() < 1e-4
    key[0, 0, 3, 5], value[1, 0, 4, 2] = torch.nan, torch.inf
    found = attend(query, key, value, None, 0.25)
    assert found[0].isnan().all() and not torch.isfinite(found[1, ..., 2]).any()
    assert torch.isfinite(found[2]).all() and torch.isfinite(found[1, ..., :2]).all()
    hidden = torch.zeros(3, 1, 1, 20, dtype=torch.bool)
    assert attend(query, key, value, hidden, 0.25).isnan().all(), "a row without keys, as in torch"


def test_what_the_loops_do_not_take():
    query, key = numbers(2, 4, 1, 16), numbers(2, 2, 5, 16)
    assert fits(query, key, key, None)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert fits(query, key, key, mask) and not fits(query, key, key, mask.float()) and not fits(query, key, key, mask[:1])
    assert not fits(numbers(2, 4, 2, 16), key, key, None) and not fits(query.half(), key.half(), key.half(), None)
    assert not fits(numbers(2, 4, 1, 24), numbers(2, 2, 5, 24), numbers(2, 2, 5, 24), None)
    assert not fits(numbers(2, 18, 1, 16), key, key, None), "more heads share keys than registers hold"
    assert not fits(query, key.transpose(2, 3).contiguous().transpose(2, 3), key, None)
    assert not fits(query.clone().requires_grad_(), key, key, None)
    assert not fits(query, key, key[:, :, :4], None) and not fits(query, key, key[:, :1], None), "torch refuses these"
    assert not fits(query, numbers(2, 2, 5, 32), key, None) and not fits(numbers(2, 4, 1, 0), key[..., :0], key, None)
    assert not fits(query, torch._neg_view(key), key, None)
    with torch.autocast("cpu"):
        assert not fits(query, key, key, None)


def test_results_are_on_the_cpu_whatever_the_default():
    query, key = numbers(2, 4, 1, 16), numbers(2, 2, 5, 16)
    wanted = attend(query, key, key, None, 0.25)
    with torch.device("meta"):
        assert torch.equal(attend(query, key, key, None, 0.25), wanted)
