"""``AttentionSwitch``: another of transformers' attention functions for the length of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class AttentionSwitch:
    """The configurations by which some modules of a model choose their attention function.

    Args:
        model: that the modules belong to.
        modules: of attention in its decoder.
    """

    def __init__(self, model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
        configs = [model.get_decoder().config, *(module.config for module in modules if hasattr(module, "config"))]
        self._configs: list[Any] = list({id(config): config for config in configs}.values())

    @property
    def implementations(self) -> set[str]:
        """Names of the functions in use."""
        return {config._attn_implementation for config in self._configs}

    @contextmanager
    def to(self, implementation: str) -> Iterator[None]:
        """Within the context, the modules use this function. Not for several threads at once."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = implementation
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
