"""Unpacking: records that cross the link as a quantised checkpoint stores them, and their slots' weights.

A packed record (``layout.PackedLayout``) is half to a quarter of its slot: 8-bit floats with a scale per block of them
(DeepSeek's FP8 checkpoints), or 4-bit floats, E2M1 (gpt-oss' MXFP4). It is unpacked on the slot's device, to the same bits as
transformers' own dequantisation:

    weight = round(float32(code) * float32(scale))

(A scale with exponent 255, which is no number in the MX formats, makes its block infinite.) On CUDA the bytes cross as they
are, and a few kernels on the copy's stream write the slot. The CPU converts 8-bit floats one by one; so it looks up two of
them at a time instead, and works on parts that fit its cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from epslots.layout import ITEM_BYTES, LayerSpec, PackedPart, RecordLayout

# Weights that the CPU unpacks at a time: their codes, indices and values stay in its second-level cache.
CPU_RUN = 1 << 18
# E2M1, by code: sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def record_views(record: torch.Tensor, layout: RecordLayout) -> dict[str, torch.Tensor]:
    """The tensors inside a record or a slot, uint8 [layout.nbytes], sharing its memory."""
    return {t.name: record[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape) for t in layout.tensors}


class SlotWriter:
    """Writes a layer's records to slots: a ``WriteSlot``. Safe to use from several threads.

    Args:
        layer: has the layouts of its records and slots.
        by_table: whether codes are looked up instead of converted; by default on the CPU.
    """

    def __init__(self, layer: LayerSpec, *, by_table: bool | None = None) -> None:
        self.layout = layer.layout
        self.packed = layer.packed
        self._by_table = by_table

    def __call__(self, slot: torch.Tensor, record: torch.Tensor) -> None:
        """Write a slot. On a GPU, kernels and temporary memory belong to the current stream.

        Args:
            slot: uint8 [layout.nbytes] on any device. Unpacked records overwrite the padding between its tensors.
            record: uint8 [record bytes], on the same device or on the host. For a GPU it must be pinned, and stay unchanged
                until the copy has ended.
        """
        if self.packed is None:
            slot.copy_(record, non_blocking=True)
            return
        record = record.to(slot.device, non_blocking=True)
        into, out_of = record_views(slot, self.layout), record_views(record, self.packed.record)
        for name in into.keys() & out_of.keys():
            into[name].copy_(out_of[name])
        for part in self.packed.parts:
            target = into[part.target][part.first_row : part.first_row + part.rows]
            self._unpack(target, out_of[part.codes], _factors(out_of[part.scales]), part)

    def _unpack(self, target: torch.Tensor, codes: torch.Tensor, factors: torch.Tensor, part: PackedPart) -> None:
        by_table = codes.device.type == "cpu" if self._by_table is None else self._by_table
        block_rows, block_columns = part.block
        if codes.dtype == torch.uint8:
            # Even and odd rows apart: each has half of a block's rows, and the same scales.
            for turn, table in enumerate(_half_tables(codes.device)):
                for rows in _runs(codes, block_rows // 2):
                    values = table.index_select(0, codes[rows].int().view(-1)).view(codes[rows].shape)
                    _scale(target[turn::2], rows, values, factors, (block_rows // 2, block_columns))
            return
        for rows in _runs(codes, block_rows):
            values = _look_up(codes[rows]) if by_table else target[rows].copy_(codes[rows])
            _scale(target, rows, values, factors, part.block)

    def same(self, slot: torch.Tensor, record: torch.Tensor) -> bool:
        """Whether a slot holds the weights of a record on the host, bit for bit."""
        if self.packed is None:
            return torch.equal(slot.cpu(), record)
        expected = torch.empty(self.layout.nbytes, dtype=torch.uint8)
        self(expected, record)
        held = slot.cpu()
        return all(torch.equal(*(x[t.offset : t.offset + t.nbytes] for x in (held, expected))) for t in self.layout.tensors)


def _runs(codes: torch.Tensor, block_rows: int) -> Iterator[slice]:
    """Runs of whole blocks of rows: one run on a GPU, runs that fit the cache on the CPU."""
    rows, columns = codes.shape
    step = rows if codes.device.type != "cpu" else max(1, CPU_RUN // (columns * block_rows)) * block_rows
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _scale(target: torch.Tensor, rows: slice, values: torch.Tensor, factors: torch.Tensor, block: tuple[int, int]) -> None:
    """Write ``values`` times their blocks' factors to these rows of ``target``. Rows begin with a block.

    The product is in float32: the factors are, and narrower values are promoted.
    """
    block_rows, block_columns = block
    for row_span, height in _spans(rows.start, rows.stop, block_rows):
        inner = slice(row_span.start - rows.start, row_span.stop - rows.start)
        grid_rows = slice(row_span.start // block_rows, -(-row_span.stop // block_rows))
        for column_span, width in _spans(0, target.shape[1], block_columns):
            grid_columns = slice(column_span.start // block_columns, -(-column_span.stop // block_columns))
            blocks, sizes = ((-1, height), (-1, width)), (row_span, column_span)
            torch.mul(
                values[inner, column_span].unflatten(1, blocks[1]).unflatten(0, blocks[0]),
                factors[grid_rows, grid_columns][:, None, :, None],
                out=target[sizes].unflatten(1, blocks[1]).unflatten(0, blocks[0]),
            )


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[slice, int]]:
    """(span, block size) of a range's whole blocks, and of a shorter last one."""
    whole = start + (stop - start) // size * size
    if whole > start:
        yield slice(start, whole), size
    if stop > whole:
        yield slice(whole, stop), stop - whole


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32."""
    if scales.element_size() > 1:
        return scales.float()
    table = _exponents(scales.dtype, scales.device)
    return table.index_select(0, scales.view(torch.uint8).int().view(-1)).view(scales.shape)


def _look_up(codes: torch.Tensor) -> torch.Tensor:
    """8-bit floats [rows, columns] as float32: two at a time, if the rows are even."""
    if codes.shape[1] % 2:
        return codes.float()
    pairs = codes.view(torch.uint16).int().view(-1)
    return _pair_table(codes.dtype, codes.device).index_select(0, pairs).view(torch.float32).view(codes.shape)


@functools.cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The float32 values of every two neighbouring codes, side by side as int64 [65536]."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    both = torch.arange(1 << 16)
    return torch.stack([values[both & 255], values[both >> 8]], dim=1).view(torch.int64).view(-1).to(device)


@functools.cache
def _half_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The E2M1 values of each byte's low half and high half, float32 [256] each."""
    values, byte = torch.tensor(_E2M1), torch.arange(256)
    return values[byte & 15].to(device), values[byte >> 4].to(device)


