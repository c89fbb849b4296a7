"""The quantised formats of checkpoints that can be read, as one table; and how their experts stay packed.

transformers dequantises by operations on whole parameters (``expert_reader.py``). The known formats can be unpacked on the
device instead, by ``unpacking.py``, so that records stay packed until they are in a slot:

    FP8      DeepSeek's blocks: matrices [rows, columns] of one expert each, 8-bit floats with one scale for a block, joined
             by their rows (gate and up)
    MXFP4    gpt-oss': all experts in one tensor, 4-bit floats, 32 of a row sharing an exponent; transposed in the model

All other operations (transposing, interleaving, mixing experts) run when the host store is built. A further format is one
entry in ``FORMATS``; codes of a new kind need ``unpacking.py`` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from epslots.errors import CheckpointError
from epslots.layout import PackedLayout, PackedPart, RecordLayout, TensorSpec
from epslots.models.checkpoint import FLOATS, TensorHeader
from epslots.models.conversions import TensorSource

# safetensors' names of the dtypes that stay packed, and torch's.
_FP8_CODES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_FP8_SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E8M0": "float8_e8m0fnu", "U8": "uint8"}
# Products of code and scale are rounded to float32 first: wider slots would show it.
_SLOT_DTYPES = ("float32", "bfloat16", "float16")
# MXFP4: weights that share an exponent, and bytes that hold them.
_MX_BLOCK, _MX_BYTES = 32, 16

ReadPattern = Callable[[str], torch.Tensor]
"""Returns one expert's own tensor of a source pattern, or its slice [1, ...] of a fused one."""


