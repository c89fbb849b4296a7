"""Dense linear layers on the CPU, read in place: ``vector_gemm.py`` multiplies their few rows at the speed of memory.

With the experts at that speed, a step that decodes few requests would spend most of its time in torch's product for the dense
layers, which copies every matrix at every call. Routers multiply by their weights without a linear layer. Only instances of a
loaded model change, never torch's class.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from epslots.moe import vector_gemm


def read_in_place(model: nn.Module, *, batch_invariant: bool) -> None:
    """Let the model's plain linear layers, and its routers, multiply few rows in place from now on.

    Args:
        batch_invariant: whether all numbers of rows are computed so, since a batch must not choose.
    """
    chosen = _always if batch_invariant else vector_gemm.is_faster_alone
    for module in model.modules():
        if type(module) is nn.Linear:
            setattr(module, "forward", InPlaceLinear(module, chosen))  # noqa: B010 - a method to mypy
        elif _calls_linear(module):
            function: Any = type(module).forward
            own = FunctionType(function.__code__, {**function.__globals__, "F": _Functional(chosen)}, function.__name__)
            own.__kwdefaults__ = function.__kwdefaults__
            setattr(module, "forward", MethodType(own, module))  # noqa: B010


def _calls_linear(module: nn.Module) -> bool:
    """Whether a module's class calls ``F.linear`` with a matrix of its own, as transformers' routers do."""
    function, weight = type(module).forward, module._parameters.get("weight")
    plain = isinstance(function, FunctionType) and function.__closure__ is None and function.__defaults__ is None
    if not plain or weight is None or "forward" in vars(module):
        return False
    return function.__globals__.get("F") is F and {"F", "linear"} <= set(function.__code__.co_names)


class _Functional:
    """``torch.nn.functional`` for one module, whose ``linear`` reads in place.

    Args:
        chosen: whether to multiply so many rows in place.
    """

    def __init__(self, chosen: Callable[[int], bool]) -> None:
        self._product = _LatestProduct(chosen)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``F.linear``."""
        return self._product(inputs, weight, bias)


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies by its ``weight`` and adds its ``bias``, and does nothing else: read in place or not."""
    if type(module) is not nn.Linear or module._forward_pre_hooks or module._forward_hooks or hooks_see_all():
        return False
    forward = vars(module).get("forward")
    return forward is None or isinstance(forward, InPlaceLinear)


def hooks_see_all() -> bool:
    """Whether hooks of all modules are set."""
    return bool(_global_forward_pre_hooks or _global_forward_hooks)


def _always(rows: int) -> bool:
    return True


class InPlaceLinear:
    """The ``forward`` of a linear layer that reads in place."""

    def __init__(self, module: nn.Linear, chosen: Callable[[int], bool]) -> None:
        self._module, self._product = module, _LatestProduct(chosen)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[*, out] for inputs [*, in]."""
        return self._product(inputs, self._module.weight, self._module.bias)

    def ready_for(self, rows: int) -> vector_gemm.ReadyProduct | None:
        """The product that multiplies so many rows, on the CPU and without gradients; None if it is torch's."""
        return self._product.ready(self._module.weight, self._module.bias) if self._product.chosen(rows) else None


class _LatestProduct:
    """``F.linear``; with a product that is ready, as long as it is called with the same weights and they stay where they are.

    Args:
        chosen: whether to multiply so many rows in place.
    """

    def __init__(self, chosen: Callable[[int], bool]) -> None:
        self.chosen = chosen
        self._latest: tuple[tuple[Any, ...], vector_gemm.ReadyProduct | None] = (), None  # one: threads may share it

    def ready(self, weight: torch.Tensor, bias: torch.Tensor | None) -> vector_gemm.ReadyProduct | None:
        """The product with a weight; None if loops don't take it."""
        about = memory_of(weight), None if bias is None else memory_of(bias)
        held, ready = self._latest
        if about != held:
            ready = _ready_product(weight, bias)
            self._latest = about, ready
        return ready

    def __call__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ready = self.ready(weight, bias)
        if ready is None or inputs.dtype is not weight.dtype or not inputs.is_cpu:
            return F.linear(inputs, weight, bias)
        if torch.is_grad_enabled() and _train(inputs, weight, bias):
            return F.linear(inputs, weight, bias)
        shape = inputs.shape
        if not shape or shape[-1] != ready.inner:  # an error
            return F.linear(inputs, weight, bias)
        rows = inputs.numel() // ready.inner
        if not rows or not self.chosen(rows) or torch.is_autocast_enabled("cpu"):
            return F.linear(inputs, weight, bias)
        return ready(inputs)


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how: all by which loops read it, who take none that isn't contiguous."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.is_contiguous()


def _ready_product(weight: torch.Tensor, bias: torch.Tensor | None) -> vector_gemm.ReadyProduct | None:
    """The product with a weight [out, in]; None if loops, which read all by its address, don't take it."""
    if weight.dim() != 2 or not weight.is_cpu or not vector_gemm.fits(weight):
        return None
    if bias is None:
        return vector_gemm.ready_product(weight[None])
    plain = bias.shape == weight.shape[:1] and bias.dtype is weight.dtype and bias.is_cpu and bias.is_contiguous()
    return vector_gemm.ready_product(weight[None], bias[None]) if plain else None


def _train(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
