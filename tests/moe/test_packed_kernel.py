"""The Triton kernel for packed slots: held to torch's operations by Triton's interpreter, and compiled for GPUs.

It runs in the process of ``tests/cuda_graph/test_triton_kernels.py``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epslots.bench.packed_formats import FORMATS, random_packed
from epslots.layout import NIBBLES, PackedForm
from epslots.moe.kernel_gemm import Gate, TorchProducts
from tests.support.interpreter import Types, assembled, compiled, interpreted, needs_triton, outside

# One rounding of weights and of sums.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3}
# Triton's types of the parts of a form.
POINTERS = {"float8_e4m3fn": "*u8", "uint8": "*u8", "int8": "*i8", "int32": "*i32"}
POINTERS |= {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
MANY = bool(os.environ.get("EPSLOTS_ALL_FORMATS"))


def assert_alike(forms: list[PackedForm], counts: list[int], dtype: torch.dtype, gate: Gate | None, *, biased: bool) -> None:
    """Both kinds of kernels compute the same results for rows in slots."""
    from epslots.moe.grouped_kernel import TritonProducts

    torch.manual_seed(sum(counts))
    weight = random_packed(forms, len(counts), dtype)
    _, inputs, outputs = weight.shape
    rows = (torch.randn(sum(counts) + 1, inputs) / 100).to(dtype)
    bias = torch.randn(len(counts), outputs).to(dtype) if biased else None
    ends, results = torch.tensor(counts).cumsum(0).to(torch.int32), []
    for products in (TritonProducts(), TorchProducts()):
        tiles = products.list_tiles(ends, len(rows))
        results.append(products.multiply(rows, weight, bias, tiles, gate)[:-1].float())
    assert results[0].shape == results[1].shape == (len(rows) - 1, outputs // (1 if gate is None else 2))
    assert torch.isfinite(results[1]).all() and results[1].any()
    assert (results[0] - results[1]).abs().max() <= TOLERANCES[dtype] * results[1].abs().max()


@needs_triton
@interpreted
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_multiplied_as_torch_would(name: str):
    """As published models have them: a gate and its up apart, of which the last block is cut short."""
    form = PackedForm(rows=40, columns=160, **FORMATS[name])
    assert_alike([form, form], [3, 0, 17], torch.float32, Gate("silu"), biased=False)


@needs_triton
@interpreted
@settings(deadline=None, max_examples=150 if MANY else 8)
@given(
    kind=st.sampled_from(["e4m3", "int8", "int4", "e2m1"]),
    group=st.sampled_from([None, "float32", "bfloat16", "float16", "float8_e4m3fn", "uint8"]),
    block=st.tuples(st.sampled_from([1, 8]), st.sampled_from([8, 16, 24, 32, 48, 128])),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    inputs=st.sampled_from([16, 40, 160]),
    forms=st.sampled_from([1, 2]),
    gate=st.sampled_from([None, Gate("silu")]),
    dtype=st.sampled_from(list(TOLERANCES)),
    biased=st.booleans(),
)
def test_any_form_is_multiplied_as_torch_would(
    kind: str, group: str | None, block: tuple[int, int], parts: tuple[bool, bool, bool], inputs: int, forms: int, **rest: Any
):
    assume(kind not in NIBBLES or block[1] % 16 == 0)
    zero, row, perm = parts
    zero = zero and kind == "int4"
    form = PackedForm(kind, 24, inputs, group, block if group or zero else (1, 1), zero=zero, row=row, perm=perm)
    assert_alike([form] * forms, [1, 0, 18], **rest)


@needs_triton
@outside
@pytest.mark.parametrize(
    ("name", "capability", "rows", "activation"),
    [
        (name, *launch)
        for number, name in enumerate(FORMATS)
        for launch in ((80, 16, "silu"), (90, 64, ""), (90, 16, "silu"), (120, 64, "silu"))
        if MANY or (number, launch[:2]) == (7, (90, 64))
    ],
)
def test_packed_blocks_fit_into_every_gpu(name: str, capability: int, rows: int, activation: str, tmp_path: Path):
    """Into the shared memory of consumers' GPUs, and into registers; as the assembler reports it."""
    from epslots.moe import packed_kernel

    form = PackedForm(rows=1536, columns=2048, **FORMATS[name])
    block = packed_kernel._FEW if rows == 16 else packed_kernel._MANY
    constants = packed_kernel.constants_of(form, block, blocks=-(-2048 // form.block[1]))
    constants |= {"ACTIVATION": activation, "BIASED": False, "PRECISION": None, "BLOCK_M": rows}
    constants["BLOCK_C"] = block.outputs // 2 if activation else block.outputs
    kinds = {part: f"{POINTERS[dtype]}:16" for part, (_, dtype) in form.tensors.items()}
    parts = tuple(kinds.get(part, kinds["codes"]) for part in ("codes", "group", "zero", "row"))
    types: Types = {"own": parts, "other": parts, "tiles": ("*i32:16",) * 4, "strides": ("i32:16",) * 4}
    types |= dict.fromkeys(("rows", "bias", "result"), "*bf16:16") | {"perm": "*i32:16"}
    integers = ("inputs", "outputs", "blocks", "row_stride", "code_stride", "perm_stride", "result_stride")
    types |= dict.fromkeys(integers, "i32:16") | dict.fromkeys(("bias_stride", "other_first"), "i32")
    binary = compiled(packed_kernel._multiply, types, constants, capability, num_warps=block.warps, num_stages=block.stages)
    assert binary.metadata.shared <= 99 << 10
    told = assembled(binary, capability, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told, told
