"""How weights and rows become vectors, by the form of the weights. ``product_tiles.py`` emits its loops with these.

A form says how to read a run of a row's weights, a run of the inputs beside them, and how to multiply and add both. Where the
processor multiplies pairs of bf16 numbers (AVX512-BF16), runs of bf16 are twice as long. To add a form, add a class here, an
entry in ``FORMS``, and its dtype in ``vector_gemm.py``. Packed matrices are unpacked to a form first (``packed_tiles.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llvmlite import ir

from epslots.moe import vector_code as code
from epslots.moe.vector_code import BF16, BF16_PAIRS, F32, I8, I16, I32, I64, LANES, Value

BFLOAT16, FLOAT32 = 0, 1


class WeightForm(Protocol):
    """Reads one form of weights.

    Attributes:
        run: weights of a row that one vector holds.
        weight_bytes: of one weight.
        row_bytes: of one input, and of one output.
    """

    run: int
    weight_bytes: int
    row_bytes: int

    def weights(self, b: Any, address: Value) -> Value:
        """A run of weights."""
        ...

    def inputs(self, b: Any, address: Value) -> Value:
        """A run of inputs."""
        ...

    def first_zeroed(self, b: Any, run: Value, count: Value) -> Value:
        """A run whose first ``count`` (32 bits) numbers are zeros."""
        ...

    def multiply(self, b: Any, weights: Value, inputs: Value, total: Value) -> Value:
        """``total`` plus the products, lane by lane."""
        ...

    def rounded(self, b: Any, x: Value) -> Value:
        """Floats as the output holds them."""
        ...

    def store(self, b: Any, x: Value, address: Value) -> None:
        """Write sixteen outputs."""
        ...

    def load(self, b: Any, address: Value) -> Value:
        """Sixteen neighbouring biases, as floats."""
        ...

    def store_weights(self, b: Any, halves: Sequence[Value], address: Value) -> None:
        """Write two vectors of floats as weights."""
        ...

    def make_table(self, b: Any, halves: Sequence[Value]) -> Any:
        """The arguments of ``store_looked_up`` from the sixteen weights of the codes, in the first and in the second half."""
        ...

    def store_looked_up(self, b: Any, table: Any, codes: Value, address: Value) -> None:
        """Write the 32 weights whose codes of 4 bits lie at an address. The first half's are in the low bits of 16 bytes."""
        ...


def _zero_first(b: Any, bits: Value, count: Value, element: Any, lanes: int) -> Value:
    positions = ir.Constant(code.vector(element, lanes), list(range(lanes)))
    small = count if element is I32 else b.trunc(count, element)
    kept = b.icmp_unsigned(">=", positions, code.splat(b, small, lanes))
    return b.select(kept, bits, ir.Constant(code.vector(element, lanes), None))


class Float32Form:
    """Float32 weights and rows."""

    run, weight_bytes, row_bytes = LANES, 4, 4

    def weights(self, b: Any, address: Value) -> Value:
        return code.load(b, address, code.vector(F32))

    inputs = load = weights

    def first_zeroed(self, b: Any, run: Value, count: Value) -> Value:
        bits = _zero_first(b, b.bitcast(run, code.vector(I32)), count, I32, LANES)
        return b.bitcast(bits, code.vector(F32))

    def multiply(self, b: Any, weights: Value, inputs: Value, total: Value) -> Value:
        return code.fma(b, weights, inputs, total)

    def rounded(self, b: Any, x: Value) -> Value:
        return x

    def store(self, b: Any, x: Value, address: Value) -> None:
        code.store(b, x, address)

    def store_weights(self, b: Any, halves: Sequence[Value], address: Value) -> None:
        for number, half in enumerate(halves):
            self.store(b, half, b.add(address, I64(number * LANES * self.weight_bytes)))

    def make_table(self, b: Any, halves: Sequence[Value]) -> Any:
        return halves

    def store_looked_up(self, b: Any, table: Any, codes: Value, address: Value) -> None:
        stored = b.zext(code.load(b, codes, code.vector(I8)), code.vector(I32))
        indices = stored, b.lshr(stored, code.constant(I32, 4))  # of which four bits count
        kinds = [code.vector(F32), code.vector(I32)]
        look_up = code.intrinsic_of(b, "llvm.x86.avx512.permvar.sf.512", kinds[0], kinds)
        self.store_weights(b, [b.call(look_up, list(each)) for each in zip(table, indices, strict=True)], address)


