"""transformers' experts modules: finding them, removing their weights, and replacing their forward pass.

transformers routes the experts of most MoE models through one interface: ``fn(experts_module, hidden_states, top_k_index,
top_k_weights)``, chosen by name. epslots registers itself there. The experts' weights never become parameters of the model: a
subclass made on the fly removes them before anything is loaded, so that transformers loads only the dense part.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from epslots.errors import UnsupportedModelError
from epslots.layout import LayerSpec, RecordLayout
from epslots.models.experts_interface import bring_to_interface, is_experts

# Attribute of an experts module: its tensors' shapes.
SPEC = "epslots_spec"
# Classes that are called experts and stay dense: every token uses them, or they belong to attention (jetmoe).
_STAYS = re.compile("Shared|^JetMoeParallelExperts$")


def num_weighted_experts(module: nn.Module) -> int:
    """Experts that have weights: higher ids have none (longcat_flash's identity experts)."""
    return min(shape[0] for shape in parameter_shapes(module).values())


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes [E, ...] of the module's own weights, present or removed."""
    taken: dict[str, tuple[int, ...]] | None = getattr(module, SPEC, None)
    return taken or {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}


def _remove_weights(module: nn.Module) -> None:
    """Replace the module's own parameters by plain meta tensors.

    They are then no part of the state dict, so their checkpoint keys are "unexpected" and never read, while code that needs
    their shape or dtype still finds them.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    setattr(module, SPEC, {name: tuple(p.shape) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        del module._parameters[name]
        setattr(module, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def dense_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of ``model_class`` whose instances have no expert weights.

    It keeps the name and module of the original: transformers looks up checkpoint conversions by them.
    """

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for module in list(self.modules()):
            bring_to_interface(module)
        for module in self.modules():
            if is_experts(module):
                _remove_weights(module)

    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            "this model holds no expert weights, they are in epslots' host store: copy the original checkpoint instead"
        )

    namespace = {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), namespace)


def experts_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The model's experts modules by path, in the order in which they run.

    Raises:
        UnsupportedModelError: there are none, or some experts don't go through the interface.
    """
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    name = type(model).__name__
    outside = {type(module).__name__ for module in model.modules() if _is_outside_interface(module)}
    if outside:
        raise UnsupportedModelError(
            f"{name} runs its experts in {', '.join(sorted(outside))}, which transformers doesn't route through its "
            f"experts interface (ALL_EXPERTS_FUNCTIONS), so they can't be run from slots. Use a transformers version in "
            f"which that class is decorated with @use_experts_implementation, or run the model with plain transformers"
        )
    if not found:
        raise UnsupportedModelError(
            f"{name} has no experts: it is a dense model, and slots would bring it nothing. Run it with plain transformers"
        )
    return found


def _is_outside_interface(module: nn.Module) -> bool:
    """Whether routed experts, by transformers' names for them, don't go through the interface."""
    name = type(module).__name__
    has_weights = any(True for _ in module.parameters())
    return name.endswith("Experts") and not _STAYS.search(name) and has_weights and not is_experts(module)


def expert_layers(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """The model's MoE layers in order, only from its structure; the model may be on the meta device.

    Raises:
        UnsupportedModelError: there are none, or some experts don't go through transformers' interface.
    """
    return tuple(_layer_spec(name, module) for name, module in experts_modules(model).items())


def _layer_spec(name: str, module: nn.Module) -> LayerSpec:
    layout = RecordLayout.of(
        (parameter, shape[1:], str(getattr(module, parameter).dtype).removeprefix("torch."))
        for parameter, shape in parameter_shapes(module).items()
    )
    return LayerSpec(name, num_weighted_experts(module), layout)
