"""Which packed slots are computed from, on which kind of device; and products with them where no kernel takes them.

The reference unpacks one used expert after another into memory that each thread keeps, and multiplies. It runs on every CPU.
Kernels take ``PackedWeight``, a form and its tensors [Q, ...]: ``packed_product.py`` on the CPU, ``packed_kernel.py`` on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from epslots.cache.unpacking import PackedWeight
from epslots.layout import LayerSpec, PackedMatrix
from epslots.moe import packed_product
from epslots.moe.vector_code import host_has

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [N, in], weight [in, out]) to [N, out]."""

_KINDS = frozenset({"e4m3", "int8", "int4", "e2m1"})
# By kind of device, the kinds of codes that a kernel computes with about as fast as with unpacked slots. On a CPU that
# multiplies pairs of bfloat16 numbers, that is within a tenth (Zen 4, ``epslots bench packed --parts formats``). On others and
# with permuted columns, it takes longer or hasn't been measured.
KERNELS: dict[str, frozenset[str]] = {"cpu": _KINDS if host_has("avx512bf16") else frozenset(), "cuda": _KINDS}
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


def has_packed_kernel(matrix: PackedMatrix, dtype: torch.dtype, device: str) -> bool:
    """Whether a kernel of a kind of device computes with a packed matrix, in ``dtype``."""
    known = all(form.kind in KERNELS[device] for form in matrix.forms)
    if device != "cpu":
        return known
    return known and not any(form.perm for form in matrix.forms) and packed_product.suits(matrix.forms, dtype)


def without_kernel(layers: Iterable[LayerSpec], device: str) -> list[str]:
    """The forms of packed layers that no kernel of a kind of device takes, in words."""
    missing: set[str] = set()
    for layer in layers:
        dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in layer.weights.tensors}
        for matrix in () if layer.packed is None else layer.packed.matrices:
            if not has_packed_kernel(matrix, dtypes[matrix.name], device):
                missing.update(str(form) for form in matrix.forms)
    return sorted(missing)
