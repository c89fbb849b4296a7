"""The records that every part of epslots shares, and who fills them.

The words are the field's own:

    expert      one FFN of one MoE layer, named by (layer, expert id)
    record      an expert in the host store: its tensors as one contiguous, aligned run of bytes
    slot        fixed device memory that holds one expert's weights, as they are computed with
    packed      of a record: in the form that a quantised checkpoint stores, which is unpacked into a slot. Any other record
                is what its slot holds, byte for byte
    quota       how many slots of the pool a layer has
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

# Tensors inside a record start on this boundary: vector loads and DMA like it, and it is a multiple of the 16 bytes
# that grouped matrix multiplication asks of every stride.
TENSOR_ALIGNMENT = 256

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# What packed records hold besides: nothing that could be computed with.
PACKED_ITEM_BYTES = {"uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1}


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
        return math.prod(self.shape) * (ITEM_BYTES.get(self.dtype) or PACKED_ITEM_BYTES[self.dtype])


class RecordLayout(msgspec.Struct, frozen=True):
    """Where each tensor of an expert lies in its slot, or in its record. Experts whose slots are alike can share a pool."""

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


class PackedPart(msgspec.Struct, frozen=True):
    """Some rows of a slot's matrix as a record has them: codes, and a scale for each block of weights.

    Attributes:
        target: the matrix in the slot's layout, [rows, columns].
        first_row, rows: the rows that the codes stand for.
        codes: the tensor of codes in the record's layout. Either one a weight, [rows, columns] of an 8-bit float type; or two
            a byte, uint8 [rows / 2, columns] of E2M1, the 4-bit float: rows 2i and 2i + 1 in the low and high halves.
        scales: the tensor of scales there, [row blocks, column blocks]; as uint8 they are exponents of two, biased by 127.
        block: rows and columns that share a scale; rows are even where codes share a byte. Last ones may be cut short.
    """

    target: str
    first_row: int
    rows: int
    codes: str
    scales: str
    block: tuple[int, int]


class PackedLayout(msgspec.Struct, frozen=True):
    """A packed record. A slot's tensors that no part stands for are in ``record`` as they are in the slot."""

    record: RecordLayout
    parts: tuple[PackedPart, ...]


class LayerSpec(msgspec.Struct, frozen=True):
    """One MoE layer, as the model defines it; ``name`` is its experts module's path in the model.

    Attributes:
        layout: of one of its slots.
        packed: of one of its records, if these are packed.
    """

    name: str
    num_experts: int
    layout: RecordLayout
    packed: PackedLayout | None = None

    @property
    def record(self) -> RecordLayout:
        """The layout of a record."""
        return self.layout if self.packed is None else self.packed.record


def unpacking_bytes(layer: LayerSpec) -> int:
    """What unpacking one of a layer's records takes on the device: its copy there, and what is on the way to the slot.

    Scales become indices and factors of 4 bytes; codes of two weights a byte become indices and values of 4 bytes
    (``unpacking.py``).
    """
    if layer.packed is None:
        return 0
    sizes = {tensor.name: tensor for tensor in layer.packed.record.tensors}
    most = 0
    for part in layer.packed.parts:
        codes, scales = sizes[part.codes], sizes[part.scales]
        halves = 2 * ITEM_BYTES["float32"] * codes.nbytes if codes.dtype == "uint8" else 0
        most = max(most, 2 * ITEM_BYTES["float32"] * math.prod(scales.shape) + halves)
    return layer.packed.record.nbytes + most
