"""The arithmetic of experts: rows sorted by slot in, each row's expert applied, rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from epslots.moe.batch_invariant import batch_invariant_functions
from epslots.moe.row_blocks import product

# What grouped matrix multiplication takes: strides in multiples of so many bytes, and these types.
STRIDE_BYTES = 16
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupedGemm:
    """Applies the experts of one layer's window of slots.

    The weights are read where they lie. How gate and up are combined, which activation is used and whether a norm follows are
    the module's own code, as transformers defines them for its experts interface.

    Args:
        module: the experts module; asked for its flags, ``_apply_gate``, ``act_fn`` and ``post_expert_norm``.
        weights: tensors [Q, ...] by the module's parameter names, in the slots' memory.
        batch_invariant: compute each row in the same bits whatever the other rows are. A Python loop over the slots that have
            rows, and on CUDA a host synchronisation.

    Attributes:
        dtype: of the weights and the results.
        hidden_size: H.
    """

    def __init__(self, module: Any, weights: Mapping[str, torch.Tensor], *, batch_invariant: bool = False) -> None:
        self._first_name = "gate_up_proj" if module.has_gate else "up_proj"
        self._transposed, self._has_bias = bool(module.is_transposed), bool(module.has_bias)
        self.use(weights)
        self._activate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if module.has_gate else module.act_fn
        self._post_norm = module.post_expert_norm if module.has_post_expert_norm else None
        self.batch_invariant = batch_invariant
        self._matmul = _matmul_by_row if batch_invariant else _matmul_for(self._first, self._down)
        self.dtype = self._first.dtype
        self.hidden_size = self._down.shape[-1]

    def use(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Read these weights from now on, of as many slots as there are."""
        self._first = _oriented(weights[self._first_name], transposed=self._transposed)
        self._down = _oriented(weights["down_proj"], transposed=self._transposed)
        self._first_bias = weights[f"{self._first_name}_bias"] if self._has_bias else None
        self._down_bias = weights["down_proj_bias"] if self._has_bias else None

    def __call__(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, slot_N: torch.Tensor) -> torch.Tensor:
        """Each row's expert applied to it.

        Args:
            rows_NH: float [N, H], sorted by slot. Rows past ``ends_Q[-1]`` come out undefined.
            ends_Q: int32 [Q], where the rows of each slot end.
            slot_N: int64 [N], the slot of each row, counted from the window's start.

        Returns:
            [N, H] in the weights' dtype.
        """
        with batch_invariant_functions() if self.batch_invariant else nullcontext():
            return self._compute(rows_NH, ends_Q, slot_N)

    def _compute(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, slot_N: torch.Tensor) -> torch.Tensor:
        result = self._matmul(rows_NH.to(self.dtype), self._first, ends_Q)
        if self._first_bias is not None:
            result += self._first_bias[slot_N]
        result = self._matmul(self._activate(result), self._down, ends_Q)
        if self._down_bias is not None:
            result += self._down_bias[slot_N]
        return result if self._post_norm is None else self._post_norm(result)


def _oriented(weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """The weights as [Q, in, out], from either layout of a checkpoint."""
    return weight if transposed else weight.transpose(-2, -1)


def _matmul_for(*weights: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """torch's grouped matrix multiplication, or transformers' loop of plain ones where dtype or strides aren't for it."""
    # The strides of the weights [Q, in, out], and of the rows [N, in] that meet them.
    strides = [(w, stride) for w in weights for stride in (*w.stride(), w.shape[1]) if stride != 1]
    aligned = all(stride * w.element_size() % STRIDE_BYTES == 0 for w, stride in strides)
    if aligned and weights[0].dtype in GROUPED_DTYPES:
        return lambda rows, weight, ends: F.grouped_mm(rows, weight, offs=ends)
    return lambda rows, weight, ends: torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def _matmul_by_row(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Grouped matrix multiplication in which no row's bits depend on the others. Rows past the last end are undefined."""
    result, start = rows.new_empty(len(rows), weight.shape[2]), 0
    for slot, end in enumerate(ends.tolist()):
        if end > start:
            result[start:end] = product(rows[start:end], weight[slot])
        start = end
    return result
