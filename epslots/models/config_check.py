"""Checks a checkpoint's configuration before transformers builds anything from it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from epslots.errors import CheckpointError, EpslotsError
from epslots.layout import LayerSpec

# Configuration classes make lists of this length before a weight file is opened, and check given ones entry by entry.
# Published models have up to some hundreds of layers.
MAX_LAYERS = 10_000
_LAYERS = re.compile(r"((?<!feature_)layers?|depth|first_k_dense_replace)$")
# Every configuration has a table of this many names. Published classifiers have up to some ten thousand classes.
MAX_LABELS = 100_000
_POSITIVE = re.compile(r"max_position_embeddings$")
# A feature layer is counted from the end (mistral_large4's -1).
_NOT_NEGATIVE = re.compile(r"((?<!feature_)layers?|depth|eps|epsilon)$")
# Names of the number of experts per token in configurations.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn errors of transformers and torch into refusals: a crafted setting can make any of their lines fail.

    Args:
        what: the thing at fault, the beginning of the message.

    Raises:
        CheckpointError: the block raised an error that isn't an EpslotsError.
    """
    try:
        yield
    except EpslotsError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or "no reason is given"
        raise CheckpointError(f"{what}: {type(error).__name__}: {reason}") from error


def check_numbers(settings: dict[str, Any], path: Path) -> None:
    """Refuse numbers that no model has. NaN, an infinity that is no bound of a range, millions of layers, and the like.

    Args:
        settings: the content of ``path``.
        path: a config.json, for messages.

    Raises:
        CheckpointError: naming the setting.
    """
    pending: list[tuple[str, Any]] = list(settings.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):  # mamba2's time_step_limit ends in infinity
            if len(value) > MAX_LAYERS and not name.startswith("quantization_config"):  # it may list modules
                raise CheckpointError(f"{path}: {name} has {len(value):,} entries: allowed: up to {MAX_LAYERS:,}")
            pending += [(f"{name}[]", item) for item in value if not (isinstance(item, float) and math.isinf(item))]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise CheckpointError(f"{path}: {name} is {value}: allowed: finite numbers")
            least = 1 if _POSITIVE.search(name) else 0 if _NOT_NEGATIVE.search(name) else value
            if value < least:
                raise CheckpointError(f"{path}: {name} is {value}: allowed: {least} and more")
            most = MAX_LAYERS if _LAYERS.search(name) else MAX_LABELS if name.endswith("num_labels") else value
            if value > most:
                raise CheckpointError(f"{path}: {name} is {value}: allowed: up to {most:,}")


def check_top_k(config: PretrainedConfig, layers: Sequence[LayerSpec], modules: Sequence[nn.Module]) -> None:
    """Refuse a number of experts per token that no layer has.

    Args:
        config: the checkpoint's configuration.
        layers: the MoE layers.
        modules: their experts modules, which may have identity experts beside those with weights.

    Raises:
        CheckpointError: it is below 1, or above the number of experts.
    """
    text = config.get_text_config(decoder=True)
    most = max(
        layer.num_experts + int(getattr(module, "zero_expert_num", 0) or 0)
        for layer, module in zip(layers, modules, strict=True)
    )
    for name in _TOP_K:
        value = getattr(text, name, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise CheckpointError(f"{config.name_or_path}: {name} is {value}, and there are {most} experts")
