"""The inner loops of products with packed matrices: ``product_tiles.py`` for codes and scales (``code_kinds.py``).

A row's scales and zeros are written down first, as two floats a block of columns: ``weight = code * scale + shift``. Then a
tile multiplies inputs in float32 with one row of codes of each half of a matrix.
"""

from __future__ import annotations

from typing import Any

from numba.extending import intrinsic

from epslots.moe import vector_code as code
from epslots.moe.code_kinds import KINDS, RUN, SCALES, CodeKind
from epslots.moe.product_tiles import emits, for_each, looped
from epslots.moe.vector_code import F32, I8, I64, LANES, Value


@for_each(SCALES)
def _write_scales(b: Any, lanes: int, zeroed: int, read_scales: Any, *args: Value) -> None:
    scales, zeros, row_scale, constants, out, out_shifts = args
    factor, middle = (code.splat(b, code.load(b, b.add(constants, I64(4 * i)), F32), lanes) for i in range(2))
    scale = b.fmul(read_scales(b, scales, lanes), code.splat(b, code.load(b, row_scale, F32), lanes))
    zero = middle
    if zeroed:
        zero = b.uitofp(code.load(b, zeros, code.vector(I8, lanes)), code.vector(F32, lanes))
    code.store(b, b.fmul(scale, factor), out, 4)
    code.store(b, b.fneg(b.fmul(zero, scale)), out_shifts, 4)


@intrinsic(prefer_literal=True)
def write_scales(context, lanes, zeroed, kind, scales, zeros, row_scale, constants, out, out_shifts):  # type: ignore[no-untyped-def]
    """The scales and shifts of ``lanes`` neighbouring blocks of a row.

    Args:
        zeroed: whether blocks have zeros, uint8; a constant, as ``lanes`` is.
        kind: of the scales, a number of ``SCALES``.
        row_scale: a float32 that all scales are multiplied with.
        constants: two float32, the kind of codes' factor and its middle.
        out, out_shifts: float32.
    """
    given = lanes, zeroed, kind, scales, zeros, row_scale, constants, out, out_shifts
    return emits(_write_scales, *given, constants=2)


@for_each(KINDS)
def _codes_tile(b: Any, rows: int, halved: int, kind: CodeKind, *args: Value) -> None:
    first, second, scales, scales_far, shifts, width, inputs, row_stride, out, out_stride, out_far, inner = args
    codes = [first, second]
    starts_x = [code.offset(b, inputs, I64(row), row_stride) for row in range(rows)]

    def block(position: Value, *totals: Value) -> list[Value]:
        number = b.udiv(position, width)
        factors = [
            [_factors(b, b.add(scales, far), shifts, number, part if halved else None) for part in range(2)]
            for far in (I64(0), scales_far)
        ]

        def run(column: Value, *sums: Value) -> list[Value]:
            results = list(sums)  # of each row, half of the matrix, and half of a run: so that no sum waits for another
            place = b.lshr(column, I64(1)) if kind.nibbles else column
            numbers = [kind.read(b, b.add(start, place)) for start in codes]
            for part in range(2):
                at = b.add(column, I64(part * LANES))
                x = [code.load(b, code.offset(b, start, at, 4), code.vector(F32)) for start in starts_x]
                for side in range(2):
                    weight = code.fma(b, numbers[side][part], *factors[side][part])
                    for row in range(rows):
                        which = 4 * row + 2 * side + part
                        results[which] = code.fma(b, weight, x[row], results[which])
            return results

        end = b.add(position, width)
        last = b.select(b.icmp_unsigned("<", end, inner), end, inner)
        return looped(b, position, I64(RUN), last, list(totals), run)

    totals = looped(b, I64(0), width, inner, [code.constant(F32, 0.0)] * (4 * rows), block, whole=False)
    merged = [b.fadd(totals[i], totals[i + 1]) for i in range(0, len(totals), 2)]
    for i, total in enumerate(code.sums_across(b, merged)):
        place = code.offset(b, out, I64(i // 2), out_stride)
        code.store(b, total, b.add(place, out_far) if i % 2 else place, 4)


def _factors(b: Any, scales: Value, shifts: Value, number: Value, half: int | None) -> list[Value]:
    """Scale and shift of a block; ``half``: of one of the two blocks in a run."""
    which = number if half is None else b.add(b.mul(number, I64(2)), I64(half))
    at = code.offset(b, scales, which, 4)
    return [code.splat(b, code.load(b, place, F32, 4)) for place in (at, b.add(at, shifts))]


@intrinsic(prefer_literal=True)
def codes_tile(  # type: ignore[no-untyped-def]
    context,
    rows,
    halved,
    kind,
    first,
    second,
    scales,
    scales_far,
    shifts,
    width,
    inputs,
    row_stride,
    out,
    out_stride,
    out_far,
    inner,
):
    """Products of ``rows`` inputs, a constant, with one row of codes of each half of a matrix.

    Args:
        halved: 1 = blocks have 16 columns, two are in a run; ``width`` is that of a run then. A constant.
        kind: of the codes, a number of ``KINDS``.
        first, second: the rows of codes.
        scales: of the first row's blocks, float32; the second row's lie ``scales_far`` behind, shifts ``shifts`` bytes.
        width: columns of a block, a multiple of a run.
        inputs: float32, zeros beyond the matrix's columns.
        inner: columns, a multiple of a run.
        out: as ``multiply_tile`` has it.
    """
    given = (
        *(rows, halved, kind, first, second, scales, scales_far, shifts, width, inputs, row_stride),
        *(out, out_stride, out_far, inner),
    )
    return emits(_codes_tile, *given, constants=2)
