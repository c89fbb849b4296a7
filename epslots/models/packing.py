"""How experts of a quantised checkpoint stay packed in records and slots, found only from its headers.

A tensor of an experts module can stay packed if it is made of quantised matrices of single experts that are at most joined by
their rows (gate and up), or of one tensor of all experts (gpt-oss). All else, such as transposing, interleaving or dealing
experts out, is converted when the host store is built, and takes whole slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist

from epslots.errors import CheckpointError
from epslots.formats.matrix import Matrix, MissingPart, join
from epslots.layout import PackedForm, PackedLayout, PackedMatrix, RecordLayout, TensorSpec
from epslots.models.checkpoint import FLOATS, TensorHeader
from epslots.models.conversions import TensorSource
from epslots.models.quantiser import Dequantise, by_matrix, module_path

# Weights are products in float32: wider slots would show it.
_COMPUTED = ("float32", "bfloat16", "float16")
_DTYPES = FLOATS | {
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "BOOL": "bool"},
    **{f"{sign}{bits}": f"{name}{bits}" for sign, name in (("U", "uint"), ("I", "int")) for bits in (8, 16, 32, 64)},
}

ReadPattern = Callable[[str], torch.Tensor]
"""Returns one expert's own tensor of a source pattern, or its slice [1, ...] of a fused one."""


@dataclass(frozen=True)
class Packing:
    """How one tensor of a layer's experts is packed.

    Attributes:
        matrix: its layout in the record.
        read: returns one expert's tensors by their names in the record.
    """

    matrix: PackedMatrix
    read: Callable[[ReadPattern], dict[str, torch.Tensor]]


def find_packing(
    spec: TensorSpec, source: TensorSource, headers: Mapping[str, TensorHeader], num_experts: int
) -> Packing | None:
    """How a tensor of a layer's experts can stay packed; None if it can't, or isn't quantised.

    Args:
        spec: the tensor that is computed with.
        source: the checkpoint's keys that it is made from.
        headers: of the checkpoint's tensors.
        num_experts: of the layer.
    """
    converter = source.converter
    if converter is None or spec.dtype not in _COMPUTED or len(spec.shape) != 2:
        return None
    operation, *rest = converter.operations
    if len(converter.target_patterns) != 1 or not isinstance(operation, Dequantise):  # several: experts are dealt out to them
        return None
    fused = operation.format.fused
    if not (not rest if fused else _joins_rows(rest)):
        return None
    patterns = [p for p in converter.source_patterns if p in source.keys]
    if any(("*" in p) == fused for p in patterns):
        return None

    def matrices(read: ReadPattern) -> list[Matrix]:
        found = []
        for head, names in by_matrix(patterns).items():
            parts = {name: read(pattern) for name, pattern in names.items()}
            parts = {name: part[0] for name, part in parts.items()} if fused else parts
            found.append(operation.matrix(parts, module_path(source.target, head)))
        return join(found)

    described = {p: _alike([headers[key] for key in source.keys[p]], 1 if fused else num_experts) for p in patterns}
    if None in described.values():
        return None
    try:
        forms = tuple(one.form for one in matrices(lambda pattern: _described(described[pattern])))
    except ValueError:  # it isn't quantised, or not in a way that is known: check_packing says so
        return None
    matrix = PackedMatrix(spec.name, forms, transposed=fused)
    shape = (sum(form.rows for form in forms), forms[0].columns)
    if (shape[::-1] if fused else shape) != spec.shape or any(form.columns != shape[1] for form in forms):
        return None

    def read_expert(read: ReadPattern) -> dict[str, torch.Tensor]:
        try:
            return record_tensors(matrix, matrices(read))
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source.target}: {error}") from error

    return Packing(matrix, read_expert)


def record_tensors(matrix: PackedMatrix, found: Sequence[Matrix]) -> dict[str, torch.Tensor]:
    """An expert's tensors of a matrix by their names in the record."""
    assert tuple(one.form for one in found) == matrix.forms, f"{matrix.name}: another form was planned"
    return {matrix.tensor(number, part): t for number, one in enumerate(found) for part, t in one.parts.items()}


