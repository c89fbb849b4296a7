"""RMSNorm of rows on the CPU in one pass of a compiled loop, rounded where torch's operations round.

torch makes eight operations of it, and so as many tensors: for one row, each takes longer than the row.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba.core import config
from numba.extending import intrinsic

from epslots.compiled import compiled
from epslots.moe import vector_code as code
from epslots.moe.product_tiles import emits, for_each, looped
from epslots.moe.vector_code import F32, I64, LANES, Value
from epslots.moe.weight_forms import BFLOAT16, FLOAT32, FORMS, WeightForm

_FORMS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}


@for_each(FORMS)
def _norm_row(b: Any, form: WeightForm, *args: Value) -> None:
    row, weight, out, columns, epsilon = args

    def add_squares(column: Value, total: Value) -> list[Value]:
        x = form.load(b, code.offset(b, row, column, form.item_bytes))
        return [code.fma(b, x, x, total)]

    (squares,) = looped(b, I64(0), I64(LANES), columns, [code.constant(F32, 0.0)], add_squares)
    (total,) = code.sums_across(b, [squares])
    mean = b.fdiv(total, b.sitofp(columns, F32))
    root = b.call(code.intrinsic_of(b, "llvm.sqrt.f32", F32, [F32]), [b.fadd(mean, code.load(b, epsilon, F32))])
    factor = code.splat(b, b.fdiv(ir.Constant(F32, 1.0), root))

    def scale(column: Value) -> list[Value]:
        at = code.offset(b, I64(0), column, form.item_bytes)
        x = form.rounded(b, b.fmul(form.load(b, b.add(row, at)), factor))
        form.store(b, b.fmul(form.load(b, b.add(weight, at)), x), b.add(out, at))
        return []

    looped(b, I64(0), I64(LANES), columns, [], scale)


@intrinsic(prefer_literal=True)
def norm_row(context, form, row, weight, out, columns, epsilon):  # type: ignore[no-untyped-def]
    """``weight * (row / sqrt(mean(row ** 2) + epsilon))``.

    Args:
        form: of all three, a number of ``FORMS``.
        columns: a multiple of ``LANES``.
        epsilon: address of a float32.
    """
    return emits(_norm_row, form, row, weight, out, columns, epsilon)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def norm_rows(form: int, rows: int, weight: int, out: int, count: int, columns: int, epsilon: int) -> None:
    """``norm_row`` of neighbouring rows, which may be ``out`` themselves."""
    row_bytes = columns * (2 if form == BFLOAT16 else 4)
    for number in range(count):
        norm_row(form, rows + number * row_bytes, weight, out + number * row_bytes, columns, epsilon)


def fits(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether rows of this dtype, place and width can be normalised here."""
    plain = rows.is_cpu and rows.dtype is weight.dtype and rows.dtype in _FORMS and not config.DISABLE_JIT
    return plain and rows.shape[-1] == weight.shape[0] and weight.shape[0] % LANES == 0 and rows.numel() > 0


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Rows [..., H] normalised, in their dtype; each has the same bits in any batch.

    Args:
        weight: contiguous [H], of the same dtype, for which ``fits``.
        epsilon: float32 [1].
    """
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    columns = weight.shape[0]
    form, count = _FORMS[rows.dtype], rows.numel() // columns
    norm_rows(form, rows.data_ptr(), weight.data_ptr(), out.data_ptr(), count, columns, epsilon.data_ptr())
    return out
