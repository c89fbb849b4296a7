"""Products with packed experts, read where they lie in slots; and which forms a kernel of a device takes.

The reference unpacks one used expert after another into memory that each thread keeps, and multiplies. It runs on every CPU.
A faster kernel of a form enters ``KERNELS``, and takes ``PackedWeight``: the form, and its tensors [Q, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from epslots.cache.unpacking import PackedWeight
from epslots.layout import LayerSpec

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [N, in], weight [in, out]) to [N, out]."""

# By kind of device, the kinds of codes that a kernel computes with about as fast as with unpacked slots.
KERNELS: dict[str, frozenset[str]] = {"cpu": frozenset(), "cuda": frozenset()}
# Devices on which the reference runs: it waits for the host's copy of the rows' ends.
REFERENCE = frozenset({"cpu"})


def packed_matmul(rows: torch.Tensor, weight: PackedWeight, ends: torch.Tensor, multiply: Multiply = torch.mm) -> torch.Tensor:
    """Grouped matrix multiplication with packed weights: the reference.

    Args:
        rows: [N, in], sorted by slot. Results of rows past ``ends[-1]`` are undefined.
        weight: of Q slots.
        ends: int32 [Q], where the rows of each slot end.

    Returns:
        [N, out].
    """
    result, start = rows.new_empty(len(rows), weight.shape[2]), 0
    for slot, end in enumerate(ends.tolist()):
        if end > start:
            result[start:end] = multiply(rows[start:end], weight.unpack(slot))
        start = end
    return result


def without_kernel(layers: Iterable[LayerSpec], device: str) -> list[str]:
    """The kinds of codes of packed layers that no kernel of a kind of device takes."""
    kinds = {form.kind for layer in layers if layer.packed for matrix in layer.packed.matrices for form in matrix.forms}
    return sorted(kinds - KERNELS[device])
