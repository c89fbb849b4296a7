"""Switches off the outputs besides logits that a model's configuration asks for.

Fine-tuned checkpoints often keep such flags (``output_router_logits``, say). A batch of requests doesn't use these outputs,
transformers can't compute them for a packed batch, and hidden states or attentions of all layers would take memory that no
plan counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PretrainedConfig, PreTrainedModel

# The prefix of transformers' flags, and of a forward pass's arguments, that ask for one more output.
_PREFIX = "output_"


class PlainOutputs:
    """The flags of one model's configuration that ask for more than logits.

    They are recorded when this is made. Outside of ``off`` the configuration is the checkpoint's own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        configs = _all_configs(model.config)
        names = sorted(_flags(model))
        asked = [(config, name, getattr(config, name, None)) for config in configs for name in names]
        self._on = [(c, n, value) for c, n, value in asked if value is not None and value is not False]
        self._on += [(c, "return_dict", value) for c in configs if (value := getattr(c, "return_dict", True)) is not True]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the context, a forward pass returns an output object with nothing but logits."""
        for config, name, _ in self._on:
            setattr(config, name, name == "return_dict")
        try:
            yield
        finally:
            for config, name, value in self._on:
                # The property refuses to be set again where the attention's implementation has changed.
                setattr(config, "_output_attentions" if name == "output_attentions" else name, value)


def _all_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A configuration and all configurations inside of it."""
    found = [config]
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            found += _all_configs(inner)
    return found


def _flags(model: PreTrainedModel) -> set[str]:
    """Names of the flags that modules read from the configuration unless a call sets them."""
    found = set()
    for module in model.modules():
        found |= {name for name in inspect.signature(module.forward).parameters if name.startswith(_PREFIX)}
        # transformers' capture_outputs reads them as output_{key}, with a default from the configuration.
        found |= {f"{_PREFIX}{key}" for key in getattr(module, "_can_record_outputs", None) or ()}
    return found
