"""A fitted predictor as a file: safetensors with the estimators' tensors, and in its metadata what they were fitted to.

Tensors of layer l are called ``l.first``, ``l.first_bias``, ``l.second`` and ``l.unlikely`` (see ``predictor.Fitted``); the
matrices are kept in bfloat16. The metadata holds one JSON object, ``epslots-predictor`` (``About``).
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
from epslots.models.experts import experts_modules
from epslots.placement.placement import check_size
from epslots.prefetch.fit import Quality, Settings
from epslots.prefetch.predictor import KEPT_ROWS, Fitted, Naive, Predictor, dtype_on
from epslots.prefetch.routers import find_routers, input_size
from epslots.runtime import runtime_of

# Not .safetensors, though it is one: loaders that take all of a folder would take it for weights.
FILE_NAME = "epslots.predictor"
FORMAT = 1
_KEY = "epslots-predictor"
_PARTS = ("first", "first_bias", "second", "unlikely")
_DTYPES = ("BF16", "F16", "F32", "F64")
_Taken = TypeVar("_Taken")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a predictor was fitted to, and how well it did.

    Attributes:
        checkpoint: ``Runtime.checkpoint``, the digest of the weights' content.
        model: what to call these.
        experts: experts of each MoE layer.
        tokens: text that it was fitted on.
        quality: of each layer's estimator; None where there is none.
    """

    format: int = FORMAT
    checkpoint: str
    model: str
    experts: list[int]
    tokens: int
    settings: Settings
    quality: list[Quality | None]


def write_predictor(path: str | os.PathLike[str], fits: Sequence[Fitted | None], about: About) -> None:
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
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata={_KEY: msgspec.json.encode(about).decode()}))
        temporary.replace(target)
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_predictor(path: str | os.PathLike[str]) -> tuple[list[Fitted | None], About]:
    """The estimators in a file by layer, and what it says of them.

    Raises:
        ConfigError: no such file, or no sound predictor.
    """
    tensors, about = _open(path, lambda file, key: file.get_tensor(key))
    return [_fitted(os.fspath(path), tensors, layer, about) for layer in range(len(about.experts))], about


