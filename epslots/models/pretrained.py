"""A checkpoint's configuration: class, dtype, quantisation, and the model's structure without weights."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from epslots.errors import CheckpointError, ConfigError, EpslotsError, UnsupportedModelError
from epslots.formats.known_formats import find_format
from epslots.layout import ITEM_BYTES
from epslots.models.config_check import check_numbers, refusing
from epslots.models.experts import dense_class
from epslots.models.experts_interface import IMPLEMENTATION
from epslots.models.json_file import read_json_object
from epslots.models.own_models import own_class, own_config
from epslots.models.quantiser import stated

# Tensors of a model made from one of its checkpoint, at most: one that holds queries, keys and values makes three.
MAX_TENSORS_FROM_ONE = 8


def read_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's configuration; a quantised one is set to be dequantised on loading.

    Raises:
        CheckpointError: config.json is missing or unreadable, has impossible settings, or names other weight files.
        UnsupportedModelError: transformers doesn't know the model without running code from the checkpoint, or the
            quantisation is not one of ``known_formats.FORMATS``.
    """
    path = folder / "config.json"
    with refusing(str(folder)):  # this user may not be allowed to read it
        has_adapter, has_config = (folder / "adapter_config.json").exists(), path.is_file()
        if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
            find_format({"quant_method": "gguf"}, folder)  # refuses it
    if has_adapter:
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which epslots doesn't apply: merge it into the weights, or "
            f"move it elsewhere"
        )
    if not has_config:
        raise CheckpointError(f"{folder} holds no config.json: it is not a checkpoint folder")
    settings = read_json_object(path)
    check_numbers(settings, path)
    if settings.get("transformers_weights") is not None:
        raise CheckpointError(f"{path} names its weight files (transformers_weights); epslots reads those of the usual names")
    with refusing(str(path)):
        try:
            config = own_config(settings, str(folder)) or AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except EpslotsError:
            raise
        except Exception as error:
            if "trust_remote_code" in str(error) or "auto_map" in settings:
                raise UnsupportedModelError(
                    f"{folder} brings its own model code, and epslots never runs code from a checkpoint; use a model that "
                    f"transformers {transformers.__version__} knows"
                ) from error
            raise
        # Where transformers looks for it. From here on it applies to the whole model of a composite configuration.
        text = config.get_text_config(decoder=True)
        places = (getattr(config, "quantization_config", None), getattr(text, "quantization_config", None))
        quantisation = next((found for found in places if found is not None), None)
        quantisation = _modelopt_settings(folder) if quantisation is None else quantisation
    if quantisation is not None:
        if not isinstance(quantisation, dict):
            raise CheckpointError(f"{path}: quantization_config is {quantisation!r}, not an object")
        with refusing(f"{path}, quantization_config"):
            find_format(quantisation, folder)
        config.quantization_config = stated(quantisation)
    return config


def _modelopt_settings(folder: Path) -> dict[str, Any] | None:
    """The quantisation that older versions of modelopt state in a file of its own; None if there is none."""
    path = folder / "hf_quant_config.json"
    settings = read_json_object(path).get("quantization") if path.is_file() else None
    return {"quant_method": "modelopt", **settings} if isinstance(settings, dict) else None


def resolve_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that the checkpoint names, made to load without expert weights.

    Raises:
        CheckpointError: ``architectures`` is no list of names, or names the class of another ``model_type``.
        UnsupportedModelError: transformers has no such class.
    """
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{config.name_or_path}: architectures is {names!r}, not a list of names")
    known = [getattr(transformers, name, None) or own_class(name) for name in names]
    if not names:  # a configuration made by hand: its language model
        known = [AutoModelForCausalLM._model_mapping.get(type(config), None)]
    classes = [c for c in known if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    if not classes:
        raise UnsupportedModelError(
            f"the configuration ({config.model_type}) names the architecture {', '.join(names) or '(none)'}, which "
            f"transformers {transformers.__version__} doesn't have"
        )
    # As transformers' auto classes choose it; a composite configuration may be given to its text model's class.
    own = AutoModelForCausalLM._model_mapping.get(type(config), None)
    expected = getattr(classes[0], "config_class", None) or PretrainedConfig
    if classes[0] is not own and not any(isinstance(c, expected) for c in (config, config.get_text_config(decoder=True))):
        raise CheckpointError(
            f"{config.name_or_path}: config.json names the architecture {classes[0].__name__}, which is none of model_type "
            f"{config.model_type}"
        )
    return dense_class(classes[0])


def has_language_head(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether a model, or a class, predicts tokens; base models and classifiers don't."""
    return model.can_generate()


