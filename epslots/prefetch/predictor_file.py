"""A fitted predictor as a file: safetensors with the estimators' tensors, and a description of the fit in its metadata.

The tensors of layer l are ``l.first``, ``l.first_bias``, ``l.second`` and ``l.unlikely`` (``predictor.FittedEstimator``); the
matrices are kept in bfloat16. The metadata holds one JSON object, ``epslots-predictor`` (``PredictorMetadata``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.given_files import write_whole
from epslots.models.experts import experts_modules
from epslots.placement.placement import check_size
from epslots.prefetch.fit import FitQuality, FitSettings
from epslots.prefetch.predictor import HISTORY_ROWS, FittedEstimator, Predictor, RouterEstimator, estimator_dtype
from epslots.prefetch.routers import find_routers, input_size
from epslots.runtime import runtime_of

# Not .safetensors, though it is one: loaders that read all such files of a folder would take it for weights.
PREDICTOR_FILE_NAME = "epslots.predictor"
FORMAT = 1
_KEY = "epslots-predictor"
_PARTS = ("first", "first_bias", "second", "unlikely")
_DTYPES = ("BF16", "F16", "F32", "F64")
_Value = TypeVar("_Value")


class PredictorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The model and text of a predictor's fit, and its quality.

    Attributes:
        checkpoint: digest of the weights' content, ``Runtime.checkpoint``.
        model: name of the model, for messages.
        experts: experts of each MoE layer.
        tokens: tokens of the text.
        quality: of each layer's estimator; None where there is none.
    """

    format: int = FORMAT
    checkpoint: str
    model: str
    experts: list[int]
    tokens: int
    settings: FitSettings
    quality: list[FitQuality | None]


def write_predictor(path: str | os.PathLike[str], fits: Sequence[FittedEstimator | None], metadata: PredictorMetadata) -> None:
    """Write a predictor; the file appears whole or not at all.

    Raises:
        ConfigError: it can't be written.
    """
    tensors = {}
    for layer, fitted in enumerate(fits):
        if fitted is not None:
            tensors[f"{layer}.first"] = fitted.first.to("cpu", torch.bfloat16).contiguous()
            tensors[f"{layer}.first_bias"] = fitted.first_bias.to("cpu", torch.float32).contiguous()
            tensors[f"{layer}.second"] = fitted.second.to("cpu", torch.bfloat16).contiguous()
            tensors[f"{layer}.unlikely"] = fitted.unlikely_E.to("cpu", torch.float32).contiguous()
    with write_whole(path) as file:
        file.write(save(tensors, metadata={_KEY: msgspec.json.encode(metadata).decode()}))


def read_predictor(path: str | os.PathLike[str]) -> tuple[list[FittedEstimator | None], PredictorMetadata]:
    """The estimators in a file by layer, and their metadata.

    Raises:
        ConfigError: no such file, or no sound predictor.
    """
    tensors, metadata = _open(path, lambda file, key: file.get_tensor(key))
    return [_estimator(os.fspath(path), tensors, layer, metadata) for layer in range(len(metadata.experts))], metadata


