"""Attention of one query a row on the CPU, by compiled loops. Keys and values are read where they lie, once for all heads.

torch's kernel for CPUs takes 20 us for one short row, and its callers as long again to shape what it takes. Here a task is a
row's group of heads that share keys: their scores, the softmax and the sum of values, all in float32, rounded once.

A *job* is an array of integers, whose fields are named below. Addresses, and strides in bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import config
from numba.extending import intrinsic

from epslots.compiled import callback, compiled, prepare
from epslots.moe import vector_code as code
from epslots.moe.product_tiles import emits, for_each, looped, read, run_threads, take_next, write
from epslots.moe.thread_memory import fork_join, thread_memory
from epslots.moe.vector_code import F32, I8, I64, LANES, Value
from epslots.moe.weight_forms import BFLOAT16, FLOAT32, FORMS, WeightForm

_FORMS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
# Heads that share keys, at most: their sums are in registers together.
MOST_SHARED = 8
# Fields of a job. NEXT_TASK is alone in its cache line.
NEXT_TASK, NEXT_THREAD, TASKS, FORM, SHARED, GROUPS, SPAN, SIZE = 0, 8, 16, 17, 18, 19, 20, 21
QUERY, QUERY_ROW, QUERY_HEAD, KEY, KEY_ROW, KEY_GROUP, KEY_NEXT = 22, 23, 24, 25, 26, 27, 28
VALUE, VALUE_ROW, VALUE_GROUP, VALUE_NEXT, VALUE_SIZE, MASK, MASK_ROW = 29, 30, 31, 32, 33, 34, 35
OUT, OUT_ROW, OUT_HEAD, SCALE, SCRATCH, SCRATCH_BYTES = 36, 37, 38, 39, 40, 41
# The cell of each position, int32, and bytes from row to row: keys and values of a row need not lie one behind another.
CELLS, CELLS_ROW, JOB_FIELDS = 42, 43, 44
# Bytes of keys and values that one thread reads sooner than several meet.
_ALONE_BYTES = 1 << 17
# exp of less is nothing.
_LEAST = -87.0


def _place(b: Any, first: Value, cells: Value, position: Value, next_bytes: Value) -> Value:
    """The address of a position's numbers, in the cell that a table of int32 names."""
    cell = code.load(b, code.offset(b, cells, position, 4), code.I32, 4)
    return code.offset(b, first, b.sext(cell, I64), next_bytes)


@for_each({shared: shared for shared in range(1, MOST_SHARED + 1)})
@for_each(FORMS)
def _score(b: Any, shared: int, form: WeightForm, *args: Value) -> None:
    query, query_head, key, cells, key_next, span, size, scale, scores, row_bytes = args
    queries = [code.offset(b, query, I64(head), query_head) for head in range(shared)]
    factor = code.load(b, scale, F32, 1)

    def one(position: Value) -> list[Value]:
        at = _place(b, key, cells, position, key_next)

        def chunk(column: Value, *sums: Value) -> list[Value]:
            k = form.load(b, code.offset(b, at, column, form.item_bytes))
            q = [form.load(b, code.offset(b, start, column, form.item_bytes)) for start in queries]
            return [code.fma(b, each, k, total) for each, total in zip(q, sums, strict=True)]

        sums = looped(b, I64(0), I64(LANES), size, [code.constant(F32, 0.0)] * shared, chunk)
        for head, total in enumerate(code.sums_across(b, sums)):
            place = code.offset(b, code.offset(b, scores, I64(head), row_bytes), position, 4)
            code.store(b, b.fmul(total, factor), place, 4)
        return []

    looped(b, I64(0), I64(1), span, [], one)


@intrinsic(prefer_literal=True)
def score(context, shared, form, query, query_head, key, cells, key_next, span, size, scale, scores, row_bytes):  # type: ignore[no-untyped-def]
    """Products of ``shared`` heads' queries with each key, times the float32 at ``scale``; float32, ``row_bytes`` a head.

    Args:
        key, cells, key_next: the first cell's key, the cell of each position, int32, and bytes from cell to cell.
    """
    return emits(_score, shared, form, query, query_head, key, cells, key_next, span, size, scale, scores, row_bytes)


