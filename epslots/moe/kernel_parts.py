"""The common parts of the Triton kernels of grouped products: the gate between two products, and when rows are few."""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a tile up to which a product is bound by memory.
FEW_ROWS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _activated(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of float32 values; ``Gate.activation`` names it."""
    if ACTIVATION == "silu":
        value = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # gelu_tanh, by tanh(x) = 2 sigmoid(2 x) - 1
        cubic = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1.0 + tl.exp(-2.0 * cubic))
    return value


@triton.jit  # type: ignore[untyped-decorator]
def gated(gate, other, dtype: tl.constexpr, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``activation(gate) * other`` of float32 sums, rounded where torch would round."""
    active = _activated(gate.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
    return active * other.to(dtype).to(tl.float32)
