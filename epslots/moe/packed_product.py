"""Grouped products with packed matrices on the CPU. Codes are read where they lie, and unpacked a pair of rows after another.

    weight = round((code - zero) * (group * row))

Many rows have the bits that they have with unpacked slots (``vector_gemm.product``), unless columns are permuted: the same
loops multiply, and what they read is in a core's cache. For up to eight rows of bfloat16, codes become numbers in registers.
The sums of blocks are scaled then, if codes have 8 bits or if there is a row or two: only results are rounded.
``cache/unpacking.py`` is the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from epslots.cache.unpacking import PackedWeight, Parts
from epslots.layout import ITEM_BYTES, PACKED_ITEM_BYTES, PackedForm, align
from epslots.moe import code_kinds as kinds
from epslots.moe.code_kinds import KINDS, RUN
from epslots.moe.packed_tiles import tiled_rows
from epslots.moe.vector_code import LANES
from epslots.moe.vector_gemm import ReadyProduct, RowBytes, SlotMatrices, least_columns

_KINDS = {"e4m3": kinds.E4M3, "int8": kinds.INT8, "int4": kinds.INT4, "e2m1": kinds.E2M1}
_SCALES = {
    None: kinds.NO_SCALE,
    "float32": kinds.SCALE_FLOAT32,
    "bfloat16": kinds.SCALE_BFLOAT16,
    "float16": kinds.SCALE_FLOAT16,
    "float8_e4m3fn": kinds.SCALE_E4M3,
    "uint8": kinds.SCALE_E8M0,
}
# Constants that every job of a kind points to: its factor and its middle; and the row scale of matrices that have none.
_CONSTANTS = {
    number: torch.tensor([kind.factor, kind.middle], dtype=torch.float32, device="cpu") for number, kind in KINDS.items()
}
_ONE = torch.ones(1, dtype=torch.float32, device="cpu")
_ACTIVATED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}


def suits(forms: Sequence[PackedForm], dtype: torch.dtype) -> bool:
    """Whether products with a matrix of these forms can be computed here, in ``dtype``."""
    least = least_columns(dtype)
    return least is not None and all(form.columns >= least and _suits(form) for form in forms)


def _suits(form: PackedForm) -> bool:
    width, blocks = _blocks(form)
    whole = form.rows % 2 == 0 and form.rows >= 2 * LANES and (width % RUN == 0 or width == LANES)
    known = form.kind in _KINDS and form.group in _SCALES
    return known and whole and blocks * width >= _padded_columns(form)  # the padding, too, belongs to a block


def _padded_columns(form: PackedForm) -> int:
    """Columns of unpacked rows: whole runs. Codes of 4 bits are stored so, too."""
    return align(form.columns, RUN)


def _blocks(form: PackedForm) -> tuple[int, int]:
    """Columns of a block, and how many blocks a row has."""
    if (form.group is None and not form.zero) or form.block[1] >= form.columns:
        return _padded_columns(form), 1
    return form.block[1], -(-form.columns // form.block[1])


class _Piece(NamedTuple):
    """A form of a matrix, or two that are joined by their rows."""

    matrices: SlotMatrices
    weights: RowBytes
    perm: torch.Tensor | None

    def ready(self, dtype: torch.dtype, bias: torch.Tensor | None, activation: str | None) -> _ReadyPiece:
        return _ReadyPiece(ReadyProduct(dtype, self.matrices, self.weights, bias, activation), self.perm, self.matrices.slots)


class _ReadyPiece(NamedTuple):
    product: ReadyProduct
    perm: torch.Tensor | None
    slots: int

    def __call__(self, rows_NK: torch.Tensor, ends_Q: torch.Tensor | None) -> torch.Tensor:
        if self.perm is not None:
            rows_NK = rows_NK.gather(1, self.perm[_slots(ends_Q, len(rows_NK), self.slots)].long())
        return self.product(rows_NK, ends_Q)


class PackedProduct:
    """``vector_gemm.product`` with one packed matrix of several slots.

    Args:
        weight: on the CPU, or without memory; its forms ``suits`` its dtype.
        bias, activation: as of ``vector_gemm.ready_product``.
        exact: whether a slot's few rows, too, are multiplied with rounded weights, as many are.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self._held = weight, bias
        pieces = list(_pieces(weight, exact=exact))
        self._activation = activation if len(pieces) > 1 else None
        self._pieces, first = [], 0
        for piece in pieces:
            end = first + piece.matrices.outer
            own = None if bias is None else bias[:, first:end]
            self._pieces.append(piece.ready(weight.dtype, own, activation if len(pieces) == 1 else None))
            first = end

    @property
    def whole(self) -> ReadyProduct | None:
        """The product, if it is one."""
        piece = self._pieces[0]
        return piece.product if len(self._pieces) == 1 and piece.perm is None else None

    def __call__(self, rows_NK: torch.Tensor, ends_Q: torch.Tensor | None = None) -> torch.Tensor:
        """The product for rows of the weight's dtype, sorted by slot; those of slot q end at ``ends_Q[q]``."""
        if len(self._pieces) == 1:
            return self._pieces[0](rows_NK, ends_Q)
        result = torch.cat([piece(rows_NK, ends_Q) for piece in self._pieces], 1)
        if self._activation is None:
            return result
        gate, up = result.chunk(2, 1)
        return _ACTIVATED[self._activation](gate) * up


