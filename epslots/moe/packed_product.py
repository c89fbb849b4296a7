"""Grouped products with packed matrices on the CPU: codes are read where they lie, at most a few bytes for a weight.

    weight = row * group * (code - zero), in float32

Products with one row or a few are as fast as codes are read and turned into floats; with more, unpack first (``is_faster``).
``unpacked`` is the twin in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from epslots.moe.code_kinds import (
    E2M1,
    E4M3,
    INT4,
    INT8,
    KINDS,
    NO_SCALE,
    RUN,
    SCALE_BFLOAT16,
    SCALE_E4M3,
    SCALE_E8M0,
    SCALE_FLOAT16,
    SCALE_FLOAT32,
)
from epslots.moe.vector_code import LANES
from epslots.moe.vector_gemm import SlotMatrices, compute

_KINDS = {"e4m3": E4M3, "int8": INT8, "int4": INT4, "e2m1": E2M1}
_SCALES = {
    torch.float32: SCALE_FLOAT32,
    torch.bfloat16: SCALE_BFLOAT16,
    torch.float16: SCALE_FLOAT16,
    torch.float8_e4m3fn: SCALE_E4M3,
    torch.uint8: SCALE_E8M0,
}
# Rows of a slot up to which codes are multiplied sooner than unpacked.
_MOST_ROWS = 4
# What every job of a kind points to: its factor and its middle; and the row scale of matrices that have none.
_CONSTANTS = {number: torch.tensor([kind.factor, kind.middle]) for number, kind in KINDS.items()}
_ONE = torch.ones(1)
# E2M1's numbers by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Codes(NamedTuple):
    """A packed matrix [M, K] of each of Q slots, as the tensors of a record hold it; slots may lie any bytes apart.

    Attributes:
        kind: "e4m3", "int8", "int4" (0 to 15) or "e2m1".
        codes: [Q, M, K], one byte each; nibbles: uint8 [Q, M, K' / 2], K' = K padded to 32, where columns j and j + 16 of
            each 32 share a byte, j in the low half.
        columns: K.
        group: [Q, block rows, block columns] float32, bfloat16, float16, float8_e4m3fn, or uint8: exponents of two, biased
            by 127.
        block: rows and columns that share a scale and a zero; the last block of each may be cut short.
        zero: uint8, in the shape of ``group``; int4 without it has 8.
        row: float32 [Q, M].
        perm: int32 [Q, K]: column j reads input ``perm[j]``.
    """

    kind: str
    codes: torch.Tensor
    columns: int
    group: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)
    zero: torch.Tensor | None = None
    row: torch.Tensor | None = None
    perm: torch.Tensor | None = None

    @property
    def blocks(self) -> tuple[int, int]:
        """Columns of a block, and how many blocks a row has."""
        if self.group is None and self.zero is None:
            return self.padded, 1
        width = min(self.block[1], self.padded) if self.block[1] >= self.columns else self.block[1]
        return (self.padded, 1) if width >= self.columns else (width, -(-self.columns // width))

    @property
    def padded(self) -> int:
        """Columns of the codes with their padding."""
        return 2 * self.codes.shape[2] if KINDS[_KINDS[self.kind]].nibbles else self.codes.shape[2]


def unpacked(matrix: Codes) -> torch.Tensor:
    """The weights, float32 [Q, M, K] in the order of the inputs."""
    codes = matrix.codes
    if matrix.kind in ("int4", "e2m1"):
        pairs = codes.unflatten(2, (-1, LANES))
        values = torch.stack((pairs & 15, pairs >> 4), 3).flatten(2).int()
        values = torch.tensor([*_E2M1, *(-v for v in _E2M1)])[values] if matrix.kind == "e2m1" else values.float()
    else:
        values = codes.float()
    values = values[:, :, : matrix.columns]
    rows = torch.arange(codes.shape[1]) // matrix.block[0]
    columns = torch.arange(matrix.columns) // matrix.block[1]
    if matrix.zero is not None:
        values = values - matrix.zero.float()[:, rows][:, :, columns]
    elif matrix.kind == "int4":
        values = values - KINDS[INT4].middle
    if matrix.group is not None:
        scales = matrix.group
        scales = torch.exp2(scales.double() - 127).float() if scales.dtype is torch.uint8 else scales.float()
        scales = scales[:, rows][:, :, columns]
        values = values * (scales if matrix.row is None else scales * matrix.row[:, :, None])
    elif matrix.row is not None:
        values = values * matrix.row[:, :, None]
    if matrix.perm is None:
        return values
    return torch.empty_like(values).scatter_(2, matrix.perm.long()[:, None].expand_as(values), values)


def fits(matrices: Sequence[Codes]) -> bool:
    """Whether products with a matrix, or with two that are joined by their rows, can be computed here."""
    if len(matrices) not in (1, 2) or any(one.codes.device.type != "cpu" or one.kind not in _KINDS for one in matrices):
        return False
    first = matrices[0]
    width, blocks = first.blocks
    outer = sum(one.codes.shape[1] for one in matrices)
    whole = outer % 2 == 0 and outer >= 2 * LANES and first.padded % RUN == 0 and (width % RUN == 0 or width == LANES)
    covered = blocks * width >= first.padded  # the padding too belongs to a block
    return whole and covered and all(_is_like(one, first) and _lies_well(one) for one in matrices)


def _is_like(one: Codes, other: Codes) -> bool:
    """Whether two matrices differ in nothing but numbers."""
    if (one.kind, one.block, one.columns) != (other.kind, other.block, other.columns) or one.perm is not other.perm:
        return False
    pairs = zip((one.codes, one.group, one.zero, one.row), (other.codes, other.group, other.zero, other.row), strict=True)
    return all(_facts(a) == _facts(b) for a, b in pairs)


def _facts(tensor: torch.Tensor | None) -> object:
    return tensor if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


def _lies_well(one: Codes) -> bool:
    tensors = [tensor for tensor in (one.codes, one.group, one.zero, one.row) if tensor is not None]
    return all(tensor[0].is_contiguous() for tensor in tensors) and (one.group is None or one.group.dtype in _SCALES)


def is_faster(rows: int, slots: int) -> bool:
    """Whether so many rows of so many slots are multiplied with codes sooner than with what they are unpacked to."""
    return rows <= _MOST_ROWS * slots


def product_of_codes(
    rows_NK: torch.Tensor,
    matrices: Sequence[Codes],
    ends_Q: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """``vector_gemm.product`` with packed matrices, in the rows' dtype.

    Args:
        rows_NK: bfloat16 or float32.
        matrices: one, or two that are joined by their rows, for which ``fits``; with a permutation, both have the same.
    """
    one = matrices[0]
    if one.perm is not None:
        rows_NK = rows_NK.gather(1, one.perm[_slots(ends_Q, len(rows_NK), len(one.codes))].long())
    inputs = torch.zeros(len(rows_NK), one.padded)
    inputs[:, : one.columns] = rows_NK
    return compute(inputs, _matrix(matrices), ends_Q, bias, activation, rows_NK.dtype)


def _slots(ends_Q: torch.Tensor | None, rows: int, slots: int) -> torch.Tensor:
    if ends_Q is None:
        return torch.zeros(rows, dtype=torch.int64)
    return torch.searchsorted(ends_Q, torch.arange(rows, dtype=torch.int32), right=True).clamp_(max=slots - 1)


def _matrix(matrices: Sequence[Codes]) -> SlotMatrices:
    first, last = matrices[0], matrices[-1]
    slots, rows, stored = first.codes.shape
    joined, kind = len(matrices) == 2, _KINDS[first.kind]
    pairs = rows if joined else rows // 2
    width, blocks = first.blocks
    fields = (
        *(kind, first.padded, blocks, max(RUN, width), int(width == LANES)),
        *(
            first.block[0],
            *((NO_SCALE, 0) if first.group is None else (_SCALES[first.group.dtype], first.group.element_size())),
        ),
        _CONSTANTS[kind].data_ptr(),
        *(_address(one.group) for one in (first, last)),
        *(_address(one.zero) for one in (first, last)),
        *(_address(_ONE if one.row is None else one.row) for one in (first, last)),
        *(0, 0 if joined else pairs),
        *(_slot_bytes(tensor) for tensor in (first.group, first.zero, first.row)),
    )
    far = last.codes.data_ptr() - first.codes.data_ptr() if joined else pairs * stored
    return SlotMatrices(
        slots, 2 * pairs, first.padded, first.codes.data_ptr(), first.codes.stride(0), stored, far, fields, 4 * 4 * blocks
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _slot_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0) * tensor.element_size()
