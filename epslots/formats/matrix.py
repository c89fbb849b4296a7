"""A quantised matrix in the one layout that all formats map to (``layout.PackedForm``), and the packing of its codes.

The functions take tensors on the meta device as well, so that shapes and dtypes follow from nothing but a checkpoint's
headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from epslots.cache.unpacking import Parts, unpack
from epslots.layout import NIBBLE_COLUMNS, NIBBLES, PackedForm

# Dtypes of groups' scales; float8_e8m0fnu is kept as the bytes that it is.
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_NVFP4_COLUMNS = 16
_KINDS = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}


class StoredParts(dict[str, torch.Tensor]):
    """The tensors that a checkpoint has of one matrix, by the ends of their names.

    Attributes:
        where: path of the matrix's module.

    Raises:
        MissingPart: on access to a name that it lacks.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor], where: str = "") -> None:
        super().__init__(parts)
        self.where = where

    def __missing__(self, name: str) -> torch.Tensor:
        raise MissingPart(name)


class MissingPart(ValueError):
    """A checkpoint lacks a tensor of a quantised matrix.

    Attributes:
        name: the end of the tensor's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no {name}")
        self.name = name


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix, [rows, columns]: outputs by inputs.

    Attributes:
        form: its layout.
        parts: the form's tensors.
    """

    form: PackedForm
    parts: Parts

    def weights(self) -> torch.Tensor:
        """float32 [rows, columns]."""
        out = torch.empty(self.form.rows, self.form.columns, device=self.parts["codes"].device)
        unpack(self.form, self.parts, out)
        return out


