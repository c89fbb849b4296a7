"""One expert out of a checkpoint of any layout that transformers can convert.

transformers describes each model's checkpoint by conversions: rename these keys, merge one tensor per expert into a fused
one, transpose, dequantise. They are written for whole fused parameters. Here the same operations run on the tensors of a
single expert, so that a fused parameter never exists.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from epslots.checkpoint import Checkpoint
from epslots.errors import CheckpointError
from epslots.experts import parameter_shapes
from epslots.records import LayerSpec

# What safetensors calls the dtypes that mean nothing without scales.
PACKED_DTYPES = {"F8_E4M3", "F8_E5M2", "U8", "I8"}


@dataclass
class _Parameter:
    """One fused parameter of an experts module, and the checkpoint keys that it is made from.

    Attributes:
        keys: by the converter's source pattern, in expert order; a single key where the checkpoint is fused already.
        part, parts: a converter may deal one list of experts out to several parameters, in equal runs (ernie4_5_vl_moe: first
            the text experts, then the vision experts); this parameter takes run ``part`` of ``parts``.
    """

    target: str
    shape: tuple[int, ...]
    converter: WeightConverter | None = None
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    part: int = 0
    parts: int = 1


class ExpertReader:
    """Reads single experts of ``layers`` from ``checkpoint``; safe to use from several threads.

    Args:
        checkpoint: the open checkpoint.
        model: the model, whose experts' parameters may be absent; it knows how its checkpoint is converted.
        layers: the MoE layers, as the model defines them.

    Raises:
        CheckpointError: keys of some expert are missing, by name.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, layers: Sequence[LayerSpec]) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._layers = [
            {t.name: _Parameter(f"{layer.name}.{t.name}", (layer.num_experts, *t.shape)) for t in layer.layout.tensors}
            for layer in layers
        ]
        self._find_keys({p.target: p for parameters in self._layers for p in parameters.values()})
        for layer, parameters in zip(layers, self._layers, strict=True):
            for parameter in parameters.values():
                declared = parameter_shapes(model.get_submodule(layer.name))[parameter.target.rpartition(".")[2]][0]
                _check_complete(parameter, checkpoint, declared)

    def _find_keys(self, parameters: dict[str, _Parameter]) -> None:
        conversions = self._model._weight_conversions
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        # rename_source_key looks here to decide whether a prefix must be added or dropped.
        wanted: dict[str, Any] = dict.fromkeys(parameters, True)
        prefix = self._model.base_model_prefix
        for key in sorted(self._checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            converter = by_pattern[pattern] if pattern else None
            fragments = converter.target_patterns if converter else [target]
            for part, fragment in enumerate(fragments):
                parameter = parameters.get(target.replace(fragments[0], fragment))
                if parameter is not None:
                    parameter.keys[pattern or key].append(key)
                    parameter.converter, parameter.part, parameter.parts = converter, part, len(fragments)

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert by name, without the expert dimension.

        Raises:
            CheckpointError: a tensor's shape is not what the model expects.
        """
        return {name: self._read(parameter, expert) for name, parameter in self._layers[layer].items()}

    def _read(self, parameter: _Parameter, expert: int) -> torch.Tensor:
        experts = [part * parameter.shape[0] + expert for part in range(parameter.parts)]
        tensors: Any = {
            pattern: [self._tensor(keys, e, merged="*" in pattern) for e in experts]
            for pattern, keys in parameter.keys.items()
        }
        converter = parameter.converter
        try:
            for operation in converter.operations if converter else ():
                tensors = operation.convert(
                    tensors,
                    source_patterns=converter.source_patterns,  # type: ignore[union-attr]
                    target_patterns=converter.target_patterns,  # type: ignore[union-attr]
                    full_layer_name=parameter.target,
                    model=self._model,
                    config=self._model.config,
                    missing_keys=None,
                )
            tensor = list(tensors.values())[parameter.part]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{parameter.target}, expert {expert}: can't be converted: {error}") from error
        expected = parameter.shape[1:]
        if tuple(tensor.shape) != (1, *expected):
            raise CheckpointError(
                f"{parameter.target}, expert {expert}: the checkpoint's tensors give shape {list(tensor.shape[1:])}, the "
                f"model expects {list(expected)}"
            )
        return tensor[0]

    def _tensor(self, keys: list[str], expert: int, *, merged: bool) -> torch.Tensor:
        """One expert's own tensor, or its slice [1, ...] of a fused one."""
        key = keys[expert] if merged else keys[0]
        header = self._checkpoint.tensors[key]
        handle = self._checkpoint.handles[header.file]
        return handle.get_tensor(key) if merged else handle.get_slice(key)[expert : expert + 1]


def _check_complete(parameter: _Parameter, checkpoint: Checkpoint, declared: int) -> None:
    """Every expert has a tensor for every pattern of the parameter, and there are no more experts than the model declares.

    Raises:
        CheckpointError: naming what is missing or too much.
    """
    if not parameter.keys:
        raise CheckpointError(f"the checkpoint has no tensor for {parameter.target}")
    if parameter.converter is not None:
        packed = any(checkpoint.tensors[keys[0]].dtype in PACKED_DTYPES for keys in parameter.keys.values())
        optional = ("activation_scale",) if packed else ("activation_scale", "weight_scale_inv")
        absent = [p for p in parameter.converter.source_patterns if p not in parameter.keys and not p.endswith(optional)]
        if absent:
            raise CheckpointError(f"{parameter.target}: the checkpoint has no tensor like {absent[0]}")
    experts = parameter.parts * declared
    for pattern, keys in parameter.keys.items():
        if "*" not in pattern:
            held = checkpoint.tensors[keys[0]].shape[0]
            if held != declared:
                raise CheckpointError(f"{keys[0]} holds {held} experts, the model has {declared}")
            continue
        place = re.compile(pattern.replace("*", r"(\d+)"))
        matches = (place.search(key) for key in keys)
        found = {int(m[1]) for m in matches if m}
        missing = sorted(set(range(experts)) - found)
        if missing:
            raise CheckpointError(
                f"{parameter.target}: the checkpoint lacks expert {', '.join(map(str, missing[:8]))} of {experts} "
                f"(keys like {keys[0]})"
            )
        if len(found) > experts:
            raise CheckpointError(f"{parameter.target}: the checkpoint has {len(found)} experts, the model {experts}")
