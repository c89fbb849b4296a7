"""Models that transformers doesn't know by the names in their checkpoints: their classes, settings and tensors' names.

    Grok-1, Grok-2              a class of ours (``grok.py``)
    Kimi-K2, Kimi-K2-Thinking   DeepSeek-V3 under another name

Their checkpoints name code of their own (``auto_map``), or the type of another model (Grok-2 says "git"). None of it is run.
"""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV3Config, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from epslots.models.grok import GrokConfig, GrokForCausalLM

# Architectures that only these conversions name: Grok-2's own, and two of Grok-1 (hpcai-tech/grok-1; keyfan/grok-1-hf).
_CLASSES = dict.fromkeys(("Grok1ForCausalLM", "Grok1ModelForCausalLM", "GrokForCausalLM"), GrokForCausalLM)
_OTHER_NAMES = {"kimi_k2": DeepseekV3Config}

# From names in released conversions to ours, which are Grok-2's.
_GROK_NAMES = {
    # Grok-1 in the names of xAI's own code
    r"^transformer\.in_out_embed\.": "model.embed_tokens.",
    r"^transformer\.rms_norm\.": "model.norm.",
    r"^transformer\.decoder_layer\.": "model.layers.",
    r"\.multi_head_attention\.query\.": ".self_attn.q_proj.",
    r"\.multi_head_attention\.key\.": ".self_attn.k_proj.",
    r"\.multi_head_attention\.value\.": ".self_attn.v_proj.",
    r"\.multi_head_attention\.linear\.": ".self_attn.o_proj.",
    r"\.router\.": ".block_sparse_moe.gate.",
    r"\.moe\.": ".block_sparse_moe.experts.",
    r"\.rms_norm\.": ".pre_attn_norm.",
    r"\.rms_norm_1\.": ".post_attn_norm.",
    r"\.rms_norm_2\.": ".pre_moe_norm.",
    r"\.rms_norm_3\.": ".post_moe_norm.",
    # the other conversion of Grok-1
    r"\.attn\.": ".self_attn.",
    r"\.moe_block\.": ".block_sparse_moe.",
    r"norm\.scale$": "norm.weight",
    # the experts of both
    r"\.linear\.": ".w1.",
    r"\.linear_v\.": ".w3.",
    r"\.linear_1\.": ".w2.",
}
_GATE_UP = ["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"]

register_checkpoint_conversion_mapping(
    GrokConfig.model_type,
    [
        *(WeightRenaming(source, target) for source, target in _GROK_NAMES.items()),
        WeightConverter(_GATE_UP, "block_sparse_moe.experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter(
            "block_sparse_moe.experts.*.w2.weight", "block_sparse_moe.experts.down_proj", [MergeModulelist(dim=0)]
        ),
    ],
    overwrite=True,
)


def own_config(settings: dict[str, Any], name_or_path: str) -> PretrainedConfig | None:
    """The configuration of a model that only epslots knows by its checkpoint's names; None for all others.

    Args:
        settings: the content of config.json.
        name_or_path: of the checkpoint.
    """
    names = settings.get("architectures")
    known = [name for name in names if name in _CLASSES] if isinstance(names, list) else []
    kind: Any = GrokConfig if known else _OTHER_NAMES.get(str(settings.get("model_type")))
    if kind is None:
        return None
    config: PretrainedConfig = kind.from_dict({**settings, "model_type": kind.model_type})
    config.name_or_path = name_or_path
    return config


def own_class(architecture: str) -> type[PreTrainedModel] | None:
    """The class of ours that an architecture's name stands for; None for transformers' own."""
    return _CLASSES.get(architecture)