def _softmax(b: Any, scores: Value, mask: Value, span: Value) -> None:
    """Weights in the place of scores, over their sum; memory goes on for ``LANES`` numbers."""
    low = code.constant(F32, -float("inf"))
    lanes = ir.Constant(code.vector(I64), list(range(LANES)))

    def present(position: Value) -> Value:
        return b.icmp_signed("<", lanes, code.splat(b, b.sub(span, position)))

    def largest(position: Value, most: Value) -> list[Value]:
        place = code.offset(b, scores, position, 4)
        x = code.load(b, place, code.vector(F32), 4)
        seen = present(position)
        x = b.select(seen, x, low)
        code.store(b, x, place, 4)
        return [b.select(b.fcmp_unordered(">", x, most), x, most)]

    def masked(position: Value) -> list[Value]:
        place = code.offset(b, scores, position, 4)
        hidden = b.icmp_unsigned("==", code.load(b, b.add(mask, position), I8), I8(0))
        x = code.load(b, place, F32, 4)
        code.store(b, b.select(hidden, ir.Constant(F32, -float("inf")), x), place, 4)
        return []

    with b.if_then(b.icmp_unsigned("!=", mask, I64(0))):
        looped(b, I64(0), I64(1), span, [], masked)
    (most,) = looped(b, I64(0), I64(LANES), span, [low], largest, whole=False)
    top = b.extract_element(most, code.I32(0))
    for lane in range(1, LANES):
        other = b.extract_element(most, code.I32(lane))
        top = b.select(b.fcmp_unordered(">", other, top), other, top)
    tops = code.splat(b, top)

    def weigh(position: Value, total: Value) -> list[Value]:
        place = code.offset(b, scores, position, 4)
        x = b.fsub(code.load(b, place, code.vector(F32), 4), tops)
        counts = b.fcmp_unordered(">", x, code.constant(F32, _LEAST))
        weight = b.select(counts, code.exp(b, x), code.constant(F32, 0.0))
        code.store(b, weight, place, 4)
        return [b.fadd(total, weight)]

    (total,) = looped(b, I64(0), I64(LANES), span, [code.constant(F32, 0.0)], weigh, whole=False)
    (all_of_it,) = code.sums_across(b, [total])
    factor = code.splat(b, b.fdiv(ir.Constant(F32, 1.0), all_of_it))

    def divide(position: Value) -> list[Value]:
        place = code.offset(b, scores, position, 4)
        code.store(b, b.fmul(code.load(b, place, code.vector(F32), 4), factor), place, 4)
        return []

    looped(b, I64(0), I64(LANES), span, [], divide, whole=False)


@intrinsic(prefer_literal=True)
def softmax(context, scores, mask, span):  # type: ignore[no-untyped-def]
    """Turn ``span`` float32 scores into weights; those whose byte in ``mask`` (0 = none) is 0 get none."""
    return emits(_softmax, scores, mask, span)


@for_each({shared: shared for shared in range(1, MOST_SHARED + 1)})
@for_each(FORMS)
def _sum_values(b: Any, shared: int, form: WeightForm, *args: Value) -> None:
    weights, row_bytes, value, cells, value_next, span, size, out, out_head = args
    heads = [code.offset(b, weights, I64(head), row_bytes) for head in range(shared)]

    def chunk(column: Value) -> list[Value]:
        def one(position: Value, *sums: Value) -> list[Value]:
            v = form.load(b, code.offset(b, _place(b, value, cells, position, value_next), column, form.item_bytes))
            found = []
            for start, total in zip(heads, sums, strict=True):
                weight = code.splat(b, code.load(b, code.offset(b, start, position, 4), F32, 4))
                found.append(code.fma(b, weight, v, total))
            return found

        sums = looped(b, I64(0), I64(1), span, [code.constant(F32, 0.0)] * shared, one)
        for head, total in enumerate(sums):
            form.store(b, total, code.offset(b, code.offset(b, out, I64(head), out_head), column, form.item_bytes))
        return []

    looped(b, I64(0), I64(LANES), size, [], chunk)


@intrinsic(prefer_literal=True)
def sum_values(context, shared, form, weights, row_bytes, value, cells, value_next, span, size, out, out_head):  # type: ignore[no-untyped-def]
    """Each head's values, weighted and summed in the order of positions, rounded to the form."""
    return emits(_sum_values, shared, form, weights, row_bytes, value, cells, value_next, span, size, out, out_head)


