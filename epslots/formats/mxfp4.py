"""MXFP4 as gpt-oss stores it: all experts in one tensor, 32 neighbouring inputs of an output sharing an exponent.

    gate_up_proj_blocks   U8 [experts, outputs, inputs / 32, 16], two E2M1 codes a byte, low half first
    gate_up_proj_scales   U8 [experts, outputs, inputs / 32], exponents of two, biased by 127

down_proj likewise. In the model, gpt-oss has these matrices as [experts, inputs, outputs].
"""

from __future__ import annotations

from epslots.formats.matrix import Matrix, StoredParts, is_exponents, make_matrix, split_bytes
from epslots.formats.stored_format import Settings, StoredFormat

_BLOCK, _BYTES = 32, 16
_PARAMETERS = ("gate_up_proj", "down_proj")


def read(parts: StoredParts, settings: Settings) -> Matrix:
    """One expert's matrix, [outputs, inputs], of its slices of both tensors."""
    name = next(name for name in _PARAMETERS if any(part.startswith(name) for part in parts))
    blocks, scales = parts[f"{name}_blocks"], parts[f"{name}_scales"]
    if blocks.dim() != 3 or blocks.shape[2] != _BYTES:
        raise ValueError(f"blocks of one expert have shape {list(blocks.shape)}, not [outputs, inputs / 32, 16]")
    if not is_exponents(scales):
        raise ValueError(f"scales are {scales.dtype}; known are exponents, of torch.uint8")
    return make_matrix(split_bytes(blocks.flatten(1)), "e2m1", group=scales, block=(1, _BLOCK))


FORMAT = StoredFormat(
    "mxfp4",
    {name: (f"{name}_blocks", f"{name}_scales") for name in _PARAMETERS},
    tuple(f"{name}_scales" for name in _PARAMETERS),
    read,
    fused=True,
)
