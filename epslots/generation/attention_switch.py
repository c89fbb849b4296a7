"""``AttentionSwitch``: another of transformers' attention functions for the length of a forward pass.

A module chooses its function by a name in its configuration, which is another meanwhile. Some classes do more by that name:
they make masks of another kind, or select keys, only for "sdpa". ``depends_on_name`` finds these.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Names that transformers' classes compare the implementation's with.
_COMPARED = frozenset({"eager", "sdpa", "flash_attention_2", "flex_attention"})


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


def depends_on_name(model: nn.Module) -> str | None:
    """The class of a module that compares its attention function's name with others; None if there is none.

    With another name, such a module would do something else than with its own.
    """
    kinds: set[type] = {type(module) for module in model.modules()}
    return next((kind.__name__ for kind in sorted(kinds, key=lambda kind: kind.__name__) if _compares_name(kind)), None)


@functools.cache
def _compares_name(kind: type) -> bool:
    methods = (
        inspect.unwrap(method).__code__
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if method is not getattr(PreTrainedModel, name, None)  # which looks at names while a model is made
    )
    return any("_attn_implementation" in code.co_names and _COMPARED & _texts(code.co_consts) for code in methods)


def _texts(constants: Iterable[Any]) -> set[str]:
    """Strings among constants, and in tuples and sets of these."""
    found: set[str] = set()
    for constant in constants:
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, tuple | frozenset):
            found |= _texts(constant)
    return found
