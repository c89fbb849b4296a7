"""Kimi-K2 (FP8) and Kimi-K2-Thinking (INT4 experts) with the keys of their released configurations, at tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.equality import assert_equal, greedy, load
from tests.support.quantised import SCHEMES, by_block, is_quantised
from tests.support.remembered import Reference

# Every key of moonshotai/Kimi-K2-Instruct's config.json; sizes are those of the zoo's deepseek_v3.
K2: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": zoo.HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 16,
    "max_position_embeddings": 512,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": zoo.VOCAB,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [16, 16]}
_INT4 = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4, "observer": "minmax"}
_INT4 |= {"observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}
_GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": _INT4}
INT4 = {
    "config_groups": {"group_0": _GROUP},
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def fp8(key: str, weight: Any) -> tuple[dict[str, Any], Any]:
    """Every projection in blocks."""
    codes, scales = zoo.quantise_fp8(weight, 16)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * by_block(scales, 16, weight)


def int4(key: str, weight: Any) -> tuple[dict[str, Any], Any]:
    """Routed experts alone."""
    return SCHEMES["ct int4"].quantise(weight) if ".mlp.experts." in key else ({"weight": weight}, weight)


def write(source: Path, folder: Path, quantise: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[Path, Path]:
    """The checkpoint, and one of the same weights that plain transformers knows."""
    tensors, plain = {}, {}
    for key, weight in zoo.read_tensors(source).items():
        tensors[key] = plain[key] = weight
        if is_quantised(key, weight):
            parts, plain[key] = quantise(key, weight)
            del tensors[key]
            tensors |= {key.removesuffix("weight") + name: part for name, part in parts.items()}
    stored = zoo.write_checkpoint(source, folder / "kimi", tensors)
    (stored / "config.json").write_text(json.dumps(K2 | {"quantization_config": settings}))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (stored / name).write_text("raise SystemExit('code of a checkpoint was run')")
    twin = zoo.write_checkpoint(source, folder / "twin", plain)
    (twin / "config.json").write_text(json.dumps(K2 | {"model_type": "deepseek_v3", "auto_map": {}}))
    return stored, twin


@pytest.mark.parametrize(("quantise", "settings", "bits"), [(fp8, FP8, 8), (int4, INT4, 4)], ids=["K2", "K2-Thinking"])
def test_kimi_equals_deepseek_v3_on_its_weights(
    quantise: Callable[..., Any],
    settings: Mapping[str, Any],
    bits: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    cache_dir: Path,
):
    stored, twin = write(checkpoint("deepseek_v3"), tmp_path, quantise, settings)
    model, reference = load(stored, cache_dir, slots="25%", slot_format="packed"), Reference(twin)
    assert_equal(model, reference)
    prompt = zoo.random_ids(1, 9, seed=2)
    assert greedy(model, prompt) == greedy(reference, prompt)
    layer = runtime_of(model).layers[0]
    codes = sum(spec.nbytes for spec in layer.layout.tensors if spec.name.endswith("codes"))
    assert codes == layer.weights.elements * bits // 8
