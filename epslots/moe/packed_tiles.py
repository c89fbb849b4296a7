"""The inner loops of products with packed matrices (``code_kinds.py``): one unpacks a row, for products that read it then.

Another multiplies up to eight bfloat16 inputs with codes that become numbers in registers, where the processor multiplies
pairs of these. It scales the sums of a block, so weights aren't rounded. For more than two inputs, where codes are looked up
in a table, it scales that instead, to the weights of ``unpack_row``.

A row's scales and zeros are written down first, as two floats a block of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from epslots.moe import vector_code as code
from epslots.moe.code_kinds import KINDS, RUN, SCALES, CodeKind
from epslots.moe.product_tiles import ROW_BLOCK, emits, for_each, looped
from epslots.moe.vector_code import F32, I8, I32, I64, LANES, Value
from epslots.moe.weight_forms import FORMS, BFloat16PairForm, WeightForm


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
    codes, ahead, scales, zeros, width, columns, held, out = args
    rest = None if kind.nibbles else _rest_of(b, codes, held)

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
            if rest is not None:
                stored = b.select(b.icmp_unsigned(">", b.add(column, I64(RUN)), held), rest, stored)
            if table is not None:
                form.store_looked_up(b, table, stored, code.offset(b, out, column, form.item_bytes), alike=not halved)
                return []
            numbers = [kind.read(b, stored, middles[half * halved])[half] for half in range(2)]
            values = [b.fmul(*each) for each in zip(numbers, factors, strict=True)]
            form.store_weights(b, values, code.offset(b, out, column, form.item_bytes))
            return []

        end = b.add(position, width)
        looped(b, position, I64(RUN), b.select(b.icmp_unsigned("<", end, columns), end, columns), [], run)
        return [b.add(scale, I64(4 << halved))]

    looped(b, I64(0), width, columns, [scales], block, whole=False)


def _rest_of(b: Any, codes: Value, held: Value) -> Value:
    """The address of a run with the codes behind a row's last whole run, and zeros behind these."""
    kind = code.vector(I8, RUN)
    run = cgutils.alloca_once(b, kind)
    count = b.and_(held, I64(RUN - 1))
    with b.if_then(b.icmp_unsigned("!=", count, I64(0)), likely=False):
        lanes = ir.Constant(code.vector(I8, RUN), list(range(RUN)))
        present = b.icmp_unsigned("<", lanes, code.splat(b, b.trunc(count, I8), RUN))
        b.store(code.load_some(b, b.add(codes, b.sub(held, count)), kind, present), run, align=1)
    return b.ptrtoint(run, I64)


@intrinsic(prefer_literal=True)
def unpack_row(context, halved, kind, form, codes, ahead, scales, zeros, width, columns, held, out):  # type: ignore[no-untyped-def]
    """Write the weights of a row of codes, while the codes ``ahead`` bytes further on come from memory.

    Args:
        halved: 1 = blocks have 16 columns, two are in a run; ``width`` is that of a run then. A constant.
        kind: of the codes, a number of ``KINDS``.
        form: of the weights, a number of ``FORMS``.
        scales: of the row's blocks, float32; their zeros lie ``zeros`` bytes behind.
        width: columns of a block, a multiple of a run.
        columns: of the row with its padding, a multiple of a run.
        held: of the row without it. Bytes end there; codes of 4 bits are stored with their padding.
    """
    return emits(_unpack_row, halved, kind, form, codes, ahead, scales, zeros, width, columns, held, out, constants=1)


_HALF = LANES // 2
_MOST_ROWS = ROW_BLOCK if code.host_has("avx512bf16") else 0
_TILED = {number: kind for number, kind in KINDS.items() if kind.words is not None or kind.table is not None}
# Inputs up to which scaling a block's sums takes less time than scaling its table (Zen 4).
_UNROUNDED = 2


def tiled_rows(kind: int) -> int:
    """Inputs up to which ``codes_tile`` multiplies them with codes of a kind; 0 = none."""
    return _MOST_ROWS if kind in _TILED else 0


