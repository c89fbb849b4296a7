"""How codes of 4 and 8 bits, and their scales, become vectors of floats. ``packed_tiles.py`` emits its loops with these.

    weight = (code - zero) * (group * row)

Codes of 4 bits are looked up in a register where the processor can (AVX-512): in a table of a block's sixteen weights. Others
yield the code's value over a power of two, ``factor``, which enters the scale: the float's bits are moved into those of a
float16, which is converted exactly; or both bytes of a bfloat16 are looked up (``words``). To add a kind, add an entry in
``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from epslots.moe import vector_code as code
from epslots.moe.vector_code import BF16_PAIRS, F32, I8, I16, I32, I64, LANES, Value

_HALF = ir.HalfType()
# Columns whose codes are read at once.
RUN = 2 * LANES
_LOOKS_UP = code.host_has("avx512f")
_LOOKS_UP_BYTES = code.host_has("avx512vbmi")
# E2M1's magnitudes by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class CodeKind(NamedTuple):
    """One kind of codes.

    Attributes:
        nibbles: whether the codes of columns j and j + 16 of each 32 share a byte, j in the low half.
        factor: what the numbers have to be multiplied with.
        middle: the zero of blocks that have none.
        read: the numbers of a run of codes less their zero (all lanes), as two vectors in the order of columns.
        table: the numbers of all codes less a zero; None if they aren't looked up.
        words: a vector of bfloat16 numbers for the run of codes at each of two addresses; None if there is a table, or the
            processor can't look up bytes (AVX512-VBMI).
    """

    nibbles: bool
    factor: float
    middle: float
    read: Callable[[Any, Value, Value], list[Value]]
    table: Callable[[Any, Value], Value] | None = None
    words: Callable[[Any, Sequence[Value]], list[Value]] | None = None


def _e4m3(b: Any, codes: Value, lanes: int) -> list[Value]:
    """The values over 256 of bytes, 16 a vector at most; a NaN stays one."""
    is_nan = b.icmp_unsigned("==", b.or_(codes, code.constant(I8, 128, lanes)), code.constant(I8, 255, lanes))
    moved = b.shl(b.sext(codes, code.vector(I16, lanes)), code.constant(I16, 7, lanes))  # the sign, again, magnitude
    bits = b.and_(moved, code.constant(I16, 0xBFFF, lanes))
    halves = b.bitcast(b.select(is_nan, code.constant(I16, 0x7E00, lanes), bits), code.vector(_HALF, lanes))
    if lanes <= LANES:
        return [b.fpext(halves, code.vector(F32, lanes))]
    return [b.fpext(_part(b, halves, first), code.vector(F32)) for first in range(0, lanes, LANES)]


def _part(b: Any, run: Value, first: int) -> Value:
    """Sixteen lanes of a run."""
    return b.shuffle_vector(run, run, ir.Constant(code.vector(I32), list(range(first, first + LANES))))


def _read_e4m3(b: Any, address: Value, zero: Value) -> list[Value]:
    return _e4m3(b, code.load(b, address, code.vector(I8, RUN)), RUN)


def _read_int8(b: Any, address: Value, zero: Value) -> list[Value]:
    stored = [code.load(b, b.add(address, I64(first)), code.vector(I8)) for first in (0, LANES)]
    return [b.sitofp(b.sext(half, code.vector(I32)), code.vector(F32)) for half in stored]


def _words_e4m3(b: Any, addresses: Sequence[Value]) -> list[Value]:
    codes = _in_eights(b, addresses)
    return _signed_words(b, codes, *(code.look_up_bytes(b, tables, codes) for tables in _E4M3_BYTES))


def _words_int8(b: Any, addresses: Sequence[Value]) -> list[Value]:
    """-128 has the index of 0, and the same low byte."""
    codes = _in_eights(b, addresses)
    magnitudes = b.select(b.icmp_signed("<", codes, _byte(0)), b.neg(codes), codes)
    low, high = (code.look_up_bytes(b, tables, magnitudes) for tables in _INT8_BYTES)
    is_least = b.icmp_unsigned("==", codes, _byte(128))
    return _signed_words(b, codes, low, b.select(is_least, _byte(_bfloat16_bits(128.0) >> 8), high))


def _in_eights(b: Any, addresses: Sequence[Value]) -> Value:
    """The runs of codes at two addresses in one vector, by turns eight of each: as ``_signed_words`` takes them."""
    first, second = (code.load(b, address, code.vector(I8, RUN)) for address in addresses)
    return _bytes_of(
        b, first, second, [RUN * side + 8 * part + lane for part in range(4) for side in range(2) for lane in range(8)]
    )


def _signed_words(b: Any, codes: Value, low: Value, high: Value) -> list[Value]:
    """Numbers by both bytes of their magnitudes, with the codes' signs: those of each run in a vector."""
    high = b.or_(high, b.and_(codes, _byte(128)))
    # An instruction's order, which pairs the bytes of each eight.
    places = [16 * part + lane + 2 * RUN * byte for part in range(4) for lane in range(8) for byte in range(2)]
    return [b.bitcast(_bytes_of(b, low, high, [8 * side + place for place in places]), BF16_PAIRS) for side in range(2)]


def _bytes_of(b: Any, first: Value, second: Value, places: Sequence[int]) -> Value:
    return b.shuffle_vector(first, second, ir.Constant(code.vector(I32, 2 * RUN), list(places)))


