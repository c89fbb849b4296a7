"""The arithmetic of experts: rows sorted by slot in, rows through their experts out.

``expert_compute.py`` computes with it from slots, ``cpu_experts.py`` from records on the host. ``product_choice.py`` chooses
the class: ``BatchInvariantGemm`` for models that are loaded with ``batch_invariant=True``, ``KernelGemm`` (``kernel_gemm.py``)
on GPUs where torch's grouped product is slow. On a CPU, ``vector_gemm.py`` computes the products where it can, and where that
is faster; otherwise torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from epslots.cache.unpacking import PackedWeight, Weight
from epslots.moe import vector_gemm
from epslots.moe.batch_invariant import batch_invariant_functions
from epslots.moe.packed_gemm import packed_matmul
from epslots.moe.packed_product import PackedProduct, suits
from epslots.moe.row_blocks import product

# F.grouped_mm takes strides in multiples of this many bytes, and these dtypes.
STRIDE_BYTES = 16
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Activations that vector_gemm.py computes within the product, by the names of torch's and transformers' classes.
_FUSED = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}

Matmul = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]
"""(rows [N, in], weight [Q, in, out], ends int32 [Q]) to [N, out]: where the rows of each slot end."""

VectorProduct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [N, in] sorted by slot, ends int32 [Q]) to [N, out]: a product with weights, biases and an activation of its own."""


class GroupedGemm:
    """Applies the experts of one layer's range of slots.

    The weights are read in place. The gate, the activation and the norm after the experts are the module's own methods, as
    transformers defines them for its experts interface.

    Args:
        module: the experts module; its flags, ``_apply_gate``, ``act_fn`` and ``post_expert_norm`` are used.
        weights: [Q, ...] by the module's parameter names, in the slots' memory.
        waits_for_host: whether each call waits for the host, so that no step can be captured; also an attribute.

    Attributes:
        dtype: of the weights and the results.
        hidden_size: H.
        batch_invariant: whether each row's bits are independent of the other rows.
    """

    batch_invariant: ClassVar[bool] = False

    def __init__(self, module: Any, weights: Mapping[str, Weight], *, waits_for_host: bool = False) -> None:
        self.waits_for_host = waits_for_host
        self._module = module
        self._fused = _fused_activation(module)
        self.use(weights)
        self._activate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if module.has_gate else module.act_fn
        self._post_norm = module.post_expert_norm if module.has_post_expert_norm else None
        self._first_matmul, self._down_matmul = self._choose_matmul(self._first), self._choose_matmul(self._down)
        self.dtype = self._first.dtype
        self.hidden_size = self._down.shape[-1]

    def use(self, weights: Mapping[str, Weight]) -> None:
        """Read other weights from now on; their number of slots may differ."""
        self._first, self._down = matrices(self._module, weights)
        names = (f"{_first_name(self._module)}_bias", "down_proj_bias")
        biases: tuple[Any, ...] = tuple(weights[name] if self._module.has_bias else None for name in names)
        self._first_bias, self._down_bias = biases
        exact = self.batch_invariant
        self._first_product = _vector_product(self._first, self._first_bias, self._fused, exact=exact)
        self._down_product = _vector_product(self._down, self._down_bias, None, exact=exact)
        first, down = _whole(self._first_product), _whole(self._down_product)
        self._whole = None if first is None or down is None else (first, down)

    def __call__(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, key_N: torch.Tensor, first_key: int = 0) -> torch.Tensor:
        """Apply each row's expert to it.

        Args:
            rows_NH: float [N, H], sorted by slot. Results of rows past ``ends_Q[-1]`` are undefined.
            ends_Q: int32 [Q], where the rows of each slot end.
            key_N: int64 [N], ``first_key`` + the slot of each row, counted from the layer's first.

        Returns:
            [N, H] in the weights' dtype.
        """
        rows_NH = rows_NH.to(self.dtype)
        if self._first_product and self._down_product and self._prefers_vectors(rows_NH):
            result = self._first_product(rows_NH, ends_Q)
            if self._fused is None:
                result = self._activate(result)
            result = self._down_product(result, ends_Q)
            return result if self._post_norm is None else self._post_norm(result)
        result = self._first_matmul(rows_NH, self._first, ends_Q)
        if self._first_bias is not None:
            result += self._first_bias[key_N - first_key]
        result = self._down_matmul(self._activate(result), self._down, ends_Q)
        if self._down_bias is not None:
            result += self._down_bias[key_N - first_key]
        return result if self._post_norm is None else self._post_norm(result)

    def ready_products(self, pairs: int) -> tuple[vector_gemm.ReadyProduct, vector_gemm.ReadyProduct] | None:
        """The two products that make up a call for so many rows, on a CPU. None if the call does something else, or more."""
        if self._whole is None or self._fused is None or self._post_norm is not None or not self._takes_vectors(pairs):
            return None
        return self._whole

    @property
    def matrices(self) -> tuple[Weight, Weight]:
        """The weights of both products, [Q, in, out]."""
        return self._first, self._down

    def _choose_matmul(self, weight: Weight) -> Matmul:
        return torch_matmul(weight)

    def _prefers_vectors(self, rows_NH: torch.Tensor) -> bool:
        wants_gradient = rows_NH.requires_grad and torch.is_grad_enabled()
        return not wants_gradient and rows_NH.is_cpu and self._takes_vectors(rows_NH.shape[0])

    def _takes_vectors(self, rows: int) -> bool:
        return vector_gemm.is_faster(rows, self._first.shape[0])


