"""The inner loops that unpack a packed matrix, row by row, for products that read it then (``code_kinds.py``).

A row's scales and zeros are written down first, as two floats a block of columns.
"""

from __future__ import annotations

from typing import Any

from numba.extending import intrinsic

from epslots.moe import vector_code as code
from epslots.moe.code_kinds import KINDS, RUN, SCALES, CodeKind
from epslots.moe.product_tiles import emits, for_each, looped
from epslots.moe.vector_code import F32, I8, I64, Value
from epslots.moe.weight_forms import FORMS, WeightForm


@for_each(SCALES)
def _write_scales(b: Any, lanes: int, zeroed: int, read_scales: Any, *args: Value) -> None:
    scales, zeros, row_scale, constants, out, out_zeros = args
    factor, middle = (code.splat(b, code.load(b, b.add(constants, I64(4 * i)), F32), lanes) for i in range(2))
    scale = b.fmul(read_scales(b, scales, lanes), code.splat(b, code.load(b, row_scale, F32), lanes))
    zero = middle
    if zeroed:
        zero = b.uitofp(code.load(b, zeros, code.vector(I8, lanes)), code.vector(F32, lanes))
    code.store(b, b.fmul(scale, factor), out, 4)
    code.store(b, zero, out_zeros, 4)


@intrinsic(prefer_literal=True)
def write_scales(context, lanes, zeroed, kind, scales, zeros, row_scale, constants, out, out_zeros):  # type: ignore[no-untyped-def]
    """The scales and zeros of ``lanes`` neighbouring blocks of a row.

    Args:
        zeroed: whether blocks have zeros, uint8; a constant, as ``lanes`` is.
        kind: of the scales, a number of ``SCALES``.
        row_scale: a float32 that all scales are multiplied with.
        constants: two float32, the kind of codes' factor and its middle.
        out, out_zeros: float32.
    """
    given = lanes, zeroed, kind, scales, zeros, row_scale, constants, out, out_zeros
    return emits(_write_scales, *given, constants=2)


@for_each(KINDS)
@for_each(FORMS)
def _unpack_row(b: Any, halved: int, kind: CodeKind, form: WeightForm, *args: Value) -> None:
    codes, ahead, scales, zeros, width, columns, out = args

    def block(position: Value, scale: Value) -> list[Value]:
        places = [b.add(scale, I64(4 * half * halved)) for half in range(2)]
        factors = [code.splat(b, code.load(b, place, F32, 4)) for place in places]
        middles = [code.splat(b, code.load(b, b.add(place, zeros), F32, 4)) for place in places]
        table: Any = None
        if kind.table is not None:
            table = form.make_table(b, [b.fmul(kind.table(b, middles[half]), factors[half]) for half in range(2)])

        def run(column: Value) -> list[Value]:
            stored = b.add(codes, b.lshr(column, I64(1)) if kind.nibbles else column)
            code.prefetch(b, b.add(stored, ahead))
            if table is not None:
                form.store_looked_up(b, table, stored, code.offset(b, out, column, form.weight_bytes))
                return []
            numbers = [kind.read(b, stored, middles[half * halved])[half] for half in range(2)]
            values = [b.fmul(*each) for each in zip(numbers, factors, strict=True)]
            form.store_weights(b, values, code.offset(b, out, column, form.weight_bytes))
            return []

        end = b.add(position, width)
        looped(b, position, I64(RUN), b.select(b.icmp_unsigned("<", end, columns), end, columns), [], run)
        return [b.add(scale, I64(4 << halved))]

    looped(b, I64(0), width, columns, [scales], block, whole=False)


@intrinsic(prefer_literal=True)
def unpack_row(context, halved, kind, form, codes, ahead, scales, zeros, width, columns, out):  # type: ignore[no-untyped-def]
    """Write the weights of a row of codes, while the codes ``ahead`` bytes further on come from memory.

    Args:
        halved: 1 = blocks have 16 columns, two are in a run; ``width`` is that of a run then. A constant.
        kind: of the codes, a number of ``KINDS``.
        form: of the weights, a number of ``FORMS``.
        scales: of the row's blocks, float32; their zeros lie ``zeros`` bytes behind.
        width: columns of a block, a multiple of a run.
        columns: of the row with its padding, a multiple of a run.
    """
    return emits(_unpack_row, halved, kind, form, codes, ahead, scales, zeros, width, columns, out, constants=1)
