"""The model's rotary embeddings on the CPU by ``row_rotation.py``, which makes one operation of torch's fourteen.

Most architectures of transformers have their own copy of Llama's functions, which their attention finds among its module's
names; others turn a part of each head. Functions are these if their code is the same. Only instances of a loaded model change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.llama import modeling_llama

from epslots.models.same_code import code_of
from epslots.moe import row_rotation

_NAME, _HALF = "apply_rotary_pos_emb", "rotate_half"
# Of whole heads, and of a part of each.
_KNOWN = [{name: code_of(vars(module)[name]) for name in (_NAME, _HALF)} for module in (modeling_llama, modeling_glm4_moe)]

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def rotate_in_place(model: nn.Module) -> None:
    """Let the model's attention turn its queries and keys in one pass from now on."""
    for module in model.modules():
        function: Any = type(module).forward
        if isinstance(function, FunctionType) and "forward" not in vars(module) and (rotating := _rotating(function)):
            setattr(module, "forward", MethodType(rotating, module))  # noqa: B010 - a method to mypy


@functools.cache
def _rotating(forward: FunctionType) -> FunctionType | None:
    """The function with our rotation in place of its module's; None if it has none, or another."""
    names = forward.__globals__
    if _NAME not in forward.__code__.co_names or forward.__closure__ is not None or not _is_known(names):
        return None
    ours = FunctionType(forward.__code__, {**names, _NAME: _rotation(names[_NAME])}, forward.__name__, forward.__defaults__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _is_known(names: dict[str, Any]) -> bool:
    return any(_has(names, known) for known in _KNOWN)


def turns_whole_heads(module: nn.Module) -> bool:
    """Whether a module's ``forward`` is what ``rotate_in_place`` has made of its class's, with Llama's rotation."""
    function, forward = type(module).forward, vars(module).get("forward")
    if not isinstance(function, FunctionType) or not _has(function.__globals__, _KNOWN[0]):
        return False
    rotating = _rotating(function)
    return rotating is not None and getattr(forward, "__func__", None) is rotating


def _has(names: dict[str, Any], known: dict[str, Any]) -> bool:
    return known == {name: code_of(names.get(name)) for name in (_NAME, _HALF)}


def _rotation(theirs: Rotate) -> Rotate:
    def rotation(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``apply_rotary_pos_emb``."""
        if unsqueeze_dim == 1 and row_rotation.fits(q, k, cos, sin):
            return row_rotation.rotated(q, k, cos, sin)
        return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return rotation
