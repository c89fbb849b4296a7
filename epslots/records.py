"""The records that every part of epslots shares, and who fills them.

The words are the field's own:

    expert      one FFN of one MoE layer, named by (layer, expert id)
    record      an expert's tensors as one contiguous, aligned run of bytes; the same in the host store and in a slot
    slot        fixed device memory that holds one record
    quota       how many slots of the pool a layer has
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

# Tensors inside a record start on this boundary: vector loads and DMA like it, and it is a multiple of the 16 bytes
# that grouped matrix multiplication asks of every stride.
TENSOR_ALIGNMENT = 256

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


Progress = Callable[[int], None]
"""What long work calls with the bytes done since its last call."""


def align(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor of an expert's record: ``shape`` without the expert dimension, ``offset`` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class RecordLayout(msgspec.Struct, frozen=True):
    """Where each tensor of an expert lies in its record. Experts with equal layouts can share a slot pool."""

    tensors: tuple[TensorSpec, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> RecordLayout:
        """Pack (name, shape, dtype) triples in the order given, each aligned."""
        offset, specs = 0, []
        for name, shape, dtype in tensors:
            spec = TensorSpec(name, tuple(shape), dtype, offset)
            specs.append(spec)
            offset = align(offset + spec.nbytes, TENSOR_ALIGNMENT)
        return cls(tuple(specs), offset)

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return sum(math.prod(t.shape) for t in self.tensors)


class LayerSpec(msgspec.Struct, frozen=True):
    """One MoE layer, as the model defines it; ``name`` is its experts module's path in the model."""

    name: str
    num_experts: int
    layout: RecordLayout
