"""NVIDIA's modelopt: NVFP4, MXFP4 and FP8.

    NVFP4   weight U8 [rows, columns / 2], two E2M1 codes a byte, low half first; weight_scale F8_E4M3 [rows, columns / 16];
            weight_scale_2 F32 [], which multiplies
    MXFP4   weight U8; weight_scale U8 [rows, columns / 32], exponents of two
    FP8     weight F8_E4M3; weight_scale F32, of the matrix, its rows, or blocks

Scales of activations (input_scale) aren't used: activations are computed with as they are.
"""

from __future__ import annotations

import torch

from epslots.errors import UnsupportedModelError
from epslots.formats.fp8 import block_of
from epslots.formats.matrix import Matrix, StoredParts, is_exponents, is_of_rows, make_matrix, make_nvfp4, split_bytes
from epslots.formats.stored_format import Settings, StoredFormat

_KNOWN = {"NVFP4", "W4A16_NVFP4", "MXFP4", "MXFP8", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MIXED_PRECISION"}


def check(settings: Settings) -> None:
    """Refuse algorithms that ``read`` doesn't know."""
    deeper = settings.get("quantization")  # the content of hf_quant_config.json
    algorithm = settings.get("quant_algo") or (deeper.get("quant_algo") if isinstance(deeper, dict) else None)
    if str(algorithm).upper() not in _KNOWN:
        raise UnsupportedModelError(f"modelopt quantised it with {algorithm!r}; epslots reads {', '.join(sorted(_KNOWN))}")


def read(parts: StoredParts, settings: Settings) -> Matrix:
    """The matrix of ``weight`` and its scales."""
    codes, scales = parts["weight"], parts["weight_scale"]
    if codes.dtype == torch.uint8:
        codes = split_bytes(codes)
        if "weight_scale_2" not in parts and is_exponents(scales):
            return make_matrix(codes, "e2m1", group=scales, block=block_of(codes.shape, scales.shape, None))
        return make_nvfp4(codes, scales, parts["weight_scale_2"])
    if scales.dtype == torch.float32 and scales.dim() == 4:  # [row blocks, 1, column blocks, 1]
        scales = scales[:, 0, :, 0]
    if is_of_rows(scales, codes.shape[0]):
        return make_matrix(codes, row=scales)
    return make_matrix(codes, group=scales, block=block_of(codes.shape, scales.shape, None))


FORMAT = StoredFormat(
    "modelopt",
    {"weight": ("weight", "weight_scale", "weight_scale_2", "input_scale")},
    ("weight_scale", "weight_scale_2"),
    read,
    check,
)
