"""How weights and rows become vectors, by the form of the weights. ``product_tiles.py`` emits its loops with these.

A form says how to read a run of a row's weights, a run of the inputs beside them, and how to multiply and add both. Where the
processor multiplies pairs of bf16 numbers (AVX512-BF16), runs of bf16 are twice as long. To add a form, add a class here, an
entry in ``FORMS``, and its dtype in ``vector_gemm.py``. Packed matrices are unpacked to a form first (``packed_tiles.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from epslots.moe import vector_code as code
from epslots.moe.vector_code import BF16, BF16_PAIRS, F32, I8, I16, I32, I64, LANES, Value

BFLOAT16, FLOAT32 = 0, 1


class WeightForm:
    """Float32 weights and rows. Other forms say how they differ.

    Attributes:
        run: numbers of a row that one vector holds.
        item_bytes: of a weight, an input or an output.
    """

    run, item_bytes = LANES, 4

    def load(self, b: Any, address: Value) -> Value:
        """Sixteen neighbouring numbers, as floats."""
        return code.load(b, address, code.vector(F32))

    def load_run(self, b: Any, address: Value) -> Value:
        """A run of weights, or of inputs."""
        return self.load(b, address)

    def first_zeroed(self, b: Any, run: Value, count: Value) -> Value:
        """A run whose first ``count`` (32 bits) numbers are zeros."""
        bits = _zero_first(b, b.bitcast(run, code.vector(I32)), count, I32, LANES)
        return b.bitcast(bits, code.vector(F32))

    def multiply(self, b: Any, weights: Value, inputs: Value, total: Value) -> Value:
        """``total`` plus the products, lane by lane."""
        return code.fma(b, weights, inputs, total)

    def rounded(self, b: Any, x: Value) -> Value:
        """Floats as the output holds them."""
        return x

    def store(self, b: Any, x: Value, address: Value) -> None:
        """Write sixteen outputs."""
        code.store(b, x, address)

    def store_weights(self, b: Any, halves: Sequence[Value], address: Value) -> None:
        """Write two vectors of floats as weights."""
        for number, half in enumerate(halves):
            self.store(b, half, b.add(address, I64(number * LANES * self.item_bytes)))

    def make_table(self, b: Any, halves: Sequence[Value]) -> Any:
        """The arguments of ``store_looked_up`` from the sixteen weights of the codes, in the first and in the second half."""
        return halves

    def store_looked_up(self, b: Any, table: Any, codes: Value, address: Value, *, alike: bool) -> None:
        """Write the 32 weights whose codes of 4 bits lie at an address. The first half's are in the low bits of 16 bytes.

        Args:
            alike: whether the table of both halves is the same.
        """
        stored = b.zext(code.load(b, codes, code.vector(I8)), code.vector(I32))
        indices = stored, b.lshr(stored, code.constant(I32, 4))  # of which four bits count
        kinds = [code.vector(F32), code.vector(I32)]
        look_up = code.intrinsic_of(b, "llvm.x86.avx512.permvar.sf.512", kinds[0], kinds)
        self.store_weights(b, [b.call(look_up, list(each)) for each in zip(table, indices, strict=True)], address)


def _zero_first(b: Any, bits: Value, count: Value, element: Any, lanes: int) -> Value:
    positions = ir.Constant(code.vector(element, lanes), list(range(lanes)))
    small = count if element is I32 else b.trunc(count, element)
    kept = b.icmp_unsigned(">=", positions, code.splat(b, small, lanes))
    return b.select(kept, bits, ir.Constant(code.vector(element, lanes), None))


class BFloat16Form(WeightForm):
    """Bfloat16 weights and rows, which are computed with as float32."""

    item_bytes = 2

    def load(self, b: Any, address: Value) -> Value:
        return code.bf16_to_f32(b, code.load(b, address, code.vector(I16)))

    def rounded(self, b: Any, x: Value) -> Value:
        return code.round_to_bf16(b, x)

    def store(self, b: Any, x: Value, address: Value) -> None:
        code.store(b, code.f32_to_bf16(b, x), address)


class BFloat16PairForm(BFloat16Form):
    """Bfloat16 where the processor multiplies pairs: 32 products an instruction, and nothing to convert."""

    run = 2 * LANES

    def load_run(self, b: Any, address: Value) -> Value:
        return b.bitcast(code.load(b, address, code.vector(I16, 2 * LANES)), BF16_PAIRS)

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

    def store_looked_up(self, b: Any, table: Any, codes: Value, address: Value, *, alike: bool) -> None:
        code.store(b, self.looked_up(b, table, codes, alike=alike), address)

    def looked_up(self, b: Any, table: Any, codes: Value, *, alike: bool) -> Value:
        """The same 32 weights in a vector. Where both halves are alike, the fifth bit of an index doesn't matter."""
        stored = code.load(b, codes, code.vector(I8))
        twice = b.zext(_joined(b, stored, stored), code.vector(I16, 2 * LANES))
        index = b.lshr(twice, _in_halves(0, 4))
        if not alike:
            index = b.or_(b.and_(index, _in_halves(15, 15)), _in_halves(0, LANES))
        return b.bitcast(code.look_up_words(b, table, index), BF16_PAIRS)


def _in_halves(first: int, second: int) -> Value:
    """One word in sixteen lanes, and another in the other sixteen."""
    return ir.Constant(code.vector(I16, 2 * LANES), [first] * LANES + [second] * LANES)


def _joined(b: Any, first: Value, second: Value) -> Value:
    """Two vectors of sixteen lanes as one."""
    return b.shuffle_vector(first, second, ir.Constant(code.vector(I32, 2 * LANES), list(range(2 * LANES))))


FORMS: dict[int, WeightForm] = {
    BFLOAT16: BFloat16PairForm() if code.host_has("avx512bf16") else BFloat16Form(),
    FLOAT32: WeightForm(),
}
