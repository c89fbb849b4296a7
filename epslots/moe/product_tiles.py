"""The inner loops of products of a few rows with a matrix, as functions that compiled code calls.

A matrix [N, K] is read row by row, where it lies, with lanes along K. A tile multiplies some rows of inputs with two rows
of the matrix that lie far apart: a gate's and that of its ``up``, or those of two distant columns of the output. Two streams
of reads are what a core's prefetcher follows at the speed of memory; four neighbouring rows took three times as long (measured
on Zen 4).

All arguments are addresses, and strides in bytes, unless it says otherwise. ``form`` is a number of ``weight_forms.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from epslots.moe import vector_code as code
from epslots.moe.vector_code import ACTIVATIONS, F32, I32, I64, Value
from epslots.moe.weight_forms import FORMS, WeightForm

_Emit = Callable[..., Value | None]


def emits(emit: _Emit, *given: Any, constants: int = 0, returns: Any = types.void) -> Any:
    """An intrinsic in numba's form: its signature, and a function that emits its body.

    Args:
        emit: called with the builder, the values of constants and the integers; returns the result, if there is one.
        given: types of the arguments: first ``constants`` literals, then integers of 64 bits.
    """
    values = [getattr(kind, "literal_value", None) for kind in given[:constants]]
    if None in values:
        return None  # numba asks again with the values
    signature = returns(*given[:constants], *[types.int64] * (len(given) - constants))

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        result = emit(b, *values, *args[constants:])
        return context.get_dummy_value() if returns is types.void else result

    return signature, generate


def for_each(forms: Mapping[int, Any]) -> Callable[[_Emit], _Emit]:
    """Code for each of the forms, and a switch between them by the first integer.

    The code gets its form in that integer's place.
    """

    def decorate(emit: _Emit) -> _Emit:
        def emit_all(b: Any, *args: Any) -> None:
            place = next(i for i, arg in enumerate(args) if isinstance(arg, ir.Value))
            end = b.function.append_basic_block("end")
            switch = b.switch(args[place], end)
            for number, form in forms.items():
                block = b.function.append_basic_block("form")
                switch.add_case(I64(number), block)
                b.position_at_end(block)
                emit(b, *args[:place], form, *args[place + 1 :])
                b.branch(end)
            b.position_at_end(end)

        return emit_all

    return decorate


def looped(
    b: Any,
    start: Value,
    step: Value,
    end: Value,
    carried: list[Value],
    body: Callable[..., list[Value]],
    *,
    whole: bool = True,
) -> list[Value]:
    """Turns of ``body(position, *carried)``: one, and more while another step begins before ``end``; ``whole``: ends."""
    before, function = b.block, b.function
    turn, after = function.append_basic_block("turn"), function.append_basic_block("after")
    b.branch(turn)
    b.position_at_end(turn)
    position = b.phi(I64)
    position.add_incoming(start, before)
    totals = [b.phi(value.type) for value in carried]
    for phi, value in zip(totals, carried, strict=True):
        phi.add_incoming(value, before)
    results = body(position, *totals)
    following = b.add(position, step)
    position.add_incoming(following, b.block)
    for phi, value in zip(totals, results, strict=True):
        phi.add_incoming(value, b.block)
    goes_on = b.icmp_signed("<=", b.add(following, step), end) if whole else b.icmp_signed("<", following, end)
    b.cbranch(goes_on, turn, after)
    b.position_at_end(after)
    return results


# Rows that a tile computes at once. Their sums fill the registers, of which AVX2 has half as many, of half the size.
ROW_BLOCK = 8 if code.host_has("avx512f") else 2


@for_each({rows: rows for rows in range(1, ROW_BLOCK + 1)})
@for_each(FORMS)
def _multiply_tile(b: Any, rows: int, form: WeightForm, *args: Value) -> None:
    weights, far, inputs, row_stride, out, out_stride, out_far, inner = args
    starts_w = [weights, b.add(weights, far)]
    starts_x = [code.offset(b, inputs, I64(row), row_stride) for row in range(rows)]

    def run(position: Value, totals: list[Value], done: Value | None) -> list[Value]:
        w = [form.load_run(b, code.offset(b, start, position, form.item_bytes)) for start in starts_w]
        x = [form.load_run(b, code.offset(b, start, position, form.item_bytes)) for start in starts_x]
        if done is not None:
            w, x = ([form.first_zeroed(b, each, done) for each in group] for group in (w, x))
        return [form.multiply(b, w[i % 2], x[i // 2], total) for i, total in enumerate(totals)]

    zeros = [code.constant(F32, 0.0)] * (2 * rows)
    totals = looped(b, I64(0), I64(form.run), inner, zeros, lambda position, *sums: run(position, list(sums), None))
    # The last run ends with the row; what it shares with the run before counts as zeros.
    rest = b.urem(inner, I64(form.run))
    before = b.block
    with b.if_then(b.icmp_unsigned("!=", rest, I64(0)), likely=False):
        done = b.trunc(b.sub(I64(form.run), rest), I32)
        more, end = run(b.sub(inner, I64(form.run)), totals, done), b.block
    merged = []
    for total, sum_ in zip(totals, more, strict=True):
        phi = b.phi(total.type)
        phi.add_incoming(total, before)
        phi.add_incoming(sum_, end)
        merged.append(phi)
    for i, total in enumerate(code.sums_across(b, merged)):
        place = code.offset(b, out, I64(i // 2), out_stride)
        code.store(b, total, b.add(place, out_far) if i % 2 else place, 4)


@intrinsic(prefer_literal=True)
def multiply_tile(context, rows, form, weights, far, inputs, row_stride, out, out_stride, out_far, inner):  # type: ignore[no-untyped-def]
    """Products of inputs with one row of each half of a matrix.

    Args:
        rows: inputs, up to ``ROW_BLOCK``.
        weights: the first half's row; the second's lies ``far`` behind.
        inputs: the first input.
        out: float32, the first input's result with the first half; with the second half ``out_far`` behind.
        inner: K, in numbers; at least a run of the form.
    """
    return emits(_multiply_tile, rows, form, weights, far, inputs, row_stride, out, out_stride, out_far, inner)


@for_each(FORMS)
def _finish(b: Any, biased: int, form: WeightForm, results: Value, bias: Value, out: Value) -> None:
    form.store(b, _with_bias(b, form, biased, results, bias), out)


def _with_bias(b: Any, form: Any, biased: int, results: Value, bias: Value) -> Value:
    total = code.load(b, results, code.vector(F32), 4)
    return b.fadd(total, form.load(b, bias)) if biased else total


@intrinsic(prefer_literal=True)
def finish(context, biased, form, results, bias, out):  # type: ignore[no-untyped-def]
    """Sixteen neighbouring outputs, from float32 results, with their biases where ``biased`` is 1."""
    return emits(_finish, biased, form, results, bias, out, constants=1)


@for_each(FORMS)
def _finish_gated(b: Any, activation: str, biased: int, form: WeightForm, *args: Value) -> None:
    gates, ups, gate_bias, up_bias, out = args
    gate, up = (
        form.rounded(b, _with_bias(b, form, biased, results, bias)) for results, bias in ((gates, gate_bias), (ups, up_bias))
    )
    active = form.rounded(b, ACTIVATIONS[activation](b, gate))
    form.store(b, b.fmul(active, up), out)


@intrinsic(prefer_literal=True)
def finish_gated(context, activation, biased, form, gates, ups, gate_bias, up_bias, out):  # type: ignore[no-untyped-def]
    """Sixteen neighbouring values of ``activation(gate) * up``, rounded where torch's operations round."""
    given = activation, biased, form, gates, ups, gate_bias, up_bias, out
    return emits(_finish_gated, *given, constants=2)


