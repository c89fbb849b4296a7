"""Dense linear layers on the CPU, read in place: ``vector_gemm.py`` multiplies their few rows at the speed of memory.

With the experts at that speed, a step that decodes few requests would spend most of its time in torch's product for the dense
layers, which copies every matrix at every call. Only instances of a loaded model change, never torch's class.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from epslots.moe import vector_gemm


def read_in_place(model: nn.Module, *, batch_invariant: bool) -> None:
    """Let the model's plain linear layers multiply few rows in place from now on.

    Args:
        batch_invariant: whether all numbers of rows are computed so, since a batch must not choose.
    """
    forward = _in_place if batch_invariant else _in_place_if_faster
    for module in model.modules():
        if type(module) is nn.Linear:
            setattr(module, "forward", MethodType(forward, module))  # noqa: B010 - a method to mypy


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies by its ``weight`` and adds its ``bias``, and does nothing else: read in place or not."""
    if type(module) is not nn.Linear or module._forward_pre_hooks or module._forward_hooks:
        return False
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "__func__", None) in (_in_place, _in_place_if_faster)


def _in_place(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return _multiply(module, inputs, lambda rows: True)


def _in_place_if_faster(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return _multiply(module, inputs, vector_gemm.is_faster_alone)


def _multiply(module: nn.Linear, inputs: torch.Tensor, chosen: Callable[[int], bool]) -> torch.Tensor:
    weight, bias = module.weight, module.bias
    rows = inputs.numel() // max(1, weight.shape[1])
    suits = weight.dtype is inputs.dtype and inputs.device.type == "cpu" and rows > 0 and chosen(rows)
    wants_gradient = torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad)
    if not suits or wants_gradient or not vector_gemm.fits(weight[None]):
        return F.linear(inputs, weight, bias)
    biases = None if bias is None else bias[None]
    results = vector_gemm.product(inputs.reshape(rows, weight.shape[1]), weight[None], None, biases)
    return results.view(*inputs.shape[:-1], weight.shape[0])
