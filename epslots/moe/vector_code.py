"""Emits vectors of 16 numbers as LLVM code: loads, rounding, sums across lanes, transposition, activations.

numba compiles loops over integers well, but decides by itself which loops become vectors. ``product_tiles.py`` therefore
writes the inner loops of matrix products with the functions here. LLVM maps 16 lanes to the processor's registers: one
register with AVX-512, two with AVX2, four with NEON.

Addresses are integers of 64 bits. In what follows, ``b`` is llvmlite's builder at the place where code goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba.core import config

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
Value = Any  # llvmlite's, which has no type hints


class BFloatType(ir.Type):
    """LLVM's ``bfloat``, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


BF16 = BFloatType()
BF16_PAIRS = ir.VectorType(BF16, 2 * LANES)


def vector(element: Any, lanes: int = LANES) -> Any:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


@functools.cache
def host_has(feature: str) -> bool:
    """Whether the processor that code is compiled for has a feature, by LLVM's name of it.

    That is this machine's, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name another.
    """
    if config.CPU_NAME is not None:
        return f"+{feature}" in (config.CPU_FEATURES or "").split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


def constant(element: Any, value: float, lanes: int = LANES) -> Value:
    """A vector of one number."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def splat(b: Any, scalar: Value, lanes: int = LANES) -> Value:
    """A scalar in all lanes."""
    nothing = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, scalar, I32(0)), nothing, constant(I32, 0, lanes))


def intrinsic_of(b: Any, name: str, result: Any, arguments: Sequence[Any]) -> Value:
    """One of LLVM's functions, declared once in a module."""
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, arguments), name)


def load(b: Any, address: Value, kind: Any, align: int = 1) -> Value:
    """Read from an address."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align, typ=kind)


def load_some(b: Any, address: Value, kind: Any, present: Value) -> Value:
    """Read the present lanes of a vector from an address; the others are zeros, and their memory isn't read."""
    pointer, flags = kind.as_pointer(), vector(ir.IntType(1), kind.count)
    name = f"llvm.masked.load.v{kind.count}{kind.element}.p0"
    function = intrinsic_of(b, name, kind, [pointer, I32, flags, kind])
    return b.call(function, [b.inttoptr(address, pointer), I32(1), present, ir.Constant(kind, None)])


def store(b: Any, value: Value, address: Value, align: int = 1) -> None:
    """Write to an address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def look_up_words(b: Any, table: Value, indices: Value) -> Value:
    """Of 32 words the one whose number the lowest five bits of each of 32 indices are (AVX512-BW)."""
    kinds = [vector(I16, 2 * LANES)] * 2
    return b.call(intrinsic_of(b, "llvm.x86.avx512.permvar.hi.512", kinds[0], kinds), [table, indices])


def look_up_bytes(b: Any, tables: Sequence[Value], indices: Value) -> Value:
    """The bytes of a table of 128, in two vectors, at the lowest seven bits of each index (AVX512-VBMI)."""
    kinds = [vector(I8, 4 * LANES)] * 3
    look_up = intrinsic_of(b, "llvm.x86.avx512.vpermi2var.qi.512", kinds[0], kinds)
    return b.call(look_up, [tables[0], indices, tables[1]])


def prefetch(b: Any, address: Value) -> None:
    """Let what lies at an address, if anything does, come into the caches."""
    kinds = [I8.as_pointer(), I32, I32, I32]
    function = intrinsic_of(b, "llvm.prefetch.p0", ir.VoidType(), kinds)
    b.call(function, [b.inttoptr(address, kinds[0]), I32(0), I32(3), I32(1)])


def offset(b: Any, address: Value, index: Value, size: int | Value) -> Value:
    """``address + index * size``."""
    return b.add(address, b.mul(index, I64(size) if isinstance(size, int) else size))


def fma(b: Any, x: Value, y: Value, total: Value) -> Value:
    """``x * y + total``, rounded once where the processor can."""
    kind = vector(F32)
    return b.call(intrinsic_of(b, "llvm.fmuladd.v16f32", kind, [kind] * 3), [x, y, total])


def bf16_to_f32(b: Any, bits: Value) -> Value:
    """Sixteen bf16 numbers, given by their bits, as floats."""
    return b.bitcast(b.shl(b.zext(bits, vector(I32)), constant(I32, 16)), vector(F32))


def f32_to_bf16(b: Any, x: Value) -> Value:
    """The bits of floats that are rounded to bf16, to the nearest and then even, as torch does. A NaN stays one."""
    bits = b.bitcast(x, vector(I32))
    odd = b.and_(b.lshr(bits, constant(I32, 16)), constant(I32, 1))
    rounded = b.lshr(b.add(b.add(bits, constant(I32, 0x7FFF)), odd), constant(I32, 16))
    is_nan = b.fcmp_unordered("uno", x, x)
    return b.trunc(b.select(is_nan, constant(I32, 0x7FC0), rounded), vector(I16))


def round_to_bf16(b: Any, x: Value) -> Value:
    """Floats that are bf16 numbers."""
    return bf16_to_f32(b, f32_to_bf16(b, x))


class PartialSums(NamedTuple):
    """A vector with partial sums of one number or more.

    Attributes:
        held: of each lane, the number and which of its partial sums it holds.
    """

    value: Value
    held: list[tuple[int, int]]


def partial_sums(vectors: Sequence[Value]) -> list[PartialSums]:
    """Vectors whose lanes are the partial sums of a number each."""
    return [PartialSums(value, [(number, lane) for lane in range(LANES)]) for number, value in enumerate(vectors)]


def sums_across(b: Any, vectors: Sequence[Value]) -> list[Value]:
    """The sum of each vector's lanes, for at most 16 vectors. They are halved together, so two cost little more than one.

    The order of additions is the same for any number of vectors: lanes i and i + 8, then i + 4, i + 2, i + 1.
    """
    return sums_of(b, partial_sums(vectors))


def sums_of(b: Any, level: Sequence[PartialSums]) -> list[Value]:
    """The sums of ``sums_across``, of vectors that may be halved already."""
    while any(part for each in level for _, part in each.held):
        level = halved(b, level)
    ((total, held),) = level
    return [b.extract_element(total, I32(held.index((number, 0)))) for number in range(1 + max(held)[0])]


def halved(b: Any, level: Sequence[PartialSums]) -> list[PartialSums]:
    """Each two vectors as one: the upper half of each number's partial sums is added to the lower one."""
    half = (1 + max(part for _, part in level[0].held)) // 2
    return [_add_halves(b, level[first : first + 2], half) for first in range(0, len(level), 2)]


