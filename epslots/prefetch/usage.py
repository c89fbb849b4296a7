"""From an estimator's scores to the next layer's predicted usage: how probably any of the step's tokens uses each expert.

``Predictor.usage`` is the caller. ``usage_by_torch`` is what a CPU runs for many tokens, and the reference of Triton's kernel
(``usage_triton.py``), which does it in one launch instead of a dozen.

Legend of shape suffixes: T tokens, E experts with scores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch.nn import functional

from epslots.prefetch.predictor_kernel import ROUTER_LOGIT_STEP, USAGE_MAX, USAGE_SCALE

UsageKernel = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(scores [T, E], K where these are a router's and 0 where they are logits, U) to the usage of the first U experts: int32 [U],
probability in 256ths, from 0 to 255."""


def router_logits(score_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """A router's scores as logits: relative to each token's k-th, in parts of the scores' standard deviation."""
    least_T1 = score_TE.topk(top_k, -1).values[:, -1:]
    return (score_TE - least_T1) / (score_TE.std(-1, correction=0, keepdim=True) * ROUTER_LOGIT_STEP + 1e-9)


def usage_by_torch(score_TE: torch.Tensor, top_k: int, experts: int) -> torch.Tensor:
    """``UsageKernel`` by torch's operations."""
    return quantised(_used(router_logits(score_TE, top_k) if top_k else score_TE))[:experts]


def quantised(used_E: torch.Tensor) -> torch.Tensor:
    """Probabilities, overwritten, in 256ths: int32 [E]."""
    return used_E.mul_(USAGE_SCALE).add_(0.5).clamp_(max=USAGE_MAX).to(torch.int32)


def _used(logits_TE: torch.Tensor) -> torch.Tensor:
    """How probably any of the tokens chooses each expert, float32 [E]."""
    if len(logits_TE) == 1:
        return logits_TE[0].float().sigmoid()
    return functional.softplus(logits_TE.float()).sum(0).neg_().exp_().neg_().add_(1)


def usage_kernel_for(device: torch.device) -> UsageKernel:
    """The kernel for a device: Triton's on a GPU, if it is installed."""
    if device.type == "cpu" or importlib.util.find_spec("triton") is None:
        return usage_by_torch
    from epslots.prefetch.usage_triton import usage_by_triton  # optional, and used only on GPUs

    return usage_by_triton
