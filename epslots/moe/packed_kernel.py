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
from collections.abc import Mapping
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
_SCALES = {None: "", "float32": "float", "bfloat16": "float", "float16": "float", "float8_e4m3fn": "e4m3", "uint8": "e8m0"}


class _Block(NamedTuple):
    """How a block is computed: inputs at a time, outputs, stages of the loop, warps."""

    inputs: int
    outputs: int
    stages: int
    warps: int


_FEW, _MANY = _Block(128, 64, 4, 4), _Block(64, 128, 3, 4)


@triton.jit
def _from_e4m3(codes):  # type: ignore[no-untyped-def]
    """Bytes as 8-bit floats: their bits in those of a float16, whose exponent is larger by 8."""
    wide = codes.to(tl.uint16)
    bits = tl.where((wide & 127) == 127, 0x7E00, ((wide & 128) << 8) | ((wide & 127) << 7))
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
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


@triton.jit
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
def _weights(  # type: ignore[no-untyped-def]
    codes,
    group,
    zero,
    row_scale,
    input_G,
    output_C,
    real_C,
    inputs,
    blocks,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HIGH: tl.constexpr,
    STEP: tl.constexpr,
):
    """The weights [W, C] of codes, float32; ``input_G`` is the first input of each run of ``STEP``."""
    RUNS: tl.constexpr = codes.shape[0] // STEP
    OUTPUTS: tl.constexpr = codes.shape[1]
    values = tl.reshape(_values(codes, KIND, HIGH), [RUNS, STEP, OUTPUTS])
    inside = (input_G < inputs)[:, None] & real_C[None, :]
    block_GC = (output_C // BLOCK_ROWS)[None, :] * blocks + (input_G // BLOCK_COLUMNS)[:, None]
    if ZERO:
        values -= tl.load(zero + block_GC, mask=inside, other=0).to(tl.float32)[:, None, :]
    elif KIND == "int4":
        values -= 8.0
    if ROW:
        row_C = tl.load(row_scale + output_C, mask=real_C, other=0.0)
    if SCALE != "":
        scale_GC = _scales(tl.load(group + block_GC, mask=inside, other=0), SCALE)
        if ROW:
            scale_GC *= row_C[None, :]
        values *= scale_GC[:, None, :]
    elif ROW:
        values *= row_C[None, None, :]
    return tl.reshape(values, [RUNS * STEP, OUTPUTS])


@triton.jit(do_not_specialize=["bias_stride", "other_first"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    rows,
    codes,
    group,
    zero,
    row_scale,
    other_codes,
    other_group,
    other_zero,
    other_row_scale,
    perm,
    bias,
    result,
    ends,
    tile_slot,
    tile_row,
    count,
    inputs,
    outputs,
    other_first,
    blocks,
    row_stride,
    code_stride,
    codes_stride,
    group_stride,
    zero_stride,
    row_scale_stride,
    perm_stride,
    bias_stride,
    result_stride,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    ROW: tl.constexpr,
    PERM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
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
        codes: [Q, outputs, bytes], by codes_stride from slot to slot and code_stride from output to output.
        group, zero: [Q, rows of blocks, blocks]; row_scale: [Q, outputs]; perm: int32 [Q, inputs]; by their slots' strides.
        other_codes ...: of the outputs that are gated; their first one is the row ``other_first``.
        bias: [Q, outputs, and behind them as many others if gated], by bias_stride.
        result: [N, outputs], by result_stride; ends, tile_slot, tile_row, count: of the tiles.
        STEP: inputs of a run that share a scale: a power of two.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(count):
        return
    slot = tl.load(tile_slot + tile).to(tl.int64)
    row_M = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    output_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    other_C = output_C + other_first
    real_M, real_C = row_M < tl.load(ends + slot), output_C < outputs
    rows += row_M[:, None].to(tl.int64) * row_stride
    codes, other_codes = codes + slot * codes_stride, other_codes + slot * codes_stride
    group, other_group = group + slot * group_stride, other_group + slot * group_stride
    zero, other_zero = zero + slot * zero_stride, other_zero + slot * zero_stride
    row_scale, other_row_scale = row_scale + slot * row_scale_stride, other_row_scale + slot * row_scale_stride
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
        here_W = first + input_W
        inside = (here_W < inputs)[:, None] & real_C[None, :]
        at_W = first // HALVES + byte_W
        code_WC = tl.load(codes + output_C[None, :] * code_stride + at_W[:, None], mask=inside, other=0)
        if ACTIVATION != "":
            gated_WC = tl.load(other_codes + other_C[None, :] * code_stride + at_W[:, None], mask=inside, other=0)
        for half in tl.static_range(HALVES):
            from_W, from_G = here_W + 16 * half, first + input_G + 16 * half
            real_W = from_W < inputs
            place_W = from_W
            if PERM:
                place_W = tl.load(perm + slot * perm_stride + from_W, mask=real_W, other=0)
            row_MW = tl.load(rows + place_W[None, :], mask=real_M[:, None] & real_W[None, :], other=0.0)
            weight_WC = _weights(
                code_WC,
                group,
                zero,
                row_scale,
                from_G,
                output_C,
                real_C,
                inputs,
                blocks,
                KIND,
                SCALE,
                ZERO,
                ROW,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                half == 1,
                STEP,
            )
            sum_MC = tl.dot(row_MW, weight_WC.to(dtype), sum_MC, input_precision=PRECISION)
            if ACTIVATION != "":
                weight_WC = _weights(
                    gated_WC,
                    other_group,
                    other_zero,
                    other_row_scale,
                    from_G,
                    other_C,
                    real_C,
                    inputs,
                    blocks,
                    KIND,
                    SCALE,
                    ZERO,
                    ROW,
                    BLOCK_ROWS,
                    BLOCK_COLUMNS,
                    half == 1,
                    STEP,
                )
                other_MC = tl.dot(row_MW, weight_WC.to(dtype), other_MC, input_precision=PRECISION)
    if BIASED:
        bias += slot * bias_stride
        sum_MC += tl.load(bias + output_C, mask=real_C, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            other_MC += tl.load(bias + outputs + output_C, mask=real_C, other=0.0).to(tl.float32)[None, :]
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
        *tensors,
        *_tensors((other or own).parts),
        own.parts.get("perm", tensors[0]),
        tensors[0] if bias_QO is None else bias_QO,
        result_NO,
        tiles.ends_Q,
        tiles.slot_T,
        tiles.row_T,
        tiles.count,
        form.columns,
        outputs,
        0 if other is None else other.first,
        blocks,
        rows_NI.stride(0),
        codes.stride(1),
        codes.stride(0),
        *(own.parts[name].stride(0) if name in own.parts else 0 for name in ("group", "zero", "row", "perm")),
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


def constants_of(form: PackedForm, block: _Block, blocks: int) -> dict[str, Any]:
    """The kernel's constants that follow from a form whose rows have so many blocks."""
    # Inputs in a row of which a run may consist: those of nibbles are read in halves.
    most = _HALF if form.kind in NIBBLES else block.inputs
    return {
        "KIND": form.kind,
        "SCALE": _SCALES[form.group],
        "ZERO": form.zero,
        "ROW": form.row,
        "PERM": form.perm,
        "BLOCK_ROWS": form.block[0],
        "BLOCK_COLUMNS": _ALL if blocks == 1 else form.block[1],
        "STEP": most if blocks == 1 else math.gcd(most, form.block[1]),
        "BLOCK_K": block.inputs,
    }


def _tensors(parts: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the kernel reads of a form: 8-bit floats as bytes; codes in the place of what it doesn't have."""
    found = [parts.get(name, parts["codes"]) for name in ("codes", "group", "zero", "row")]
    return [tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in found]