def _slots(ends_Q: torch.Tensor | None, rows: int, slots: int) -> torch.Tensor:
    """The slot of each row; of rows past the last end, any."""
    if ends_Q is None:
        return torch.zeros(rows, dtype=torch.int64, device="cpu")
    number_N = torch.arange(rows, dtype=torch.int32, device="cpu")
    return torch.searchsorted(ends_Q, number_N, right=True).clamp_(max=slots - 1)


def _pieces(weight: PackedWeight, *, exact: bool) -> Iterator[_Piece]:
    forms, parts = weight.matrix.forms, weight.parts
    if len(forms) == 2 and forms[0] == forms[1] and not forms[0].perm:
        yield _piece(forms[0], parts, weight.dtype, exact=exact)
        return
    for form, own in zip(forms, parts, strict=True):
        yield _piece(form, [own], weight.dtype, exact=exact)


def _piece(form: PackedForm, parts: Sequence[Parts], dtype: torch.dtype, *, exact: bool) -> _Piece:
    """The halves of a matrix: two forms that are alike, or both halves of one form's rows."""
    first, last = parts[0], parts[-1]
    codes, kind, joined = first["codes"], _KINDS[form.kind], len(parts) == 2
    assert all(part[0].is_contiguous() for own in parts for part in own.values()), "tensors of a record"
    pairs = form.rows if joined else form.rows // 2
    (width, blocks), padded = _blocks(form), _padded_columns(form)
    row_bytes = codes.shape[2]
    far = last["codes"].data_ptr() - codes.data_ptr() if joined else pairs * row_bytes
    tiles = dtype is torch.bfloat16 and padded == form.columns and not exact
    fields = (
        *(
            kind,
            tiled_rows(kind) if tiles else 0,
            row_bytes,
            far,
            padded,
            blocks,
            max(RUN, width),
            int(width == LANES),
            form.block[0],
        ),
        *(_SCALES[form.group], 0 if form.group is None else _item_bytes(form.group), _CONSTANTS[kind].data_ptr()),
        *(_address(own.get("group")) for own in (first, last)),
        *(_address(own.get("zero")) for own in (first, last)),
        *(_address(own.get("row", _ONE)) for own in (first, last)),
        *(0, 0 if joined else pairs),
        *(_slot_bytes(first.get(name)) for name in ("group", "zero", "row")),
    )
    unpacked = padded * dtype.itemsize
    return _Piece(
        SlotMatrices(len(codes), 2 * pairs, form.columns, codes.data_ptr(), codes.stride(0), fields, 4 * 4 * blocks),
        RowBytes(2 * unpacked, unpacked, 2 * unpacked),
        first.get("perm"),
    )


def _item_bytes(dtype: str) -> int:
    return ITEM_BYTES.get(dtype) or PACKED_ITEM_BYTES[dtype]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _slot_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0) * tensor.element_size()