@dataclass(frozen=True)
class PackedTensor:
    """How one tensor of a layer's slots is packed.

    Attributes:
        tensors: the record's tensors in its stead: (name, shape, dtype).
        parts: the rows of the slot's tensor that these are unpacked into.
        read: returns one expert's tensors by name.
    """

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    parts: tuple[PackedPart, ...]
    read: Callable[[ReadPattern], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class QuantisedFormat:
    """One quantised format.

    Attributes:
        method: ``quant_method`` in config.json's quantization_config.
        operation: transformers' operation that dequantises it.
        scales: the end of the source patterns of its scales.
        optional: ends of source patterns that a checkpoint may lack.
        pack: called by ``find_packing`` with its arguments where the conversion begins with ``operation``.
    """

    method: str
    operation: type
    scales: str
    optional: tuple[str, ...]
    pack: Callable[[TensorSpec, TensorSource, Mapping[str, TensorHeader], int], PackedTensor | None]


def find_packing(
    spec: TensorSpec, source: TensorSource, headers: Mapping[str, TensorHeader], num_experts: int
) -> PackedTensor | None:
    """How a tensor of a layer's slots can stay packed; None if it can't, or isn't quantised.

    Args:
        spec: the slots' tensor.
        source: the checkpoint's keys that it is made from.
        headers: of the checkpoint's tensors.
        num_experts: of the layer.
    """
    converter = source.converter
    if converter is None or spec.dtype not in _SLOT_DTYPES or len(spec.shape) != 2:
        return None
    if len(converter.target_patterns) != 1 or not converter.operations:  # several: experts are dealt out to them
        return None
    packs = (format.pack for format in FORMATS if isinstance(converter.operations[0], format.operation))
    return next((pack(spec, source, headers, num_experts) for pack in packs), None)


def check_packing(source: TensorSource, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse packed tensors that nothing unpacks, or without scales, and scales of unpacked tensors.

    Args:
        source: a tensor of the model, and the checkpoint's keys that it is made from.
        headers: of the checkpoint's tensors.

    Raises:
        CheckpointError: naming the tensor.
    """
    converter, keys = source.converter, source.keys
    scales = [pattern for pattern in keys if pattern.endswith(_SCALES)]
    stored = [key for pattern, listed in keys.items() if not pattern.endswith((*_SCALES, *OPTIONAL)) for key in listed]
    packed = [key for key in stored if headers[key].dtype not in FLOATS]
    operations = tuple(format.operation for format in FORMATS)
    if converter is None or not any(isinstance(operation, operations) for operation in converter.operations):
        if packed:
            raise CheckpointError(
                f"{packed[0]} is stored as {headers[packed[0]].dtype}, and config.json has no quantization_config by which it "
                f"is unpacked: its codes would be taken for weights"
            )
        return
    absent = [p for p in converter.source_patterns if p.endswith(_SCALES) and p not in keys]
    if packed and absent:
        raise CheckpointError(
            f"{source.target}: the checkpoint has no tensor like {absent[0]}, and {packed[0]} is stored as "
            f"{headers[packed[0]].dtype}"
        )
    if scales and len(packed) < len(stored):
        plain = next(key for key in stored if headers[key].dtype in FLOATS)
        raise CheckpointError(
            f"{keys[scales[0]][0]} is a scale, but {plain} is stored as {headers[plain].dtype}, which needs none"
        )


def packed_layout(layout: RecordLayout, packings: Mapping[str, PackedTensor]) -> PackedLayout | None:
    """The layout of records in which these tensors of the slots are packed; None if none is."""
    if not packings:
        return None
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    for spec in layout.tensors:
        packing = packings.get(spec.name)
        tensors += [(spec.name, spec.shape, spec.dtype)] if packing is None else packing.tensors
    return PackedLayout(RecordLayout.of(tensors), tuple(part for packing in packings.values() for part in packing.parts))


def _pack_fp8(
    spec: TensorSpec, source: TensorSource, headers: Mapping[str, TensorHeader], num_experts: int
) -> PackedTensor | None:
    assert source.converter is not None
    operation, *rest = source.converter.operations
    if not _joins_rows(rest):
        return None
    found = {p: [headers[key] for key in source.keys[p]] for p in source.converter.source_patterns if p in source.keys}
    matrices = [p for p in found if not p.endswith(("weight_scale_inv", "activation_scale"))]
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    parts, names, row = [], [], 0
    for number, pattern in enumerate(matrices):
        scales_pattern = f"{pattern}_scale_inv"
        codes, scales = _alike(found[pattern], num_experts), _alike(found.get(scales_pattern, ()), num_experts)
        if "*" not in pattern or codes is None or scales is None:
            return None
        if codes.dtype not in _FP8_CODES or scales.dtype not in _FP8_SCALES or len(codes.shape) != 2:
            return None
        block = _block_of(codes.shape, scales.shape, operation)
        if block is None or codes.shape[1] != spec.shape[1]:
            return None
        of_codes, of_scales = f"{spec.name}.{number}.codes", f"{spec.name}.{number}.scales"
        tensors.append((of_codes, codes.shape, _FP8_CODES[codes.dtype]))
        tensors.append((of_scales, scales.shape, _FP8_SCALES[scales.dtype]))
        parts.append(PackedPart(spec.name, row, codes.shape[0], of_codes, of_scales, block))
        names += [(of_codes, pattern), (of_scales, scales_pattern)]
        row += codes.shape[0]
    if row != spec.shape[0]:
        return None
    return PackedTensor(tuple(tensors), tuple(parts), lambda read: {name: read(pattern) for name, pattern in names})


def _joins_rows(operations: Sequence[Any]) -> bool:
    """Whether these operations stack one matrix per expert, and join at most their rows."""
    if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return False
    joins = operations[1:]
    return not joins or (
        len(joins) == 1
        and type(joins[0]) is Concatenate
        and joins[0].dim == 1
        and getattr(joins[0], "num_shards_attribute", None) is None
    )


def _alike(headers: Iterable[TensorHeader], num_experts: int) -> TensorHeader | None:
    """The one header of all experts' tensors; None if they differ, or an expert has none."""
    listed = list(headers)
    kinds = {(header.shape, header.dtype) for header in listed}
    return listed[0] if len(kinds) == 1 and len(listed) == num_experts else None


def _block_of(shape: tuple[int, ...], grid: tuple[int, ...], operation: Fp8Dequantize) -> tuple[int, int] | None:
    """Rows and columns of the block that transformers infers from a grid of scales: ``fp8.BlockDequantize``."""
    if len(grid) != 2 or 0 in grid:
        return None
    rows, columns = shape
    stated = operation.hf_quantizer.quantization_config.weight_block_size
    if stated is not None:
        height, width = stated
        if (rows % height or columns % width) and grid == (-(-rows // height), -(-columns // width)):
            return height, width
    if rows % grid[0] or columns % grid[1]:
        return None
    return rows // grid[0], columns // grid[1]


def _pack_mxfp4(
    spec: TensorSpec, source: TensorSource, headers: Mapping[str, TensorHeader], num_experts: int
) -> PackedTensor | None:
    assert source.converter is not None
    keys = source.keys
    of_blocks = [p for p in keys if p.endswith(f"{spec.name}_blocks")]
    of_scales = [p for p in keys if p.endswith(f"{spec.name}_scales")]
    if len(source.converter.operations) != 1 or len(of_blocks) != 1 or len(of_scales) != 1 or len(keys) != 2:
        return None
    if "*" in of_blocks[0] + of_scales[0]:
        return None
    blocks, scales = headers[keys[of_blocks[0]][0]], headers[keys[of_scales[0]][0]]
    rows, columns = spec.shape
    groups, odd = divmod(rows, _MX_BLOCK)
    if odd or blocks.dtype != "U8" or scales.dtype != "U8":
        return None
    if blocks.shape[1:] != (columns, groups, _MX_BYTES) or scales.shape[1:] != (columns, groups):
        return None
    codes_name, scales_name = f"{spec.name}.codes", f"{spec.name}.scales"

    def read(tensor: ReadPattern) -> dict[str, torch.Tensor]:
        # Transposed like the slot: two codes of a byte are neighbours in a column, and rows are written whole.
        codes = tensor(of_blocks[0])[0].flatten(1).t()
        return {codes_name: codes, scales_name: tensor(of_scales[0])[0].t()}

    return PackedTensor(
        ((codes_name, (rows // 2, columns), "uint8"), (scales_name, (groups, columns), "uint8")),
        (PackedPart(spec.name, 0, rows, codes_name, scales_name, (_MX_BLOCK, 1)),),
        read,
    )


FORMATS = (
    QuantisedFormat("fp8", Fp8Dequantize, "weight_scale_inv", ("activation_scale", "weight_scale_inv"), _pack_fp8),
    QuantisedFormat("mxfp4", Mxfp4Dequantize, "_scales", (), _pack_mxfp4),
)
_SCALES = tuple(format.scales for format in FORMATS)
OPTIONAL = tuple(end for format in FORMATS for end in format.optional)
