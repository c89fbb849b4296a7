"""Grouped products with packed matrices as a Triton kernel: codes are read in slots, and unpacked in registers.

    weight = round((code - zero) * (group * row))

A block's weights are rounded to the rows' dtype, as in unpacked slots, and multiplied with sums in float32. Codes of 4 bits
share a byte with those of the input 16 further on: each byte is read once, and multiplied in two halves. Tests hold the kernel
to ``TorchProducts`` by Triton's interpreter, and compile it for GPUs; no test of the project runs it on one.

Legend of shape suffixes: N rows, I inputs, O outputs, Q slots; of a block: M rows, W inputs, C outputs, G runs of inputs that
share a scale.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from epslots.cache.unpacking import PackedWeight, Parts
from epslots.layout import NIBBLES, PackedForm
from epslots.moe.kernel_gemm import Gate, Tiles, activated
from epslots.moe.kernel_parts import FEW_ROWS, gated

# Inputs of a run whose nibbles share bytes with those of the next; columns of a block that is the whole row.
_HALF, _ALL = 16, 1 << 30
_PARTS = ("codes", "group", "zero", "row")
_SCALES = {None: "", "float32": "float", "bfloat16": "float", "float16": "float", "float8_e4m3fn": "e4m3", "uint8": "e8m0"}


class _PackedBlock(NamedTuple):
    """How a block is computed: inputs at a time, outputs, stages of the loop, warps."""

    inputs: int
    outputs: int
    stages: int
    warps: int


_FEW, _MANY = _PackedBlock(128, 64, 4, 4), _PackedBlock(64, 128, 3, 4)


@triton.jit
def _from_e4m3(codes):  # type: ignore[no-untyped-def]
    """Bytes as 8-bit floats: their bits in those of a float16, whose exponent is larger by 8."""
    wide = codes.to(tl.uint16)
    bits = tl.where((wide & 127) == 127, 0x7E00, ((wide & 128) << 8) | ((wide & 127) << 7))
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit  # type: ignore[untyped-decorator]
def _values(codes, KIND: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as float32; ``HIGH``: of the upper halves of bytes."""
    if KIND == "e4m3":
        found = _from_e4m3(codes)
    elif KIND == "int8":
        found = codes.to(tl.float32)
    else:
        four = (codes >> 4) if HIGH else (codes & 15)
        if KIND == "int4":
            found = four.to(tl.float32)
        else:  # e2m1, likewise, whose exponent is larger by 14
            wide = four.to(tl.uint16)
            bits = ((wide & 8) << 12) | ((wide & 7) << 9)
            found = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _scales(stored, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales as float32."""
    if SCALE == "e8m0":  # exponents of two, biased by 127: 255 is NaN, and 0 a denormal number
        exponent = stored.to(tl.uint32)
        bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        found = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        found = _from_e4m3(stored)
    else:
        found = stored.to(tl.float32)
    return found


@triton.jit
def _in_slot(parts, strides, slot):  # type: ignore[no-untyped-def]
    """The addresses of a slot's codes, group scales, zeros and row scales."""
    codes, group, zero, row_scale = parts[0], parts[1], parts[2], parts[3]
    return (codes + slot * strides[0], group + slot * strides[1], zero + slot * strides[2], row_scale + slot * strides[3])


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    code_WC,
    parts,
    input_G,
    output_C,
    inside_GC,
    blocks,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    HIGH: tl.constexpr,
    STEP: tl.constexpr,
):
    """The weights [W, C] of codes, float32; ``input_G`` is the first input of each run of ``STEP``."""
    RUNS: tl.constexpr = code_WC.shape[0] // STEP
    OUTPUTS: tl.constexpr = code_WC.shape[1]
    values = tl.reshape(_values(code_WC, KIND, HIGH), [RUNS, STEP, OUTPUTS])
    place_GC = (output_C // BLOCK[0])[None, :] * blocks + (input_G // BLOCK[1])[:, None]
    if ZERO:
        values -= tl.load(parts[2] + place_GC, mask=inside_GC, other=0).to(tl.float32)[:, None, :]
    elif KIND == "int4":
        values -= 8.0
    if SCALE != "" or ROW:
        scale_GC = tl.full([RUNS, OUTPUTS], 1.0, tl.float32)
        if SCALE != "":
            scale_GC = _scales(tl.load(parts[1] + place_GC, mask=inside_GC, other=0), SCALE)
        if ROW:
            scale_GC *= tl.load(parts[3] + output_C[None, :] + input_G[:, None] * 0, mask=inside_GC, other=0.0)
        values *= scale_GC[:, None, :]
    return tl.reshape(values, [RUNS * STEP, OUTPUTS])


@triton.jit(do_not_specialize=["bias_stride", "other_first"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    rows,
    own,
    other,
    perm,
    bias,
    result,
    tiles,
    inputs,
    outputs,
    other_first,
    blocks,
    strides,
    row_stride,
    code_stride,
    perm_stride,
    bias_stride,
    result_stride,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    ROW: tl.constexpr,
    PERM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows times their slots' weights, plus bias; gated, if there is an activation. Grid: (blocks of outputs, T).

    Args:
        rows: [N, inputs], by row_stride.
        own: codes [Q, outputs, bytes], by code_stride from output to output; group scales and zeros [Q, rows of blocks,
            blocks]; row scales [Q, outputs]; from slot to slot by ``strides``.
        other: the same, of the outputs that are gated; their first one is the row ``other_first``.
        perm: int32 [Q, inputs]; bias: [Q, outputs, and behind them as many others if gated]; by their slots' strides.
        result: [N, outputs], by result_stride.
        tiles: ends, slots and first rows of tiles, and their count.
        BLOCK: outputs and inputs of a block.
        STEP: inputs of a run that share a scale: a power of two.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(tiles[3]):
        return
    slot = tl.load(tiles[1] + tile).to(tl.int64)
    row_M = tl.load(tiles[2] + tile) + tl.arange(0, BLOCK_M)
    output_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real_M, real_C = row_M < tl.load(tiles[0] + slot), output_C < outputs
    rows += row_M[:, None].to(tl.int64) * row_stride
    own, other, other_C = _in_slot(own, strides, slot), _in_slot(other, strides, slot), output_C + other_first
    dtype = result.dtype.element_ty
    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    other_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    HALVES: tl.constexpr = 2 if KIND == "int4" or KIND == "e2m1" else 1
    WIDTH: tl.constexpr = BLOCK_K // HALVES
    byte_W, run_G = tl.arange(0, WIDTH), tl.arange(0, WIDTH // STEP) * STEP
    input_W, input_G = byte_W, run_G
    if HALVES == 2:
        input_W, input_G = byte_W + byte_W // 16 * 16, run_G + run_G // 16 * 16
    for first in range(0, inputs, BLOCK_K):
        at_W, inside = first // HALVES + byte_W, (first + input_W < inputs)[:, None] & real_C[None, :]
        code_WC = tl.load(own[0] + output_C[None, :] * code_stride + at_W[:, None], mask=inside, other=0)
        if ACTIVATION != "":
            gated_WC = tl.load(other[0] + other_C[None, :] * code_stride + at_W[:, None], mask=inside, other=0)
        for half in tl.static_range(HALVES):
            from_W, from_G = first + input_W + 16 * half, first + input_G + 16 * half
            real_W, inside_GC = from_W < inputs, (from_G < inputs)[:, None] & real_C[None, :]
            place_W = from_W
            if PERM:
                place_W = tl.load(perm + slot * perm_stride + from_W, mask=real_W, other=0)
            row_MW = tl.load(rows + place_W[None, :], mask=real_M[:, None] & real_W[None, :], other=0.0)
            weight_WC = _weights(
                code_WC, own, from_G, output_C, inside_GC, blocks, KIND, SCALE, ZERO, ROW, BLOCK, half == 1, STEP
            )
            sum_MC = tl.dot(row_MW, weight_WC.to(dtype), sum_MC, input_precision=PRECISION)
            if ACTIVATION != "":
                weight_WC = _weights(
                    gated_WC, other, from_G, other_C, inside_GC, blocks, KIND, SCALE, ZERO, ROW, BLOCK, half == 1, STEP
                )
                other_MC = tl.dot(row_MW, weight_WC.to(dtype), other_MC, input_precision=PRECISION)
    if BIASED:
        bias += slot * bias_stride + output_C
        sum_MC += tl.load(bias, mask=real_C, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            other_MC += tl.load(bias + outputs, mask=real_C, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        sum_MC = gated(sum_MC, other_MC, dtype, ACTIVATION)
    place_MC = row_M[:, None].to(tl.int64) * result_stride + output_C[None, :]
    tl.store(result + place_MC, sum_MC.to(dtype), mask=real_M[:, None] & real_C[None, :])


class _Half(NamedTuple):
    """Outputs of a form: its tensors, and the row of the first of them."""

    parts: Parts
    first: int = 0


def multiply_packed(
    rows_NI: torch.Tensor, weight: PackedWeight, bias_QO: torch.Tensor | None, tiles: Tiles, gate: Gate | None = None
) -> torch.Tensor:
    """``Products.multiply`` with a packed matrix."""
    forms, parts = weight.matrix.forms, weight.parts
    joined = len(forms) == 2 and forms[0] == forms[1] and not forms[0].perm
    if gate is not None and (joined or len(forms) == 1):
        result_NO = rows_NI.new_empty(len(rows_NI), weight.shape[2] // 2)
        other = _Half(parts[1]) if joined else _Half(parts[0], forms[0].rows // 2)
        _launch(rows_NI, forms[0], _Half(parts[0]), bias_QO, tiles, result_NO, gate, other)
        return result_NO
    result_NO, first = rows_NI.new_empty(len(rows_NI), weight.shape[2]), 0
    for form, own in zip(forms, parts, strict=True):
        outputs = slice(first, first + form.rows)
        bias = None if bias_QO is None else bias_QO[:, outputs]
        _launch(rows_NI, form, _Half(own), bias, tiles, result_NO[:, outputs])
        first = outputs.stop
    return result_NO if gate is None else activated(result_NO, gate)


def _launch(
    rows_NI: torch.Tensor,
    form: PackedForm,
    own: _Half,
    bias_QO: torch.Tensor | None,
    tiles: Tiles,
    result_NO: torch.Tensor,
    gate: Gate | None = None,
    other: _Half | None = None,
) -> None:
    block, outputs = _FEW if tiles.size <= FEW_ROWS else _MANY, result_NO.shape[1]
    columns = block.outputs if gate is None else block.outputs // 2
    codes = own.parts["codes"]
    grid = own.parts.get("group", own.parts.get("zero"))
    blocks = 1 if grid is None else grid.shape[2]
    tensors = _tensors(own.parts)
    _multiply[(triton.cdiv(outputs, columns), tiles.slot_T.shape[0])](
        rows_NI,
        tensors,
        _tensors((other or own).parts),
        own.parts.get("perm", tensors[0]),
        tensors[0] if bias_QO is None else bias_QO,
        result_NO,
        (tiles.ends_Q, tiles.slot_T, tiles.row_T, tiles.count),
        form.columns,
        outputs,
        0 if other is None else other.first,
        blocks,
        tuple(own.parts[name].stride(0) if name in own.parts else 0 for name in _PARTS),
        rows_NI.stride(0),
        codes.stride(1),
        own.parts["perm"].stride(0) if form.perm else 0,
        0 if bias_QO is None else bias_QO.stride(0),
        result_NO.stride(0),
        **constants_of(form, block, blocks),
        ACTIVATION="" if gate is None else gate.activation,
        BIASED=bias_QO is not None,
        PRECISION="ieee" if rows_NI.dtype == torch.float32 else None,
        BLOCK_M=tiles.size,
        BLOCK_C=columns,
        num_warps=block.warps,
        num_stages=block.stages,
    )


def constants_of(form: PackedForm, block: _PackedBlock, blocks: int) -> dict[str, Any]:
    """The kernel's constants that follow from a form whose rows have so many blocks."""
    # Inputs in a row of which a run may consist: those of nibbles are read in halves.
    most = _HALF if form.kind in NIBBLES else block.inputs
    return {
        "KIND": form.kind,
        "SCALE": _SCALES[form.group],
        "ZERO": form.zero,
        "ROW": form.row,
        "PERM": form.perm,
        "BLOCK": (form.block[0], _ALL if blocks == 1 else form.block[1]),
        "STEP": most if blocks == 1 else math.gcd(most, form.block[1]),
        "BLOCK_K": block.inputs,
    }


def _tensors(parts: Parts) -> tuple[torch.Tensor, ...]:
    """The kernel's arguments of a form: 8-bit floats as bytes; codes in the place of missing parts."""
    found = [parts.get(name, parts["codes"]) for name in _PARTS]
    return tuple(tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in found)
