"""The grouped product's Triton kernels: held to torch's operations by Triton's interpreter, and compiled for GPUs.

They run in the process of ``tests/cuda_graph/test_triton_kernels.py``.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from epslots.moe import product_choice
from epslots.moe.grouped_gemm import BatchInvariantGemm, GroupedGemm
from epslots.moe.kernel_gemm import Gate, KernelGemm, Products, TorchProducts, known_gate, tile_rows, tiles_at_most
from epslots.moe.product_choice import Product, choose_product, make_gemm
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.gpu_spec import GPUS
from tests.support.interpreter import assembled, compiled, interpreted, needs_triton, outside

GATES = [None, Gate("silu"), Gate("gelu"), Gate("gelu_tanh")]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def triton_products() -> Products:
    from epslots.moe.grouped_kernel import TritonProducts

    return TritonProducts()


def in_slots(weight: torch.Tensor) -> torch.Tensor:
    """The same weights [Q, I, O] in slots: each behind what else a slot holds, and the slots not the first of their pool."""
    slots, size = len(weight), weight[0].numel()
    pool = torch.full((slots + 2, size + 24), float("nan"), dtype=weight.dtype)
    view = pool[1 : slots + 1, 16 : 16 + size].view(weight.shape)
    return view.copy_(weight)


def problem(
    counts: list[int], inputs: int, outputs: int, dtype: torch.dtype, *, transposed: bool, biased: bool, spare: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows, weights [Q, I, O], biases and ends; ``spare`` rows are in no slot."""
    random = torch.Generator().manual_seed(sum(counts) + inputs)
    rows = torch.randn(sum(counts) + spare, inputs, generator=random).to(dtype)
    shape = (len(counts), inputs, outputs) if transposed else (len(counts), outputs, inputs)
    weight = in_slots((torch.randn(shape, generator=random) * inputs**-0.5).to(dtype))
    bias = torch.randn(len(counts), outputs, generator=random).to(dtype) if biased else None
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return rows, weight if transposed else weight.transpose(1, 2), bias, ends


def assert_alike(rows: torch.Tensor, weight: torch.Tensor, bias: Any, ends: torch.Tensor, gate: Gate | None) -> None:
    """Both kinds of kernels list the same tiles, and compute the same results for rows in slots."""
    ours, reference, results = triton_products(), TorchProducts(), []
    tiles, expected = ours.list_tiles(ends, len(rows)), reference.list_tiles(ends, len(rows))
    count = int(tiles.count)
    assert count == int(expected.count) <= len(tiles.slot_T)
    assert tiles.slot_T[:count].tolist() == expected.slot_T[:count].tolist()
    assert tiles.row_T[:count].tolist() == expected.row_T[:count].tolist()
    for products, listed in ((ours, tiles), (reference, expected)):
        results.append(products.multiply(rows, weight, bias, listed, gate)[: int(ends[-1])].float())
    assert results[0].shape == results[1].shape
    difference = (results[0] - results[1]).abs().max() if len(results[0]) else torch.zeros(())
    assert difference <= TOLERANCES[rows.dtype] * max(1.0, float(results[1].abs().max()) if len(results[1]) else 0.0)


@pytest.fixture(scope="module", autouse=True)
def exact_bfloat16() -> Any:
    """Triton's interpreter keeps bf16 as 16 bits of an integer, and multiplies those."""
    if not product_choice.importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        import triton.language as tl

        wide = [
            TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if t.data.dtype == np.uint16 else t
            for t in (a, b)
        ]
        return multiply(self, *wide, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", widened)
        yield


@needs_triton
@interpreted
@settings(deadline=None, max_examples=12)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 17, 33]), min_size=1, max_size=5),
    inputs=st.sampled_from([8, 40, 72]),
    outputs=st.sampled_from([16, 70, 136]),
    dtype=st.sampled_from(list(TOLERANCES)),
    transposed=st.booleans(),
    biased=st.booleans(),
    gate=st.sampled_from(GATES),
    spare=st.integers(0, 3),
)
def test_products_equal_torchs(counts: list[int], gate: Gate | None, **shape: Any):
    rows, *rest = problem(counts, **shape)
    if len(rows):
        assert_alike(rows, *rest, gate)


@needs_triton
@interpreted
@pytest.mark.parametrize("counts", [[1], [0, 0, 4096, 0], [0] * 63 + [1], [64, 0, 65], [700, 1, 0, 300]])
def test_few_rows_and_many(counts: list[int]):
    assert_alike(*problem(counts, 16, 16, torch.float32, transposed=False, biased=False), Gate("silu"))