def file_bytes(path: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> tuple[int, About]:
    """What a predictor in a file will take on the device of a model of ``dtype``, rows kept included; from its header alone.

    Raises:
        ConfigError: no such file, or no predictor.
    """
    shapes, about = _open(path, lambda file, key: tuple(file.get_slice(key).get_shape()))
    item = dtype_on(device, dtype).itemsize
    total = sum(math.prod(shape) * (4 if key.endswith(".unlikely") else item) for key, shape in shapes.items())
    for layer, quality in enumerate(about.quality):
        if quality is not None and quality.history:
            width = shapes.get(f"{layer}.first", ())[1:2]
            total += KEPT_ROWS * sum(width) // 2 * item  # a file without such a tensor is refused when it is loaded
    return total, about


def _open(path: str | os.PathLike[str], take: Callable[[Any, str], _Taken]) -> tuple[dict[str, _Taken], About]:
    """What is taken of each tensor in a file, and what the file says of them.

    Raises:
        ConfigError: no such file, or no predictor.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise ConfigError(f"no predictor at {name}: no such file; `epslots predict fit` makes one")
    try:
        with safe_open(path, "pt") as file:
            # First of all: another file's tensors may be as large as a model.
            about = _read_about(name, (file.metadata() or {}).get(_KEY))
            own = {f"{layer}.{part}" for layer in range(len(about.experts)) for part in _PARTS}
            taken = {}
            for key in own.intersection(file.keys()):
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise ConfigError(f"{name} is not a predictor: its tensor {key} is {dtype}; allowed: {', '.join(_DTYPES)}")
                taken[key] = take(file, key)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{name} is not a predictor: {error}") from error
    return taken, about


def _read_about(name: str, text: str | None) -> About:
    """What a file says of itself, checked.

    Raises:
        ConfigError: nothing, or what can't be.
    """
    if text is None:
        raise ConfigError(f"{name} is not a predictor: its metadata has no {_KEY!r}")
    try:
        about = msgspec.json.decode(text, type=About)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{name} is not a predictor: {error}") from error
    if about.format != FORMAT:
        raise ConfigError(f"{name} has format {about.format}; allowed: {FORMAT}")
    if len(about.quality) != len(about.experts):
        raise ConfigError(f"{name} is not a predictor: {len(about.quality)} qualities for {len(about.experts)} layers")
    if min(about.experts, default=0) < 1 or about.settings.distance < 1:
        raise ConfigError(
            f"{name} is not a predictor: layers of {str(about.experts)[:80]} experts, {about.settings.distance} layers ahead; "
            f"allowed: 1 and more of each"
        )
    check_size(len(about.experts), 1, max(about.experts))
    return about


def load_predictor(path: str | os.PathLike[str], model: PreTrainedModel) -> Predictor:
    """The predictor in a file, ready to run beside a model that ``epslots.load`` returned.

    Raises:
        ConfigError: no sound predictor, or one of another checkpoint.
    """
    runtime = runtime_of(model)
    fits, about = read_predictor(path)
    if about.checkpoint != runtime.checkpoint:
        raise ConfigError(
            f"{os.fspath(path)} was fitted to another checkpoint ({about.model}, content {about.checkpoint}; this one has "
            f"{runtime.checkpoint}): fit it anew with `epslots predict fit --model ...`"
        )
    experts = [layer.num_experts for layer in runtime.layers]
    if experts != about.experts:
        raise ConfigError(f"{os.fspath(path)} tells of layers with {about.experts} experts; this model has {experts}")
    if about.settings.distance != Predictor.lookahead:
        raise ConfigError(f"{os.fspath(path)} looks {about.settings.distance} layers ahead; allowed: {Predictor.lookahead}")
    sizes = [input_size(module) for module in experts_modules(model).values()]
    for layer, fitted in enumerate(fits):
        wanted = 0 if fitted is None else fitted.first.shape[1] // (2 if fitted.history else 1)
        if fitted is not None and wanted != sizes[layer]:
            raise ConfigError(
                f"{os.fspath(path)}: layer {layer} wants rows of {wanted}, and the model's are of {sizes[layer]}"
            )
    return Predictor(fits, experts, model.device, model.dtype)


def naive_predictor(model: PreTrainedModel) -> Predictor:
    """The next layers' routers, for a model that nobody has fitted a predictor to; layers without a router that can be applied
    elsewhere aren't told of.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
    """
    runtime = runtime_of(model)
    estimators = _naive(model, dtype_on(model.device, model.dtype), runtime.plan.shape.top_k)
    return Predictor(estimators, [layer.num_experts for layer in runtime.layers], model.device, model.dtype)


def naive_bytes(skeleton: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> int:
    """What ``naive_predictor`` will take on the device of a model of ``dtype``, beside the model.

    Args:
        skeleton: the model, on the meta device.
    """
    kept = dtype_on(device, dtype)
    own = [parameter.untyped_storage() for parameter in skeleton.parameters()]

    def is_own(tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage() is storage for storage in own)

    total = 0
    for estimator in _naive(skeleton, kept, top_k=1):
        if estimator is not None:
            weight, bias = estimator.router.weight_EH, estimator.router.bias_E
            total += 0 if is_own(bias) else bias.nbytes
            # A CPU has it in an order of its own.
            total += 0 if is_own(weight) and device.type != "cpu" else weight.nbytes
    return total


def _naive(model: PreTrainedModel, dtype: torch.dtype, top_k: int) -> list[Naive | None]:
    """For each MoE layer the router of the next, where there is one that takes what this layer is given."""
    modules = experts_modules(model)
    routers, sizes = find_routers(model, modules, dtype), [input_size(module) for module in modules.values()]
    estimators: list[Naive | None] = [None] * len(routers)
    for layer, router in enumerate(routers[Predictor.lookahead :]):
        if router is not None and router.weight_EH.shape[1] == sizes[layer]:
            estimators[layer] = Naive(router, top_k)
    return estimators


def _fitted(name: str, tensors: Mapping[str, torch.Tensor], layer: int, about: About) -> Fitted | None:
    """One layer's estimator, its tensors checked against each other.

    Raises:
        ConfigError: they don't fit together.
    """
    quality = about.quality[layer]
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
    following = layer + about.settings.distance
    if about.settings.distance == 1:
        following %= len(about.experts)  # the first, with the next token
    if (
        following >= len(about.experts)
        or second.shape[1] < about.experts[following]
        or (quality.history and first.shape[1] % 2)
    ):
        raise ConfigError(f"{name} is not a predictor: layer {layer} tells of {second.shape[1]} experts, which no layer has")
    return Fitted(first, bias, second, unlikely_E, quality.history)
