"""Unpacking: the weights that a packed record stands for. The reference of every kernel that computes from packed slots.

    weight = round((row * group) * (code - zero)), all factors and products in float32

``layout.PackedForm`` says which of them a matrix has. ``unpack`` writes one matrix; ``PackedWeight`` is a packed matrix of
several slots, whose tensors are views of the slots' memory. On the CPU, rows are unpacked in runs that fit its cache, into
memory that each thread keeps, by compiled loops (``unpack_loops.py``).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from epslots.cache.unpack_loops import LANES, SCALE
from epslots.layout import NIBBLE_COLUMNS, NIBBLES, UNPACK_RUN, LayerSpec, PackedForm, PackedMatrix, RecordLayout, align

_THREAD = threading.local()
# Half of the columns that share bytes.
_HALF = NIBBLE_COLUMNS // 2
# The zero point of int4 codes without zeros.
_MIDDLE = 8.0
# E2M1's bits, moved into those of a float16, stand for the value over this.
_E2M1_SCALE = 2.0**14

Parts = Mapping[str, torch.Tensor]
"""The tensors of a form by the name of their part: codes, group, zero, row, perm."""


def record_views(record: torch.Tensor, layout: RecordLayout) -> dict[str, torch.Tensor]:
    """The tensors inside a record or a slot, uint8 [layout.nbytes], sharing its memory."""
    return {t.name: record[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape) for t in layout.tensors}


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix of Q slots: its forms, and their tensors in the slots' memory.

    Attributes:
        matrix: name, forms and orientation.
        parts: of each form, tensors [Q, ...] by part.
        dtype: to compute in.
        device: of the slots.
        shape: [Q, inputs, outputs].
    """

    matrix: PackedMatrix
    parts: tuple[Parts, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, matrix: PackedMatrix, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PackedWeight:
        """The matrix in a record's tensors, [Q, ...] each, by name."""
        parts = tuple(
            {part: tensors[matrix.tensor(number, part)] for part in form.tensors} for number, form in enumerate(matrix.forms)
        )
        return cls(matrix, parts, dtype)

    @property
    def device(self) -> torch.device:
        return self.parts[0]["codes"].device

    @property
    def shape(self) -> tuple[int, int, int]:
        forms = self.matrix.forms
        return len(self.parts[0]["codes"]), forms[0].columns, sum(form.rows for form in forms)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All parts, [Q, ...] each."""
        return [tensor for own in self.parts for tensor in own.values()]

    def unpack(self, slot: int) -> torch.Tensor:
        """One slot's weights [inputs, outputs], in memory of this thread that the next call overwrites."""
        _, columns, rows = self.shape
        out = _kept("weights", rows * columns, self.dtype, self.device).view(rows, columns)
        self.unpack_into(slot, out)
        return out.t()

    def unpack_into(self, slot: int, out: torch.Tensor) -> None:
        """Write one slot's weights to ``out`` [outputs, inputs], of any strides."""
        first = 0
        for form, parts in zip(self.matrix.forms, self.parts, strict=True):
            unpack(form, {name: tensor[slot] for name, tensor in parts.items()}, out[first : first + form.rows])
            first += form.rows


Weight = torch.Tensor | PackedWeight
"""[Q, inputs, outputs], or transposed if the module's are."""


def weights_of(layer: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, Weight]:
    """The weights of experts by the module's parameter names, from the tensors [Q, ...] of Q slots by name."""
    packed = {} if layer.packed is None else {matrix.name: matrix for matrix in layer.packed.matrices}
    return {
        spec.name: PackedWeight.of(packed[spec.name], tensors, getattr(torch, spec.dtype))
        if spec.name in packed
        else tensors[spec.name]
        for spec in layer.weights.tensors
    }


def unpack(form: PackedForm, parts: Parts, out: torch.Tensor, *, loops: bool = True) -> None:
    """Write a matrix's weights to ``out`` [rows, columns], a float of up to 32 bits; all tensors on one device.

    Args:
        loops: whether to use the compiled loops where they can be used: to the same bits.
    """
    loops = loops and parts["codes"].device.type == "cpu" and _suits_loops(form)
    scale, zero = _grids(form, parts)
    for rows, values in (_by_loops if loops else _by_operations)(form, parts["codes"], scale, zero):
        values = values[:, : form.columns]
        if form.perm:
            out[rows].index_copy_(1, parts["perm"].long(), values.to(out.dtype))
        else:
            out[rows].copy_(values)


def _grids(form: PackedForm, parts: Parts) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scales, all factors in one, and zeros of each row's blocks: float32 [rows, blocks] each; None if there are none."""
    rows_of = functools.partial(_rows_of_blocks, form)
    scale = None if form.group is None else rows_of(_factors(parts["group"]))
    if form.row:
        row = parts["row"][:, None]
        scale = row if scale is None else scale * row
    return scale, rows_of(parts["zero"].float()) if form.zero else None


def _rows_of_blocks(form: PackedForm, grid: torch.Tensor) -> torch.Tensor:
    """A grid of blocks [row blocks, blocks] for each row of the matrix."""
    return grid if form.block[0] == 1 else grid.repeat_interleave(form.block[0], 0)[: form.rows]


def unpack_record(layer: LayerSpec, record: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of one expert, by the module's names and in its orientation, from its record, uint8 [layout.nbytes]."""
    one, found = {name: tensor[None] for name, tensor in record_views(record, layer.layout).items()}, {}
    for name, weight in weights_of(layer, one).items():
        if isinstance(weight, torch.Tensor):
            found[name] = weight[0]
            continue
        _, columns, rows = weight.shape
        whole = torch.empty(
            (columns, rows) if weight.matrix.transposed else (rows, columns), dtype=weight.dtype, device=record.device
        )
        weight.unpack_into(0, whole.t() if weight.matrix.transposed else whole)
        found[name] = whole
    return found


def _runs(codes: torch.Tensor, form: PackedForm) -> Iterator[slice]:
    """Runs of rows: one run on a GPU, runs that fit the cache on the CPU."""
    step = max(1, UNPACK_RUN // form.columns) if codes.device.type == "cpu" else form.rows
    for first in range(0, form.rows, step):
        yield slice(first, min(first + step, form.rows))


Runs = Iterator[tuple[slice, torch.Tensor]]
"""Rows of a matrix, and their weights: float32 [rows, >= columns], in memory of this thread that the next run overwrites."""


def _suits_loops(form: PackedForm) -> bool:
    """Whether the loops know the blocks: the whole row, or a multiple of their lanes that covers padded columns as well."""
    if form.group is None and not form.zero:
        return True
    width, blocks = form.block[1], -(-form.columns // form.block[1])
    return blocks == 1 or (width % LANES == 0 and blocks * width >= _stored_columns(form))


def _stored_columns(form: PackedForm) -> int:
    return align(form.columns, NIBBLE_COLUMNS) if form.kind in NIBBLES else form.columns


def _by_loops(form: PackedForm, codes: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> Runs:
    columns = _stored_columns(form)
    blocks = max([1, *(grid.shape[1] for grid in (scale, zero) if grid is not None)])
    scale = torch.ones(form.rows, 1, dtype=torch.float32, device="cpu") if scale is None else scale
    zero = torch.full((form.rows, 1), _MIDDLE, dtype=torch.float32, device="cpu") if zero is None else zero
    scales, zeros = (grid.expand(form.rows, blocks).contiguous().numpy() for grid in (scale, zero))
    width = columns if blocks == 1 else form.block[1]
    stored, scale_rows = codes.contiguous().view(torch.uint8).numpy(), SCALE[form.kind]
    for rows in _runs(codes, form):
        values = _kept("values", (rows.stop - rows.start) * columns, torch.float32, codes.device).view(-1, columns)
        scale_rows(stored[rows], scales[rows], zeros[rows], width, values.numpy())
        yield rows, values


def _by_operations(form: PackedForm, codes: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> Runs:
    """``unpack`` by torch's operations, on any device and for any blocks."""
    for rows in _runs(codes, form):
        values = _values(form, codes[rows])
        if zero is not None:
            _by_block(torch.Tensor.sub_, values, zero[rows], form)
        elif form.kind == "int4":
            values -= _MIDDLE
        if scale is not None:
            _by_block(torch.Tensor.mul_, values, scale[rows], form)
        yield rows, values


def _by_block(operation: Callable[..., object], values: torch.Tensor, grid: torch.Tensor, form: PackedForm) -> None:
    """Apply an in-place operation to values [rows, >= columns] and their blocks' numbers [rows, blocks, or 1]."""
    width = form.columns if grid.shape[1] == 1 else form.block[1]
    whole = form.columns // width * width
    if whole:
        operation(values[:, :whole].unflatten(1, (-1, width)), grid[:, : whole // width, None])
    if whole < form.columns:
        operation(values[:, whole : form.columns], grid[:, -1:])


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """Blocks' scales as float32."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return _exponents(scales.device).index_select(0, scales.reshape(-1).int()).view(scales.shape)


def _values(form: PackedForm, codes: torch.Tensor) -> torch.Tensor:
    """Codes of some rows as float32, in memory of this thread; columns of nibbles are padded."""
    rows, columns = len(codes), _stored_columns(form)
    values = _kept("values", rows * columns, torch.float32, codes.device).view(rows, columns)
    if form.kind not in NIBBLES:
        return values.copy_(codes)
    halves = values.view(rows, columns // NIBBLE_COLUMNS, 2, _HALF)
    pairs = codes.view(rows, columns // NIBBLE_COLUMNS, _HALF)
    if form.kind == "int4":
        halves[:, :, 0].copy_(pairs & 15)
        halves[:, :, 1].copy_(pairs >> 4)
        return values
    bits = pairs.short()
    for half, shift in enumerate((0, 4)):
        code = bits >> shift
        moved = ((code & 8) << 12) | ((code & 7) << 9)
        halves[:, :, half].copy_(moved.view(torch.float16))
    return values.mul_(_E2M1_SCALE)


@functools.cache
def _exponents(device: torch.device) -> torch.Tensor:
    """The value of each exponent of two, float32 [256]; the last is NaN (OCP's microscaling formats)."""
    values = torch.exp2(torch.arange(256, dtype=torch.float64, device="cpu") - 127).float()
    values[255] = torch.nan
    return values.to(device)


def _kept(name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """This thread's memory for ``size`` elements: new memory each time would cost as much as unpacking."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    kept: dict[tuple[str, torch.dtype], torch.Tensor] = _THREAD.__dict__.setdefault("kept", {})
    held = kept.get((name, dtype))
    if held is None or len(held) < size:
        held = kept[name, dtype] = torch.empty(size, dtype=dtype, device=device)
    return held[:size]


def assert_consistent(layer: LayerSpec) -> None:
    """Assert that a packed record yields every tensor that is computed with exactly once.

    Raises:
        AssertionError: the layout is wrong. It is a bug of ours.
    """
    if layer.packed is None:
        return
    held = {t.name: (t.shape, t.dtype) for t in layer.layout.tensors}
    matrices = {matrix.name: matrix for matrix in layer.packed.matrices}
    for spec in layer.weights.tensors:
        matrix = matrices.pop(spec.name, None)
        if matrix is None:
            assert held.pop(spec.name, None) == (spec.shape, spec.dtype), spec.name
            continue
        shape = spec.shape[::-1] if matrix.transposed else spec.shape
        assert shape == (sum(form.rows for form in matrix.forms), matrix.forms[0].columns), spec.name
        assert len({form.columns for form in matrix.forms}) == 1, spec.name
        for name, *tensor in matrix.tensors:
            assert held.pop(name, None) == tuple(tensor), name
    assert not held and not matrices, f"{layer.name}: {held} {matrices}"
