"""``usage_by_torch`` as a Triton kernel. Optional: needs ``triton``.

One program holds some tokens' scores of all experts in its registers. Tests hold it to ``usage_by_torch`` by Triton's
interpreter; no test of the project runs it on a GPU.

Legend of shape suffixes: T tokens, E experts; B: tokens that the program takes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from epslots.prefetch.predictor_kernel import ROUTER_LOGIT_STEP, USAGE_MAX, USAGE_SCALE

_TOKENS = 16
# Scores that a warp holds: 64 registers of each thread.
_WARP_SCORES = 2048
_STEP, _SCALE, _MOST = tl.constexpr(ROUTER_LOGIT_STEP), tl.constexpr(USAGE_SCALE), tl.constexpr(USAGE_MAX)


@triton.jit(do_not_specialize=["tokens", "experts", "wanted"])  # type: ignore[untyped-decorator]
def _usage(  # type: ignore[no-untyped-def]
    scores, usage, tokens, experts, wanted, stride, TOP_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):
    """All tokens' scores to the usage of each expert. Grid: 1.

    Args:
        scores: [tokens, experts], by stride.
        usage: int32 [wanted].
        TOP_K: as in ``UsageKernel``.
    """
    expert_E = tl.arange(0, BLOCK_E)
    real_E = expert_E < experts
    total_E = tl.zeros([BLOCK_E], tl.float32)
    first = 0
    while first < tokens:
        token_B = first + tl.arange(0, BLOCK_B)
        real_BE = (token_B < tokens)[:, None] & real_E[None, :]
        logit_BE = tl.load(scores + token_B[:, None] * stride + expert_E[None, :], mask=real_BE, other=0.0).to(tl.float32)
        if TOP_K > 0:
            left_BE = tl.where(real_E[None, :], logit_BE, float("-inf"))
            least_B = tl.max(left_BE, axis=1)
            for _ in range(TOP_K - 1):
                best_BE = tl.where(left_BE == least_B[:, None], expert_E[None, :], BLOCK_E)
                left_BE = tl.where(expert_E[None, :] == tl.min(best_BE, axis=1)[:, None], float("-inf"), left_BE)
                least_B = tl.max(left_BE, axis=1)
            mean_B = tl.sum(logit_BE, axis=1) / experts
            apart_BE = tl.where(real_E[None, :], logit_BE - mean_B[:, None], 0.0)
            unit_B = tl.sqrt(tl.sum(apart_BE * apart_BE, axis=1) / experts) * _STEP + 1e-9
            logit_BE = (logit_BE - least_B[:, None]) / unit_B[:, None]
        softplus_BE = tl.maximum(logit_BE, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(logit_BE)))
        total_E += tl.sum(tl.where(real_BE, softplus_BE, 0.0), axis=0)
        first += BLOCK_B
    parts_E = ((1.0 - tl.exp(-total_E)) * _SCALE + 0.5).to(tl.int32)
    tl.store(usage + expert_E, tl.minimum(parts_E, _MOST), mask=expert_E < wanted)


def usage_by_triton(score_TE: torch.Tensor, top_k: int, experts: int) -> torch.Tensor:
    """``UsageKernel`` on a GPU."""
    tokens, scored = score_TE.shape
    usage_U = torch.empty(experts, dtype=torch.int32, device=score_TE.device)
    block = triton.next_power_of_2(scored)
    _usage[(1,)](
        score_TE,
        usage_U,
        tokens,
        scored,
        experts,
        score_TE.stride(0),
        TOP_K=top_k,
        BLOCK_B=_TOKENS,
        BLOCK_E=block,
        num_warps=max(1, min(8, _TOKENS * block // _WARP_SCORES)),
    )
    return usage_U
