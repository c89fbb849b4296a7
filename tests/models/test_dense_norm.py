"""A loaded model's RMSNorms make one pass over their rows, rounded as torch's operations round."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from epslots.models.dense_norm import norm_in_place
from epslots.moe import row_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_torchs(dtype: torch.dtype):
    torch.manual_seed(0)
    norm = Qwen3MoeRMSNorm(80, eps=1e-3).to(dtype)
    norm.weight.data.normal_()
    rows = (torch.randn(3, 5, 80) * torch.logspace(-4, 4, 15).view(3, 5, 1)).to(dtype)
    with torch.no_grad():
        wanted = norm(rows)
        norm_in_place(norm)
        result = norm(rows)
        assert result.dtype is dtype and result.shape == rows.shape
        assert torch.equal(norm(rows[1:2, 3]), result[1:2, 3]), "a row has the same bits in any batch"
        assert torch.equal(norm(rows.transpose(0, 1)), result.transpose(0, 1))
    torch.testing.assert_close(result, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=0)
    same = (result == wanted).float().mean()
    assert same > (0.99 if dtype is torch.bfloat16 else 0.4)


def test_other_norms_stay(monkeypatch: pytest.MonkeyPatch):
    """Of other arithmetic, widths or dtypes; and where gradients are asked for."""
    monkeypatch.setattr(row_norm, "rms_norm", lambda *_: pytest.fail("torch's"))
    norms = nn.ModuleList([GemmaRMSNorm(32), nn.RMSNorm(32), Qwen3MoeRMSNorm(40), Qwen3MoeRMSNorm(32).double()])
    norm_in_place(norms)
    with torch.no_grad():
        for norm in norms:
            width, dtype = norm.weight.shape[0], norm.weight.dtype
            assert norm(torch.ones(2, width, dtype=dtype)).shape == (2, width)
        assert norms[2](torch.ones(0, 40)).shape == (0, 40)
    plain = Qwen3MoeRMSNorm(32)
    norm_in_place(plain)
    plain(torch.randn(2, 32)).sum().backward()
    assert plain.weight.grad is not None