def file_bytes(path: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> tuple[int, PredictorMetadata]:
    """Device bytes of a predictor beside a model of ``dtype``, history included; and its metadata. Reads only the header.

    Raises:
        ConfigError: no such file, or no predictor.
    """
    shapes, metadata = _open(path, lambda file, key: tuple(file.get_slice(key).get_shape()))
    item = estimator_dtype(device, dtype).itemsize
    total = sum(math.prod(shape) * (4 if key.endswith(".unlikely") else item) for key, shape in shapes.items())
    for layer, quality in enumerate(metadata.quality):
        if quality is not None and quality.history:
            width = shapes.get(f"{layer}.first", ())[1:2]
            total += HISTORY_ROWS * sum(width) // 2 * item  # a file without such a tensor is refused when it is loaded
    return total, metadata


def _open(path: str | os.PathLike[str], get: Callable[[Any, str], _Value]) -> tuple[dict[str, _Value], PredictorMetadata]:
    """The result of ``get(file, key)`` for each of a predictor's tensors, and its metadata.

    Raises:
        ConfigError: no such file, or no predictor.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise ConfigError(f"no predictor at {name}: no such file; `epslots predict fit` makes one")
    try:
        with safe_open(path, "pt") as file:
            # Before any tensor is read: another file's may be as large as a model.
            metadata = _read_metadata(name, (file.metadata() or {}).get(_KEY))
            own = {f"{layer}.{part}" for layer in range(len(metadata.experts)) for part in _PARTS}
            values = {}
            for key in own.intersection(file.keys()):
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise ConfigError(f"{name} is not a predictor: its tensor {key} is {dtype}; allowed: {', '.join(_DTYPES)}")
                values[key] = get(file, key)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{name} is not a predictor: {error}") from error
    return values, metadata


def _read_metadata(name: str, text: str | None) -> PredictorMetadata:
    """A file's metadata, checked.

    Raises:
        ConfigError: there is none, or it is no predictor's.
    """
    if text is None:
        raise ConfigError(f"{name} is not a predictor: its metadata has no {_KEY!r}")
    try:
        metadata = msgspec.json.decode(text, type=PredictorMetadata)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{name} is not a predictor: {error}") from error
    if metadata.format != FORMAT:
        raise ConfigError(f"{name} has format {metadata.format}; allowed: {FORMAT}")
    if len(metadata.quality) != len(metadata.experts):
        raise ConfigError(f"{name} is not a predictor: {len(metadata.quality)} qualities for {len(metadata.experts)} layers")
    if min(metadata.experts, default=0) < 1 or metadata.settings.distance < 1:
        raise ConfigError(
            f"{name} is not a predictor: layers of {str(metadata.experts)[:80]} experts, {metadata.settings.distance} layers "
            f"ahead; allowed: 1 and more of each"
        )
    check_size(len(metadata.experts), 1, max(metadata.experts))
    return metadata


def load_predictor(path: str | os.PathLike[str], model: PreTrainedModel) -> Predictor:
    """The predictor in a file, on the device of a model that ``epslots.load`` returned.

    Raises:
        ConfigError: no sound predictor, or one of another checkpoint.
    """
    runtime = runtime_of(model)
    fits, metadata = read_predictor(path)
    if metadata.checkpoint != runtime.checkpoint:
        raise ConfigError(
            f"{os.fspath(path)} was fitted to another checkpoint ({metadata.model}, content {metadata.checkpoint}; this one "
            f"has {runtime.checkpoint}): fit it anew with `epslots predict fit --model ...`"
        )
    experts = [layer.num_experts for layer in runtime.layers]
    if experts != metadata.experts:
        raise ConfigError(f"{os.fspath(path)} predicts layers with {metadata.experts} experts; this model has {experts}")
    if metadata.settings.distance != Predictor.lookahead:
        raise ConfigError(f"{os.fspath(path)} looks {metadata.settings.distance} layers ahead; allowed: {Predictor.lookahead}")
    sizes = [input_size(module) for module in experts_modules(model).values()]
    for layer, fitted in enumerate(fits):
        wanted = 0 if fitted is None else fitted.first.shape[1] // (2 if fitted.history else 1)
        if fitted is not None and wanted != sizes[layer]:
            raise ConfigError(
                f"{os.fspath(path)}: layer {layer} wants rows of {wanted}, and the model's are of {sizes[layer]}"
            )
    return Predictor(fits, experts, model.device, model.dtype)


def router_predictor(model: PreTrainedModel) -> Predictor:
    """A predictor of the model's own routers, without a fit. Layers whose router is no linear map aren't predicted.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
    """
    runtime = runtime_of(model)
    estimators = _router_estimators(model, estimator_dtype(model.device, model.dtype), runtime.plan.shape.top_k)
    return Predictor(estimators, [layer.num_experts for layer in runtime.layers], model.device, model.dtype)


def router_predictor_bytes(skeleton: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> int:
    """Device bytes of ``router_predictor`` beside a model of ``dtype``; weights shared with the model don't count.

    Args:
        skeleton: the model, on the meta device.
    """
    kept = estimator_dtype(device, dtype)
    own = [parameter.untyped_storage() for parameter in skeleton.parameters()]

    def is_own(tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage() is storage for storage in own)

    total = 0
    for estimator in _router_estimators(skeleton, kept, top_k=1):
        if estimator is not None:
            weight, bias = estimator.router.weight_EH, estimator.router.bias_E
            total += 0 if is_own(bias) else bias.nbytes
            # On a CPU it is copied into column-major order.
            total += 0 if is_own(weight) and device.type != "cpu" else weight.nbytes
    return total


def _router_estimators(model: PreTrainedModel, dtype: torch.dtype, top_k: int) -> list[RouterEstimator | None]:
    """For each MoE layer the router of the next one; None where there is none that takes this layer's input."""
    modules = experts_modules(model)
    routers, sizes = find_routers(model, modules, dtype), [input_size(module) for module in modules.values()]
    estimators: list[RouterEstimator | None] = [None] * len(routers)
    for layer, router in enumerate(routers[Predictor.lookahead :]):
        if router is not None and router.weight_EH.shape[1] == sizes[layer]:
            estimators[layer] = RouterEstimator(router, top_k)
    return estimators


def _estimator(
    name: str, tensors: Mapping[str, torch.Tensor], layer: int, metadata: PredictorMetadata
) -> FittedEstimator | None:
    """One layer's estimator, its tensors checked against each other.

    Raises:
        ConfigError: they don't fit together.
    """
    quality = metadata.quality[layer]
    if quality is None:
        return None
    try:
        first, bias, second, unlikely_E = (tensors[f"{layer}.{part}"] for part in _PARTS)
    except KeyError as error:
        raise ConfigError(f"{name} is not a predictor: it has no tensor {error}") from error
    dims = (first.dim(), bias.dim(), second.dim(), unlikely_E.dim())
    finite = all(bool(t.isfinite().all()) for t in (first, bias, second, unlikely_E))
    if (
        not finite
        or dims != (2, 1, 2, 1)
        or not len(first) == len(bias) == sum(second.shape)
        or second.shape[1] != len(unlikely_E)
    ):
        shapes = ", ".join(str(list(t.shape)) for t in (first, bias, second, unlikely_E))
        raise ConfigError(f"{name} is not a predictor: the tensors of layer {layer} ({shapes}) don't fit together")
    following = layer + metadata.settings.distance
    if metadata.settings.distance == 1:
        following %= len(metadata.experts)  # the first, with the next token
    if (
        following >= len(metadata.experts)
        or second.shape[1] < metadata.experts[following]
        or (quality.history and first.shape[1] % 2)
    ):
        raise ConfigError(f"{name} is not a predictor: layer {layer} predicts {second.shape[1]} experts, which no layer has")
    return FittedEstimator(first, bias, second, unlikely_E, quality.history)
