"""Rotary embeddings whose angles depend on the batch's longest sequence: finding and resetting them.

Some choose their frequencies, or a scale, by the largest position of the forward pass (transformers' ``longrope`` and
``dynamic``, and phimoe's own scale). A request would get other tokens beside a longer one, or with its prompt in chunks. They
are found by comparing the angles of the same positions with and without a far one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Every threshold lies between these two positions: the second is farther than any context.
_NEAR = 4
_FAR = 2**30


def depends_on_length(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's rotary embeddings that give a position other angles beside a far one."""
    return [module for module in _rotaries(model) if _depends(module, model.device)]


def forget_length(module: nn.Module, forward: Callable[..., Any], device: torch.device) -> None:
    """Reset a rotary embedding, by its ``forward``, to its state for a short sequence."""
    for kind in _kinds(module):
        _angles(forward, torch.zeros(1, 1, dtype=torch.int64, device=device), kind)


def _rotaries(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that turn positions into angles: they hold frequencies and take positions."""
    return [
        module
        for module in model.get_decoder().modules()
        if any("inv_freq" in name for name in (*module._buffers, *vars(module)))
        and "position_ids" in inspect.signature(module.forward).parameters
    ]


def _depends(module: Any, device: torch.device) -> bool:
    if device.type == "meta":  # without frequencies, which follow from the configuration
        module, device = type(module)(module.config), torch.device("cpu")
    near = torch.arange(_NEAR + 1, device=device)[None]
    far = near.clone()
    far[0, -1] = _FAR
    for kind in _kinds(module):
        probe = copy.deepcopy(module)  # a call may change it
        # Both have the same shape, so that both are computed alike to the last bit.
        alone, with_far = ([part[..., :_NEAR, :] for part in _angles(probe, positions, kind)] for positions in (near, far))
        if not all(torch.equal(one, other) for one, other in zip(alone, with_far, strict=True)):
            return True
    return False


def _kinds(module: nn.Module) -> list[str | None]:
    """The layer types for which a rotary embedding has frequencies of its own; None = one for all."""
    kinds = getattr(module, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


@torch.no_grad()
def _angles(module: Callable[..., Any], positions: torch.Tensor, kind: str | None) -> tuple[torch.Tensor, ...]:
    """Cosines and sines [..., T, any] of positions [1, T]."""
    like = torch.zeros(1, device=positions.device)  # only its dtype and device are used
    kinds = {} if kind is None else {"layer_type": kind}
    try:
        found = module(like, position_ids=positions, **kinds)
    except (ValueError, RuntimeError, IndexError):  # with an axis for each of time, height and width
        found = module(like, position_ids=positions.expand(3, *positions.shape), **kinds)
    return found if isinstance(found, tuple) else (found,)
