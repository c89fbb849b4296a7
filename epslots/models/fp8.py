"""FP8 checkpoints whose weights don't divide into whole blocks.

DeepSeek-V3 keeps one scale for each 128 x 128 block, and its ``kv_a_proj_with_mqa`` has 576 rows: four blocks and a half.
transformers 5.23 infers the block from the scales' shape, and so takes such a weight for one of ragged blocks everywhere: it
refuses it, or, where the rows happen to divide, scales it wrongly. Here the block is the one that the configuration states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


class BlockDequantize(Fp8Dequantize):
    """transformers' operation, for weights whose last blocks are cut short: they are padded to whole blocks."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        rows, columns = quantized.shape[-2:]
        if block is not None and scales.dim() >= 2:
            block_rows, block_columns = block
            grid = (-(-rows // block_rows), -(-columns // block_columns))
            ragged = rows % block_rows or columns % block_columns
            if ragged and tuple(scales.shape[-2:]) == grid:
                padding = (0, -columns % block_columns, 0, -rows % block_rows)
                whole = super()._dequantize_one(F.pad(quantized.float(), padding), scales, output_dtype)
                return whole[..., :rows, :columns].contiguous()
        return super()._dequantize_one(quantized, scales, output_dtype)


@contextlib.contextmanager
def ragged_blocks() -> Iterator[None]:
    """Let transformers load with ``BlockDequantize`` inside the block; for one thread at a time, inside of ``quiet``."""
    original = FineGrainedFP8HfQuantizer.get_load_operations
    FineGrainedFP8HfQuantizer.get_load_operations = lambda self: {"dequantize": BlockDequantize}
    try:
        yield
    finally:
        FineGrainedFP8HfQuantizer.get_load_operations = original
