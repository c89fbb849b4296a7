"""Reads one expert out of a checkpoint of any layout that transformers can convert.

transformers describes each model's checkpoint by conversions: rename these keys, merge one tensor per expert into a fused one,
transpose, dequantise. They are written for whole fused parameters. Here the same operations run on the tensors of a single
expert, so that a fused parameter never exists. Experts of a quantised checkpoint that stay packed (``packing.py``)
are read as they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel

from epslots.cache.unpacking import assert_consistent, record_views, unpack_record
from epslots.errors import CheckpointError
from epslots.formats.quantise import QUANTISED
from epslots.layout import LayerSpec, PackedForm, PackedMatrix, TensorSpec
from epslots.models.checkpoint import Checkpoint
from epslots.models.conversions import TensorSource, conversions_of, loaded_conversions, match_keys
from epslots.models.experts import parameter_shapes
from epslots.models.experts_interface import expert_rows
from epslots.models.packing import Packing, check_packing, find_packing, formed_matrices, packed_layout, record_tensors
from epslots.models.quantiser import Dequantise, by_matrix


class ExpertReader:
    """Reads single experts of ``layers`` from ``checkpoint``; safe to use from several threads.

    Args:
        checkpoint: the open checkpoint.
        model: the model, whose experts' parameters may be absent; it knows how its checkpoint is converted.
        layers: the MoE layers, from the model; packed ones from ``pack_layers``.
        conversions: the model's conversions; by default those that it was loaded by.
        quantise: how matrices are quantised (``quantise.QUANTISED``); None = they stay as they are stored.

    Raises:
        CheckpointError: keys of some expert are missing, by name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        layers: Sequence[LayerSpec],
        conversions: Sequence[Any] | None = None,
        *,
        quantise: str | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._specs = tuple(layers)
        self._conversions = loaded_conversions(model) if conversions is None else conversions
        self._layers = [
            {tensor.name: TensorSource(f"{layer.name}.{tensor.name}") for tensor in layer.weights.tensors} for layer in layers
        ]
        self._find_keys({source.target: source for sources in self._layers for source in sources.values()})
        for layer, sources in zip(layers, self._layers, strict=True):
            shapes = parameter_shapes(model.get_submodule(layer.name))
            for name, source in sources.items():
                _check_complete(source, checkpoint, shapes[name][0])
        self._quantise = None if quantise is None else QUANTISED[quantise]
        planned = [() if layer.packed is None else layer.packed.matrices for layer in layers]
        self._quantised = [{matrix.name: matrix for matrix in matrices if quantise is not None} for matrices in planned]
        self._packings = [self.packings(i) if quantise is None and matrices else {} for i, matrices in enumerate(planned)]
        for packings, quantised, matrices in zip(self._packings, self._quantised, planned, strict=True):
            found = (*(packing.matrix for packing in packings.values()), *quantised.values())
            assert found == matrices, "packed in another way than planned"

    def packings(self, layer: int) -> dict[str, Packing]:
        """How the tensors of a layer's experts can stay packed, by name."""
        spec, headers, found = self._specs[layer], self._checkpoint.tensors, {}
        for tensor in spec.weights.tensors:
            packing = find_packing(tensor, self._layers[layer][tensor.name], headers, spec.num_experts)
            if packing is not None:
                found[tensor.name] = packing
        return found

    def _find_keys(self, sources: dict[str, TensorSource]) -> None:
        prefix = self._model.base_model_prefix
        for found in match_keys(self._checkpoint.tensors, self._conversions, prefix, dict.fromkeys(sources, True)):
            for part, target in enumerate(found.targets):
                if (source := sources.get(target)) is not None:
                    source.take_part(found, part)

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert's record by name, without the expert dimension.

        Raises:
            CheckpointError: a tensor's shape is not the model's.
        """
        sources, packings, tensors = self._layers[layer], self._packings[layer], {}
        for tensor in self._specs[layer].weights.tensors:
            if tensor.name in packings:
                continue
            value = self._read(layer, tensor, expert)
            matrix = self._quantised[layer].get(tensor.name)
            if matrix is None:
                tensors[tensor.name] = value
            else:
                assert self._quantise is not None
                tensors |= record_tensors(matrix, [self._quantise(value.t() if matrix.transposed else value)])
        for name, packing in packings.items():
            tensors |= packing.read(partial(self._read_pattern, sources[name], expert))
        if packings and expert == 0:
            self._check_packed(layer, tensors)
        return tensors

    def _read_pattern(self, source: TensorSource, expert: int, pattern: str) -> torch.Tensor:
        return self._tensor(source.keys[pattern], expert, merged="*" in pattern)

    def _check_packed(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Compare a layer's first expert, unpacked from its record, with the result of the model's conversions.

        Raises:
            CheckpointError: they differ: the conversions do more than joining rows.
        """
        spec = self._specs[layer]
        record = torch.zeros(spec.layout.nbytes, dtype=torch.uint8)
        for name, view in record_views(record, spec.layout).items():
            view.copy_(tensors[name])
        unpacked = unpack_record(spec, record)
        for tensor in spec.weights.tensors:
            expected, found = self._read(layer, tensor, 0), unpacked[tensor.name]
            if not torch.equal(found.nan_to_num(), expected.to(found.dtype).nan_to_num()):
                raise CheckpointError(f"{spec.name}.{tensor.name}: its packed form stands for other weights than the model's")

    def _read(self, layer: int, tensor: TensorSpec, expert: int) -> torch.Tensor:
        """One expert's tensor, converted by transformers' operations."""
        source, num_experts = self._layers[layer][tensor.name], self._specs[layer].num_experts
        experts = [part * num_experts + expert for part in range(source.parts)]
        converter = source.converter
        rows = 1 if converter is None else expert_rows(converter.operations)
        values: Any = {
            pattern: [self._tensor(keys, e, merged="*" in pattern, rows=rows) for e in experts]
            for pattern, keys in source.keys.items()
        }
        try:
            for operation in converter.operations if converter else ():
                values = operation.convert(
                    values,
                    source_patterns=converter.source_patterns,  # type: ignore[union-attr]
                    target_patterns=converter.target_patterns,  # type: ignore[union-attr]
                    full_layer_name=source.target,
                    model=_OfOneExpert(self._model, tensor.shape),
                    config=self._model.config,
                    missing_keys=None,
                )
            value = list(values.values())[source.part]
            value = value[0] if isinstance(value, list) else value
        except Exception as error:  # a crafted checkpoint can make any line of transformers fail
            raise CheckpointError(f"{source.target}, expert {expert}: can't be converted: {error}") from error
        if tuple(value.shape) != (1, *tensor.shape):
            raise CheckpointError(
                f"{source.target}, expert {expert}: the checkpoint's tensors give shape {list(value.shape[1:])}, the model "
                f"expects {list(tensor.shape)}"
            )
        return value[0]

    def _tensor(self, keys: list[str], expert: int, *, merged: bool, rows: int = 1) -> torch.Tensor:
        """One expert's own tensor, or its slice [rows, ...] of a fused one."""
        key = keys[expert] if merged else keys[0]
        header = self._checkpoint.tensors[key]
        handle = self._checkpoint.handles[header.file]
        return handle.get_tensor(key) if merged else handle.get_slice(key)[expert * rows : (expert + 1) * rows]


