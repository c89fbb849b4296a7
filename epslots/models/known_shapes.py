"""Shapes of well-known models, for memory plans without a checkpoint.

The settings below are those of the published configurations that decide a size; the others are left out. As for a checkpoint,
the model's skeleton is built and measured (``measure_shape.py``). A further model needs one entry in ``_PUBLISHED``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from epslots.errors import ConfigError
from epslots.layout import ITEM_BYTES
from epslots.models.model_shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Published(NamedTuple):
    """A model's class, the settings of its configuration, and their source."""

    architecture: str
    settings: Mapping[str, Any]
    source: str


_DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_KIMI_K2 = _DEEPSEEK_V3 | {
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
}
_PUBLISHED = {
    "deepseek-v3": _Published(
        "DeepseekV3ForCausalLM",
        _DEEPSEEK_V3,
        "deepseek-ai/DeepSeek-V3, config.json; without the multi-token prediction module",
    ),
    "kimi-k2": _Published(
        "DeepseekV3ForCausalLM",
        _KIMI_K2,
        "moonshotai/Kimi-K2-Base, config.json (the architecture is DeepSeek-V3's); Kimi-K2-Thinking has the same sizes",
    ),
    "qwen3-235b-a22b": _Published(
        "Qwen3MoeForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
        "Qwen/Qwen3-235B-A22B, config.json",
    ),
    "gpt-oss-120b": _Published(
        "GptOssForCausalLM",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "tie_word_embeddings": False,
        },
        "openai/gpt-oss-120b, config.json; planned in bf16, its experts are published in MXFP4",
    ),
    "qwen3-30b-a3b": _Published(
        "Qwen3MoeForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
        "Qwen/Qwen3-30B-A3B, config.json",
    ),
    "mixtral-8x7b": _Published(
        "MixtralForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        "mistralai/Mixtral-8x7B-v0.1, config.json",
    ),
    "grok-1": _Published(
        "Grok1ModelForCausalLM",
        {
            "vocab_size": 131072,
            "hidden_size": 6144,
            "intermediate_size": 32768,
            "num_hidden_layers": 64,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
        "xai-org/grok-1, run.py and model.py; hpcai-tech/grok-1, config.json",
    ),
    "grok-2": _Published(
        "Grok1ForCausalLM",
        {
            "vocab_size": 131072,
            "hidden_size": 8192,
            "intermediate_size": 32768,
            "moe_intermediate_size": 16384,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "residual_moe": True,
            "max_position_embeddings": 131072,
        },
        "xai-org/grok-2, config.json",
    ),
    "gemma-4-26b-a4b": _Published(
        "Gemma4ForCausalLM",
        {
            "vocab_size": 262144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_hidden_layers": 30,  # every sixth one attends to everything, the others to a window
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "tie_word_embeddings": True,
        },
        "google/gemma-4-26B-A4B, text_config of config.json; without the vision tower",
    ),
}

KNOWN_SHAPES: dict[str, str] = {name: published.source for name, published in _PUBLISHED.items()}
"""The names that ``known_model`` takes, each with the source of its numbers."""


@functools.cache
def known_model(name: str, dtype: str = "bfloat16", attention: str | None = None) -> tuple[ModelShape, PreTrainedModel]:
    """The shape of a well-known model with all weights in ``dtype``, and its skeleton.

    Args:
        attention: transformers' implementation, by its name; None = the model's own choice.

    Raises:
        ConfigError: no model of that name is known, or no such dtype or attention.
    """
    if name not in KNOWN_SHAPES:
        raise ConfigError(f"model={name!r} is not known; the known ones: {', '.join(sorted(KNOWN_SHAPES))}")
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"dtype={dtype!r}: allowed: {', '.join(ITEM_BYTES)}")
    # Both take seconds to import; the names above are needed without them.
    import transformers

    from epslots.models.experts import expert_layers
    from epslots.models.measure_shape import shape_of_model
    from epslots.models.own_models import own_class
    from epslots.models.pretrained import build_skeleton, resolve_class, resolve_dtype

    published = _PUBLISHED[name]
    model_class = own_class(published.architecture) or getattr(transformers, published.architecture)
    config = model_class.config_class(**published.settings, architectures=[published.architecture])
    skeleton = build_skeleton(resolve_class(config), config, resolve_dtype(dtype, config), attention=attention)
    return shape_of_model(skeleton, name, dtype, expert_layers(skeleton)), skeleton
