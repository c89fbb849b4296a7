"""Random checkpoints of a given shape, for benchmarks that need size and not sense."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from epslots.planner.cost_model import Costs

# What ranks pay that serve large experts: 9.4 MB each and rows of 4 KB (Qwen3-30B-A3B in bf16), over 8 GB/s to the host and
# 200 GB/s between ranks, in nanoseconds.
LARGE_EXPERTS = Costs(
    host_fetch=1_180_000,
    peer_fetch=47_000,
    pair_transfer=20,
    pair_compute=30,
    expert_compute=3_000,
    exchange=30_000,
    gather=20_000,
)


def random_config(
    *, layers: int, hidden: int, experts: int, top_k: int, width: int, vocab: int = 4096, heads: int = 16
) -> Qwen3MoeConfig:
    """A Qwen3-MoE of the given shape: every layer has experts."""
    return Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=hidden // heads,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=8192,
        architectures=["Qwen3MoeForCausalLM"],
    )


@contextlib.contextmanager
def random_checkpoint(config: Qwen3MoeConfig, dtype: torch.dtype, *, embedding: float | None = None) -> Iterator[Path]:
    """A folder with a random model of ``config``, one tensor per expert as such checkpoints have; gone after the block.

    Args:
        embedding: the deviation of embeddings. With transformers' own, 0.02, all tokens are routed alike soon: what attention
            adds, which hardly differs from token to token, drowns them.
    """
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as folder:
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM._from_config(config, dtype=dtype)
        if embedding is not None:
            model.model.embed_tokens.weight.data.normal_(0, embedding)
        model.save_pretrained(folder)
        del model
        yield Path(folder)
