"""Which experts of a quantised checkpoint can stay as they are stored until they are in a slot, and how.

transformers dequantises by operations on whole parameters (``expert_reader.py``). Two chains of them are known here well
enough to be done on the device instead, by ``unpacking.py``:

    FP8      DeepSeek's blocks: matrices [rows, columns] of one expert each, 8-bit floats with one scale for a block, joined
             by their rows (gate and up)
    MXFP4    gpt-oss': all experts in one tensor, 4-bit floats, 32 of a row sharing an exponent; transposed in the model

Whatever else an operation does, transposing, interleaving or mixing experts, is done when the host store is built, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from epslots.layout import PackedLayout, PackedPart, RecordLayout, TensorSpec
from epslots.models.checkpoint import TensorHeader

# What safetensors calls the types that stay packed, and their names in torch.
_FP8_CODES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_FP8_SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E8M0": "float8_e8m0fnu", "U8": "uint8"}
# Products of code and scale are rounded to float32 first: wider slots would show it.
_SLOT_DTYPES = ("float32", "bfloat16", "float16")
# MXFP4: weights that share an exponent, and bytes that hold them.
_MX_BLOCK, _MX_BYTES = 32, 16

Read = Callable[[str], torch.Tensor]
"""One expert's own tensor of a source pattern, or its slice [1, ...] of a fused one."""


@dataclass(frozen=True)
class Packed:
    """How one tensor of a layer's slots is packed.

    Attributes:
        tensors: what the record has in its stead: (name, shape, dtype).
        parts: what these stand for.
        read: one expert's tensors by name.
    """

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    parts: tuple[PackedPart, ...]
    read: Callable[[Read], dict[str, torch.Tensor]]


def find_packing(
    spec: TensorSpec,
    converter: WeightConverter | None,
    keys: Mapping[str, Sequence[str]],
    headers: Mapping[str, TensorHeader],
    num_experts: int,
) -> Packed | None:
    """How a tensor of a layer's slots can be packed; None if it can't, or isn't quantised.

    Args:
        converter: makes the tensor from the checkpoint's.
        keys: these by the converter's source pattern, in expert order; a single one where the checkpoint is fused.
        headers: of the checkpoint's tensors.
        num_experts: that the layer has.
    """
    if converter is None or spec.dtype not in _SLOT_DTYPES or len(spec.shape) != 2:
        return None
    if len(converter.target_patterns) != 1 or not converter.operations:  # several: experts are dealt out to them
        return None
    names = [type(operation) for operation in converter.operations]
    if names == [Mxfp4Dequantize]:
        return _find_mxfp4(spec, keys, headers)
    first, rest = converter.operations[0], converter.operations[1:]
    if isinstance(first, Fp8Dequantize) and _joins_rows(rest):
        sources = [p for p in converter.source_patterns if p in keys]
        return _find_fp8(spec, sources, {p: [headers[key] for key in keys[p]] for p in sources}, first, num_experts)
    return None


def packed_layout(layout: RecordLayout, packings: Mapping[str, Packed]) -> PackedLayout | None:
    """The layout of records in which these tensors of the slots are packed; None if none is."""
    if not packings:
        return None
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    for spec in layout.tensors:
        packing = packings.get(spec.name)
        tensors += [(spec.name, spec.shape, spec.dtype)] if packing is None else packing.tensors
    return PackedLayout(RecordLayout.of(tensors), tuple(part for packing in packings.values() for part in packing.parts))


def _joins_rows(operations: Sequence[Any]) -> bool:
    """Whether these stack one matrix per expert, and at most join several of them by their rows."""
    if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return False
    joins = operations[1:]
    return not joins or (
        len(joins) == 1
        and type(joins[0]) is Concatenate
        and joins[0].dim == 1
        and getattr(joins[0], "num_shards_attribute", None) is None
    )


def _find_fp8(
    spec: TensorSpec,
    sources: Sequence[str],
    headers: Mapping[str, Sequence[TensorHeader]],
    operation: Fp8Dequantize,
    num_experts: int,
) -> Packed | None:
    matrices = [p for p in sources if not p.endswith(("weight_scale_inv", "activation_scale"))]
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    parts, names, row = [], [], 0
    for number, pattern in enumerate(matrices):
        scales_pattern = f"{pattern}_scale_inv"
        codes, scales = _alike(headers[pattern], num_experts), _alike(headers.get(scales_pattern, ()), num_experts)
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
    return Packed(tuple(tensors), tuple(parts), lambda read: {name: read(pattern) for name, pattern in names})


def _alike(headers: Iterable[TensorHeader], num_experts: int) -> TensorHeader | None:
    """The header of one of all experts' tensors, if these are alike."""
    listed = list(headers)
    kinds = {(header.shape, header.dtype) for header in listed}
    return listed[0] if len(kinds) == 1 and len(listed) == num_experts else None


def _block_of(shape: tuple[int, ...], grid: tuple[int, ...], operation: Fp8Dequantize) -> tuple[int, int] | None:
    """The block that transformers takes for one of a grid of scales: ``fp8.BlockDequantize``."""
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


def _find_mxfp4(spec: TensorSpec, keys: Mapping[str, Sequence[str]], headers: Mapping[str, TensorHeader]) -> Packed | None:
    of_blocks = [p for p in keys if p.endswith(f"{spec.name}_blocks")]
    of_scales = [p for p in keys if p.endswith(f"{spec.name}_scales")]
    if len(of_blocks) != 1 or len(of_scales) != 1 or len(keys) != 2 or "*" in of_blocks[0] + of_scales[0]:
        return None
    blocks, scales = headers[keys[of_blocks[0]][0]], headers[keys[of_scales[0]][0]]
    rows, columns = spec.shape
    groups, odd = divmod(rows, _MX_BLOCK)
    if odd or blocks.dtype != "U8" or scales.dtype != "U8":
        return None
    if blocks.shape[1:] != (columns, groups, _MX_BYTES) or scales.shape[1:] != (columns, groups):
        return None
    codes_name, scales_name = f"{spec.name}.codes", f"{spec.name}.scales"

    def read(tensor: Read) -> dict[str, torch.Tensor]:
        # Transposed like the slot, so that what shares a byte is neighbours in a column, and rows are written whole.
        codes = tensor(of_blocks[0])[0].flatten(1).t()
        return {codes_name: codes, scales_name: tensor(of_scales[0])[0].t()}

    return Packed(
        ((codes_name, (rows // 2, columns), "uint8"), (scales_name, (groups, columns), "uint8")),
        (PackedPart(spec.name, 0, rows, codes_name, scales_name, (_MX_BLOCK, 1)),),
        read,
    )
