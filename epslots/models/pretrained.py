"""What transformers needs to know to load a checkpoint's dense part: class, configuration, quantisation, and the skeleton."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from epslots.errors import CheckpointError, ConfigError, UnsupportedModelError
from epslots.models.experts import IMPLEMENTATION, dense_class
from epslots.models.fp8 import ragged_blocks
from epslots.records import ITEM_BYTES

# Quantised checkpoints whose experts are dequantised one by one on the way into the host store.
QUANTISATIONS = ("fp8", "mxfp4")


def read_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's configuration, quantised ones set to be dequantised on loading.

    Raises:
        CheckpointError: config.json is missing or unreadable.
        UnsupportedModelError: transformers doesn't know the model without running code from the checkpoint, or the
            quantisation is not one of ``QUANTISATIONS``.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: it is not a checkpoint folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except PermissionError as error:
        raise CheckpointError(f"no permission to read {error.filename}") from error
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error) or "auto_map" in (folder / "config.json").read_text(encoding="utf-8"):
            raise UnsupportedModelError(
                f"{folder} brings its own model code, and epslots never runs code from a checkpoint; use a model that "
                f"transformers {transformers.__version__} knows"
            ) from error
        raise CheckpointError(f"{folder / 'config.json'}: {reason}") from error
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method")
        if method not in QUANTISATIONS:
            raise UnsupportedModelError(
                f"{folder} is quantised with {method!r}; epslots reads {', '.join(QUANTISATIONS)} and unquantised checkpoints"
            )
        config.quantization_config = quantisation | {"dequantize": True}
    return config


def resolve_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that the checkpoint names, made to load without expert weights.

    Raises:
        UnsupportedModelError: transformers has no such class.
    """
    names = config.architectures or []
    known = [getattr(transformers, name, None) for name in names]
    if not names:  # a configuration made by hand: its language model
        known = [AutoModelForCausalLM._model_mapping.get(type(config), None)]
    classes = [c for c in known if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    if not classes:
        raise UnsupportedModelError(
            f"the configuration ({config.model_type}) names the architecture {', '.join(names) or '(none)'}, which "
            f"transformers {transformers.__version__} doesn't have"
        )
    return dense_class(classes[0])


def has_language_head(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether a model, or a class of models, predicts tokens: False for a base model (hidden states) and for classifiers."""
    return model.can_generate()


def read_language_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checkpoint whose model predicts tokens: known from config.json, before anything is loaded.

    Raises:
        CheckpointError: as ``read_config``.
        UnsupportedModelError: as ``read_config``; or the model has no language-model head.
    """
    config = read_config(folder)
    model_class = resolve_class(config)
    if not has_language_head(model_class):
        raise UnsupportedModelError(
            f"{folder} holds a {model_class.__name__}, which has no language-model head, so it predicts no tokens; allowed: a "
            f"checkpoint of the whole model, whose config.json names an architecture such as ...ForCausalLM"
        )
    return config


def resolve_dtype(dtype: str | torch.dtype, config: PretrainedConfig) -> torch.dtype:
    """The dtype to compute in: ``"auto"`` is the checkpoint's own (bfloat16 for a quantised one).

    Raises:
        ConfigError: not a float dtype that experts can be kept in.
    """
    if dtype == "auto":
        if getattr(config, "quantization_config", None) is not None:
            return torch.bfloat16
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ConfigError(f"dtype={name!r}: allowed: auto, {', '.join(ITEM_BYTES)}")
    resolved = getattr(torch, name)
    assert isinstance(resolved, torch.dtype)
    return resolved


def build_skeleton(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's structure on the meta device: no memory, no weights."""
    with torch.device("meta"), _quiet():
        skeleton: PreTrainedModel = model_class._from_config(
            copy.deepcopy(config), dtype=dtype, experts_implementation=IMPLEMENTATION
        )
    return skeleton.eval()


def load_dense(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    show_progress: bool,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Everything but the experts, loaded by transformers onto ``device``, in evaluation mode.

    Raises:
        CheckpointError: a dense tensor is missing or has another shape than the model's.
    """
    try:
        with _quiet(progress=show_progress), ragged_blocks():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                experts_implementation=IMPLEMENTATION,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be told of them: they are refused below, by name
                **model_kwargs,
            )
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())[:600]}") from error
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{folder}: {key} has shape {list(found)}, the model expects {list(expected)}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that the model needs: {', '.join(missing[:4])}"
            + (", ..." if len(missing) > 4 else "")
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextlib.contextmanager
def _quiet(progress: bool = False) -> Iterator[None]:
    """Keep transformers' loading report and bar to itself: what matters of them is raised as errors here."""
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
