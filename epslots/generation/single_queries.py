"""Attention of one query a request on the CPU, by compiled loops (``moe/query_attention.py``).

What these don't take is torch's, with a mask. Without one, transformers lets torch's kernel share keys among heads, which on
CPUs reads them again for each head; with one, it makes these heads the queries of one head, which takes an eighth of the time
(32 requests, 72 keys, 4 heads of each; bf16).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from epslots.generation.attention_steps import AttentionStep, attention_step_of, is_plain
from epslots.generation.attention_switch import AttentionSwitch, depends_on_name
from epslots.generation.paged_cache import paging_obstacle, row_width
from epslots.moe import query_attention

IMPLEMENTATION = "epslots_single_queries"


class SingleQueries:
    """The attention of one model's forward passes.

    Args:
        model: on a CPU, with transformers' "sdpa" attention, and layers that keep keys and values of one shape; with others,
            nothing changes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._switch: AttentionSwitch | None = None
        self._steps: list[tuple[nn.Module, AttentionStep]] = []
        plain = model.device.type == "cpu" and paging_obstacle(model) is None and row_width(model) is None
        if plain:
            modules = [module for module in model.get_decoder().modules() if hasattr(module, "num_key_value_groups")]
            switch = AttentionSwitch(model, modules)
            if switch.implementations == {"sdpa"} and depends_on_name(model.get_decoder()) is None:
                self._switch = switch
                steps = ((module, attention_step_of(module)) for module in modules)
                self._steps = [(module, step) for module, step in steps if step is not None]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the model attends so. Not for several threads at once."""
        if self._switch is None:
            yield
            return
        # A later wrapper of a module's forward pass has to be called.
        steps = [(vars(module), step) for module, step in self._steps if vars(module).get("forward") is step.replaced]
        try:
            for names, step in steps:
                names["forward"] = step
            with self._switch.to(IMPLEMENTATION):
                yield
        finally:
            for names, step in steps:
                names["forward"] = step.replaced


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function "sdpa", by compiled loops where a single query is attended."""
    if query.shape[2] == 1 and query.is_cpu:
        if is_plain(kwargs) and query_attention.fits(query, key, value, attention_mask):
            scale = kwargs.get("scaling")
            scale = query.shape[3] ** -0.5 if scale is None else scale
            return query_attention.attend(query, key, value, attention_mask, scale), None
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
