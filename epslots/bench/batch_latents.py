"""Latents: decoding on them over expanding them in every step, and the bytes that an engine keeps of a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config

from epslots.bench.batch_speed import HEADROOM, batch_checkpoint
from epslots.bench.engines import Decoding, open_engine, random_requests
from epslots.bench.models import load_fp32
from epslots.bench.report import MS, Tables, compare
from epslots.generation.row_cache import RowCache
from epslots.models.measure_shape import shape_of_config
from epslots.progress import Advance

ROWS, CONTEXT = 4, 1500
# The models' own sizes, and the bytes that are aimed at.
LARGE_MODELS: dict[str, tuple[Any, int | None]] = {
    "DeepSeek-V3": (DeepseekV3Config(), 72 * 1024),
    "DeepSeek-V3.2": (DeepseekV32Config(), None),
}
LATENT_ROWS = 1 + len(LARGE_MODELS)
ABSORBED, EXPANDED = "epslots, on latents", "transformers, expanding them"


def latent_config() -> DeepseekV3Config:
    """A DeepSeek-V3 of 4 layers, with 16 heads and latents of 256 numbers."""
    return DeepseekV3Config(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=128,
        kv_lora_rank=256,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )


def measure_latents(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Decoding steps of 4 rows with 1,500 tokens each, over transformers' on the same tokens."""
    steps = 4 * rounds
    with batch_checkpoint(latent_config()) as folder:
        room = {"kv_tokens": ROWS * (CONTEXT + steps + HEADROOM), "max_requests": ROWS}
        engine = open_engine(load_fp32(folder, cache_dir), cache="rows", **room)
        requests = random_requests(engine.model, ROWS, CONTEXT, steps + HEADROOM)
        decode = Decoding(engine, requests).step
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        cache = plain(torch.tensor([request.prompt for request in requests]), use_cache=True, logits_to_keep=1).past_key_values
        ids = torch.tensor([request.prompt[:1] for request in requests])

        def expand() -> None:
            plain(ids, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        times = compare({ABSORBED: decode, EXPANDED: expand}, ABSORBED, EXPANDED, steps, MS)
        engine.batcher.close()
    advance(1)
    sizes = []
    for name, (config, aim) in LARGE_MODELS.items():
        sizes.append({"model, bf16": name, **cache_bytes(config), "aim": aim})
        advance(1)
    return {
        f"ms of a decoding step of {ROWS} rows at {CONTEXT} tokens; deepseek_v3, 4 layers": [times],
        "bytes of cache a token": sizes,
    }


def cache_bytes(config: Any) -> dict[str, float]:
    """Bytes of cache for each token: allocated, planned, and of keys and values.

    The allocation is an engine's on the meta device.

    Args:
        config: of a model whose layers all keep latents.
    """
    shape = shape_of_config(config, "bench", torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def allocated(kv_tokens: int) -> int:
        return RowCache(model, shape.cache, kv_tokens=kv_tokens, max_requests=1, in_flight=1).nbytes

    numbers = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    expanded = 2 * config.num_hidden_layers * config.num_attention_heads * numbers
    kept = (allocated(2**17) - allocated(2**16)) / 2**16
    return {"engine": kept, "plan": shape.token_bytes, "expanded": expanded, "expanded / engine": expanded / kept}
