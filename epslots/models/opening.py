"""Opens a checkpoint and checks it against its model by its headers; then loads the dense part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from epslots.errors import CheckpointError
from epslots.layout import LayerSpec
from epslots.models.checkpoint import Checkpoint, CheckpointSource, find_checkpoint, open_checkpoint
from epslots.models.config_check import check_numbers, check_top_k, refusing
from epslots.models.experts import expert_layers, experts_modules
from epslots.models.experts_interface import IMPLEMENTATION
from epslots.models.json_file import read_json_object
from epslots.models.pretrained import build_skeleton, has_language_head, quiet, read_config, resolve_class, resolve_dtype
from epslots.models.quantiser import take_failure
from epslots.models.tensor_check import check_tensors


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint and the model that it describes, before a weight is read.

    Attributes:
        checkpoint: its open files.
        config: its configuration, from ``read_config``.
        model_class: the transformers class, made to load without expert weights.
        dtype: to compute in.
        attention: transformers' implementation, by its name; None = the model's own choice.
        skeleton: the model on the meta device.
        layers: its MoE layers.
        left_out: names that transformers will report as unexpected; from ``check_tensors``.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    dtype: torch.dtype
    attention: str | None
    skeleton: PreTrainedModel
    layers: tuple[LayerSpec, ...]
    left_out: frozenset[str]


def open_model(
    source: CheckpointSource | str | os.PathLike[str], dtype: str | torch.dtype, attention: str | None = None
) -> OpenModel:
    """Find a checkpoint's files and check them against the model that its configuration describes.

    Args:
        source: the checkpoint; a plain path or hub id will do.
        dtype: to compute in; ``"auto"`` = the checkpoint's own, bfloat16 for a quantised one.
        attention: transformers' implementation, by its name; None = the model's own choice.

    Raises:
        ConfigError: experts can't be kept in ``dtype``, the model has no such ``attention`` here, or ``source`` is
            contradictory.
        CheckpointError: files are missing, damaged, or don't fit together or the model.
        UnsupportedModelError: the model's experts can't be run from slots.
    """
    if not isinstance(source, CheckpointSource):
        source = CheckpointSource(source)
    folder = find_checkpoint(source)
    config = read_config(folder)
    checkpoint = open_checkpoint(folder, source.variant)
    resolved = resolve_dtype(dtype, config, checkpoint.dtype)
    model_class = resolve_class(config)
    skeleton = build_skeleton(model_class, config, resolved, tensors=len(checkpoint.tensors), attention=attention)
    layers = expert_layers(skeleton)
    check_top_k(config, layers, list(experts_modules(skeleton).values()))
    left_out = check_tensors(checkpoint, skeleton, layers)
    return OpenModel(checkpoint, config, model_class, resolved, attention, skeleton, layers, left_out)


def load_dense(opened: OpenModel, *, device: torch.device, show_progress: bool) -> PreTrainedModel:
    """The model without its experts, loaded by transformers onto ``device``, in evaluation mode.

    transformers is given the checkpoint's tensors and searches for no files: dense weights and experts come from the same
    ones.

    Args:
        opened: from ``open_model``.
        device: holds the dense weights.
        show_progress: whether transformers shows its bar.

    Raises:
        CheckpointError: a dense tensor is missing, has another shape than the model's, or was left out.
    """
    checkpoint = opened.checkpoint
    folder = checkpoint.folder
    generation_config = read_generation_config(folder) if has_language_head(opened.model_class) else None
    attention = {} if opened.attention is None else {"attn_implementation": opened.attention}
    take_failure()  # of an earlier checkpoint
    try:
        with quiet(progress=show_progress):
            model, report = opened.model_class.from_pretrained(
                None,
                state_dict={key: checkpoint.handles[header.file].get_slice(key) for key, header in checkpoint.tensors.items()},
                config=opened.config,
                dtype=opened.dtype,
                device_map={"": device},
                experts_implementation=IMPLEMENTATION,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report lists them: they are refused below, by name
                **attention,
            )
    except Exception as error:  # a crafted checkpoint can make any line of transformers fail
        reason = take_failure() or f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        raise CheckpointError(f"{folder}: {reason}") from error
    _check_report(folder, report, opened)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not buffer.isfinite().all():
            raise CheckpointError(f"{folder}: {name} isn't finite: config.json states impossible rotary embeddings (rope)")
    if generation_config is not None:
        model.generation_config = generation_config
    model.name_or_path = model.config.name_or_path = os.fspath(folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _check_report(folder: Path, report: dict[str, Any], opened: OpenModel) -> None:
    """Refuse the differences that transformers would only warn of.

    Raises:
        CheckpointError: naming tensors.
    """
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{folder}: {key} has shape {list(found)}, the model expects {list(expected)}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors that the model needs: {_first(missing)}")
    prefix = f"{opened.skeleton.base_model_prefix}."
    left_out = {name.removeprefix(prefix) for name in opened.left_out}
    unexpected = sorted(name for name in report["unexpected_keys"] if name.removeprefix(prefix) not in left_out)
    if unexpected:
        raise CheckpointError(f"{folder}: transformers has no use for {len(unexpected)} tensors: {_first(unexpected)}")


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def read_generation_config(folder: Path) -> GenerationConfig:
    """The checkpoint's generation settings: generation_config.json, else those in config.json.

    Raises:
        CheckpointError: generation_config.json is damaged. (transformers would continue without it.)
    """
    path = folder / "generation_config.json"
    if path.is_file():
        settings = read_json_object(path)
        check_numbers(settings, path)
        for name, value in settings.items():
            ids = value if isinstance(value, list) else [value]
            if name.endswith("_token_id") and value is not None and not all(type(id) is int for id in ids):  # bool is an int
                raise CheckpointError(f"{path}: {name} is {value!r}: allowed: an integer or a list of integers")
        with refusing(str(path)), quiet():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
    with refusing(str(folder / "config.json")), quiet():
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )
