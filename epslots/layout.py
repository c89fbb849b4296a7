"""Layouts of experts in records and slots, shared by every part of epslots. The models package makes them.

expert      one FFN of one MoE layer, named by (layer, expert id)
record      an expert in the host store: its tensors as one contiguous, aligned run of bytes
slot        fixed device memory that holds one expert's record, byte for byte
packed      of a record: its matrices are stored as codes and scales, as a quantised checkpoint has them (``PackedForm``)
quota       number of slots that a layer has of its pool
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

# Records begin on pages of the host store's file.
PAGE = 4096
# Tensors inside a record start on this boundary: good for vector loads and DMA, and a multiple of the 16 bytes that grouped
# matrix multiplication requires of every stride.
TENSOR_ALIGNMENT = 256

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Dtypes of codes, scales and permutations in packed records; nothing is computed in them.
PACKED_ITEM_BYTES = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "int32": 4}
# Codes of 4 bits: those of the columns j and j + 16 of each 32 of a row share a byte, j in the low half.
NIBBLES = ("int4", "e2m1")
NIBBLE_COLUMNS = 32
# Weights that are unpacked at a time on the CPU: their codes and values stay in its second-level cache.
UNPACK_RUN = 1 << 17


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
    def stride(self) -> int:
        """Bytes from one record of a layer to the next in the host store: whole pages."""
        return align(self.nbytes, PAGE)

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return sum(math.prod(t.shape) for t in self.tensors)


class PackedForm(msgspec.Struct, frozen=True):
    """How the weights [rows, columns] of a matrix are stored; rows are its outputs, columns its inputs.

        weight = row * group * (code - zero), all in float32

    ``tensors`` has the shape and dtype of each part. All quantised formats map to these without loss.

    Attributes:
        kind: of the codes: ``e4m3`` (8-bit float), ``int8``, ``int4`` (0 to 15) or ``e2m1`` (4-bit float).
        rows, columns: of the matrix.
        group: dtype of the scales that blocks of weights share; ``uint8`` = exponents of two, biased by 127; None = no such
            scale.
        block: rows and columns that share a scale and a zero. The last block of each may be cut short.
        zero: whether blocks have a zero; int4 without one has 8.
        row: whether each row has a float32 scale.
        perm: whether the columns are permuted: column j reads input ``perm[j]`` (GPTQ's act order).
    """

    kind: str
    rows: int
    columns: int
    group: str | None = None
    block: tuple[int, int] = (1, 1)
    zero: bool = False
    row: bool = False
    perm: bool = False

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each tensor, by the name of its part: codes, group, zero, row, perm."""
        stored = align(self.columns, NIBBLE_COLUMNS) // 2 if self.kind in NIBBLES else self.columns
        dtype = {"e4m3": "float8_e4m3fn", "int8": "int8"}.get(self.kind, "uint8")
        grid = (-(-self.rows // self.block[0]), -(-self.columns // self.block[1]))
        found: dict[str, tuple[tuple[int, ...], str]] = {"codes": ((self.rows, stored), dtype)}
        if self.group is not None:
            found["group"] = (grid, self.group)
        if self.zero:
            found["zero"] = (grid, "uint8")
        if self.row:
            found["row"] = ((self.rows,), "float32")
        if self.perm:
            found["perm"] = ((self.columns,), "int32")
        return found

    def __str__(self) -> str:
        groups = "" if self.group is None else f" in blocks of {self.block[0]} x {self.block[1]}"
        return f"{self.kind}{groups}"


class PackedMatrix(msgspec.Struct, frozen=True):
    """A matrix of an expert that its record holds as codes and scales.

    Attributes:
        name: the experts module's parameter, such as ``gate_up_proj``.
        forms: of its rows, in order: one, or one for each matrix that was joined into it and stays apart.
        transposed: whether the parameter is [columns, rows].
    """

    name: str
    forms: tuple[PackedForm, ...]
    transposed: bool = False

    def tensor(self, form: int, part: str) -> str:
        """The name in the record of a part of a form."""
        return f"{self.name}.{form}.{part}"

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """The record's tensors in the parameter's stead: (name, shape, dtype)."""
        return [
            (self.tensor(number, part), *spec) for number, form in enumerate(self.forms) for part, spec in form.tensors.items()
        ]


class PackedLayout(msgspec.Struct, frozen=True):
    """The unpacked form of a packed record.

    Attributes:
        weights: the tensors that experts are computed with, by the module's names.
        matrices: those of them that are packed; the record has the others as they are.
    """

    weights: RecordLayout
    matrices: tuple[PackedMatrix, ...]


class LayerSpec(msgspec.Struct, frozen=True):
    """One MoE layer of a model.

    Attributes:
        name: the experts module's path in the model.
        layout: of a record, and so of a slot.
        packed: the unpacked form of a packed record; None = records hold the weights that are computed with.
    """

    name: str
    num_experts: int
    layout: RecordLayout
    packed: PackedLayout | None = None

    @property
    def weights(self) -> RecordLayout:
        """The tensors of one expert that are computed with."""
        return self.layout if self.packed is None else self.packed.weights


def unpacking_bytes(layer: LayerSpec) -> int:
    """Bytes that computing from a layer's packed slots takes beside them: one unpacked matrix, and runs of float32 values."""
    if layer.packed is None:
        return 0
    names = {matrix.name for matrix in layer.packed.matrices}
    largest = max(tensor.nbytes for tensor in layer.weights.tensors if tensor.name in names)
    columns = max(form.columns for matrix in layer.packed.matrices for form in matrix.forms)
    return largest + 3 * ITEM_BYTES["float32"] * max(UNPACK_RUN, align(columns, NIBBLE_COLUMNS))