@outside
def test_a_grid_covers_every_routing():
    """The most tiles are reached, and no routing has more."""
    for rows, slots in [(1, 1), (8, 128), (100, 3), (1000, 8), (4096, 64)]:
        size = tile_rows(rows, slots)
        most = tiles_at_most(rows, slots, size)
        spread = [1] * min(slots - 1, rows - 1)
        counts = [*spread, rows - len(spread), *[0] * (slots - len(spread) - 1)]
        needed = sum(-(-count // size) for count in counts)
        assert most - 1 <= needed <= most
        assert 16 <= size <= 64


def experts(name: str = "silu", gate: Any = _default_apply_gate, *, has_gate: bool = True) -> Any:
    module = SimpleNamespace(has_gate=has_gate, has_bias=False, is_transposed=False, has_post_expert_norm=False)
    module.act_fn = ACT2FN[name]
    module._apply_gate = MethodType(gate, module)
    return module


@outside
def test_gates_are_fused_only_where_known():
    """A clamped or interleaved gate, or another activation, is the module's own business."""

    def clamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up

    assert known_gate(experts("silu")) == Gate("silu")
    assert known_gate(experts("gelu")) == Gate("gelu")
    assert known_gate(experts("gelu_pytorch_tanh")) == Gate("gelu_tanh")
    assert known_gate(experts("relu2")) is None
    assert known_gate(experts("silu", clamped)) is None
    assert known_gate(experts("relu2", has_gate=False)) is None


@outside
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_a_kernel_gemm_equals_torchs(name: str):
    """With the kernels' reference, whose gates are transformers' own."""
    module, random = experts(name), torch.Generator().manual_seed(0)
    weights = {"gate_up_proj": torch.randn(3, 32, 8, generator=random), "down_proj": torch.randn(3, 8, 16, generator=random)}
    rows, ends = torch.randn(5, 8, generator=random), torch.tensor([2, 2, 5], dtype=torch.int32)
    keys = torch.tensor([0, 0, 2, 2, 2])
    expected = GroupedGemm(module, weights)(rows, ends, keys)
    assert torch.equal(KernelGemm(module, weights, TorchProducts())(rows, ends, keys), expected)


@outside
@pytest.mark.parametrize(
    ("gpu", "dtype", "product"),
    [
        ("a100", torch.bfloat16, Product.KERNEL),
        ("4090", torch.bfloat16, Product.KERNEL),
        ("5090", torch.bfloat16, Product.KERNEL),
        ("h100", torch.bfloat16, Product.TORCH),
        ("b200", torch.bfloat16, Product.TORCH),
        ("h100", torch.float16, Product.KERNEL),
        ("h100", torch.float32, Product.KERNEL),
        ("h100", torch.float64, Product.BY_SLOT),
    ],
)
def test_each_gpu_has_its_product(gpu: str, dtype: torch.dtype, product: Product, monkeypatch: pytest.MonkeyPatch):
    """Torch's kernel where it has one; else ours, where Triton is there."""
    with simulated_gpus(gpu):
        weights = {name: torch.zeros(2, 16, 16, dtype=dtype, device="cuda") for name in ("gate_up_proj", "down_proj")}
        assert choose_product(list(weights.values())) is product
        gemm = make_gemm(experts(), weights)
        assert isinstance(gemm, KernelGemm) is (product is Product.KERNEL)
        assert gemm.waits_for_host is (product is Product.BY_SLOT)
        assert (product is Product.TORCH) is (GPUS[gpu].fast_grouped_mm and dtype == torch.bfloat16)
        odd = {name: torch.zeros(2, 16, 15, dtype=dtype, device="cuda") for name in weights}
        assert choose_product(list(odd.values())) is (Product.BY_SLOT if dtype == torch.float64 else Product.KERNEL)
        assert isinstance(make_gemm(experts(), weights, batch_invariant=True), BatchInvariantGemm)
        monkeypatch.setattr(product_choice.importlib.util, "find_spec", lambda name: None)
        assert make_gemm(experts(), weights).waits_for_host is (product is not Product.TORCH)


@outside
def test_a_cpu_never_waits_for_itself():
    weights = {"gate_up_proj": torch.zeros(2, 16, 15), "down_proj": torch.zeros(2, 15, 16)}
    for batch_invariant in (False, True):
        gemm = make_gemm(experts(), weights, batch_invariant=batch_invariant)
        assert type(gemm) is (BatchInvariantGemm if batch_invariant else GroupedGemm)
        assert not gemm.waits_for_host


@needs_triton
@outside
@pytest.mark.parametrize(
    ("capability", "rows", "activation"), [(80, 16, "silu"), (89, 64, "silu"), (90, 64, ""), (120, 16, "")]
)
def test_blocks_fit_into_every_gpu(capability: int, rows: int, activation: str, tmp_path: Path):
    """Into the shared memory of consumers' GPUs, and into registers; as the assembler reports it."""
    from epslots.moe import grouped_kernel

    block = grouped_kernel._FEW if rows == 16 else grouped_kernel._MANY
    columns = block.outputs // 2 if activation else block.outputs
    constants = {"ACTIVATION": activation, "BIASED": False, "PRECISION": None}
    constants |= {"BLOCK_M": rows, "BLOCK_C": columns, "BLOCK_K": block.input_bytes // 2, "in_stride": 1}
    types = dict.fromkeys(("rows", "weight", "bias", "result"), "*bf16:16")
    types |= dict.fromkeys(("ends", "tile_slot", "tile_row", "count"), "*i32:16")
    types |= dict.fromkeys(("inputs", "outputs", "row_stride", "slot_stride", "out_stride"), "i32:16")
    types |= {"bias_stride": "i32"}
    kernel = grouped_kernel._multiply
    binary = compiled(kernel, types, constants, capability, num_warps=block.warps, num_stages=block.stages)
    assert binary.metadata.shared <= 99 << 10
    told = assembled(binary, capability, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told, told