class BatchInvariantGemm(GroupedGemm):
    """Computes each row in bits that don't depend on the other rows.

    Without ``vector_gemm.py``, it loops in Python over the slots that have rows; on CUDA that synchronises with the host.
    """

    batch_invariant: ClassVar[bool] = True

    def __call__(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, key_N: torch.Tensor, first_key: int = 0) -> torch.Tensor:
        with batch_invariant_functions():
            return super().__call__(rows_NH, ends_Q, key_N, first_key)

    def _takes_vectors(self, rows: int) -> bool:
        return True  # any number of rows: a batch must not choose

    def _choose_matmul(self, weight: Weight) -> Matmul:
        return partial(packed_matmul, multiply=product) if isinstance(weight, PackedWeight) else _matmul_by_row


def _first_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def matrices(module: Any, weights: Mapping[str, Weight]) -> tuple[Weight, Weight]:
    """The weights of both products, [Q, in, out]."""
    first, down = (_oriented(weights[name], transposed=module.is_transposed) for name in (_first_name(module), "down_proj"))
    return first, down


def _oriented(weight: Weight, *, transposed: bool) -> Weight:
    """The weights as [Q, in, out], from either orientation of the checkpoint's layout. Packed ones are so in any case."""
    return weight if transposed or isinstance(weight, PackedWeight) else weight.transpose(-2, -1)


def suits_torch(weight: torch.Tensor) -> bool:
    """Whether ``F.grouped_mm`` takes weights [Q, in, out] of this dtype and these strides, and the rows of their products."""
    strides = [*(stride for stride in weight.stride() if stride != 1), weight.shape[1]]
    return weight.dtype in GROUPED_DTYPES and all(stride * weight.element_size() % STRIDE_BYTES == 0 for stride in strides)


def torch_matmul(weight: Weight) -> Matmul:
    """torch's grouped matrix multiplication; transformers' loop of plain ones where dtype or strides don't suit it."""
    if isinstance(weight, PackedWeight):
        return packed_matmul
    if suits_torch(weight):
        return lambda rows, weight, ends: F.grouped_mm(rows, weight, offs=ends)
    return lambda rows, weight, ends: torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def _vector_product(weight: Weight, bias: torch.Tensor | None, activation: str | None, *, exact: bool) -> VectorProduct | None:
    """The product with a weight by compiled loops; None if they don't take it."""
    if weight.device.type not in ("cpu", "meta"):
        return None
    if isinstance(weight, PackedWeight):
        suited = suits(weight.matrix.forms, weight.dtype)
        return PackedProduct(weight, bias, activation, exact=exact) if suited else None
    turned = weight.transpose(-2, -1)  # where the checkpoint has [in, out], its rows aren't contiguous, and don't fit
    return vector_gemm.ready_product(turned, bias, activation) if vector_gemm.fits(turned) else None


def _whole(product: VectorProduct | None) -> vector_gemm.ReadyProduct | None:
    """A product that is one of ``vector_gemm``'s, and no more."""
    found = product.whole if isinstance(product, PackedProduct) else product
    return found if isinstance(found, vector_gemm.ReadyProduct) else None


def _fused_activation(module: Any) -> str | None:
    """vector_gemm.py's name of ``activation(gate) * up``, if the module computes that, as transformers' default gate does."""
    gate = getattr(module, "_apply_gate", None) if module.has_gate else None
    if getattr(getattr(gate, "__func__", None), "__name__", None) != "_default_apply_gate":
        return None
    return _FUSED.get(type(module.act_fn).__name__)


def _matmul_by_row(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Grouped matrix multiplication in which no row's bits depend on the others. Rows past the last end are undefined."""
    result, start = rows.new_empty(len(rows), weight.shape[2]), 0
    for slot, end in enumerate(ends.tolist()):
        if end > start:
            result[start:end] = product(rows[start:end], weight[slot])
        start = end
    return result
