"""The measured shape equals what plain transformers holds: caches of real runs, bytes of real weights, experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from epslots.errors import ConfigError, UnsupportedModelError
from epslots.models.experts import expert_layers
from epslots.models.measure_shape import shape_of_config, shape_of_model
from epslots.models.model_shape import KVLayer, ModelShape
from epslots.models.pretrained import build_skeleton, resolve_class
from tests.support.zoo import HIDDEN, VOCAB, ZOO, Tiny, random_ids

MEASURES_EVERY_MODEL = True
TOKENS = 40  # longer than every sliding window of the zoo, 16
FP32 = 4

SETTINGS = dict(ZOO["mixtral"].settings)
UNUSUAL = {
    # States in the cache itself, beside its layers.
    "minimax": Tiny(
        "minimax",
        "MiniMaxForCausalLM",
        SETTINGS | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 8},
        num_experts=8,
        top_k=2,
        moe_layers=3,
    ),
    # Rows picked by a mask, on the way to a cache of three kinds of keys.
    "glm5_next": Tiny(
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
                "index_n_heads": 2,
                "index_kpool": 4,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "pad_token_id": 0,
            },
            "vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64},
            "image_token_id": 4,
            "video_token_id": 5,
        },
        num_experts=8,
        top_k=2,
        moe_layers=2,
    ),
    # Frequencies that depend on the length.
    "phimoe_longrope": replace(
        ZOO["phimoe"],
        settings=dict(ZOO["phimoe"].settings)
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "short_mscale": 1.0,
                "long_mscale": 1.0,
                "original_max_position_embeddings": 20,
            }
        },
    ),
    # Layers that are served by another one's cache.
    "gemma4_shared_kv": replace(
        ZOO["gemma4"],
        settings=dict(ZOO["gemma4"].settings)
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
        },
        moe_layers=4,
    ),
    # Keys that are values too, fewer global heads, of another width.
    "gemma4_k_eq_v": replace(
        ZOO["gemma4"],
        settings=dict(ZOO["gemma4"].settings) | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
}
MODELS = {name: tiny for name, tiny in ZOO.items() if tiny.interface or tiny.decorate} | UNUSUAL
DEEPSEEK_V4 = Tiny(
    "deepseek_v4",
    "DeepseekV4ForCausalLM",
    {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "partial_rotary_factor": 0.5,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
        "mlp_layer_types": ["moe", "moe"],
    },
)


def config_of(tiny: Tiny) -> transformers.PretrainedConfig:
    config = getattr(transformers, tiny.architecture).config_class(**tiny.settings)
    config.architectures = [tiny.architecture]
    return config


def shape_of(tiny: Tiny, dtype: str = "float32") -> ModelShape:
    return shape_of_config(config_of(tiny), tiny.name, dtype)


def cache_of(model: PreTrainedModel, tokens: int) -> Any:
    """The model's cache after a prompt, and a last token alone: a step that lets go of what the prompt left behind."""
    model.set_experts_implementation("eager")
    ids = random_ids(length=tokens)
    with torch.no_grad():
        prompt = model(input_ids=ids[:, :-1], use_cache=True)
        return model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True).past_key_values


def tensors_in(holder: Any) -> Iterator[torch.Tensor]:
    """All tensors reachable from an object through attributes, lists and dicts, but for scalar bookkeeping."""
    if isinstance(holder, torch.Tensor):
        if holder.dim():
            yield holder
    elif isinstance(holder, dict):
        for item in holder.values():
            yield from tensors_in(item)
    elif isinstance(holder, list | tuple):
        for item in holder:
            yield from tensors_in(item)
    elif hasattr(holder, "__dict__"):
        yield from tensors_in(vars(holder))


def allocated_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the storages that tensors keep alive, however many views share one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_real_runs_cache_takes_the_bytes_of_the_shape(name: str) -> None:
    shape = shape_of(MODELS[name])
    model = MODELS[name].build()
    for tokens in (9, TOKENS):
        assert allocated_bytes(tensors_in(cache_of(model, tokens))) == shape.kv_bytes(tokens)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "nemotron_h", "deepseek_v3"])
def test_caches_keep_their_own_dtypes(name: str) -> None:
    """Keys and values are in the model's dtype, recurrent states stay in fp32."""
    shape = shape_of(MODELS[name], "bfloat16")
    model = MODELS[name].build().to(torch.bfloat16)
    assert allocated_bytes(tensors_in(cache_of(model, TOKENS))) == shape.kv_bytes(TOKENS)
    assert shape.kv_bytes(TOKENS) < shape_of(MODELS[name]).kv_bytes(TOKENS)