def read_language_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checkpoint whose model predicts tokens; checked before anything is loaded.

    Raises:
        CheckpointError: config.json is missing or unreadable, has impossible settings, or names other weight files.
        UnsupportedModelError: transformers doesn't know the model, its quantisation can't be read, or it has no language-model
            head.
    """
    config = read_config(folder)
    model_class = resolve_class(config)
    if not has_language_head(model_class):
        raise UnsupportedModelError(
            f"{folder} holds a {model_class.__name__}, which has no language-model head, so it predicts no tokens; allowed: a "
            f"checkpoint of the whole model, whose config.json names an architecture such as ...ForCausalLM"
        )
    return config


def resolve_dtype(dtype: str | torch.dtype, config: PretrainedConfig, of_weights: str | None = None) -> torch.dtype:
    """The dtype to compute in.

    ``"auto"`` follows transformers: the configuration's, else that of the weights. With one exception: a quantised checkpoint
    is never dequantised to float32 or more, which its configuration or its scales may name, but to bfloat16.

    Args:
        dtype: a float dtype of torch or its name, or ``"auto"``.
        config: the checkpoint's configuration.
        of_weights: ``Checkpoint.dtype``; None without weights.

    Raises:
        ConfigError: not a float dtype that experts can be kept in.
    """
    allowed = f"auto, {', '.join(ITEM_BYTES)}"
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or of_weights or getattr(config.get_text_config(), "dtype", None) or "float32"
        if getattr(config, "quantization_config", None) is not None and str(dtype).endswith(("float32", "float64")):
            dtype = torch.bfloat16
        allowed = f"{allowed}; auto found it in the checkpoint"
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ConfigError(f"dtype={name!r}: allowed: {allowed}")
    resolved = getattr(torch, name)
    assert isinstance(resolved, torch.dtype)
    return resolved


def build_skeleton(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    tensors: int | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model's structure on the meta device: no memory, no weights.

    Args:
        model_class: from ``resolve_class``.
        config: the checkpoint's configuration; it is copied.
        dtype: of the parameters.
        tensors: number of the checkpoint's tensors; a configuration that describes a much larger model is refused.

        attention: transformers' implementation, by its name; None = the model's own choice.

    Raises:
        ConfigError: the model has no such attention, or a package that it needs isn't installed.
        CheckpointError: the class can't be made from the configuration.
    """
    what = f"{config.name_or_path or 'config.json'} describes no {model_class.__name__} that transformers can build"
    with torch.device("meta"), quiet(), refusing(what), _at_most(None if tensors is None else MAX_TENSORS_FROM_ONE * tensors):
        try:
            return _build(model_class, config, dtype, {} if attention is None else {"attn_implementation": attention})
        except (ValueError, ImportError) as error:
            if attention is not None:
                _build(model_class, config, dtype, {})  # raises where the configuration is at fault
                reason = " ".join(str(error).split())[:600]
                raise ConfigError(f"attn_implementation={attention!r}: {model_class.__name__}: {reason}") from error
            raise


def _build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attention: dict[str, str]
) -> PreTrainedModel:
    skeleton: PreTrainedModel = model_class._from_config(
        copy.deepcopy(config), dtype=dtype, experts_implementation=IMPLEMENTATION, **attention
    )
    return skeleton.eval()


@contextlib.contextmanager
def _at_most(parameters: int | None) -> Iterator[None]:
    """Stop this thread from registering more parameters: a crafted number of layers would take minutes and gigabytes.

    Raises:
        CheckpointError: the thread registered more.
    """
    thread, made = threading.get_ident(), 0

    def count(_module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += threading.get_ident() == thread and parameter is not None
        if parameters is not None and made > parameters:
            raise CheckpointError(
                f"config.json describes a model of more than {parameters:,} tensors, far more than the weight files hold: "
                f"does it state the number of layers?"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


# Guards settings of the process: verbosity, bars, the default dtype, skipped initialisation, a replaced operation.
_process_settings = threading.RLock()


@contextlib.contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Call transformers without its report and bar, one thread at a time: it changes settings of the process."""
    with _process_settings:
        verbosity = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if not progress:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