def check_packing(source: TensorSource, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse packed tensors that nothing unpacks, or that lack a part, and scales of unpacked tensors.

    Args:
        source: a tensor of the model, and the checkpoint's keys that it is made from.
        headers: of the checkpoint's tensors.

    Raises:
        CheckpointError: naming the tensor.
    """
    converter = source.converter
    operation = converter.operations[0] if converter is not None and converter.operations else None
    if not isinstance(operation, Dequantise):
        _check_floats([key for listed in source.keys.values() for key in listed], headers)
        return
    for head, names in by_matrix(source.keys).items():
        scales = [names[name] for name in operation.format.scales if name in names]
        keys = {name: source.keys[pattern] for name, pattern in names.items()}
        if not scales and not (len(names) == 1 and headers[next(iter(keys.values()))[0]].dtype not in FLOATS):
            _check_floats([key for listed in keys.values() for key in listed], headers)
            continue
        plain = next((key for key in keys.get("weight", ()) if headers[key].dtype in FLOATS), None)
        if plain is not None:
            raise CheckpointError(
                f"{source.keys[scales[0]][0]} is a scale, but {plain} is stored as {headers[plain].dtype}, which needs none"
            )
        first = {name: headers[listed[0]] for name, listed in keys.items()}
        if operation.format.fused:
            first = {name: TensorHeader(h.file, h.shape[1:], h.dtype) for name, h in first.items()}
        _check_matrix(operation, source.target, head, first, next(iter(keys.values()))[0])


def _check_floats(keys: Iterable[str], headers: Mapping[str, TensorHeader]) -> None:
    for key in keys:
        if headers[key].dtype not in FLOATS:
            raise CheckpointError(
                f"{key} is stored as {headers[key].dtype}, and config.json has no quantization_config by which it is "
                f"unpacked: its codes would be taken for weights"
            )


def _check_matrix(operation: Dequantise, target: str, head: str, parts: Mapping[str, TensorHeader], key: str) -> None:
    try:
        operation.matrix({name: _described(header) for name, header in parts.items()}, module_path(target, head))
    except MissingPart as error:
        code = next(iter(parts.values()))
        raise CheckpointError(
            f"{target}: the checkpoint has no tensor like {error.name}, and {key} is stored as {code.dtype}"
        ) from error
    except Exception as error:  # of crafted shapes and settings, torch and re may refuse any
        raise CheckpointError(f"{target} can't be unpacked from {key} and its scales: {error}") from error


def packed_layout(layout: RecordLayout, matrices: Mapping[str, PackedMatrix]) -> tuple[RecordLayout, PackedLayout | None]:
    """The layout of records in which these tensors are packed, and what it stands for.

    The given layout and None if no tensor is packed.
    """
    if not matrices:
        return layout, None
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    for spec in layout.tensors:
        matrix = matrices.get(spec.name)
        tensors += [(spec.name, spec.shape, spec.dtype)] if matrix is None else matrix.tensors
    return RecordLayout.of(tensors), PackedLayout(layout, tuple(matrices.values()))


def formed_matrices(
    layout: RecordLayout, form_of: Callable[[int, int], PackedForm], *, transposed: bool
) -> dict[str, PackedMatrix]:
    """The matrices of an expert, all of one kind of form.

    Args:
        layout: of the weights.
        form_of: the form of a matrix of so many rows and columns.
        transposed: whether the module has matrices as [inputs, outputs].
    """
    found = {}
    for spec in layout.tensors:
        if len(spec.shape) == 2 and spec.dtype in _COMPUTED:
            rows, columns = spec.shape[::-1] if transposed else spec.shape
            found[spec.name] = PackedMatrix(spec.name, (form_of(rows, columns),), transposed)
    return found


def _joins_rows(operations: Sequence[Any]) -> bool:
    """Whether these operations stack one matrix per expert, and join at most their rows."""
    if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return False
    joins = operations[1:]
    return not joins or (
        len(joins) == 1
        and type(joins[0]) is Concatenate
        and joins[0].dim == 1
        and getattr(joins[0], "num_shards_attribute", None) is None
    )


def _alike(headers: Iterable[TensorHeader], count: int) -> TensorHeader | None:
    """The one header of all experts' tensors; None if they differ, or an expert has none."""
    listed = list(headers)
    kinds = {(header.shape, header.dtype) for header in listed}
    return listed[0] if len(kinds) == 1 and len(listed) == count else None


def _described(header: TensorHeader | None) -> torch.Tensor:
    """A tensor on the meta device, as its header describes it."""
    assert header is not None
    return torch.empty(header.shape, dtype=getattr(torch, _DTYPES.get(header.dtype, "uint8")), device="meta")
