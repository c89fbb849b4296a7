"""Tiny random checkpoints of many architectures, made on the spot for tests.

Every model here is a real transformers class with its own router, experts and attention, shrunk until making, saving
and loading it takes a fraction of a second. Weights are seeded by the model's name, so that a failure repeats.

    folder = make_checkpoint("mixtral", tmp_path / "mixtral")      # safetensors shards, an index, configs
    model = reference(folder)                                      # plain transformers, fp32: what outputs must equal
    model(random_ids())

The same weights in other layouts on disk: ``make_single_file``, ``make_fused``, ``make_fp8``, ``make_mxfp4``.
"""

from __future__ import annotations

import inspect
import json
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

VOCAB = 320
HIDDEN = 64

# Ids below this one are left to the special tokens (pad, bos, images), which random prompts must not contain.
FIRST_PLAIN_ID = 16


@dataclass(frozen=True)
class Tiny:
    """One architecture of the zoo; ``settings`` are the keyword arguments of its configuration class.

    The rest is what tests choose models by, or check results against. ``test_zoo.py`` holds that it is true.
    """

    name: str
    architecture: str
    settings: Mapping[str, Any]
    num_experts: int = 0
    """Experts of each MoE layer that have weights of their own; 0 for a dense model."""
    top_k: int = 0
    moe_layers: int = 0
    """Modules of routed experts in the model."""
    idle_layers: int = 0
    """Those of them that text alone never calls; see ``mixed_inputs``."""
    interface: bool = True
    """The experts go through transformers' experts interface."""
    decorate: bool = False
    """They don't, but have its signature: decorating their class at run time brings them to it."""
    rebuilt: bool = False
    """They don't; epslots rebuilds the block around them, which brings them to it (``models/experts_interface.py``)."""
    zero_experts: int = 0
    """Identity experts, without weights, that the router can choose by the ids from ``num_experts`` on."""
    hybrid: bool = False
    """Some layers keep other things than keys and values: recurrent states, an indexer's keys, compressed blocks."""
    tied: bool = False
    """The output layer shares the embedding's weights and is not in the checkpoint."""
    aligned: bool = True
    """All strides of the experts' weights are multiples of 16 bytes in bf16 and fp32, as grouped matmul wants them."""

    @property
    def served(self) -> bool:
        """Whether its experts can be run from slots."""
        return self.interface or self.decorate or self.rebuilt

    def build(self) -> PreTrainedModel:
        """The model on the CPU in fp32, in evaluation mode, the same at every call."""
        architecture = getattr(transformers, self.architecture)
        config = architecture.config_class(**self.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = cast(PreTrainedModel, architecture(config).eval())
            _spread_weights(model, self.tied)
        return model


def _spread_weights(model: PreTrainedModel, tied: bool) -> None:
    """Replace initial weights by ones that a test can tell apart.

    Initialisation leaves routing nearly uniform, and biases, corrections and centred norms at zero, where a weight that
    is lost on the way goes unnoticed. Here every weight is random, the residual stream is mostly the token's own
    embedding, so that tokens choose different experts in every layer, and logits have a deviation of about one.
    """
    embedding = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if name.endswith("tid2eid"):
                # DeepSeek-V4's first layers choose experts by the token: a row of different ones for each.
                tensor.copy_(torch.rand(len(tensor), model.config.n_routed_experts).argsort(-1)[:, : tensor.shape[1]])
            if not tensor.is_floating_point():
                continue
            if tensor is embedding:
                tensor.normal_(std=0.3 if tied else 1.0)
            elif tied and name.endswith("model.norm.weight"):
                # Signs at random: else each token's logit for itself, a square, wins and generation only repeats.
                tensor.normal_(std=0.3)
            elif name.endswith("balancing_biases"):
                # The last is zaya's bias against its skip expert; transformers sets it to -1, after loading another value.
                tensor[:-1].normal_(std=0.02)
            elif name.endswith(("slope_rate", "_decay")):
                pass  # minimax's buffers, which follow from its configuration
            elif tensor.dim() < 2 or name.endswith("l2_clip.scale"):
                tensor.add_(torch.randn_like(tensor), alpha=0.02)
            else:
                # Zaya's router is a small MLP, whose output shrinks with every layer.
                tensor.normal_(std=0.5 if "router_mlp" in name else 0.1)


# Settings that nearly every configuration shares. Nothing ends a sequence, so that generation runs its length.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# The names under which a configuration class has the number of experts and the experts per token.
_LOCAL = ("num_local_experts", "num_experts_per_tok")
_NUM = ("num_experts", "num_experts_per_tok")
_ROUTED = ("n_routed_experts", "num_experts_per_tok")

_WIDTHS = {"intermediate_size": 96, "moe_intermediate_size": 32}
_NARROW = {"intermediate_size": 32}
_TWO = {"num_hidden_layers": 2}  # of layers that are all alike, a third shows nothing more
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_DEEPSEEK = {**_MLA, **_WIDTHS, "n_shared_experts": 1, "first_k_dense_replace": 1}
_DEEPSEEK_V3 = {**_DEEPSEEK, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_KIMI = {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
_DSA = {**_MLA, **_WIDTHS, "q_lora_rank": 32, "n_shared_experts": 1}
_DSA |= {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
_INKLING = {"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "sliding_window_size": 16, "rel_extent": 24}
_INKLING |= {"moe_intermediate_size": 32, "unpadded_vocab_size": VOCAB, "head_dim": 16, "swa_head_dim": 16}
_INKLING |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "log_scaling_n_floor": 32}
_DOTS3_WINDOWS = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "head_dim": 32}
_DOTS3_WINDOWS |= {"qk_nope_head_dim": 24, "v_head_dim": 16}
_YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
_YARN |= {"truncate": False, "original_max_position_embeddings": 128}
_GEMMA4 = {
    **_WIDTHS,
    "enable_moe_block": True,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 16,
}
_GEMMA4_KEYS = ("num_experts", "top_k_experts")
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
_WIDE_VISION = {**_VISION, "intermediate_size": 32}
_GEMMA4_VISION = {**_WIDE_VISION, "num_key_value_heads": 2}
_GEMMA4_TOKENS = {"boi_token_id": 2, "eoi_token_id": 3, "image_token_id": 4, "video_token_id": 5, "boa_token_id": 6}
_AUDIO = {"patch_sizes": [2, 2], "hidden_sizes": [16, 16], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": HIDDEN}
_ERNIE_VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
_ERNIE_VL_TOKENS = {f"{kind}_token_id": id for id, kind in enumerate(("image_start", "image_end", "image"), 2)}
_ERNIE_VL_TOKENS |= {f"{kind}_token_id": id for id, kind in enumerate(("video_start", "video_end", "video"), 5)}
_DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
_FLAGS = {field.name for field in fields(Tiny)}


def _tiny(
    name: str,
    architecture: str,
    keys: Sequence[str],
    num_experts: int,
    top_k: int,
    moe_layers: int = 3,
    *,
    beside_text: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    **given: Any,
) -> Tiny:
    """A row of the table.

    Args:
        keys: the configuration's names for ``num_experts`` and ``top_k``.
        beside_text: the text model's settings are its ``text_config``, and these stand beside that.
        without: common settings that the configuration class doesn't have.
        given: flags of ``Tiny``, and settings of the configuration class.
    """
    flags = {flag: given.pop(flag) for flag in _FLAGS & given.keys()}
    settings = {key: value for key, value in _COMMON.items() if key not in without}
    settings |= {"tie_word_embeddings": flags.get("tied", False)} | dict(zip(keys, (num_experts, top_k), strict=True)) | given
    if beside_text is not None:
        settings = {"text_config": settings, **beside_text}
    return Tiny(name, architecture, settings, num_experts, top_k, moe_layers, **flags)


# fmt: off
_ALL = [
    _tiny("mixtral", "MixtralForCausalLM", _LOCAL, 8, 2, 2, **_TWO, intermediate_size=96),
    _tiny("qwen2_moe", "Qwen2MoeForCausalLM", _NUM, 16, 4, 2, **_TWO, **_WIDTHS, decoder_sparse_step=1,
          shared_expert_intermediate_size=48),
    _tiny("qwen3_moe", "Qwen3MoeForCausalLM", _NUM, 16, 4, **_WIDTHS, head_dim=16, decoder_sparse_step=1, norm_topk_prob=True),
    _tiny("qwen3_next", "Qwen3NextForCausalLM", _NUM, 16, 4, hybrid=True,
          **_WIDTHS, **_LINEAR, shared_expert_intermediate_size=32, head_dim=16,
          layer_types=["linear_attention", "full_attention", "linear_attention"]),
    _tiny("deepseek_v2", "DeepseekV2ForCausalLM", _ROUTED, 16, 4, 2,
          **_DEEPSEEK | {"n_shared_experts": 2}, q_lora_rank=None, topk_method="greedy"),
    _tiny("deepseek_v3", "DeepseekV3ForCausalLM", _ROUTED, 16, 4, 2, **_DEEPSEEK_V3),
    _tiny("kimi", "DeepseekV3ForCausalLM", _ROUTED, 96, 8, 2, **_DEEPSEEK_V3 | _KIMI),
    _tiny("gpt_oss", "GptOssForCausalLM", _LOCAL, 8, 2, **_NARROW, head_dim=16, sliding_window=16, rope_parameters=_YARN,
          layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    _tiny("gemma4", "Gemma4ForCausalLM", _GEMMA4_KEYS, 16, 4, tied=True, **_GEMMA4),
    _tiny("gemma4_multimodal", "Gemma4ForConditionalGeneration", _GEMMA4_KEYS, 16, 4, tied=True, **_GEMMA4,
          beside_text={"vision_config": {**_GEMMA4_VISION, "head_dim": 16, "position_embedding_size": 16},
                       **_GEMMA4_TOKENS, "eoa_token_index": 7, "audio_token_id": 8}),
    _tiny("olmoe", "OlmoeForCausalLM", _NUM, 16, 4, 2, **_TWO, **_NARROW),
    _tiny("olmoe_tied", "OlmoeForCausalLM", _NUM, 16, 4, 2, **_TWO, tied=True, **_NARROW),
    _tiny("olmoe_unaligned", "OlmoeForCausalLM", _NUM, 16, 4, 2, **_TWO, aligned=False, intermediate_size=30),
    _tiny("glm4_moe", "Glm4MoeForCausalLM", _ROUTED, 16, 4, 2, **_WIDTHS,
          n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=16),
    _tiny("phimoe", "PhimoeForCausalLM", _LOCAL, 8, 2, 2, **_TWO, **_NARROW),
    _tiny("granitemoe", "GraniteMoeForCausalLM", _LOCAL, 8, 2, 2, **_TWO, **_NARROW),
    _tiny("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", ("moe_num_experts", "moe_k"), 8, 2, 2, **_WIDTHS,
          moe_num_shared_experts=1),
    _tiny("minimax_m2", "MiniMaxM2ForCausalLM", _LOCAL, 8, 2, 2, **_TWO, **_NARROW, head_dim=16),
    _tiny("nemotron_h", "NemotronHForCausalLM", _ROUTED, 8, 2, 2, hybrid=True, **_WIDTHS | {"intermediate_size": 64},
          **_MAMBA, n_shared_experts=1, moe_shared_expert_intermediate_size=32, head_dim=16, num_hidden_layers=4,
          layers_block_type=["moe", "full_attention", "linear_attention", "moe"]),
    _tiny("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", ("num_experts", "moe_topk"), 8, 2, 2, **_TWO, **_NARROW, head_dim=16),
    _tiny("jamba", "JambaForCausalLM", _NUM, 8, 2, 2, hybrid=True, **_NARROW, num_hidden_layers=4, expert_layer_period=2,
          expert_layer_offset=1, attn_layer_period=4, attn_layer_offset=2, mamba_d_state=8),
    _tiny("zaya", "ZayaForCausalLM", _NUM, 8, 1, hybrid=True, moe_intermediate_size=32, head_dim=16, router_hidden_size=16),
    _tiny("muse_spark", "MuseSparkForConditionalGeneration", _LOCAL, 16, 4, 2, **_WIDTHS, moe_hidden_size=48, head_dim=16,
          sliding_window=16, output_multiplier=1.0, mlp_layer_types=["dense", "sparse", "sparse"],
          beside_text={"vision_config": {**_WIDE_VISION, "pos_emb_height": 4, "pos_emb_width": 4}, "audio_config": _AUDIO,
                       "out_hidden_size": 128, "projector_hidden_size": 32,
                       "image_token_id": 4, "video_token_id": 5, "audio_token_id": 8}),
    _tiny("longcat_flash", "LongcatFlashForCausalLM", ("n_routed_experts", "moe_topk"), 8, 3, 2, interface=False,
          decorate=True, zero_experts=2, **_MLA, without={"num_hidden_layers"}, num_layers=2, q_lora_rank=32, head_dim=8,
          ffn_hidden_size=96, expert_ffn_hidden_size=32, zero_expert_num=2),
    _tiny("step3p7", "Step3p7ForConditionalGeneration", _ROUTED, 16, 4, 2, interface=False, decorate=True,
          **_WIDTHS, share_expert_dim=32, head_dim=16, sliding_window=16, swiglu_limits=[0.0, 0.5, 0.0],
          layer_types=["full_attention", "sliding_attention", "full_attention"], mlp_layer_types=["dense", "sparse", "sparse"],
          beside_text={"vision_config": {**_VISION, "mlp_ratio": 1.0, "image_size": 16, "max_position_embeddings": 16},
                       "image_token_id": 4}),
    _tiny("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", ("moe_num_experts", "moe_k"), 8, 2, 4, idle_layers=2,
          intermediate_size=96, moe_intermediate_size=[32, 16], moe_num_shared_experts=1,
          rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
          beside_text={"vision_config": _ERNIE_VISION, **_ERNIE_VL_TOKENS, "tie_word_embeddings": False}),
    Tiny("llama", "LlamaForCausalLM", _COMMON | _TWO | {"intermediate_size": 96}, interface=False),
    _tiny("llama4", "Llama4ForCausalLM", _LOCAL, 8, 1, interface=False, rebuilt=True, **_NARROW, intermediate_size_mlp=96,
          head_dim=16, attention_chunk_size=64),
    Tiny("dbrx", "DbrxForCausalLM", num_experts=8, top_k=2, moe_layers=3, interface=False, rebuilt=True, settings={
        "d_model": HIDDEN, "n_heads": 4, "n_layers": 3, "max_seq_len": 512, "vocab_size": VOCAB,
        "attn_config": _DBRX_ATTENTION,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": HIDDEN},
        "pad_token_id": 0, "bos_token_id": 1}),
    _tiny("jetmoe", "JetMoeForCausalLM", _LOCAL, 8, 2, 2, interface=False, rebuilt=True, without={"num_attention_heads"},
          **_TWO, **_NARROW, kv_channels=16),
    _tiny("doge", "DogeForCausalLM", _NUM, 16, 4, interface=False, rebuilt=True, is_moe=True, intermediate_size=96,
          keep_window_size=16),
    # The layers of those below keep various things of a sequence, and prompts of some tens of tokens show which: windows hold
    # 16 tokens, an index chooses 8, blocks have 4 to 16. Their experts are stored and called as qwen3_moe's are.
    _tiny("qwen3_5_moe", "Qwen3_5MoeForCausalLM", _NUM, 16, 4, hybrid=True, **_LINEAR, moe_intermediate_size=32,
          shared_expert_intermediate_size=32, head_dim=16,
          layer_types=["linear_attention", "linear_attention", "full_attention"]),
    # It needs a token that ends n-grams; tests that generate name no end token.
    _tiny("qwen4_exp", "Qwen4ExpForCausalLM", _NUM, 16, 4, hybrid=True, **_LINEAR, moe_intermediate_size=32,
          shared_expert_intermediate_size=32, head_dim=16, eos_token_id=2,
          layer_types=["linear_attention", "linear_attention", "indexed_attention"], hc_lowrank=16,
          indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4,
          ple_layer_ids=[1], ple_embed_dim=32, heads_per_ngram=2, ngram_vocab_size_base=500, split_ngram_parts=1),
    _tiny("kimi_linear", "KimiLinearForCausalLM", _LOCAL, 16, 4, 2, hybrid=True, **_MLA, **_WIDTHS, q_lora_rank=None,
          linear_head_dim=16, linear_num_heads=4,
          layer_types=["linear_attention", "linear_attention", "full_attention"]),
    _tiny("bailing_hybrid", "BailingHybridForCausalLM", _LOCAL, 16, 4, 2, hybrid=True, **_MLA, **_WIDTHS,
          layer_group_size=3, head_dim=8, first_k_dense_replace=1, n_group=4, topk_group=2),
    _tiny("glm_moe_dsa", "GlmMoeDsaForCausalLM", _ROUTED, 16, 4, 2, hybrid=True, **_DSA, first_k_dense_replace=1,
          indexer_types=["full", "full", "shared"]),
    _tiny("deepseek_v32", "DeepseekV32ForCausalLM", _ROUTED, 16, 4, 2, hybrid=True, **_DSA, first_k_dense_replace=1,
          n_group=4, topk_group=2),
    _tiny("deepseek_v4", "DeepseekV4ForCausalLM", _ROUTED, 16, 4, 4, hybrid=True, num_hidden_layers=4,
          num_key_value_heads=1, head_dim=16, partial_rotary_factor=0.5, q_lora_rank=32,
          moe_intermediate_size=32, o_groups=2, o_lora_rank=16, sliding_window=16,
          layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                       "compressed_sparse_attention"],
          compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
          index_topk=3, index_n_heads=16, index_head_dim=16, mlp_layer_types=["hash_moe", "moe", "moe", "moe"]),
    _tiny("mimo_v2_flash", "MiMoV2FlashForCausalLM", _ROUTED, 16, 4, 2, **_WIDTHS, head_dim=24, v_head_dim=16,
          sliding_window=16),
    _tiny("lfm2_moe", "Lfm2MoeForCausalLM", _NUM, 16, 4, 2, hybrid=True, **_WIDTHS, num_dense_layers=1,
          layer_types=["conv", "full_attention", "conv"]),
    _tiny("granitemoehybrid", "GraniteMoeHybridForCausalLM", _LOCAL, 8, 2, hybrid=True, **_NARROW,
          shared_intermediate_size=32, layer_types=["linear_attention", "linear_attention", "full_attention"],
          mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16),
    _tiny("hy_v4", "HYV4ForCausalLM", _ROUTED, 16, 4, 2, hybrid=True, **_DSA, indexer_types=["full", "shared", "full"]),
    _tiny("inkling2", "Inkling2ForCausalLM", _ROUTED, 16, 4, hybrid=True, **_INKLING, n_layers_per_attn_res_block=2),
    _tiny("dots3_note", "Dots3NoteForCausalLM", _ROUTED, 16, 4, 2, hybrid=True, **_DSA, head_dim=16, sliding_window=16,
          shared_experts_intermediate_size=32, layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
          **{f"swa_{name}": value for name, value in _DOTS3_WINDOWS.items()}),
    _tiny("minimax", "MiniMaxForCausalLM", _LOCAL, 8, 2, hybrid=True, **_NARROW, head_dim=16, block_size=16,
          layer_types=["linear_attention", "full_attention", "linear_attention"]),
]

_STRESSED = [
    _tiny("zaya_sliding", "ZayaForCausalLM", _NUM, 8, 1, hybrid=True, moe_intermediate_size=32, head_dim=16,
          router_hidden_size=16, layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=16),
    _tiny("llama4_nope", "Llama4ForCausalLM", _LOCAL, 8, 1, interface=False, rebuilt=True, **_NARROW, intermediate_size_mlp=96,
          head_dim=16, attention_chunk_size=16, layer_types=["chunked_attention", "full_attention", "chunked_attention"],
          no_rope_layers=[1, 0, 1], floor_scale=8, attn_scale=0.5),
    _tiny("minimax_m3", "MiniMaxM3VLForCausalLM", _LOCAL, 8, 2, 3, **_NARROW, head_dim=16, rotary_dim=8,
          dense_intermediate_size=64, shared_intermediate_size=32,
          layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
          index_n_heads=2, index_head_dim=16, index_block_size=8, index_topk_blocks=3),
    _tiny("inkling", "InklingForCausalLM", _ROUTED, 16, 4, hybrid=True, **_INKLING, intermediate_size=96, n_shared_experts=1),
    _tiny("axk2", "AXK2ForCausalLM", _ROUTED, 16, 4, 2, hybrid=True, **_DSA),
]
# fmt: on

ZOO: dict[str, Tiny] = {tiny.name: tiny for tiny in _ALL}

STRESSED: dict[str, Tiny] = {tiny.name: tiny for tiny in _STRESSED}
"""For tests of caches alone: further kinds of layers, and settings under which prompts of some tens of tokens show them."""

SHORT = {
    "qwen3_moe_short": replace(ZOO["qwen3_moe"], moe_layers=2, settings={**ZOO["qwen3_moe"].settings, "num_hidden_layers": 2})
}
"""For tests of clusters, which make tens of thousands of steps: every layer more would take them half as long again."""


def make_checkpoint(name: str, folder: Path, max_shard_size: str = "200KB") -> Path:
    """Save the model called ``name`` in ``folder``, as its author would: safetensors shards, an index and configs."""
    (ZOO | SHORT)[name].build().save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def reference(folder: Path, experts_implementation: str = "eager", **settings: Any) -> PreTrainedModel:
    """The checkpoint in plain transformers, fp32, every weight loaded and none left over.

    "eager" is transformers' loop over experts: it shares no kernel with epslots, and takes experts whose strides the
    default "grouped_mm" refuses.
    """
    architecture = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    model, report = architecture.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation=experts_implementation,
        output_loading_info=True,
        **settings,
    )
    assert not any(report.values()), report
    return cast(PreTrainedModel, model.eval())


def reference_dequantised(folder: Path, **settings: Any) -> PreTrainedModel:
    """An FP8 or MXFP4 checkpoint in plain transformers, its weights dequantised to fp32."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    config = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method](dequantize=True)
    return reference(folder, quantization_config=config, **settings)


def random_ids(batch: int = 1, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Random prompts [batch, length] that every model of the zoo accepts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_ID, VOCAB, (batch, length), generator=generator)


def mixed_inputs(batch: int = 1, length: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for ernie4_5_vl_moe in which every other token counts as an image's and so goes to the vision experts."""
    ids = random_ids(batch, length, seed)
    return {"input_ids": ids, "moe_mm_token_type_ids": torch.arange(length).remainder(2).expand(batch, -1)}


def experts_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that compute routed experts from (hidden states, expert ids, weights), by their path."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts") and len(inspect.signature(module.forward).parameters) == 3
    }


def routing(model: PreTrainedModel, **inputs: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The expert ids and weights [T, K] that the model chooses for ``inputs``, by the experts module's path."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = (args[1], args[2])

        return hook

    handles = [module.register_forward_pre_hook(record(name)) for name, module in experts_modules(model).items()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, under its name on disk."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def write_checkpoint(
    source: Path, folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int | None = 200_000, **config: Any
) -> Path:
    """A checkpoint of ``tensors`` in ``folder``, with the configs of ``source`` and ``config`` added to config.json.

    ``shard_bytes=None`` writes one file and no index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "generation_config.json", folder)
    settings = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings, indent=2))

    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, tensor in tensors.items():
        filled = sum(t.nbytes for t in shards[-1].values())
        if shard_bytes is not None and shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][key] = tensor.contiguous()
    if shard_bytes is None:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    return folder


def make_single_file(source: Path, folder: Path) -> Path:
    """The same tensors in one model.safetensors, without an index."""
    return write_checkpoint(source, folder, read_tensors(source), shard_bytes=None)


def make_fused(source: Path, folder: Path) -> Path:
    """The same weights under the names the model has in memory: one tensor [E, ...] for all experts of a layer.

    transformers loads such a checkpoint as it is; no conversion takes part.
    """
    model = reference(source)
    # A tied weight has two names in the state dict, but safetensors stores a piece of memory once.
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    return write_checkpoint(source, folder, {k: t for k, t in model.state_dict().items() if k not in shared})


def make_fp8(source: Path, folder: Path, block: int = 8) -> Path:
    """A DeepSeek-style FP8 checkpoint: every projection in e4m3, with one fp32 scale per ``block`` x ``block`` weights.

    Embeddings, norms, router and output layer keep their precision, as in the published checkpoints. So does the ragged
    edge: a last block may be smaller. transformers can't dequantise that, so the default divides all shapes here.
    """
    tensors = {}
    for key, weight in read_tensors(source).items():
        if not (key.endswith(".weight") and weight.dim() == 2 and "_proj" in key):
            tensors[key] = weight
            continue
        tensors[key], tensors[f"{key}_scale_inv"] = quantise_fp8(weight, block)
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }
    return write_checkpoint(source, folder, tensors, quantization_config=quantisation)


def quantise_fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [M, N] as e4m3 [M, N] and the scales of its blocks, whose product is close to it."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    grid = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block)
    largest = grid.abs().amax((1, 3))
    scales = largest / torch.finfo(torch.float8_e4m3fn).max
    every = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (weight / every).to(torch.float8_e4m3fn), scales


# The magnitudes of E2M1, the 4-bit float of MXFP4, by the three low bits of its code; the fourth is the sign.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MXFP4_BLOCK = 32


def make_mxfp4(source: Path, folder: Path) -> Path:
    """A gpt-oss-style MXFP4 checkpoint: the experts' weights as packed blocks and scales, all else as it was."""
    tensors = {}
    for key, weight in read_tensors(source).items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key] = weight
            continue
        # On disk the blocks run along each output's inputs; in memory gpt-oss has [E, inputs, outputs].
        tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = quantise_mxfp4(weight.transpose(1, 2))
    quantisation = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    return write_checkpoint(source, folder, tensors, quantization_config=quantisation)


def quantise_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [..., N] as blocks [..., N / 32, 16] of two codes a byte, low nibble first, and scales [..., N / 32]."""
    blocks = weight.reshape(*weight.shape[:-1], -1, _MXFP4_BLOCK)
    # 6 = 1.5 * 2^2 is the largest magnitude: the block's largest lands in [4, 8), and what exceeds 6 saturates.
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    scaled = blocks / torch.exp2(exponent)[..., None]
    magnitude = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed, (exponent + 127).to(torch.uint8)
