"""Makes a loaded model's forward passes batch-invariant: its dense layers; experts by ``BatchInvariantGemm``.

Attention isn't part of it: its view of a batch depends on the caller. ``generation/paged_invariance.py`` computes that of
requests in pages. The bits are those of one machine type, torch build and number of threads.

Models with recurrent states, or with ``unknown_functions``, run one request at a time; such a request may differ after it has
moved from a lost rank. On CUDA all rests on equal shapes taking equal kernels, and has never run.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from epslots.models.experts import experts_modules
from epslots.models.measure_shape import run_without_experts
from epslots.moe.batch_invariant import batch_invariant_functions, obstacles

_ATTRIBUTE = "epslots_batch_invariance_unknown"
# Tokens of the forward pass that records the functions that a model calls.
_TRIAL_TOKENS = 4
_NO_ATTENTION = "epslots_no_attention"


def make_batch_invariant(model: PreTrainedModel) -> None:
    """Compute every later forward pass of this model with batch-invariant functions.

    Call it before the model joins other ranks: it runs the decoder once, to record the functions that it calls.
    """
    record_unknown_functions(model)
    forward = model.forward

    @functools.wraps(forward)
    def invariant_forward(*args: object, **kwargs: object) -> object:
        with batch_invariant_functions():
            return forward(*args, **kwargs)

    setattr(model, "forward", invariant_forward)  # noqa: B010 - a method to mypy


def record_unknown_functions(model: PreTrainedModel) -> None:
    """Let ``is_batch_invariant`` and ``unknown_functions`` know the model: as loaded, or as a skeleton on the meta device."""
    setattr(model, _ATTRIBUTE, tuple(_unknown_functions(model)))


def is_batch_invariant(model: nn.Module) -> bool:
    """Whether a model was, or is to be, loaded with ``batch_invariant=True``."""
    return hasattr(model, _ATTRIBUTE)


def unknown_functions(model: nn.Module) -> tuple[str, ...]:
    """Functions that a batch-invariant model's decoder calls and that aren't known to be batch-invariant."""
    found: tuple[str, ...] = getattr(model, _ATTRIBUTE)
    return found


def _unknown_functions(model: PreTrainedModel) -> list[str]:
    """Found by running the decoder without experts and attention, which have kernels of their own."""
    if not model._supports_attention_backend:
        return ["attention outside of transformers' interface"]

    def stand_in(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)

    modules = list(experts_modules(model).values())
    implementation = model.config._attn_implementation
    model.set_attn_implementation(_NO_ATTENTION)
    try:
        return obstacles(lambda: run_without_experts(model, _TRIAL_TOKENS, modules, stand_in))
    finally:
        model.set_attn_implementation(implementation)


def _no_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, **kwargs: object
) -> tuple[torch.Tensor, None]:
    """Zeros in the shape of attention's results."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(_NO_ATTENTION, _no_attention)
