"""Models on simulated GPUs: ``load_simulated`` is ``epslots.load`` there.

transformers fills the dense weights in threads of its own, where no device is simulated: so they are loaded on the CPU, and
moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from epslots import loading
from epslots.cache import pinning
from epslots.models import opening
from epslots.simulated_gpu.cuda_api import replaced

_load_dense = opening.load_dense


def load_simulated(path: Any, **settings: Any) -> PreTrainedModel:
    """``epslots.load`` onto a simulated GPU: arguments and errors are the same. For use within ``simulated_gpus``."""
    with replaced(loading, "load_dense", _load_dense_simulated), replaced(pinning, "_unpin", _unpin):
        given: dict[str, Any] = {"device": "cuda", "progress": False} | settings
        return loading.load(path, **given)


def _unpin(runtime: Any, _memory: torch.Tensor, pinned: list[int], *_: Any) -> None:
    """Without the device, which may be gone when the store is."""
    for address in pinned:
        runtime.cudaHostUnregister(address)


def _load_dense_simulated(*arguments: Any, device: torch.device, **settings: Any) -> PreTrainedModel:
    model = _load_dense(*arguments, device=torch.device("cpu"), **settings)
    return model if device.type == "cpu" else move(model, device)


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model's weights to a simulated GPU."""
    moved: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "cpu":
                found = moved.setdefault(id(parameter), parameter.detach())
                if found.device.type == "cpu":
                    found = moved[id(parameter)] = nn.Parameter(found.to(device), requires_grad=False)
                module._parameters[name] = found
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                module._buffers[name] = buffer.to(device)
    return model