def _byte(value: int) -> Value:
    return code.constant(I8, value, 2 * RUN)


def _byte_tables(numbers: Sequence[float]) -> list[list[Value]]:
    """The low bytes of 128 bfloat16 numbers in two vectors, and the high ones."""
    words = [_bfloat16_bits(number) for number in numbers]
    halves, kind = (words[: 2 * RUN], words[2 * RUN :]), code.vector(I8, 2 * RUN)
    return [[ir.Constant(kind, [word >> shift & 255 for word in half]) for half in halves] for shift in (0, 8)]


def _bfloat16_bits(value: float) -> int:
    """Of a number that is one."""
    return int(np.float32(value).view(np.uint32)) >> 16


def _e4m3_magnitude(bits: int) -> float:
    exponent, rest = divmod(bits, 8)
    return float("nan") if bits == 127 else (rest / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)


_E4M3_BYTES = _byte_tables([_e4m3_magnitude(bits) / 2**8 for bits in range(128)])
_INT8_BYTES = _byte_tables([float(number) for number in range(128)])


def _nibbles(b: Any, address: Value) -> list[Value]:
    """A run's codes, 32 bits each."""
    stored = b.zext(code.load(b, address, code.vector(I8)), code.vector(I32))
    return [b.and_(stored, code.constant(I32, 15)), b.lshr(stored, code.constant(I32, 4))]


def _read_int4(b: Any, address: Value, zero: Value) -> list[Value]:
    return [b.fsub(b.sitofp(codes, code.vector(F32)), zero) for codes in _nibbles(b, address)]


def _table_int4(b: Any, zero: Value) -> Value:
    return b.fsub(ir.Constant(code.vector(F32), [float(number) for number in range(LANES)]), zero)


def _read_e2m1(b: Any, address: Value, zero: Value) -> list[Value]:
    """The values over 2**14."""
    found = []
    for codes in (b.trunc(half, code.vector(I16)) for half in _nibbles(b, address)):
        sign = b.shl(b.and_(codes, code.constant(I16, 8)), code.constant(I16, 12))
        bits = b.or_(sign, b.shl(b.and_(codes, code.constant(I16, 7)), code.constant(I16, 9)))
        found.append(b.fpext(b.bitcast(bits, code.vector(_HALF)), code.vector(F32)))
    return found


def _table_e2m1(b: Any, zero: Value) -> Value:
    return ir.Constant(code.vector(F32), [*_E2M1, *(-value for value in _E2M1)])


E4M3, INT8, INT4, E2M1 = range(4)
KINDS: dict[int, CodeKind] = {
    E4M3: CodeKind(False, 2.0**8, 0.0, _read_e4m3, words=_words_e4m3 if _LOOKS_UP_BYTES else None),
    INT8: CodeKind(False, 1.0, 0.0, _read_int8, words=_words_int8 if _LOOKS_UP_BYTES else None),
    INT4: CodeKind(True, 1.0, 8.0, _read_int4, _table_int4 if _LOOKS_UP else None),
    E2M1: CodeKind(True, 1.0 if _LOOKS_UP else 2.0**14, 0.0, _read_e2m1, _table_e2m1 if _LOOKS_UP else None),
}


def _scale_e4m3(b: Any, address: Value, lanes: int) -> Value:
    (values,) = _e4m3(b, code.load(b, address, code.vector(I8, lanes)), lanes)
    return b.fmul(values, code.constant(F32, 2.0**8, lanes))


def _scale_e8m0(b: Any, address: Value, lanes: int) -> Value:
    """Exponents of two, biased by 127; 255 is NaN, and 0 a denormal number."""
    exponent = b.zext(code.load(b, address, code.vector(I8, lanes)), code.vector(I32, lanes))
    bits = b.shl(exponent, code.constant(I32, 23, lanes))
    is_least = b.icmp_unsigned("==", exponent, code.constant(I32, 0, lanes))
    bits = b.select(is_least, code.constant(I32, 1 << 22, lanes), bits)
    is_nan = b.icmp_unsigned("==", exponent, code.constant(I32, 255, lanes))
    return b.bitcast(b.select(is_nan, code.constant(I32, 0x7FC00000, lanes), bits), code.vector(F32, lanes))


def _scale_bfloat16(b: Any, address: Value, lanes: int) -> Value:
    bits = b.zext(code.load(b, address, code.vector(I16, lanes)), code.vector(I32, lanes))
    return b.bitcast(b.shl(bits, code.constant(I32, 16, lanes)), code.vector(F32, lanes))


def _scale_float16(b: Any, address: Value, lanes: int) -> Value:
    return b.fpext(code.load(b, address, code.vector(_HALF, lanes)), code.vector(F32, lanes))


def _scale_float32(b: Any, address: Value, lanes: int) -> Value:
    return code.load(b, address, code.vector(F32, lanes))


def _no_scale(b: Any, address: Value, lanes: int) -> Value:
    return code.constant(F32, 1.0, lanes)


# Reads so many neighbouring scales.
SCALES: dict[int, Callable[[Any, Value, int], Value]] = dict(
    enumerate((_no_scale, _scale_float32, _scale_bfloat16, _scale_float16, _scale_e4m3, _scale_e8m0))
)
NO_SCALE, SCALE_FLOAT32, SCALE_BFLOAT16, SCALE_FLOAT16, SCALE_E4M3, SCALE_E8M0 = range(6)
