"""Tiny random architectures beside the zoo's, for tests of caches, attention and sizes: no checkpoint is made of them.

``LATENTS`` keep latents. ``UNUSUAL`` keep what is hard to measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.support.zoo import HIDDEN, VOCAB, ZOO, Tiny

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# All sizes of a head differ, so that none can stand for another.
_MLA = {"kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_VISION = {"hidden_size": 32, "intermediate_size": 32}


def _latent(name: str, architecture: str, *, moe_layers: int = 2, text: bool = False, **given: Any) -> Tiny:
    """A model of 8 experts; ``text`` puts all settings but those of towers into its ``text_config``."""
    beside = {key: given.pop(key) for key in ("vision_config", "image_token_id", "video_token_id") if key in given}
    settings = {**_COMMON, **_MLA, **(_MOE if moe_layers else {}), **given}
    experts = 8 if moe_layers else 0
    return Tiny(
        name, architecture, {"text_config": settings, **beside} if text else settings, experts, 2 if experts else 0, moe_layers
    )


_ROUTED = {"n_routed_experts": 8}

_ALL = [
    _latent("glm4_moe_lite", "Glm4MoeLiteForCausalLM", **_ROUTED),
    _latent("axk1", "AXK1ForCausalLM", **_ROUTED),
    _latent("mistral4", "Mistral4ForCausalLM", **_ROUTED, moe_layers=3),
    # A layer attends to the latents of another one, with an index of its own.
    _latent("mistral_large4", "MistralLarge4ForConditionalGeneration", **_ROUTED, text=True, q_lora_rank=None,
            index_topk=8, index_head_dim=16, index_n_heads=16, no_rope_layers=[1, 1, 1], kv_source_layers=[0, 0, 2],
            vision_config={"model_type": "pixtral", **_VISION, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "image_size": 16, "patch_size": 4}),
    _latent("minicpm3", "MiniCPM3ForCausalLM", moe_layers=0),
    _latent("youtu", "YoutuForCausalLM", moe_layers=0),
]  # fmt: skip

_GLM5_NEXT = Tiny(
    "glm5_next",
    "Glm5NextForConditionalGeneration",
    {
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
            "mlp_layer_types": ["sparse", "sparse"],
            "layer_types": ["linear_attention", "indexed_attention"],
            "index_topk": 16,
            "index_head_dim": 16,
            "index_n_heads": 16,  # with few heads, tokens tie, and which is chosen depends on padding
            "index_kpool": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "pad_token_id": 0,
        },
        "vision_config": {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        "image_token_id": 4,
        "video_token_id": 5,
    },
    num_experts=8,
    top_k=2,
    moe_layers=2,
)

LATENTS: dict[str, Tiny] = {tiny.name: tiny for tiny in [*_ALL, _GLM5_NEXT]}


def _changed(name: str, moe_layers: int | None = None, **settings: Any) -> Tiny:
    """A model of the zoo with other settings."""
    tiny = ZOO[name]
    return replace(tiny, settings=dict(tiny.settings) | settings, moe_layers=moe_layers or tiny.moe_layers)


_LONGROPE: Mapping[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
    "original_max_position_embeddings": 20,
}

UNUSUAL: dict[str, Tiny] = {
    # Rows picked by a mask, on the way to a cache of three kinds of keys.
    "glm5_next": _GLM5_NEXT,
    # Frequencies that depend on the length.
    "phimoe_longrope": _changed("phimoe", rope_parameters=_LONGROPE),
    # Layers that are served by another one's cache.
    "gemma4_shared_kv": _changed(
        "gemma4",
        moe_layers=4,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
    ),
    # Keys that are values too, fewer global heads, of another width.
    "gemma4_k_eq_v": _changed("gemma4", attention_k_eq_v=True, num_global_key_value_heads=1),
}
