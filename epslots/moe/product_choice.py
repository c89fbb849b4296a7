"""Which implementation multiplies experts: the one predicate that layers, captured decoding and plans ask.

torch's grouped product (``F.grouped_mm``) is a kernel for bf16 only on compute capabilities 9 and 10, with aligned strides
and less than 1,024 groups (``_grouped_mm_cuda`` in torch 2.13). Elsewhere on CUDA it reads the groups on the host, waits for
that, and loops over all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch

from epslots.cache.slot_pool import slot_weights
from epslots.cache.unpacking import Weight
from epslots.layout import LayerSpec
from epslots.moe.grouped_gemm import BatchInvariantGemm, GroupedGemm, matrices, suits_torch
from epslots.moe.kernel_gemm import KernelGemm, Products
from epslots.moe.packed_gemm import has_packed_kernel

_TORCH_MAJORS = (9, 10)
_TORCH_GROUPS = 1024
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Product(Enum):
    """An implementation of grouped products."""

    TORCH = "torch's"
    """Or on a CPU, where ``GroupedGemm`` prefers them, compiled loops."""
    KERNEL = "our kernel"
    BY_SLOT = "a loop on the host"
    """Slot by slot: batch-invariant, or where neither of the others can; on CUDA it waits for the device."""


def choose_product(weights: Sequence[Weight], *, batch_invariant: bool = False, device: torch.device | None = None) -> Product:
    """The implementation for an experts module, by its weights' device, dtype and strides.

    Args:
        weights: its matrices [Q, in, out] in a layer's range of slots.
        batch_invariant: whether each row's bits must be independent of the others.
        device: of the weights, if they aren't there yet.
    """
    first = weights[0]
    device = device or first.device
    if batch_invariant:
        return Product.BY_SLOT
    if device.type != "cuda":
        return Product.TORCH
    major = torch.cuda.get_device_capability(device)[0]
    has_kernel = major in _TORCH_MAJORS and first.dtype == torch.bfloat16 and first.shape[0] < _TORCH_GROUPS
    if has_kernel and all(isinstance(weight, torch.Tensor) and suits_torch(weight) for weight in weights):
        return Product.TORCH
    known = all(
        isinstance(weight, torch.Tensor) or has_packed_kernel(weight.matrix, weight.dtype, "cuda") for weight in weights
    )
    if known and first.dtype in _KERNEL_DTYPES and importlib.util.find_spec("triton") is not None:
        return Product.KERNEL
    return Product.BY_SLOT


def planned_products(
    modules: Iterable[Any], layers: Iterable[LayerSpec], device: torch.device, *, batch_invariant: bool
) -> set[Product]:
    """The implementations that ``make_gemm`` will choose for a model that isn't loaded.

    Args:
        modules: its experts modules, on the meta device; ``layers`` are theirs, with the layouts of their slots.
    """
    found, seen = set(), set()
    for module, layer in zip(modules, layers, strict=True):
        if layer.layout not in seen:
            seen.add(layer.layout)
            slots = torch.empty(layer.num_experts, layer.layout.nbytes, dtype=torch.uint8, device="meta")
            weights = matrices(module, slot_weights(layer, slots))
            found.add(choose_product(weights, batch_invariant=batch_invariant, device=device))
    return found


def make_gemm(module: Any, weights: Mapping[str, Weight], *, batch_invariant: bool = False) -> GroupedGemm:
    """The grouped product of a layer's range of slots: of the experts module, and its weights by parameter name."""
    found = matrices(module, weights)
    product = choose_product(found, batch_invariant=batch_invariant)
    if product is Product.KERNEL:
        return KernelGemm(module, weights, kernel_products())
    waits = product is Product.BY_SLOT and found[0].device.type == "cuda"
    return (BatchInvariantGemm if batch_invariant else GroupedGemm)(module, weights, waits_for_host=waits)


def kernel_products() -> Products:
    """Our kernels for GPUs."""
    from epslots.moe.grouped_kernel import TritonProducts  # optional, and used only on GPUs

    return TritonProducts()
