"""How codes of 4 and 8 bits, and their scales, become vectors of floats. ``packed_tiles.py`` emits its loops with these.

    weight = row * group * (code - zero)

A kind of codes yields numbers that are the code's value over a power of two, ``factor``, which enters the scale: so a float of
4 or 8 bits is moved into the bits of a float16 and converted exactly. To add a kind, add an entry in ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from epslots.moe import vector_code as code
from epslots.moe.vector_code import F32, I8, I16, I32, I64, LANES, Value

_HALF = ir.HalfType()
# Columns whose codes are read at once.
RUN = 2 * LANES


class CodeKind(NamedTuple):
    """One kind of codes.

    Attributes:
        nibbles: whether the codes of columns j and j + 16 of each 32 share a byte, j in the low half.
        factor: what the numbers have to be multiplied with.
        middle: the zero of blocks that have none.
        values: the numbers of sixteen codes, given in 16 bits each.
    """

    nibbles: bool
    factor: float
    middle: float
    values: Callable[[Any, Value, int], Value]

    def read(self, b: Any, address: Value) -> list[Value]:
        """A run of codes as two vectors of floats, in the order of columns."""
        stored = b.zext(code.load(b, address, code.vector(I8)), code.vector(I16))
        if self.nibbles:
            halves = b.and_(stored, code.constant(I16, 15)), b.lshr(stored, code.constant(I16, 4))
        else:
            further = code.load(b, b.add(address, I64(LANES)), code.vector(I8))
            halves = stored, b.zext(further, code.vector(I16))
        return [self.values(b, half, LANES) for half in halves]


def _e4m3(b: Any, codes: Value, lanes: int) -> Value:
    """The value over 256; a NaN stays one."""
    twice = b.ashr(b.shl(codes, code.constant(I16, 8, lanes)), code.constant(I16, 1, lanes))  # the sign, again, magnitude
    bits = b.and_(twice, code.constant(I16, 0xBFFF, lanes))
    magnitude = b.and_(bits, code.constant(I16, 127 << 7, lanes))
    is_nan = b.icmp_unsigned("==", magnitude, code.constant(I16, 127 << 7, lanes))
    bits = b.select(is_nan, code.constant(I16, 0x7E00, lanes), bits)
    return b.fpext(b.bitcast(bits, code.vector(_HALF, lanes)), code.vector(F32, lanes))


def _e2m1(b: Any, codes: Value, lanes: int) -> Value:
    """The value over 2**14."""
    sign = b.shl(b.and_(codes, code.constant(I16, 8, lanes)), code.constant(I16, 12, lanes))
    bits = b.or_(sign, b.shl(b.and_(codes, code.constant(I16, 7, lanes)), code.constant(I16, 9, lanes)))
    return b.fpext(b.bitcast(bits, code.vector(_HALF, lanes)), code.vector(F32, lanes))


def _int8(b: Any, codes: Value, lanes: int) -> Value:
    return b.sitofp(b.sext(b.trunc(codes, code.vector(I8, lanes)), code.vector(I32, lanes)), code.vector(F32, lanes))


def _int4(b: Any, codes: Value, lanes: int) -> Value:
    return b.sitofp(b.zext(codes, code.vector(I32, lanes)), code.vector(F32, lanes))


E4M3, INT8, INT4, E2M1 = range(4)
KINDS: dict[int, CodeKind] = {
    E4M3: CodeKind(False, 2.0**8, 0.0, _e4m3),
    INT8: CodeKind(False, 1.0, 0.0, _int8),
    INT4: CodeKind(True, 1.0, 8.0, _int4),
    E2M1: CodeKind(True, 2.0**14, 0.0, _e2m1),
}


def _scale_e4m3(b: Any, address: Value, lanes: int) -> Value:
    codes = b.zext(code.load(b, address, code.vector(I8, lanes)), code.vector(I16, lanes))
    return b.fmul(_e4m3(b, codes, lanes), code.constant(F32, 2.0**8, lanes))


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