def _add_halves(b: Any, pair: Sequence[PartialSums], half: int) -> PartialSums:
    """Partial sums ``half`` and up of one or two vectors added to those below, in one vector."""
    place = {what: LANES * source + lane for source, (_, held) in enumerate(pair) for lane, what in enumerate(held)}
    kept = [what for _, held in pair for what in dict.fromkeys(held) if what[1] < half]
    kept += kept[:1] * (LANES - len(kept))
    low = ir.Constant(vector(I32), [place[what] for what in kept])
    high = ir.Constant(vector(I32), [place[number, part + half] for number, part in kept])
    one, other = pair[0].value, pair[-1].value
    return PartialSums(b.fadd(b.shuffle_vector(one, other, low), b.shuffle_vector(one, other, high)), kept)


# exp(x) = 2^n exp(r): the coefficients of r^2 and up in exp(r), |r| <= log(2) / 2, from Cephes' expf.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_LARGEST_EXPONENT = 88.0


def exp(b: Any, x: Value) -> Value:
    """e to the power of each lane, within 2 units in the last place. Beyond +-88 it is that of +-88, and NaN for NaN."""
    one = constant(F32, 1.0)
    clamped = _limited(b, x, _LARGEST_EXPONENT)
    power = b.call(intrinsic_of(b, "llvm.rint.v16f32", vector(F32), [vector(F32)]), [b.fmul(clamped, constant(F32, _LOG2_E))])
    rest = fma(b, power, constant(F32, -_LN2_HIGH), clamped)
    rest = fma(b, power, constant(F32, -_LN2_LOW), rest)
    total = constant(F32, _EXP[0])
    for coefficient in _EXP[1:]:
        total = fma(b, total, rest, constant(F32, coefficient))
    total = b.fadd(fma(b, b.fmul(total, rest), rest, rest), one)
    exponent = b.add(b.fptosi(power, vector(I32)), constant(I32, 127))
    result = b.fmul(total, b.bitcast(b.shl(exponent, constant(I32, 23)), vector(F32)))
    return b.select(b.fcmp_unordered("uno", x, x), x, result)


def _limited(b: Any, x: Value, most: float) -> Value:
    """Lanes between ``-most`` and ``most``; NaN becomes one of both."""
    upper, lower = constant(F32, most), constant(F32, -most)
    x = b.select(b.fcmp_ordered("<", x, upper), x, upper)
    return b.select(b.fcmp_ordered(">", x, lower), x, lower)


def silu(b: Any, x: Value) -> Value:
    """``x * sigmoid(x)``."""
    return b.fdiv(x, b.fadd(constant(F32, 1.0), exp(b, b.fneg(x))))


def gelu_tanh(b: Any, x: Value) -> Value:
    """GELU by tanh: ``x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))``."""
    cube = b.fmul(b.fmul(x, x), x)
    inner = fma(b, cube, constant(F32, 0.044715), x)
    return b.fdiv(x, b.fadd(constant(F32, 1.0), exp(b, b.fmul(inner, constant(F32, -1.5957691216057308)))))


ACTIVATIONS: dict[str, Callable[[Any, Value], Value]] = {"silu": silu, "gelu_tanh": gelu_tanh}
