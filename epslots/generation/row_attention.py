"""Attention that has to be computed row by row, and rotary embeddings that have to: everything else stays batched.

- Attention over a layer of the cache that has an object for each row runs for one row after the other. ``LayerOfRows`` is such
  a layer whose rows can't be pooled; pooled ones have ``rows`` beside what they are for the whole batch.
- A rotary embedding whose angles depend on the longest sequence of a batch sees one row at a time.

``RowByRow`` replaces the ``forward`` of such modules for the length of a forward pass.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from epslots.errors import UnsupportedModelError
from epslots.generation.positions import forget_length

# Attention that takes its tokens' positions from the length of the cache, padding included.
LENGTH_BOUND = frozenset({"Llama4TextAttention", "InklingAttention"})
# Attention whose blocks of keys begin at the cache's first place, not at the row's first token.
BLOCK_BOUND = frozenset({"MiniMaxM3VLAttention"})


class LayerOfRows(CacheLayerMixin):
    """A layer of a model's cache with an object for each row. Masks are made for the longest."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)
        self.keys = self.values = None
        self.is_initialized = True
        self.is_sliding = getattr(rows[0], "is_sliding", False)
        self._longest = max(self.rows, key=lambda row: row.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self._longest.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        length: int = self._longest.get_seq_length()
        return length

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *_: Any) -> None:
        raise AssertionError("attention over these rows runs one by one")

    def update(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("attention over these rows runs one by one")


class RowByRow:
    """Has some modules of a model computed row by row, within a context.

    Args:
        modules: of attention, from ``attentions_by_row``.
        rotaries: rotary embeddings that depend on the longest sequence (``positions.py``).
        device: of the model.
    """

    def __init__(self, modules: Sequence[nn.Module], rotaries: Sequence[nn.Module], device: torch.device) -> None:
        self._forwards = [(module, _each_row(module.forward, layer_of(module))) for module in modules]
        self._forwards += [(module, _each_sequence(module, module.forward, device)) for module in rotaries]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the modules run row by row over a ``RowCache``'s step. Not for several threads at once."""
        own = [vars(module).get("forward") for module, _ in self._forwards]
        try:
            for module, forward in self._forwards:
                module.forward = forward
            yield
        finally:
            for (module, _), forward in zip(self._forwards, own, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def layer_of(module: nn.Module) -> int:
    """The layer of the cache that a module of attention uses."""
    return int(module.layer_idx)  # type: ignore[arg-type]


def attentions_by_row(model: PreTrainedModel, unknown: frozenset[int]) -> tuple[nn.Module, ...]:
    """The modules of attention that have to run row by row.

    Args:
        unknown: layers whose objects can't be pooled.

    Raises:
        UnsupportedModelError: no module of such a layer takes a cache.
    """
    names = LENGTH_BOUND | BLOCK_BOUND
    found = [module for module in model.modules() if type(module).__name__ in names]
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents first
        if getattr(module, "layer_idx", None) not in unknown or isinstance(module, GradientCheckpointingLayer):
            continue
        if module not in inside and "past_key_values" in inspect.signature(module.forward).parameters:
            found.append(module)
            inside |= set(module.modules())
    if missing := unknown - set(map(layer_of, found)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: no module of layer {min(missing)} takes a cache, so its rows can't be kept apart"
        )
    return tuple(found)


def _each_row(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
    def each_row(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        layer = None if cache is None else cache.layers[index]
        rows = getattr(layer, "rows", None)
        if not rows:
            return forward(*args, **kwargs)
        outputs = []
        for r, row in enumerate(rows):
            own = copy.copy(cache)
            own.layers = [row if i == index else other for i, other in enumerate(cache.layers)]  # type: ignore[union-attr]
            part = _RowOf(r, len(rows), row, cache, own)
            outputs.append(forward(*map(part, args), **{name: part(value, name) for name, value in kwargs.items()}))
        return torch.cat([output[0] for output in outputs]), *[None] * (len(outputs[0]) - 1)  # no attention weights

    return each_row


class _RowOf:
    """Cuts one row out of an attention module's arguments."""

    def __init__(self, number: int, rows: int, layer: Any, cache: Any, own: Any) -> None:
        self._number, self._rows, self._layer, self._cache, self._own = number, rows, layer, cache, own

    def __call__(self, value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: self(item, key) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if not isinstance(value, torch.Tensor):
            return self._own if value is self._cache else value
        if name == "attention_mask":
            value = value[..., -self._layer.get_mask_sizes(value.shape[2])[0] :]
        return value[self._number : self._number + 1] if value.dim() > 1 and value.shape[0] == self._rows else value


def _each_sequence(module: nn.Module, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    def each_sequence(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        positions = bound.arguments["position_ids"]  # [B, W], or [axes, B, W]
        found = []
        for row in range(positions.shape[-2]):
            forget_length(module, forward, device)
            bound.arguments["position_ids"] = positions[..., row : row + 1, :]
            found.append(forward(*bound.args, **bound.kwargs))
        if isinstance(found[0], tuple):
            return tuple(torch.cat(parts, dim=-3) for parts in zip(*found, strict=True))
        return torch.cat(found, dim=-3)

    return each_sequence
