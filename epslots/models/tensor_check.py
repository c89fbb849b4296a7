"""Compares a checkpoint's tensors with the model's, by nothing but headers.

transformers loads the tensors that it can use and reports the others afterwards, as a warning. Here its rules are followed
before a weight is read, and each unused tensor is judged:

    of a module that the model has        refused: a dropped scale, bias or shared expert changes its outputs
    one more layer like the model's own   refused: the configuration leaves out a part of the model
    of a module that the model lacks      left out with a warning, as in transformers: vision towers, multi-token prediction
    named by the class as ignorable, or recomputed from the configuration    left out
    scales of keys and values, in a quantised checkpoint                     left out
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from epslots.errors import CheckpointError
from epslots.layout import LayerSpec
from epslots.models.checkpoint import FLOATS, Checkpoint
from epslots.models.conversions import TensorSource, conversions_of, match_keys
from epslots.models.experts_interface import rebuilt_conversions
from epslots.models.packing import check_packing

logger = logging.getLogger(__name__)

# Buffers of older checkpoints that models now compute from their configuration.
_RECOMPUTED = (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$", r"(^|\.)position_ids$")
# Scales for queries, keys and values in 8 bits, beside a quantised checkpoint's weights: here they stay as they are.
_OF_CACHES = re.compile(r"\.(([qkv]|kv|prob)(_output)?_scale|[qkv]_proj\.output_scale|[qkv]_zero_point)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def check_tensors(checkpoint: Checkpoint, skeleton: PreTrainedModel, layers: Sequence[LayerSpec]) -> frozenset[str]:
    """Refuse a checkpoint with tensors that would be left out or mistaken for others.

    Args:
        checkpoint: the open checkpoint.
        skeleton: the model's structure, on the meta device.
        layers: its MoE layers.

    Returns:
        Names that transformers will report as unexpected when it loads the dense part, with or without the base model's
        prefix: the experts', and those left out.

    Raises:
        CheckpointError: naming a tensor that is packed and isn't unpacked, has another shape than the model's, or would be
            left out though the model has its module.
    """
    dense = skeleton.state_dict()
    experts = [f"{layer.name}.{tensor.name}" for layer in layers for tensor in layer.layout.tensors]
    wanted = dense | dict.fromkeys(experts, True)
    made: dict[str, TensorSource] = {}
    left: dict[str, str] = {}
    elsewhere: set[str] = set()
    for found in match_keys(checkpoint.tensors, conversions_of(skeleton), skeleton.base_model_prefix, wanted):
        used = [target for target in found.targets if target in wanted]
        for target in used:
            made.setdefault(target, TensorSource(target, found.converter)).add(found)
        if not used:
            left[found.key] = found.targets[0]
        elsewhere.update(target for target in found.targets if target not in dense)
    for target, source in made.items():
        if target not in dense or dense[target].is_floating_point():
            check_packing(source, checkpoint.tensors)
        if target in dense:
            _check_source(checkpoint, source, tuple(dense[target].shape))
    _judge_unused(checkpoint, skeleton, left, made)
    return frozenset(elsewhere | _names_before_rebuilding(checkpoint, skeleton, dense))


def _names_before_rebuilding(checkpoint: Checkpoint, skeleton: PreTrainedModel, dense: dict[str, Any]) -> set[str]:
    """Names that transformers, which knows nothing of rebuilt experts, gives to their tensors."""
    if not rebuilt_conversions(skeleton):
        return set()
    own = conversions_of(skeleton, rebuilt=False)
    found = match_keys(checkpoint.tensors, own, skeleton.base_model_prefix, dense)
    return {target for match in found for target in match.targets if target not in dense}


def _check_source(checkpoint: Checkpoint, source: TensorSource, expected: tuple[int, ...]) -> None:
    """Check that a tensor has one source of each pattern and, unconverted, the model's shape."""
    folder, target = checkpoint.folder, source.target
    keys = [key for listed in source.keys.values() for key in listed]
    patterns = 1 if source.converter is None else len(source.keys)
    if len(keys) > patterns and not any("*" in pattern for pattern in source.keys):
        raise CheckpointError(f"{folder}: {' and '.join(keys[:3])} are all {target}: remove the unwanted ones")
    found = checkpoint.tensors[keys[0]].shape
    if source.converter is None and found != expected:
        raise CheckpointError(f"{folder}: {target} has shape {list(found)}, the model expects {list(expected)}")


def _judge_unused(checkpoint: Checkpoint, skeleton: PreTrainedModel, left: dict[str, str], made: Iterable[str]) -> None:
    """Refuse or leave out the tensors that the model has no use for.

    Args:
        checkpoint: the open checkpoint.
        skeleton: the model's structure.
        left: the model's name for each, by key.
        made: names of the model's tensors that the checkpoint has.

    Raises:
        CheckpointError: naming one that must not be left out.
    """
    modules = dict(skeleton.named_modules())
    ignorable = re.compile("|".join(f"({p})" for p in (*(skeleton._keys_to_ignore_on_load_unexpected or ()), *_RECOMPUTED)))
    without_module: dict[str, list[str]] = defaultdict(list)
    is_quantised = getattr(skeleton.config, "quantization_config", None) is not None
    for key, target in left.items():
        if is_quantised and _OF_CACHES.search(target):
            continue
        owner, rest = _owner(target, modules, skeleton.base_model_prefix)
        inside = not isinstance(modules[owner], PreTrainedModel | nn.ModuleList | nn.ModuleDict)
        quantised = checkpoint.tensors[key].dtype not in FLOATS or "scale" in rest
        # Classes name ignorable layers by their numbers in published checkpoints; in other checkpoints these are layers of the
        # model.
        if ignorable.search(target) and not (inside and quantised):
            continue
        if inside:
            hint = ": is its quantisation stated?" if quantised else ""
            raise CheckpointError(
                f"{checkpoint.folder}: {key} would be left out: in {owner}, {type(skeleton).__name__} has no such tensor{hint}"
            )
        without_module[".".join(filter(None, (owner, rest.partition(".")[0])))].append(f"{owner}.{rest}".lstrip("."))
    kinds = {_NUMBER.sub("*", target) for target in made}
    for group, targets in without_module.items():
        numbered = isinstance(modules[group.rpartition(".")[0]], nn.ModuleList)
        if numbered and all(_NUMBER.sub("*", target) in kinds for target in targets):
            raise CheckpointError(
                f"{checkpoint.folder}: {group} would be left out, one more layer like those that the model has: does "
                f"config.json state the number of layers?"
            )
    if without_module:
        listed = ", ".join(f"{group} ({len(targets)})" for group, targets in sorted(without_module.items()))
        logger.warning(
            "%s: left out, as %s has no such modules (tensors): %s", checkpoint.name, type(skeleton).__name__, listed
        )


def _owner(target: str, modules: dict[str, nn.Module], prefix: str) -> tuple[str, str]:
    """The model's innermost module on a tensor's path, and the rest of the path.

    The path may have the base model's prefix, or lack it.
    """
    found = ("", target)
    for name in (target, f"{prefix}.{target}", target.removeprefix(f"{prefix}.")):
        path = name
        while path and path not in modules:
            path = path.rpartition(".")[0]
        if len(path) > len(found[0]):
            found = (path, name[len(path) :].lstrip("."))
    return found
