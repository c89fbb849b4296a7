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

from epslots.moe import vector_gemm


def read_in_place(model: nn.Module, *, batch_invariant: bool) -> None:
    """Let the model's plain linear layers, and its routers, multiply few rows in place from now on.

    Args:
        batch_invariant: whether all numbers of rows are computed so, since a batch must not choose.
    """
    forward = _in_place if batch_invariant else _in_place_if_faster
    functional = _Functional(_always if batch_invariant else vector_gemm.is_faster_alone)
    for module in model.modules():
        if type(module) is nn.Linear:
            setattr(module, "forward", MethodType(forward, module))  # noqa: B010 - a method to mypy
        elif _calls_linear(module):
            function: Any = type(module).forward
            own = FunctionType(function.__code__, {**function.__globals__, "F": functional}, function.__name__)
            own.__kwdefaults__ = function.__kwdefaults__
            setattr(module, "forward", MethodType(own, module))  # noqa: B010


def _calls_linear(module: nn.Module) -> bool:
    """Whether a module's class calls ``F.linear`` with a matrix of its own, as transformers' routers do."""
    function, weight = type(module).forward, module._parameters.get("weight")
    plain = isinstance(function, FunctionType) and function.__closure__ is None and function.__defaults__ is None
    if not plain or weight is None or weight.dim() != 2 or "forward" in vars(module):
        return False
    return function.__globals__.get("F") is F and {"F", "linear"} <= set(function.__code__.co_names)


class _Functional:
    """``torch.nn.functional``, whose ``linear`` reads in place.

    Args:
        chosen: whether to multiply so many rows in place.
    """

    def __init__(self, chosen: Callable[[int], bool]) -> None:
        self._chosen = chosen

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``F.linear``."""
        return _multiply(inputs, weight, bias, self._chosen)


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies by its ``weight`` and adds its ``bias``, and does nothing else: read in place or not."""
    if type(module) is not nn.Linear or module._forward_pre_hooks or module._forward_hooks:
        return False
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "__func__", None) in (_in_place, _in_place_if_faster)


def _always(rows: int) -> bool:
    return True


def _in_place(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return _multiply(inputs, module.weight, module.bias, _always)


def _in_place_if_faster(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return _multiply(inputs, module.weight, module.bias, vector_gemm.is_faster_alone)


def _multiply(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: Callable[[int], bool]
) -> torch.Tensor:
    rows = inputs.numel() // max(1, weight.shape[1])
    if not _takes(inputs, weight, bias) or not chosen(rows):
        return F.linear(inputs, weight, bias)
    biases = None if bias is None else bias[None]
    results = vector_gemm.product(inputs.reshape(rows, weight.shape[1]), weight[None], None, biases)
    return results.view(*inputs.shape[:-1], weight.shape[0])


def _takes(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether inputs can be multiplied in place by a weight [out, in] without its gradient. Loops read all by its address."""
    suits = weight.dtype is inputs.dtype and inputs.is_cpu and weight.is_cpu and inputs.numel() > 0
    if not suits or torch.is_autocast_enabled("cpu"):
        return False
    trained = inputs.requires_grad or weight.requires_grad
    if bias is not None:
        trained |= bias.requires_grad
        if bias.shape != weight.shape[:1] or bias.dtype is not weight.dtype or not (bias.is_cpu and bias.is_contiguous()):
            return False
    return not (trained and torch.is_grad_enabled()) and vector_gemm.fits(weight)
