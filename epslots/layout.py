"""Layouts of experts in records and slots, shared by every part of epslots. The models package makes them.

expert      one FFN of one MoE layer, named by (layer, expert id)
record      an expert in the host store: its tensors as one contiguous, aligned run of bytes
slot        fixed device memory that holds one expert's weights in the form in which they are computed with
packed      of a record: in the form of a quantised checkpoint, unpacked on the way into a slot. Any other record equals
            its slot byte for byte
quota       number of slots that a layer has of its pool
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

# Tensors inside a record start on this boundary: good for vector loads and DMA, and a multiple of the 16 bytes that grouped
# matrix multiplication requires of every stride.
TENSOR_ALIGNMENT = 256

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Dtypes of codes and scales in packed records; nothing is computed in them.
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
    """Offsets of an expert's tensors in its slot or its record. Layers with equal slot layouts share a pool."""

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
    """Packed rows of a slot's matrix: codes, and a scale for each block of weights.

    Attributes:
        target: the matrix in the slot's layout, [rows, columns].
        first_row, rows: the rows that the codes stand for.
        codes: name of the tensor of codes in the record's layout: [rows, columns] of an 8-bit float type; or uint8
            [rows / 2, columns] of the 4-bit float E2M1, with row 2i in the low and row 2i + 1 in the high half of a byte.
        scales: name of the tensor of scales, [row blocks, column blocks]; uint8 scales are exponents of two, biased by 127.
        block: rows and columns that share a scale; rows are even for E2M1. The last block of each may be cut short.
    """

    target: str
    first_row: int
    rows: int
    codes: str
    scales: str
    block: tuple[int, int]


class PackedLayout(msgspec.Struct, frozen=True):
    """A packed record. Tensors of the slot that aren't the target of a part are in ``record`` unpacked."""

    record: RecordLayout
    parts: tuple[PackedPart, ...]


class LayerSpec(msgspec.Struct, frozen=True):
    """One MoE layer of a model.

    Attributes:
        name: the experts module's path in the model.
        layout: of a slot.
        packed: of a record, if records are packed.
    """

    name: str
    num_experts: int
    layout: RecordLayout
    packed: PackedLayout | None = None

    @property
    def record(self) -> RecordLayout:
        """The layout of a record, packed or not."""
        return self.layout if self.packed is None else self.packed.record


def unpacking_bytes(layer: LayerSpec) -> int:
    """Device bytes that unpacking one of a layer's records takes (``unpacking.py``): the record, and temporary tensors.

    Scales become indices and factors of 4 bytes; E2M1 codes become indices and values of 4 bytes.
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