@compiled("void(int64, int64, int64)")
def _attend(job: int, task: int, scratch: int) -> None:
    """One row's group of heads."""
    groups, shared, form, span = read(job, GROUPS), read(job, SHARED), read(job, FORM), read(job, SPAN)
    row, group = task // groups, task % groups
    row_bytes, query_head = 4 * (span + LANES), read(job, QUERY_HEAD)
    query = read(job, QUERY) + row * read(job, QUERY_ROW) + group * shared * query_head
    key = read(job, KEY) + row * read(job, KEY_ROW) + group * read(job, KEY_GROUP)
    value = read(job, VALUE) + row * read(job, VALUE_ROW) + group * read(job, VALUE_GROUP)
    cells = read(job, CELLS) + row * read(job, CELLS_ROW)
    scale, key_next, value_next = job + 8 * SCALE, read(job, KEY_NEXT), read(job, VALUE_NEXT)
    score(shared, form, query, query_head, key, cells, key_next, span, read(job, SIZE), scale, scratch, row_bytes)
    mask = read(job, MASK)
    if mask:
        mask += row * read(job, MASK_ROW)
    for head in range(shared):
        softmax(scratch + head * row_bytes, mask, span)
    out_head = read(job, OUT_HEAD)
    out = read(job, OUT) + row * read(job, OUT_ROW) + group * shared * out_head
    sum_values(shared, form, scratch, row_bytes, value, cells, value_next, span, read(job, VALUE_SIZE), out, out_head)


@callback("void(int64)")
def work(job: int) -> None:
    """Take part in a job."""
    scratch = read(job, SCRATCH) + take_next(job, NEXT_THREAD) * read(job, SCRATCH_BYTES)
    tasks, task = read(job, TASKS), take_next(job, NEXT_TASK)
    while task < tasks:
        _attend(job, task, scratch)
        task = take_next(job, NEXT_TASK)


@compiled("void(int64, int64, int64, int64)")
def launch(job: int, work_address: int, fork: int, threads: int) -> None:
    """Compute a job."""
    write(job, NEXT_TASK, 0)
    write(job, NEXT_THREAD, 0)
    run_threads(fork, work_address, job, threads)


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether attention over these shapes can be computed here.

    Queries [R, H, 1, D] over keys and values [R, G, S, D], without gradients.

    Args:
        mask: bool [R, 1, 1, S], False where a row has no key.
    """
    if not query.is_cpu or query.dtype not in _FORMS or config.DISABLE_JIT or torch.is_autocast_enabled("cpu"):
        return False
    rows, heads, queries, size = query.shape
    groups, span = key.shape[1], key.shape[2]
    alike = query.dtype is key.dtype is value.dtype and key.shape[3] == size and value.shape[1:3] == key.shape[1:3]
    wide = size > 0 and size % LANES == 0 and value.shape[3] % LANES == 0
    whole = queries == 1 and rows > 0 and span > 0 and heads % groups == 0 and heads // groups <= MOST_SHARED
    near = query.stride(3) == key.stride(3) == value.stride(3) == 1 and key.shape[0] == value.shape[0] == rows
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    plain = mask is None or (mask.dtype is torch.bool and tuple(mask.shape) == (rows, 1, 1, span) and mask.stride(3) == 1)
    return alike and wide and whole and near and plain and not (query.is_neg() or key.is_neg() or value.is_neg())


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention [R, 1, H, D] of queries, keys, values and a mask for which ``fits``. A row without any key yields NaN."""
    rows, heads, _, size = query.shape
    groups, span = key.shape[1], key.shape[2]
    out = torch.empty(rows, 1, heads, value.shape[3], dtype=query.dtype, device="cpu")
    if work.address is None:
        prepare()
    tasks, item, shared, places = rows * groups, query.element_size(), heads // groups, _places(span)
    threads = threads_for(tasks, tasks * span * (size + value.shape[3]) * item)
    scratch_bytes = 4 * (span + LANES) * shared
    here = thread_memory()
    strides = [item * stride for each in (query, key, value) for stride in each.stride()]
    here.enter(
        TASKS,
        *(tasks, _FORMS[query.dtype], shared, groups, span, size, query.data_ptr(), *strides[:2]),
        *(key.data_ptr(), *strides[4:7], value.data_ptr(), *strides[8:11], value.shape[3]),
        *((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))),
        *(out.data_ptr(), heads * value.shape[3] * item, value.shape[3] * item),
        *(float_bits(float(scale)), here.reserve(threads * scratch_bytes), scratch_bytes, places.data_ptr(), 0),
    )
    launch(here.job, work.address, fork_join(), threads)
    return out


def threads_for(tasks: int, nbytes: int) -> int:
    """Threads that read so many bytes of keys and values soonest."""
    return 1 if nbytes <= _ALONE_BYTES or not fork_join() else min(tasks, torch.get_num_threads())


def _places(span: int) -> torch.Tensor:
    """The numbers from 0 on, at least so many: the cells of positions that lie one behind another."""
    return _first_places(1 << (span - 1).bit_length())


@functools.cache
def _first_places(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device="cpu")


@functools.cache
def float_bits(number: float) -> int:
    """The bits of a float32 in the lower half of an integer."""
    return int(np.float32(number).view(np.uint32))