class BFloat16Form(Float32Form):
    """Bfloat16 weights and rows, which are computed with as float32."""

    run, weight_bytes, row_bytes = LANES, 2, 2

    def weights(self, b: Any, address: Value) -> Value:
        return code.bf16_to_f32(b, code.load(b, address, code.vector(I16)))

    inputs = load = weights

    def rounded(self, b: Any, x: Value) -> Value:
        return code.round_to_bf16(b, x)

    def store(self, b: Any, x: Value, address: Value) -> None:
        code.store(b, code.f32_to_bf16(b, x), address)


class BFloat16PairForm(BFloat16Form):
    """Bfloat16 where the processor multiplies pairs: 32 products an instruction, and nothing to convert."""

    run = 2 * LANES

    def weights(self, b: Any, address: Value) -> Value:
        return b.bitcast(code.load(b, address, code.vector(I16, 2 * LANES)), BF16_PAIRS)

    inputs = weights

    def first_zeroed(self, b: Any, run: Value, count: Value) -> Value:
        bits = b.bitcast(run, code.vector(I16, 2 * LANES))
        return b.bitcast(_zero_first(b, bits, count, I16, 2 * LANES), BF16_PAIRS)

    def multiply(self, b: Any, weights: Value, inputs: Value, total: Value) -> Value:
        kinds = [code.vector(F32), BF16_PAIRS, BF16_PAIRS]
        dot = code.intrinsic_of(b, "llvm.x86.avx512bf16.dpbf16ps.512", kinds[0], kinds)
        return b.call(dot, [total, weights, inputs])

    def store_weights(self, b: Any, halves: Sequence[Value], address: Value) -> None:
        """In an instruction for each. Denormal numbers become zeros, as which ``multiply`` takes them."""
        for number, half in enumerate(halves):
            code.store(b, b.fptrunc(half, code.vector(BF16)), b.add(address, I64(2 * LANES * number)))

    def make_table(self, b: Any, halves: Sequence[Value]) -> Any:
        """The weights of both halves, rounded, in one vector."""
        rounded = [b.bitcast(b.fptrunc(half, code.vector(BF16)), code.vector(I16)) for half in halves]
        return _joined(b, *rounded)

    def store_looked_up(self, b: Any, table: Any, codes: Value, address: Value) -> None:
        code.store(b, self.looked_up(b, table, codes), address)

    def looked_up(self, b: Any, table: Any, codes: Value) -> Value:
        """The same 32 weights in a vector."""
        stored = b.zext(code.load(b, codes, code.vector(I8)), code.vector(I16))
        both = _joined(b, stored, b.lshr(stored, code.constant(I16, 4)))
        second = ir.Constant(code.vector(I16, 2 * LANES), [0] * LANES + [LANES] * LANES)
        index = b.or_(b.and_(both, code.constant(I16, 15, 2 * LANES)), second)
        return b.bitcast(code.look_up_words(b, table, index), BF16_PAIRS)


def _joined(b: Any, first: Value, second: Value) -> Value:
    """Two vectors of sixteen lanes as one."""
    return b.shuffle_vector(first, second, ir.Constant(code.vector(I32, 2 * LANES), list(range(2 * LANES))))


FORMS: dict[int, WeightForm] = {
    BFLOAT16: BFloat16PairForm() if code.host_has("avx512bf16") else BFloat16Form(),
    FLOAT32: Float32Form(),
}