@functools.cache
def _exponents(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The value of each 8-bit scale, float32 [256]."""
    codes = torch.arange(256, dtype=torch.uint8)
    if dtype == torch.uint8:
        return torch.pow(2.0, codes.int() - 127).to(device)
    return codes.view(dtype).float().to(device)


def assert_consistent(layer: LayerSpec) -> None:
    """Assert that a packed record yields every tensor of the layer's slots exactly once.

    Raises:
        AssertionError: the layout is wrong. It is a bug of ours.
    """
    if layer.packed is None:
        return
    tensors = {t.name: t for t in layer.packed.record.tensors}
    for spec in layer.layout.tensors:
        parts = sorted((p for p in layer.packed.parts if p.target == spec.name), key=lambda p: p.first_row)
        if not parts:
            assert tensors[spec.name].shape == spec.shape and tensors[spec.name].dtype == spec.dtype, spec.name
            continue
        assert spec.name not in tensors and ITEM_BYTES[spec.dtype] <= 4, f"{spec.name}: products are rounded to float32"
        ends = [0, *(p.first_row + p.rows for p in parts)]
        assert ends[-1] == spec.shape[0] and [p.first_row for p in parts] == ends[:-1], f"{spec.name}: rows are missing"
        for part in parts:
            codes, (rows, columns) = tensors[part.codes], part.block
            halves = 2 if codes.dtype == "uint8" else 1
            assert codes.shape == (part.rows // halves, spec.shape[1]) and part.rows % halves == rows % halves == 0, part
            assert tensors[part.scales].shape == (-(-part.rows // rows), -(-spec.shape[1] // columns)), part