def make_matrix(
    codes: torch.Tensor,
    kind: str | None = None,
    *,
    group: torch.Tensor | None = None,
    block: tuple[int, int] = (1, 1),
    zero: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
) -> Matrix:
    """A matrix of codes [rows, columns] and what scales them.

    Args:
        codes: float8_e4m3fn or int8; for ``kind`` int4 and e2m1 one code of four bits in each uint8.
        kind: None = by the codes' dtype.
        group: scales of blocks, [row blocks, column blocks].
        block: rows and columns of a block.
        zero: of blocks, integers from 0 to 16, in the shape of ``group``.
        row: scale of each row, or one for all; in uint8, exponents.
        perm: the input that each column reads, int [columns].

    Raises:
        ValueError: shapes or dtypes don't fit together.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {list(codes.shape)}, not that of a matrix")
    if kind is None:
        if codes.dtype not in _KINDS:
            raise ValueError(f"codes are {_name(codes.dtype)}; known are {', '.join(map(_name, _KINDS))}")
        kind = _KINDS[codes.dtype]
    rows, columns = codes.shape
    parts = {"codes": pack_nibbles(codes) if kind in NIBBLES else codes}
    if group is not None:
        group = group.view(torch.uint8) if group.dtype == torch.float8_e8m0fnu else group
        if group.dtype not in _SCALES:
            raise ValueError(f"scales are {_name(group.dtype)}; known are {', '.join(map(_name, _SCALES))} and float8_e8m0fnu")
        parts["group"] = group
    if zero is not None:
        parts["zero"] = zero.to(torch.uint8)
    if row is not None:
        row = (row.view(torch.float8_e8m0fnu) if row.dtype == torch.uint8 else row).float().reshape(-1)
        parts["row"] = row.expand(rows) if row.numel() == 1 else row
    if perm is not None:
        parts["perm"] = perm.int()
    dtype = None if group is None else _name(group.dtype)
    form = PackedForm(kind, rows, columns, dtype, block, zero is not None, row is not None, perm is not None)
    for name, (shape, _) in form.tensors.items():
        if parts[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(parts[name].shape)}, and a matrix of {rows} x {columns} has {list(shape)}"
            )
    return Matrix(form, parts)


def make_nvfp4(codes: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor) -> Matrix:
    """A matrix of E2M1 codes in groups of 16.

    Args:
        codes: one of four bits in each uint8, [rows, columns].
        scales: of groups, floats.
        whole: the scale of the matrix, by which the others are multiplied.

    Raises:
        ValueError: shapes or dtypes don't fit together.
    """
    if is_exponents(scales):
        raise ValueError(f"scales are {_name(scales.dtype)}, beside a scale of the matrix: known are floats")
    return make_matrix(codes, "e2m1", group=scales, row=whole, block=(1, _NVFP4_COLUMNS))


def join(matrices: Iterable[Matrix]) -> list[Matrix]:
    """Matrices whose rows follow each other, with neighbours made one where one form describes both."""
    joined: list[Matrix] = []
    for matrix in matrices:
        if joined and _alike(joined[-1].form, matrix.form):
            before = joined.pop()
            rows = before.form.rows + matrix.form.rows
            parts = {name: torch.cat([before.parts[name], matrix.parts[name]]) for name in matrix.parts}
            matrix = Matrix(_with_rows(matrix.form, rows), parts)
        joined.append(matrix)
    return joined


def _alike(first: PackedForm, second: PackedForm) -> bool:
    """Whether the rows of the second can follow those of the first in one form."""
    return not first.perm and _with_rows(first, second.rows) == second and not first.rows % first.block[0]


def _with_rows(form: PackedForm, rows: int) -> PackedForm:
    return PackedForm(form.kind, rows, form.columns, form.group, form.block, form.zero, form.row, form.perm)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits [rows, columns] as bytes [rows, columns / 2], columns padded to a multiple of 32.

    Columns j and j + 16 of each 32 share a byte: both halves of neighbouring bytes then meet neighbouring inputs.
    """
    rows, columns = codes.shape
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -columns % NIBBLE_COLUMNS))
    halves = codes.view(rows, codes.shape[1] // NIBBLE_COLUMNS, 2, NIBBLE_COLUMNS // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, codes.shape[1] // 2)


def split_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The codes of four bits in bytes [rows, n]: uint8 [rows, 2 n], low half first."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def split_words(packed: torch.Tensor, bits: int = 4, order: Iterable[int] | None = None) -> torch.Tensor:
    """The codes of ``bits`` bits in int32 words [rows, n]: uint8 [rows, n * 32 / bits].

    Args:
        order: which code of a word each column takes; by default from the lowest bits upwards.
    """
    places = torch.arange(32 // bits) if order is None else torch.tensor(tuple(order))
    shifts = (places * bits).to(torch.int32).to(packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def sort_columns(codes: torch.Tensor, groups: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns] with the columns of each group together, and the input that each column reads.

    Args:
        groups: the group of each column, int [columns].
        width: columns of a group.

    Raises:
        ValueError: groups have other numbers of columns.
    """
    if groups.shape != codes.shape[1:]:
        raise ValueError(f"g_idx has shape {list(groups.shape)} for {codes.shape[1]} inputs")
    perm = torch.argsort(groups, stable=True)
    check_columns(groups[perm], width)
    return codes.index_select(1, perm), perm


def check_columns(groups: torch.Tensor, width: int) -> None:
    """Refuse columns whose groups, int [columns], don't follow each other ``width`` by ``width``.

    Raises:
        ValueError: they don't. Unknown for headers alone.
    """
    if not groups.is_meta and not torch.equal(groups.long(), torch.arange(len(groups), device=groups.device) // width):
        raise ValueError(f"g_idx mixes groups, which needs desc_act=true; or its groups aren't of {width} inputs each")


def is_of_rows(scales: torch.Tensor, rows: int) -> bool:
    """Whether there is one scale for the whole matrix, or one for each row."""
    return scales.numel() == 1 or (scales.dtype != torch.uint8 and scales.shape in ((rows,), (rows, 1)))


def is_exponents(scales: torch.Tensor) -> bool:
    """Whether scales are exponents of two."""
    return scales.dtype in _EXPONENTS


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
