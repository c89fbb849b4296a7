"""Rotary position embedding of queries and keys on the CPU, in one pass of a compiled loop (RoFormer, arXiv:2104.09864).

torch makes fourteen operations of it. Each number here is rounded where these round, so the bits are theirs.

A *job* is an array of integers, whose fields are named below. Addresses, and strides in bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from numba.core import config
from numba.extending import intrinsic

from epslots.compiled import compiled
from epslots.moe import vector_code as code
from epslots.moe.product_tiles import emits, for_each, looped, read
from epslots.moe.thread_memory import thread_memory
from epslots.moe.vector_code import I64, LANES, Value
from epslots.moe.weight_forms import BFLOAT16, FLOAT32, FORMS, WeightForm

_FORMS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
# Fields of a job; of queries, then of keys: IN to HEADS.
FORM, ROWS, TOKENS, SIZE, TURNED, COS, SIN, ANGLE_ROW, ANGLE_TOKEN = range(9)
OF_QUERIES, OF_KEYS = 9, 15
IN, IN_ROW, IN_TOKEN, IN_HEAD, OUT, HEADS = range(6)


@for_each(FORMS)
def _rotate(b: Any, form: WeightForm, *args: Value) -> None:
    x, cos, sin, turned, size, out = args
    half = b.mul(b.lshr(turned, I64(1)), I64(form.item_bytes))

    def turn(column: Value) -> list[Value]:
        near = code.offset(b, I64(0), column, form.item_bytes)
        far = b.add(near, half)
        first, second = (form.load(b, b.add(x, at)) for at in (near, far))
        for at, own, other, combine in ((near, first, second, b.fsub), (far, second, first, b.fadd)):
            by_cos = form.rounded(b, b.fmul(own, form.load(b, b.add(cos, at))))
            by_sin = form.rounded(b, b.fmul(other, form.load(b, b.add(sin, at))))
            form.store(b, combine(by_cos, by_sin), b.add(out, at))
        return []

    def copy(column: Value) -> list[Value]:
        at = code.offset(b, I64(0), column, form.item_bytes)
        form.store(b, form.load(b, b.add(x, at)), b.add(out, at))
        return []

    looped(b, I64(0), I64(LANES), b.lshr(turned, I64(1)), [], turn)
    with b.if_then(b.icmp_signed("<", turned, size)):
        looped(b, turned, I64(LANES), size, [], copy)


@intrinsic(prefer_literal=True)
def rotate(context, form, x, cos, sin, turned, size, out):  # type: ignore[no-untyped-def]
    """``x * cos + rotate_half(x) * sin`` of a head's first ``turned`` numbers. The others, up to ``size``, stay as they are.

    Args:
        form: of all, a number of ``FORMS``.
        turned: a multiple of two vectors.
        size: a multiple of ``LANES``.
    """
    return emits(_rotate, form, x, cos, sin, turned, size, out)


@compiled("void(int64, int64)")
def _rotate_heads(job: int, side: int) -> None:
    """The heads of all tokens, queries or keys: outputs [rows, tokens, heads, size] lie one behind another."""
    tokens, heads, size, form, turned = (
        read(job, TOKENS),
        read(job, side + HEADS),
        read(job, SIZE),
        read(job, FORM),
        read(job, TURNED),
    )
    out, head_bytes = read(job, side + OUT), size * (2 if form == BFLOAT16 else 4)
    for row in range(read(job, ROWS)):
        for token in range(tokens):
            angles = row * read(job, ANGLE_ROW) + token * read(job, ANGLE_TOKEN)
            x = read(job, side + IN) + row * read(job, side + IN_ROW) + token * read(job, side + IN_TOKEN)
            for head in range(heads):
                at = x + head * read(job, side + IN_HEAD)
                rotate(form, at, read(job, COS) + angles, read(job, SIN) + angles, turned, size, out)
                out += head_bytes


@compiled("void(int64)")
def _launch(job: int) -> None:
    _rotate_heads(job, OF_QUERIES)
    _rotate_heads(job, OF_KEYS)


def fits(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether queries [B, H, T, D] and keys [B, G, T, D] can be turned here. The angles are [B or 1, T, R]."""
    dtype = query.dtype
    if not query.is_cpu or dtype not in _FORMS or config.DISABLE_JIT or query.dim() != 4 or cos.dim() != 3:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or cos.requires_grad):
        return False
    rows, _, tokens, size = query.shape
    turned = cos.shape[2]
    alike = key.dtype is dtype and cos.dtype is dtype and sin.dtype is dtype and key.dim() == 4
    whole = size % LANES == 0 and turned % (2 * LANES) == 0 and 0 < turned <= size and query.numel() > 0 and key.numel() > 0
    return (
        alike
        and whole
        and (key.shape[0], key.shape[2], key.shape[3]) == (rows, tokens, size)
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and cos.shape[0] in (1, rows)
        and cos.shape[1] == tokens
        and query.stride(3) == key.stride(3) == cos.stride(2) == 1
    )


def rotated(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x * cos) + (rotate_half(x) * sin)`` for queries and keys for which ``fits``; numbers behind the angles' stay.

    Returns:
        Tensors of the same shapes, whose heads of a token lie one behind another.
    """
    rows, heads, tokens, size = query.shape
    groups, item = key.shape[1], query.element_size()
    outs = [torch.empty(rows, tokens, count, size, dtype=query.dtype, device="cpu") for count in (heads, groups)]
    angle_row, angle_token, _ = cos.stride()
    here = thread_memory()
    here.enter(
        0,
        *(_FORMS[query.dtype], rows, tokens, size, cos.shape[2], cos.data_ptr(), sin.data_ptr()),
        *(angle_row * item if cos.shape[0] > 1 else 0, angle_token * item),
        *_side(query, item, outs[0]),
        *_side(key, item, outs[1]),
    )
    _launch(here.job)
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


def _side(states: torch.Tensor, item: int, out: torch.Tensor) -> tuple[int, ...]:
    row, head, token, _ = states.stride()
    return states.data_ptr(), row * item, token * item, head * item, out.data_ptr(), states.shape[1]