@for_each({rows: rows for rows in range(1, _MOST_ROWS + 1)})
@for_each(_TILED)
def _codes_tile(b: Any, halved: int, rows: int, kind: CodeKind, *args: Value) -> None:
    codes, far, ahead, scales, zeros, width, columns, inputs, row_stride, out, out_stride, out_far = args
    form, starts = BFloat16PairForm(), [codes, b.add(codes, far)]
    starts_x = [code.offset(b, inputs, I64(row), row_stride) for row in range(rows)]
    rounds, joins = kind.table is not None and rows > _UNROUNDED, kind.words is not None and not halved

    def block(position: Value, scale: Value, *totals: Value) -> list[Value]:
        sides = scale, b.add(scale, b.mul(zeros, I64(2)))
        places = [[b.add(side, I64(4 * half * halved)) for half in range(2)] for side in sides]
        factors = [_splats(b, side) for side in places]
        tables = [_table(b, kind, _splats(b, [b.add(place, zeros) for place in side])) for side in places]
        if rounds:
            tables = [[b.fmul(*each) for each in zip(*both, strict=True)] for both in zip(tables, factors, strict=True)]
        joined = [form.make_table(b, table) if table else None for table in tables]

        def run(column: Value, *sums: Value) -> list[Value]:
            x = [form.load_run(b, code.offset(b, start, column, form.item_bytes)) for start in starts_x]
            stored = [b.add(start, b.lshr(column, I64(1)) if kind.nibbles else column) for start in starts]
            for at in stored:
                code.prefetch(b, b.add(at, ahead))
            if kind.words is None:
                alike = not halved or tables[0][0] == tables[0][1]
                words = [form.looked_up(b, *each, alike=alike) for each in zip(joined, stored, strict=True)]
            else:
                words = kind.words(b, stored)
            return [form.multiply(b, words[i % 2], x[i // 2], total) for i, total in enumerate(sums)]

        end = b.add(position, width)
        last, following = b.select(b.icmp_unsigned("<", end, columns), end, columns), b.add(scale, I64(4 << halved))
        if rounds:
            return [following, *looped(b, position, I64(RUN), last, list(totals), run)]
        sums = looped(b, position, I64(RUN), last, [code.constant(F32, 0.0)] * (2 * rows), run)
        return [following, *_add_scaled(b, joins, sums, factors, totals)]

    zero = [code.constant(F32, 0.0)] * (rows if joins else 2 * rows)
    _, *totals = looped(b, I64(0), width, columns, [scales, *zero], block, whole=False)
    for i, total in enumerate(_results(b, joins, totals)):
        place = code.offset(b, out, I64(i // 2), out_stride)
        code.store(b, total, b.add(place, out_far) if i % 2 else place, 4)


def _splats(b: Any, places: list[Value]) -> list[Value]:
    return [code.splat(b, code.load(b, place, F32, 4)) for place in places]


def _table(b: Any, kind: CodeKind, zeros: list[Value]) -> list[Value]:
    """The tables of the codes of both halves of a run; none if codes aren't looked up."""
    return [] if kind.table is None else [kind.table(b, zero) for zero in zeros]


def _add_scaled(b: Any, joins: bool, sums: list[Value], factors: list[list[Value]], totals: Sequence[Value]) -> list[Value]:
    """Add a block's sums times its scales to totals; ``joins``: those of both sides are halved, and share a register."""
    if joins:
        sums = [each.value for each in code.halved(b, code.partial_sums(sums))]
        scales = [_in_halves(b, factors[0][0], factors[1][0])]
    else:
        scales = [_in_halves(b, *side) for side in factors]
    return [code.fma(b, one, scales[i % len(scales)], totals[i]) for i, one in enumerate(sums)]


def _in_halves(b: Any, first: Value, second: Value) -> Value:
    """The lower lanes of one vector with the upper ones of another."""
    return b.shuffle_vector(first, second, ir.Constant(code.vector(I32), [*range(_HALF), *range(LANES + _HALF, 2 * LANES)]))


def _results(b: Any, joins: bool, totals: list[Value]) -> list[Value]:
    """The results of each input with both sides."""
    if not joins:
        return code.sums_across(b, totals)
    held = [[(2 * row + side, lane) for side in range(2) for lane in range(_HALF)] for row in range(len(totals))]
    return code.sums_of(b, [code.PartialSums(*each) for each in zip(totals, held, strict=True)])


@intrinsic(prefer_literal=True)
def codes_tile(  # type: ignore[no-untyped-def]
    context, halved, rows, kind, codes, far, ahead, scales, zeros, width, columns, inputs, row_stride, out, out_stride, out_far
):
    """Products of bfloat16 inputs with one row of codes of each half of a matrix.

    Args:
        halved, kind, ahead, zeros, width, columns: as of ``unpack_row``.
        rows: inputs, up to ``tiled_rows`` of the kind.
        codes: the first half's row; the second's lies ``far`` behind.
        scales: of the first row's blocks; the second's lie behind the zeros.
        out: as of ``multiply_tile``.
    """
    given = halved, rows, kind, codes, far, ahead, scales, zeros, width, columns, inputs, row_stride, out, out_stride, out_far
    return emits(_codes_tile, *given, constants=1)
