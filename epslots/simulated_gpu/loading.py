"""Models on simulated GPUs: ``load_simulated`` is ``epslots.load`` there.

transformers fills the dense weights in threads of its own, where no device is simulated: so they are loaded on the CPU, and
moved. The kernels of captured decoding, which are Triton's, are one launch each, with torch's results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from epslots import loading
from epslots.cache import pinning
from epslots.cache.expert_loader import ExpertLoader
from epslots.cuda_graph import decode_graph
from epslots.cuda_graph.device_slots import DeviceLayer, Missing, TorchKernels
from epslots.models import opening
from epslots.simulated_gpu.cuda_api import replaced
from epslots.simulated_gpu.launching import launch_kernel

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


class SimulatedKernels:
    """``Kernels`` whose decision and copy are one launch each, as Triton's are."""

    def __init__(self, loader: ExpertLoader) -> None:
        self._loader, self._torch = loader, TorchKernels(loader)

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        state = [layer.slot_of_E, layer.expert_of_Q, layer.last_use_E, layer.decayed_DE, layer.step, layer.tally_3]
        writes = [*state, missing.expert_M, missing.slot_M, missing.count]
        twin = self._torch
        reads = [ids_N, layer.factors_D]
        launch_kernel("decide", twin.decide, layer, ids_N, missing, reads=reads, writes=writes)

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        pool, store = self._loader.pool, self._loader.store
        slot_range = pool.memory[pool.slot_range(layer.number)]
        store_layer = self._loader.store_layers[layer.number]

        def copy_records(experts_M: torch.Tensor, slots_M: torch.Tensor, count: torch.Tensor, memory: torch.Tensor) -> None:
            for expert, slot in list(zip(experts_M.tolist(), slots_M.tolist(), strict=True))[: int(count)]:
                memory[slot - layer.start].copy_(store.record(store_layer, expert))

        arguments = missing.expert_M, missing.slot_M, missing.count, slot_range
        launch_kernel("copy_missing", copy_records, *arguments, reads=arguments[:3], writes=[slot_range])


@contextmanager
def simulated_kernels() -> Iterator[None]:
    """Let captured decoding use ``SimulatedKernels``."""
    with replaced(decode_graph, "kernels_for", SimulatedKernels):
        yield
