"""Linear layers of a loaded model multiply few rows in place, and are torch's otherwise."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from epslots.models.dense_linear import _always, _LatestProduct, read_in_place
from epslots.moe import vector_gemm


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that was computed in place."""
    rows: list[int] = []
    original = vector_gemm.ReadyProduct.__call__

    def count(product: vector_gemm.ReadyProduct, inputs: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(inputs.numel() // inputs.shape[-1])
        return original(product, inputs, *args)

    monkeypatch.setattr(vector_gemm.ReadyProduct, "__call__", count)
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_are_multiplied_in_place(dtype: torch.dtype, bias: bool, products: list[int]):
    torch.manual_seed(0)
    layer = nn.Linear(48, 64, bias=bias, dtype=dtype)
    inputs = torch.randn(2, 3, 48).to(dtype)
    with torch.no_grad():
        wanted = layer(inputs)
        read_in_place(layer, batch_invariant=False)
        result = layer(inputs)
        assert result.shape == wanted.shape and result.dtype is dtype
        torch.testing.assert_close(result, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)
        assert products == [6]
        layer(torch.randn(1, vector_gemm._ALONE_ROWS + 1, 48).to(dtype))
        assert products == [6], "torch is faster"


def test_routers_multiply_in_place_too(products: list[int]):
    """By the code of their own class, of which only ``F.linear`` is another; transformers has it in 20 architectures."""
    config = Qwen3MoeConfig(num_experts=40, hidden_size=64, num_experts_per_tok=3, norm_topk_prob=True)
    router, inputs = Qwen3MoeTopKRouter(config), torch.randn(5, 64)
    router.weight.data.normal_()
    with torch.no_grad():
        wanted = router(inputs)
        read_in_place(router, batch_invariant=False)
        found = router(inputs)
    for ours, torchs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torchs)
    assert products == [5]
    router(inputs)[0].sum().backward()
    assert products == [5] and router.weight.grad is not None


def test_a_batch_invariant_model_does_not_choose_by_rows(products: list[int]):
    layer = nn.Linear(48, 64)
    read_in_place(layer, batch_invariant=True)
    with torch.no_grad():
        inputs = torch.randn(200, 48)
        assert torch.equal(layer(inputs)[:1], layer(inputs[:1]))
    assert products == [200, 1]


def test_what_does_not_suit_is_torchs(products: list[int]):
    """Gradients, no rows, other devices, mixed dtypes (an error in torch), matrices of another kind."""
    layer = nn.Linear(48, 64)
    read_in_place(layer, batch_invariant=False)
    layer(torch.randn(2, 48)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer(torch.randn(0, 48)).shape == (0, 64)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(2, 48).bfloat16())
        assert layer.to("meta")(torch.randn(2, 48, device="meta")).shape == (2, 64)
        narrow = nn.Linear(48, 3)
        read_in_place(narrow, batch_invariant=False)
        assert narrow(torch.randn(2, 48)).shape == (2, 3)
    assert products == []


class _Scores(nn.Module):
    """One number a row: its weight is no matrix, though ``F.linear`` takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight)


@torch.no_grad()
def test_weights_that_are_no_matrices_are_torchs(products: list[int]):
    scores, inputs = _Scores(), torch.randn(3, 48)
    read_in_place(scores, batch_invariant=False)
    assert torch.equal(scores(inputs), inputs @ scores.weight) and products == []


@torch.no_grad()
def test_what_loops_can_not_read_is_torchs(products: list[int]):
    """A bias of another shape, type or stride, or under autocast."""
    layer = nn.Linear(48, 64)
    read_in_place(layer, batch_invariant=False)
    inputs, bias = torch.randn(3, 48), torch.randn(128)
    for strange in (bias[::2], bias[:1], bias[0]):
        layer.bias = nn.Parameter(strange, requires_grad=False)
        assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, strange))
    layer.bias = nn.Parameter(bias[:64].double(), requires_grad=False)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(inputs)
    layer.bias = None
    with torch.autocast("cpu"):
        assert layer(inputs).dtype is torch.bfloat16
    assert products == []


@torch.no_grad()
def test_moved_and_changed_weights_are_read(products: list[int]):
    """In the same layer: other values in place, another matrix, another dtype, and a copy of the layer."""
    layer, inputs = nn.Linear(48, 64, bias=False), torch.randn(3, 48)
    read_in_place(layer, batch_invariant=False)
    for number in range(6):
        if number == 1:
            layer.weight.mul_(2)
        elif number == 2:
            layer.weight = nn.Parameter(torch.randn(64, 48))
        elif number == 3:
            layer, inputs = layer.bfloat16(), inputs.bfloat16()
        elif number == 4:
            layer = copy.deepcopy(layer)
            layer.weight.mul_(2)
        elif number == 5:
            layer.bias = nn.Parameter(torch.randn(64).bfloat16())
        wanted = F.linear(inputs, layer.weight, layer.bias)
        torch.testing.assert_close(layer(inputs), wanted, rtol=2**-7 if number > 2 else 1e-5, atol=1e-2)
    assert products == [3] * 6


@torch.no_grad()
def test_results_are_on_the_cpu_whatever_the_default(products: list[int]):
    layer, inputs = nn.Linear(48, 64), torch.randn(3, 48)
    wanted = layer(inputs)
    read_in_place(layer, batch_invariant=False)
    with torch.device("meta"):
        torch.testing.assert_close(layer(inputs), wanted)
    assert products == [3]


@torch.no_grad()
def test_other_views_of_the_same_memory_are_read():
    """A matrix that is transposed in place; a bias of other steps, and of another dtype."""
    layer, inputs, numbers = nn.Linear(64, 64), torch.randn(3, 64), torch.randn(128)
    read_in_place(layer, batch_invariant=False)
    for matrix in (layer.weight.data, layer.weight.data.t(), layer.weight.data):
        for bias in (numbers[:64], numbers[::2], numbers[:64]):
            layer.weight.data, layer.bias.data = matrix, bias
            torch.testing.assert_close(layer(inputs), inputs @ matrix.t() + bias)
    layer.bias.data = numbers.bfloat16()[:64]
    with pytest.raises(RuntimeError, match="dtype"):
        layer(inputs)


@torch.no_grad()
def test_inputs_of_a_wrong_width_are_an_error(products: list[int]):
    """Of linear layers and of routers, by less than a row and by whole rows; no number is read past them."""
    layer, scores = nn.Linear(48, 64), _Scores()
    scores.weight = nn.Parameter(torch.randn(64, 48))
    for module in (layer, scores):
        read_in_place(module, batch_invariant=False)
        assert module(torch.randn(48)).shape == (64,)
        for shape in ((3, 47), (3, 96), (96, 1), (1,), ()):
            with pytest.raises(RuntimeError):
                module(torch.randn(shape))
    assert products == [1, 1]


class _SharedProduct(_LatestProduct):
    """Whenever it has noted something, another thread asks for the product."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.seen: list[vector_gemm.ReadyProduct | None] = []
        self._weight = weight
        super().__init__(_always)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self.__dict__.get("begun"):
            self.__dict__["begun"] = False
            other = threading.Thread(target=lambda: self.seen.append(self.ready(self._weight, None)))
            other.start()
            other.join()


def test_threads_never_get_the_product_before():
    first, second = torch.randn(64, 48), torch.randn(64, 48)
    latest = _SharedProduct(second)
    before = latest.ready(first, None)
    latest.__dict__["begun"] = True
    assert latest.ready(second, None) is not before and len(latest.seen) == 1
    assert before not in latest.seen
