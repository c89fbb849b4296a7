"""FP8 in blocks, as DeepSeek-V3 stores it; and DeepSeek-V4's experts, in FP4 under the same method.

weight             F8_E4M3 [rows, columns]; or I8 [rows, columns / 2], two E2M1 codes a byte, low half first
weight_scale_inv   F32, BF16, F8_E8M0 or U8 (exponents), one for each block; the block is the one that the configuration
                   states if the last ones are cut short (DeepSeek-V3's kv_a_proj_with_mqa has 576 rows of 128), else it
                   follows from the shapes. One number = for the whole matrix. AutoFP8 calls it weight_scale
activation_scale   or input_scale; of activations in 8 bits; not used
"""

from __future__ import annotations

from typing import cast

import torch

from epslots.errors import CheckpointError
from epslots.formats.matrix import Matrix, StoredParts, make_matrix, split_bytes
from epslots.formats.stored_format import Settings, StoredFormat


def check(settings: Settings) -> None:
    """Refuse blocks of no size."""
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise CheckpointError(f"weight_block_size is {block!r}: allowed: rows and columns of a block, 1 and more")


def _is_block(stated: object) -> bool:
    return isinstance(stated, list | tuple) and len(stated) == 2 and all(isinstance(size, int) and size > 0 for size in stated)


def read(parts: StoredParts, settings: Settings) -> Matrix:
    """The matrix of ``weight`` and ``weight_scale_inv``."""
    codes, scales = parts["weight"], parts["weight_scale_inv"]
    kind = None
    if codes.dtype == torch.int8:
        codes, kind = split_bytes(codes), "e2m1"
    if scales.numel() == 1:
        return make_matrix(codes, kind, row=scales)
    return make_matrix(codes, kind, group=scales, block=block_of(codes.shape, scales.shape, settings.get("weight_block_size")))


def block_of(shape: torch.Size, grid: torch.Size, stated: object) -> tuple[int, int]:
    """Rows and columns of the blocks that a grid of scales stands for.

    Raises:
        ValueError: there is none.
    """
    if len(shape) != 2 or len(grid) != 2 or 0 in grid:
        raise ValueError(f"scales have shape {list(grid)} for weights of shape {list(shape)}")
    rows, columns = shape
    if _is_block(stated):
        height, width = cast(tuple[int, int], stated)
        if tuple(grid) == (-(-rows // height), -(-columns // width)):
            return height, width
    if rows % grid[0] or columns % grid[1]:
        raise ValueError(f"scales of {grid[0]} x {grid[1]} blocks don't divide weights of {rows} x {columns}")
    return rows // grid[0], columns // grid[1]


def group_of(shape: torch.Size, grid: torch.Size, size: object, *, exact: bool) -> tuple[int, int]:
    """The block of scales that each stand for some neighbouring inputs of one output.

    Args:
        shape: of the weights.
        grid: of the scales.
        size: inputs of a group, as stated; -1 and None = all.
        exact: refuse other groups than stated; else, the shapes decide.

    Raises:
        ValueError: there is none.
    """
    block = block_of(shape, grid, (1, size))
    if block[0] > 1:
        raise ValueError(f"scales of {grid[0]} x {grid[1]} groups aren't those of {shape[0]} outputs")
    if exact and isinstance(size, int) and size > 0 and -(-shape[1] // size) != grid[1]:
        raise ValueError(f"group_size={size}, but {shape[1]} inputs have {grid[1]} scales")
    return block


FORMAT = StoredFormat(
    "fp8",
    {"weight": ("weight", "weight_scale_inv", "activation_scale", "input_scale")},
    ("weight_scale_inv",),
    read,
    check,
    renames=(
        (r"^(.+)\.scale", r"\1.weight_scale_inv"),  # DeepSeek-V4's
        (r"\.qscale_weight", ".weight_scale_inv"),  # Mistral's
        (r"\.weight_scale$", ".weight_scale_inv"),  # AutoFP8's
    ),
)
