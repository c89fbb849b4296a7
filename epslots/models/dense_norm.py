"""The model's RMSNorms on the CPU by ``row_norm.py``, which makes one operation of torch's eight.

Most architectures of transformers have their own copy of Llama's class. A class is one of these if its code is the same.
Only instances of a loaded model change.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from epslots.models.same_code import code_of
from epslots.moe import row_norm


def norm_in_place(model: nn.Module) -> None:
    """Let the model's RMSNorms make one pass over their rows from now on."""
    for module in model.modules():
        if _is_llamas(type(module)):
            setattr(module, "forward", MethodType(_in_place, module))  # noqa: B010 - a method to mypy


def _is_llamas(kind: type[nn.Module]) -> bool:
    return code_of(kind.forward) == code_of(LlamaRMSNorm.forward)


def norm_of(module: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The weight [H] and epsilon [1] of a norm that makes one pass over rows of ``dtype``. None if it does something else."""
    forward, weight = vars(module).get("forward"), module._parameters.get("weight")
    if getattr(forward, "__func__", None) is not _in_place or module._forward_pre_hooks or module._forward_hooks:
        return None
    plain = weight is not None and weight.dtype is dtype and weight.is_cpu and weight.is_contiguous()
    return (weight, _epsilon(module.variance_epsilon)) if plain else None  # type: ignore[return-value]


def _in_place(module: Any, rows: torch.Tensor) -> torch.Tensor:
    wants_gradient = torch.is_grad_enabled() and (rows.requires_grad or module.weight.requires_grad)
    if wants_gradient or not row_norm.fits(rows, module.weight):
        return type(module).forward(module, rows)
    return row_norm.rms_norm(rows, module.weight, _epsilon(module.variance_epsilon))


@functools.cache
def _epsilon(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32, device="cpu")
