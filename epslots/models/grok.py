"""Grok-1 and Grok-2, which transformers lacks, in transformers' own building blocks.

Written from xAI's published computation (github.com/xai-org/grok-1, model.py) and, for Grok-2, from SGLang's (models/grok.py,
and its attention). Both are decoders of sandwich-normed layers: attention whose logits are capped by tanh, then experts that a
softmax over all of them chooses and weighs. Grok-2 adds a dense MLP beside the experts, caps of the router's and the final
logits, and a temperature of attention that grows with a token's position. All gates are GELU's tanh form, as in xAI's code;
a conversion's configuration isn't asked.

``own_models.py`` has the names in checkpoints.

Legend of shape suffixes: B rows, W new tokens, S tokens attended to, T = B * W, K experts per token.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import (
    MixtralExperts,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from epslots.errors import UnsupportedModelError

_ACTIVATION = "gelu_pytorch_tanh"


class GrokConfig(PretrainedConfig):
    """The settings of both models, under the names of all released configurations.

    Raises:
        UnsupportedModelError: a setting that no released model has: other rotary embeddings, or sliding windows.
    """

    model_type = "grok"
    attribute_map: ClassVar = {"num_experts": "num_local_experts", "max_attn_value": "attn_logit_softcapping"}
    default_theta = 10000.0

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    moe_intermediate_size: int | None = None
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    residual_moe: bool = False
    embedding_multiplier_scale: float = 1.0
    output_multiplier_scale: float = 1.0
    attn_output_multiplier: float | None = None
    attn_logit_softcapping: float = 30.0
    router_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attn_temperature_len: int = -1
    rope_type: str | None = None
    rope_parameters: dict | None = None  # type: ignore[type-arg]
    sliding_window_size: int = -1
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.attn_output_multiplier is None:
            self.attn_output_multiplier = self.head_dim**-0.5
        if self.tie_word_embeddings is None:  # older versions of transformers left out what was true: Grok-1's
            self.tie_word_embeddings = not self.residual_moe
        # "original": angles as they are, at any length; the settings of a scaling beside it are idle.
        if self.rope_type not in (None, "default", "original"):
            raise UnsupportedModelError(f"rope_type is {self.rope_type!r}: allowed for Grok: original, as in its release")
        if self.sliding_window_size > 0:
            raise UnsupportedModelError(f"sliding_window_size is {self.sliding_window_size}: allowed for Grok: -1, no window")
        super().__post_init__(**kwargs)


class GrokRMSNorm(MixtralRMSNorm):
    """Scaled in fp32, rounded once."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.float()
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * rows).to(hidden_states.dtype)


def softcap(logits: torch.Tensor, most: float | None) -> torch.Tensor:
    """Logits kept within +- ``most``; as they are where that is None or 0."""
    return most * torch.tanh(logits / most) if most else logits


class GrokAttention(nn.Module):
    """Grouped-query attention with capped logits, which no implementation of transformers but this one computes."""

    def __init__(self, config: GrokConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, cast(int, config.head_dim)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        temperature_B1W1: torch.Tensor | None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        key, value = (repeat_kv(states, self.num_key_value_groups) for states in (key, value))
        logits = (query @ key.transpose(2, 3)).float() * self.config.attn_output_multiplier
        logits = softcap(logits, self.config.attn_logit_softcapping)
        if temperature_B1W1 is not None:
            logits = logits * temperature_B1W1
        if attention_mask is not None:
            logits = logits + attention_mask
        output = logits.softmax(-1).to(value.dtype) @ value
        result: torch.Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return result


class GrokMLP(nn.Module):
    """Grok-2's dense MLP beside the experts."""

    def __init__(self, config: GrokConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[_ACTIVATION]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return result


class GrokExperts(MixtralExperts):
    """The experts, at transformers' interface."""

    def __init__(self, config: GrokConfig) -> None:
        sizes = copy.copy(config)
        sizes.intermediate_size, sizes.hidden_act = cast(int, config.moe_intermediate_size), _ACTIVATION
        super().__init__(sizes)
        self.config = config


class GrokRouter(nn.Module):
    """Chooses experts in fp32, by a softmax over all."""

    def __init__(self, config: GrokConfig) -> None:
        super().__init__()
        self.top_k, self.cap = config.num_experts_per_tok, config.router_logit_softcapping
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers of the experts of each token, [T, K]."""
        logits_TE = softcap(nn.functional.linear(hidden_TH.float(), self.weight.float()), self.cap)
        weight_TK, index_TK = logits_TE.softmax(-1).topk(self.top_k, -1)
        return weight_TK.to(hidden_TH.dtype), index_TK


class GrokMoE(nn.Module):
    """The router and its experts."""

    def __init__(self, config: GrokConfig) -> None:
        super().__init__()
        self.gate = GrokRouter(config)
        self.experts = GrokExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows_TH = hidden_states.flatten(0, 1)
        weight_TK, index_TK = self.gate(rows_TH)
        result: torch.Tensor = self.experts(rows_TH, index_TK, weight_TK).view(hidden_states.shape)
        return result


class GrokDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts, each between two norms."""

    def __init__(self, config: GrokConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GrokAttention(config, layer_idx)
        self.block_sparse_moe = GrokMoE(config)
        self.mlp = GrokMLP(config) if config.residual_moe else None
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            self.add_module(name, GrokRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, hidden_states: torch.Tensor, **attention: Any) -> torch.Tensor:
        attended = self.self_attn(self.pre_attn_norm(hidden_states), **attention)
        hidden_states = hidden_states + self.post_attn_norm(attended)
        normed = self.pre_moe_norm(hidden_states)
        routed = self.block_sparse_moe(normed)
        if self.mlp is not None:
            routed = (self.mlp(normed) + routed) / math.sqrt(2)
        result: torch.Tensor = hidden_states + self.post_moe_norm(routed)
        return result


class GrokPreTrainedModel(PreTrainedModel):
    """transformers' base class. Of its implementations of attention, none caps logits as Grok does."""

    config_class = GrokConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["GrokDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GrokExperts | GrokRouter):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class GrokModel(GrokPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: GrokConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([GrokDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = GrokRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states of tokens, or of their embeddings before these are multiplied."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(embedded.shape[1], device=embedded.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = embedded * self.config.embedding_multiplier_scale
        attention = {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            "attention_mask": mask,
            "temperature_B1W1": self._temperature(position_ids),
            "past_key_values": past_key_values,
        }
        for layer in self.layers:
            hidden_states = layer(hidden_states, **attention)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _temperature(self, position_BW: torch.Tensor) -> torch.Tensor | None:
        """The factor of each token's attention logits: the logarithm of its position, to a base of 1,024."""
        base = self.config.attn_temperature_len
        if base <= 0:
            return None
        growth_BW = torch.log2(position_BW.clamp(min=1).float()) / math.log2(base)
        return torch.where(position_BW > base, growth_BW, 1.0)[:, None, :, None]


class GrokForCausalLM(GrokPreTrainedModel, GenerationMixin):
    """Grok with its language-model head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GrokConfig) -> None:
        super().__init__(config)
        self.model = GrokModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of tokens, or of their embeddings before these are multiplied."""
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        logits = softcap(logits * self.config.output_multiplier_scale, self.config.final_logit_softcapping)
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
