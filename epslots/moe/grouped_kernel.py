"""Grouped matrix multiplication of rows sorted by slot, as Triton kernels for every GPU. Optional: needs ``triton``.

torch's own is fast only for bf16 on some GPUs (``product_choice.py``); elsewhere it waits for the host and loops over all
slots. Here ``list_tiles`` lists the blocks of rows of the slots that have any, and ``multiply`` computes the listed blocks,
reading the slots in place. Both launch the same grids for any routing, and never ask the host: they can be captured.

``packed_kernel.py`` does the same with packed slots. Tests hold the kernels to ``TorchProducts`` by Triton's interpreter, and
compile them for GPUs; no test of the project runs them on one.

Legend of shape suffixes: N rows, I inputs, O outputs, Q slots, T tiles at most; M, K, C: rows, inputs and outputs of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from epslots.cache.unpacking import Weight
from epslots.moe.kernel_gemm import Gate, Tiles
from epslots.moe.kernel_parts import FEW_ROWS, gated
from epslots.moe.packed_kernel import multiply_packed


# Bytes of inputs that a block takes at a time, and outputs of a block for few rows (bound by memory) and for many. A gated
# block has as many outputs again. All stages of a loop together fit into the 99 KiB of shared memory of consumers' GPUs.
class _Block(NamedTuple):
    """How a block is computed: bytes of a row at a time, outputs, stages of the loop."""

    input_bytes: int
    outputs: int
    stages: int
    warps: int


_FEW, _MANY = _Block(256, 64, 4, 4), _Block(128, 128, 3, 4)


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _list_tiles(  # type: ignore[no-untyped-def]
    ends, tile_slot, tile_row, count, slots, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Blocks of up to ROWS rows of one slot, in the order of slots. Grid: 1.

    Args:
        ends: int32 [slots], where the rows of each slot end.
        tile_slot, tile_row: int32 [T], the slot and the first row of each block.
        count: int32 [1], how many blocks there are.
        BLOCK_Q: a power of two, at least ``slots``.
    """
    slot_Q = tl.arange(0, BLOCK_Q)
    real_Q = slot_Q < slots
    end_Q = tl.load(ends + slot_Q, mask=real_Q, other=0)
    start_Q = tl.load(ends + slot_Q - 1, mask=real_Q & (slot_Q > 0), other=0)
    tiles_Q = tl.where(real_Q, (end_Q - start_Q + ROWS - 1) // ROWS, 0)
    first_Q = tl.cumsum(tiles_Q, 0) - tiles_Q
    most = tl.max(tiles_Q, 0)
    turn = most * 0
    while turn < most:
        here_Q = turn < tiles_Q
        tl.store(tile_slot + first_Q + turn, slot_Q, mask=here_Q)
        tl.store(tile_row + first_Q + turn, start_Q + turn * ROWS, mask=here_Q)
        turn += 1
    tl.store(count, tl.sum(tiles_Q, 0))


@triton.jit
def _weight_tile(weight, slot, input_K, output_C, inside, slot_stride, in_stride, out_stride):  # type: ignore[no-untyped-def]
    """A slot's weights [K, C], zeros outside."""
    place_KC = input_K[:, None] * in_stride + output_C[None, :] * out_stride
    return tl.load(weight + slot * slot_stride + place_KC, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["bias_stride"])  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    rows,
    weight,
    bias,
    result,
    ends,
    tile_slot,
    tile_row,
    count,
    inputs,
    outputs,
    row_stride,
    slot_stride,
    in_stride,
    out_stride,
    bias_stride,
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
        weight: [Q, inputs, outputs], by three strides; if gated, the gate's outputs and behind them as many others.
        bias: [Q, as many], by bias_stride.
        result: [N, outputs]; ends, tile_slot, tile_row, count: of the tiles.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(count):
        return
    slot = tl.load(tile_slot + tile).to(tl.int64)
    row_M = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    output_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real_M, real_C = row_M < tl.load(ends + slot), output_C < outputs
    rows += row_M[:, None].to(tl.int64) * row_stride
    dtype = result.dtype.element_ty
    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    other_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        input_K = first + tl.arange(0, BLOCK_K)
        real_K = input_K < inputs
        row_MK = tl.load(rows + input_K[None, :], mask=real_M[:, None] & real_K[None, :], other=0.0)
        inside_KC = real_K[:, None] & real_C[None, :]
        weight_KC = _weight_tile(weight, slot, input_K, output_C, inside_KC, slot_stride, in_stride, out_stride)
        sum_MC = tl.dot(row_MK, weight_KC, sum_MC, input_precision=PRECISION)
        if ACTIVATION != "":
            other_KC = _weight_tile(weight, slot, input_K, output_C + outputs, inside_KC, slot_stride, in_stride, out_stride)
            other_MC = tl.dot(row_MK, other_KC, other_MC, input_precision=PRECISION)
    if BIASED:
        bias += slot * bias_stride
        sum_MC += tl.load(bias + output_C, mask=real_C, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            other_MC += tl.load(bias + outputs + output_C, mask=real_C, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        sum_MC = gated(sum_MC, other_MC, dtype, ACTIVATION)
    place_MC = row_M[:, None].to(tl.int64) * outputs + output_C[None, :]
    tl.store(result + place_MC, sum_MC.to(dtype), mask=real_M[:, None] & real_C[None, :])


class TritonProducts:
    """``kernel_gemm.Products`` on a GPU."""

    def list_tiles(self, ends_Q: torch.Tensor, rows: int) -> Tiles:
        slots = ends_Q.shape[0]
        tiles = Tiles.empty(ends_Q, rows)
        block_Q = triton.next_power_of_2(slots)
        _list_tiles[(1,)](ends_Q, tiles.slot_T, tiles.row_T, tiles.count, slots, ROWS=tiles.size, BLOCK_Q=block_Q)
        return tiles

    def multiply(
        self,
        rows_NI: torch.Tensor,
        weight_QIO: Weight,
        bias_QO: torch.Tensor | None,
        tiles: Tiles,
        gate: Gate | None = None,
    ) -> torch.Tensor:
        if not isinstance(weight_QIO, torch.Tensor):
            return multiply_packed(rows_NI, weight_QIO, bias_QO, tiles, gate)
        _, inputs, outputs = weight_QIO.shape
        outputs = outputs if gate is None else outputs // 2
        block = _FEW if tiles.size <= FEW_ROWS else _MANY
        columns = block.outputs if gate is None else block.outputs // 2
        result_NO = rows_NI.new_empty(rows_NI.shape[0], outputs)
        _multiply[(triton.cdiv(outputs, columns), tiles.slot_T.shape[0])](
            rows_NI,
            weight_QIO,
            weight_QIO if bias_QO is None else bias_QO,
            result_NO,
            tiles.ends_Q,
            tiles.slot_T,
            tiles.row_T,
            tiles.count,
            inputs,
            outputs,
            rows_NI.stride(0),
            *weight_QIO.stride(),
            0 if bias_QO is None else bias_QO.stride(0),
            ACTIVATION="" if gate is None else gate.activation,
            BIASED=bias_QO is not None,
            PRECISION="ieee" if rows_NI.dtype == torch.float32 else None,
            BLOCK_M=tiles.size,
            BLOCK_C=columns,
            BLOCK_K=block.input_bytes // rows_NI.element_size(),
            num_warps=block.warps,
            num_stages=block.stages,
        )
        return result_NO
