"""A loaded model's attention turns queries and keys in one pass, to the bits of transformers' functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen3_moe import modeling_qwen3_moe

from epslots.models.dense_rotation import rotate_in_place
from epslots.moe import row_rotation


def attention_of(module: ModuleType) -> nn.Module:
    """A module that does what its architecture's attention does with queries and keys: no more."""
    names = vars(module)
    code = "def forward(self, *given, **more): return apply_rotary_pos_emb(*given, **more)"
    found: dict[str, Any] = {}
    exec(code, names, found)
    return type("Attention", (nn.Module,), found)()


def given_for(*, dtype: torch.dtype, turned: int = 64, rows: int = 3) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    states = (torch.randn(3, 5, heads, 64).to(dtype).transpose(1, 2) for heads in (4, 2))
    return *states, *(torch.randn(rows, 5, turned).to(dtype) for _ in range(2))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of a head that were turned, at each call of the loops."""
    found: list[int] = []
    original = row_rotation.rotated
    monkeypatch.setattr(row_rotation, "rotated", lambda *given: (found.append(given[2].shape[2]), original(*given))[1])
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_have_the_bits_of_transformers(dtype: torch.dtype, turns: list[int]):
    """Of whole heads and of a part, with angles of each row or of all; also of states that lie in larger tensors."""
    for module, turned, rows in ((modeling_qwen3_moe, 64, 3), (modeling_qwen3_moe, 64, 1), (modeling_glm4_moe, 32, 3)):
        attention, given = attention_of(module), given_for(dtype=dtype, turned=turned, rows=rows)
        wanted = attention(*given)
        rotate_in_place(attention)
        for ours, theirs in zip(attention(*given), wanted, strict=True):
            assert ours.shape == theirs.shape and torch.equal(ours, theirs)
        wide = torch.randn(3, 4, 5, 96).to(dtype)
        apart = attention(wide[..., 32:], *given[1:])
        assert torch.equal(apart[0], module.apply_rotary_pos_emb(wide[..., 32:], *given[1:])[0])
    assert turns == [64, 64, 64, 64, 32, 32]


def test_other_rotations_stay(turns: list[int]):
    """Of another arithmetic, in other dtypes, widths or dimensions; and where gradients are asked for."""
    given = given_for(dtype=torch.bfloat16)
    for module in (modeling_cohere2, modeling_olmo2):
        attention = attention_of(module)
        rotate_in_place(attention)
        assert "forward" not in vars(attention)
    attention = attention_of(modeling_qwen3_moe)
    rotate_in_place(attention)
    float32 = tuple(one.float() for one in given)
    assert attention(*given[:2], *float32[2:])[0].dtype is torch.float32
    assert attention(*(one[..., :40] for one in given))[0].shape[3] == 40
    assert attention(*(one.transpose(1, 2) for one in given[:2]), *given[2:], unsqueeze_dim=2)[0].shape == (3, 5, 4, 64)
    query = float32[0].requires_grad_()
    attention(query, *float32[1:])[0].sum().backward()
    assert query.grad is not None and turns == []