class _OfOneExpert:
    """A model whose experts' tensors have one expert: qwen3_vl_moe's conversion turns what isn't of the model's shape."""

    def __init__(self, model: PreTrainedModel, shape: tuple[int, ...]) -> None:
        self._model, self._shape = model, shape

    def get_parameter(self, _: str) -> torch.Tensor:
        return torch.empty(1, *self._shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def pack_layers(checkpoint: Checkpoint, skeleton: PreTrainedModel, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers with their records packed where the checkpoint's quantisation allows it; read only from headers.

    Args:
        checkpoint: the open checkpoint.
        skeleton: the model's structure, on the meta device.
        layers: the MoE layers, from the skeleton.

    Raises:
        CheckpointError: keys of some expert of a quantised checkpoint are missing, by name.
    """
    if getattr(skeleton.config, "quantization_config", None) is None:
        return tuple(layers)
    reader = ExpertReader(checkpoint, skeleton, layers, conversions_of(skeleton))
    return tuple(
        _packed(layer, {name: packing.matrix for name, packing in reader.packings(index).items()})
        for index, layer in enumerate(layers)
    )


def form_layers(
    skeleton: PreTrainedModel, layers: Sequence[LayerSpec], form_of: Callable[[int, int], PackedForm]
) -> tuple[LayerSpec, ...]:
    """The layers with all their matrices packed in one kind of form.

    Args:
        skeleton: the model's structure, on the meta device.
        layers: the MoE layers, from the skeleton.
        form_of: the form of a matrix of so many rows and columns.
    """
    transposed = [bool(skeleton.get_submodule(layer.name).is_transposed) for layer in layers]
    return tuple(
        _packed(layer, formed_matrices(layer.layout, form_of, transposed=turned))
        for layer, turned in zip(layers, transposed, strict=True)
    )


def _packed(layer: LayerSpec, matrices: Mapping[str, PackedMatrix]) -> LayerSpec:
    layout, of_weights = packed_layout(layer.layout, matrices)
    packed = msgspec.structs.replace(layer, layout=layout, packed=of_weights)
    assert_consistent(packed)
    return packed


def _check_complete(source: TensorSource, checkpoint: Checkpoint, declared: int) -> None:
    """Check that the checkpoint has each of a tensor's experts, and no more.

    Raises:
        CheckpointError: naming a missing or superfluous tensor.
    """
    if not source.keys:
        raise CheckpointError(f"the checkpoint has no tensor for {source.target}")
    check_packing(source, checkpoint.tensors)
    if source.converter is not None:
        absent = [p for p in source.converter.source_patterns if p not in source.keys]
        if isinstance(source.converter.operations[0], Dequantise):  # any of a matrix's parts will do: check_packing saw to it
            begun = by_matrix(source.keys)
            absent = [p for p in absent if p.rpartition(".")[0] not in begun]
        if absent:
            raise CheckpointError(f"{source.target}: the checkpoint has no tensor like {absent[0]}")
    experts = source.parts * declared
    for pattern, keys in source.keys.items():
        if "*" not in pattern:
            rows = 1 if source.converter is None else expert_rows(source.converter.operations)
            held = sum(checkpoint.tensors[keys[0]].shape[:1])
            if held != declared * rows:
                raise CheckpointError(f"{keys[0]} holds {held / rows:g} experts, the model has {declared}")
            continue
        place = re.compile(pattern.replace("*", r"(\d+)"))
        matches = (place.search(key) for key in source.renamed[pattern])
        found = {int(m[1]) for m in matches if m}
        missing = sorted(set(range(experts)) - found)
        if missing:
            raise CheckpointError(
                f"{source.target}: the checkpoint lacks expert {', '.join(map(str, missing[:8]))} of {experts} "
                f"(keys like {keys[0]})"
            )
        if len(keys) > len(found):
            raise CheckpointError(f"{source.target}: the checkpoint has some experts under two names, as {keys[0]}")
        if len(found) > experts:
            raise CheckpointError(f"{source.target}: the checkpoint has {len(found)} experts, the model {experts}")