def test_compressed_caches_are_measured_in_whole_entries() -> None:
    """deepseek_v4: a window, a history compressed 32 to 1 (or 4 to 1, with keys for an index), and buffers."""
    shape = shape_of(DEEPSEEK_V4)
    entry = 16 * FP32
    assert {layer for layer in shape.kv if layer.window} == {KVLayer(entry, 16)}
    heavy, sparse = (layer for layer in shape.kv if layer.window is None)
    assert heavy.bytes_per_token == entry // 32
    assert sparse.bytes_per_token == (entry + entry) // 4
    model = DEEPSEEK_V4.build()
    for tokens in (63, 64, 100, 127):
        # Views keep larger storages alive until the next step; what counts is what they show.
        shown = {(t.data_ptr(), t.shape): t.nbytes for t in tensors_in(cache_of(model, tokens)) if t.numel()}
        # The plan takes the buffers of tokens that wait to be compressed as full, and the window as holding the next token.
        waiting = 31 * 2 * entry + 3 * 2 * 2 * (entry + entry)
        assert 0 <= shape.kv_bytes(tokens) - sum(shown.values()) <= waiting + 3 * entry


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_experts_and_dense_bytes_are_the_real_models(name: str) -> None:
    tiny = MODELS[name]
    shape = shape_of(tiny)
    assert len(shape.layers) == tiny.moe_layers
    assert {layer.num_experts for layer in shape.layers} == {tiny.num_experts}
    assert shape.top_k == tiny.top_k
    assert (shape.hidden_size, shape.vocab_size) == (HIDDEN, VOCAB)
    model = tiny.build()
    parameters = dict(model.named_parameters())
    of_experts = {f"{layer.name}.{tensor.name}" for layer in shape.layers for tensor in layer.layout.tensors}
    assert of_experts <= parameters.keys()
    dense = [parameter for path, parameter in parameters.items() if path not in of_experts]
    assert shape.dense_bytes == allocated_bytes(iter([*dense, *model.buffers()]))


def test_a_skeleton_with_its_experts_has_the_same_shape() -> None:
    """Experts are told from dense weights by their layer, not by their absence."""
    config = config_of(ZOO["deepseek_v3"])
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    layers = expert_layers(model)
    assert shape_of_model(model, "deepseek_v3", "float32", layers) == shape_of(ZOO["deepseek_v3"])


def test_the_shape_carries_name_and_dtype_and_halves_with_it() -> None:
    full, half = shape_of(ZOO["mixtral"]), shape_of(ZOO["mixtral"], "bfloat16")
    assert (full.name, full.dtype, half.dtype) == ("mixtral", "float32", "bfloat16")
    assert half.expert_bytes * 2 == full.expert_bytes
    # Rotary frequencies stay in fp32, whatever the model's dtype: 2 buffers of 8.
    assert half.dense_bytes * 2 == full.dense_bytes + 2 * 8 * FP32
    assert full.parameters - half.parameters in range(-100, 100)


def test_auto_takes_the_configurations_dtype() -> None:
    config = config_of(ZOO["mixtral"])
    config.dtype = torch.bfloat16
    assert shape_of_config(config, "mixtral").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="int8"):
        shape_of_config(config, "mixtral", "int8")


@pytest.mark.parametrize("name", ["mixtral", "longcat_flash"])
def test_a_measured_skeleton_has_its_own_forward_again(name: str) -> None:
    """longcat_flash's experts run through a forward of the instance, which must not be lost."""
    config = config_of(ZOO[name])
    model = build_skeleton(resolve_class(config), config, torch.float32)
    layers = expert_layers(model)
    before = [vars(model.get_submodule(layer.name)).get("forward") for layer in layers]
    shape_of_model(model, name, "float32", layers)
    assert [vars(model.get_submodule(layer.name)).get("forward") for layer in layers] == before


def test_a_model_that_cannot_be_traced_is_refused_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_values(self: torch.nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.from_numpy(hidden_states.numpy())

    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    monkeypatch.setattr(MixtralDecoderLayer, "forward", needs_values)
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM can't be measured.*TypeError.*numpy"):
        shape_of(ZOO["mixtral"])


def test_dense_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        shape_of(ZOO["llama"])
