"""transformers' static cache for captured decoding: its tensors stay in place, and a captured step can be checked for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from epslots.errors import ConfigError

# By the model type of the text model; tests/cuda_graph holds that all others of the zoo decode from a static cache.
_OWN_CACHE_ALONE = {"minimax"}
_MASKS_WITHOUT_WINDOWS = {"inkling_text", "inkling2_text"}
_ASKS_THE_HOST = {"qwen4_exp_text"}


def make_static_cache(model: PreTrainedModel, max_tokens: int, *, captured: bool) -> StaticCache:
    """A cache of ``max_tokens`` tokens per sequence whose tensors stay in place.

    Args:
        model: decides the cache's layers.
        max_tokens: of each sequence.
        captured: whether steps are captured in a CUDA graph.

    Raises:
        ConfigError: the model has no such cache, or none of so many tokens in a graph.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{name} has an encoder: allowed: models that decode alone")
    kind = model.config.get_text_config().model_type
    if kind in _OWN_CACHE_ALONE:
        raise ConfigError(f"{name} can't decode from a static cache (it takes one of its own class); allowed: plain generate")
    if captured and kind in _ASKS_THE_HOST:
        raise ConfigError(f"{name} asks the host for values in each step; allowed: capture=False")
    try:
        cache = StaticCache(config=model.config, max_cache_len=max_tokens)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{name} can't decode from a static cache ({error!r}); allowed: plain generate") from error
    if not cache.is_compileable:
        kinds = sorted({type(layer).__name__ for layer in cache.layers if not layer.is_compileable})
        raise ConfigError(f"{name} keeps state that isn't static ({', '.join(kinds)}); allowed: plain generate")
    # A full window moves on, and the host decides which tokens are in it.
    windows = [layer.max_cache_len for layer in cache.layers if getattr(layer, "is_sliding", False)]
    fixed = kind in _MASKS_WITHOUT_WINDOWS
    if (captured or fixed) and min(windows, default=max_tokens) < max_tokens:
        allowed = "allowed: up to" if fixed else "allowed in a CUDA graph: up to"
        raise ConfigError(
            f"max_tokens={max_tokens}: some of {name}'s layers attend to a window of {min(windows)} tokens: {allowed} "
            f"max_tokens={min(windows)}{'' if fixed else '; or capture=False'}"
        )
    return cache


def tensor_addresses(cache: StaticCache) -> list[tuple[int, str, Any]]:
    """The address of each of the cache's tensors: (layer, attribute, address).

    Flags, names and dtypes in the layers' attributes are listed with their values.
    """
    found: list[tuple[int, str, Any]] = []
    for number, layer in enumerate(cache.layers):
        for name, value in sorted(vars(layer).items()):
            for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, torch.Tensor):
                    found.append((number, name, part.data_ptr()))
                elif isinstance(part, bool | str | torch.dtype | None):
                    found.append((number, name, part))
    return found