def _read(b: Any, address: Value, index: Value) -> Value:
    return code.load(b, code.offset(b, address, index, 8), I64, 8)


@intrinsic(prefer_literal=True)
def read(context, address, index):  # type: ignore[no-untyped-def]
    """An integer of 64 bits, by the address of an array and the index."""
    return emits(_read, address, index, returns=types.int64)


@intrinsic(prefer_literal=True)
def read_int32(context, address):  # type: ignore[no-untyped-def]
    """The integer of 32 bits at an address."""
    return emits(lambda b, at: b.sext(code.load(b, at, I32, 4), I64), address, returns=types.int64)


def _write(b: Any, address: Value, index: Value, value: Value) -> None:
    code.store(b, value, code.offset(b, address, index, 8), 8)


@intrinsic(prefer_literal=True)
def write(context, address, index, value):  # type: ignore[no-untyped-def]
    """Change an integer of 64 bits, by the address of an array and the index."""
    return emits(_write, address, index, value)


@intrinsic(prefer_literal=True)
def write_int32(context, address, index, value):  # type: ignore[no-untyped-def]
    """Change an integer of 32 bits, by the address of an array and the index."""

    def emit(b: Any, at: Value, position: Value, number: Value) -> None:
        code.store(b, b.trunc(number, I32), code.offset(b, at, position, 4), 4)

    return emits(emit, address, index, value)


def _copy_bytes(b: Any, source: Value, target: Value, count: Value) -> None:
    pointer = ir.IntType(8).as_pointer()
    function = code.intrinsic_of(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [pointer, pointer, I64, ir.IntType(1)])
    b.call(function, [b.inttoptr(target, pointer), b.inttoptr(source, pointer), count, ir.IntType(1)(0)])


@intrinsic(prefer_literal=True)
def copy_bytes(context, source, target, count):  # type: ignore[no-untyped-def]
    """Copy bytes from one address to another."""
    return emits(_copy_bytes, source, target, count)


def _take_next(b: Any, address: Value, index: Value) -> Value:
    counter = b.inttoptr(code.offset(b, address, index, 8), I64.as_pointer())
    return b.atomic_rmw("add", counter, I64(1), "monotonic")


@intrinsic(prefer_literal=True)
def take_next(context, address, index):  # type: ignore[no-untyped-def]
    """A counter, which is raised by one: threads never get the same number."""
    return emits(_take_next, address, index, returns=types.int64)


def _run_threads(b: Any, fork_join: Value, work: Value, job: Value, threads: Value) -> None:
    pointer = ir.IntType(8).as_pointer()
    alone = ir.FunctionType(ir.VoidType(), [I64])
    team = ir.FunctionType(ir.VoidType(), [pointer, pointer, I32, I32])
    with b.if_else(b.icmp_signed("<=", threads, I64(1))) as (one, many):
        with one:
            b.call(b.inttoptr(work, alone.as_pointer()), [job])
        with many:
            function = b.inttoptr(fork_join, team.as_pointer())
            b.call(function, [b.inttoptr(work, pointer), b.inttoptr(job, pointer), b.trunc(threads, I32), I32(0)])


@intrinsic(prefer_literal=True)
def run_threads(context, fork_join, work, job, threads):  # type: ignore[no-untyped-def]
    """Run ``work(job)`` in threads, and return when all have.

    Args:
        fork_join: OpenMP's ``GOMP_parallel``; not called for one thread.
        work: a function of one address.
        threads: how many run it; the caller is one of them.
    """
    return emits(_run_threads, fork_join, work, job, threads)
