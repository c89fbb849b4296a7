"""Every tensor of a checkpoint is used, left out by a rule that is stated, or the reason why the checkpoint is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from epslots import CheckpointError, UnsupportedModelError
from epslots.models.conversions import conversions_of
from epslots.models.expert_reader import ExpertReader, pack_layers
from epslots.models.opening import load_dense, open_model
from epslots.models.pretrained import has_language_head
from tests.support import zoo
from tests.support.quantised import make_quantised

CPU = torch.device("cpu")
Checkpoints = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def variant(checkpoint: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint with other tensors: ``variant(name, change, **settings of config.json)``."""

    def make(name: str | Path, change: Callable[[Tensors], object], **config: object) -> Path:
        source = name if isinstance(name, Path) else checkpoint(name)
        tensors = zoo.read_tensors(source)
        change(tensors)
        return zoo.write_checkpoint(source, tmp_path / "variant", tensors, shard_bytes=None, **config)

    return make


def adding(*keys: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: torch.ones(4, 4).to(dtype) for key in keys})


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_model(folder, "float32")


# --- packed tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["experts", "dense"])
def test_fp8_without_quantization_config(kept: str, variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path):
    packed = zoo.make_fp8(checkpoint("qwen3_moe"), tmp_path / "fp8")
    plain = zoo.read_tensors(checkpoint("qwen3_moe"))

    def change(tensors: Tensors) -> None:
        for key in list(tensors):
            if ("experts" in key) != (kept == "experts"):
                del tensors[key]
        tensors |= {key: tensor for key, tensor in plain.items() if key not in tensors}

    folder = variant(packed, change, quantization_config=None)
    refused(folder, rf"{'experts' if kept == 'experts' else 'self_attn'}.* is stored as F8_E4M3, and config.json has no quant")


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("key", [Q_PROJ, "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_codes_without_scales_are_no_weights(key: str, dtype: torch.dtype, variant: Callable[..., Path]):
    refused(variant("qwen3_moe", lambda tensors: tensors.update({key: tensors[key].to(dtype)})), f"{key} is stored as")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            Q_PROJ.replace("q_proj", "q_a_proj"),
            r"no tensor like weight_scale_inv, and .*q_a_proj\.weight is stored as F8_E4M3",
        ),
        ("model.layers.2.mlp.shared_experts.up_proj.weight", "no tensor like weight_scale_inv"),
    ],
)
def test_a_dense_layer_without_its_scale(
    key: str, message: str, variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path
):
    packed = zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8")
    folder = variant(packed, lambda tensors: tensors.pop(f"{key}_scale_inv"))
    refused(folder, message)


def test_one_expert_without_its_scale(variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path):
    packed = zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8")
    opened = open_model(
        variant(packed, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight_scale_inv")), "float32"
    )
    with pytest.raises(CheckpointError, match="lacks expert 7 of 16"):
        pack_layers(opened.checkpoint, opened.skeleton, opened.layers)


def test_a_scale_of_what_is_not_packed(variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path):
    """Unpacked weights whose scales were kept would be scaled a second time."""
    packed = zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8")
    key = Q_PROJ.replace("q_proj", "q_a_proj")
    refused(
        variant(packed, lambda tensors: tensors.update({key: tensors[key].float()})),
        rf"{key}_scale_inv is a scale, but {key} is stored as F32",
    )


@pytest.mark.parametrize("rows", [slice(None, 5), slice(None, 0), 0])
def test_scales_of_another_shape(rows: slice | int, variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path):
    packed = zoo.make_mxfp4(checkpoint("gpt_oss"), tmp_path / "mxfp4")
    key = "model.layers.1.mlp.experts.gate_up_proj_scales"
    folder = variant(packed, lambda tensors: tensors.update({key: tensors[key][:, rows].clone()}))
    refused(folder, rf"layers\.1\.mlp\.experts\.gate_up_proj can't be unpacked from {key.replace('scales', 'blocks')} and its")


@pytest.mark.parametrize("shape", [(), (3,)])
def test_fused_experts_of_no_dimension(shape: tuple[int, ...], variant: Callable[..., Path]):
    key = "model.layers.1.mlp.experts.down_proj"
    opened = open_model(variant("gpt_oss", lambda tensors: tensors.update({key: torch.ones(shape)})), "float32")
    with pytest.raises(CheckpointError, match=f"{key} holds {sum(shape)} experts, the model has 8"):
        ExpertReader(opened.checkpoint, opened.skeleton, opened.layers, conversions_of(opened.skeleton))


def test_mxfp4_without_its_scales(variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path):
    packed = zoo.make_mxfp4(checkpoint("gpt_oss"), tmp_path / "mxfp4")
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    refused(
        variant(packed, lambda tensors: tensors.pop(scales)), "no tensor like down_proj_scales, and .*_blocks is stored as U8"
    )


def test_mxfp4_without_quantization_config(variant: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path):
    packed = zoo.make_mxfp4(checkpoint("gpt_oss"), tmp_path / "mxfp4")
    refused(variant(packed, lambda tensors: None, quantization_config=None), r"experts\.\w+_blocks would be left out")


# --- tensors without a use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *("model.layers.0.self_attn.q_proj.weight_scale_inv", "model.layers.0.self_attn.q_proj.qweight"),
        *("model.layers.2.self_attn.o_proj.bias", "model.norm.weight_scale", "lm_head.weight_scale", "lm_head.bias"),
        *("model.layers.1.mlp.experts.3.gate_proj.input_scale", "model.layers.1.mlp.experts.3.gate_proj.bias"),
        *("model.layers.1.mlp.shared_expert.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"),
        *("model.embed_tokens.scales", "model.layers.0.post_feedforward_layernorm.weight"),
        "model.layers.1.mlp.experts.gate_up_proj_scale_inv",
    ],
)
def test_a_tensor_of_a_module_that_the_model_has(key: str, variant: Callable[..., Path]):
    refused(variant("qwen3_moe", adding(key)), f"{key} would be left out")


def test_the_base_models_prefix_hides_nothing(variant: Callable[..., Path]):
    """A checkpoint of the base model names its tensors without ``model.``; transformers adds it where that leads to one."""

    def change(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)
        tensors["layers.0.self_attn.q_proj.weight_scale"] = torch.ones(1)

    refused(variant("qwen3_moe", change), r"layers\.0\.self_attn\.q_proj\.weight_scale would be left out")


def test_more_layers_than_the_configuration_states(variant: Callable[..., Path]):
    refused(variant("qwen3_moe", lambda tensors: None, num_hidden_layers=2), r"model\.layers\.2 would be left out, one more")


def test_one_tensor_under_two_names(variant: Callable[..., Path]):
    refused(
        variant("qwen3_moe", lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] * 2})),
        r"model\.norm\.weight and norm\.weight are all model\.norm\.weight",
    )


def test_one_expert_under_two_names(variant: Callable[..., Path]):
    def change(tensors: Tensors) -> None:
        tensors["layers.0.mlp.experts.3.up_proj.weight"] = tensors["model.layers.0.mlp.experts.3.up_proj.weight"] * 2

    opened = open_model(variant("qwen3_moe", change), "float32")
    model = load_dense(opened, device=CPU, show_progress=False)
    with pytest.raises(CheckpointError, match="some experts under two names"):
        ExpertReader(opened.checkpoint, model, opened.layers)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("qwen3_moe", ["visual.blocks.0.attn.qkv.weight", "visual.patch_embed.proj.weight"], "visual (2)"),
        ("qwen3_moe", ["mtp.layers.0.self_attn.q_proj.weight", "mtp.norm.weight"], "mtp (2)"),
        ("qwen3_moe", ["score.weight"], "score (1)"),
        # Multi-token prediction as DeepSeek-V3 stores it: one more layer, with tensors that no other layer has.
        ("glm4_moe", ["model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_proj.weight"], "model.layers.3 (2)"),
    ],
)
def test_modules_that_the_model_lacks_are_left_out_and_named(
    name: str, keys: list[str], said: str, variant: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    """As transformers does: a vision tower is no part of a text model."""
    with caplog.at_level(logging.WARNING, "epslots"):
        opened = open_model(variant(name, adding(*keys)), "float32")
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said in message
    load_dense(opened, device=CPU, show_progress=False)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen3_moe", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("qwen3_moe", "model.layers.0.self_attn.rotary_emb.cos_cached"),
        ("deepseek_v3", "model.layers.61.self_attn.q_proj.weight"),  # its class ignores that layer by name
    ],
)
def test_what_transformers_ignores_silently(
    name: str, key: str, variant: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "epslots"):
        load_dense(open_model(variant(name, adding(key)), "float32"), device=CPU, show_progress=False)
    assert not [record for record in caplog.records if "left out" in record.getMessage()]


def test_a_scale_is_never_ignorable(variant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """Classes name ignorable layers by number: 61 in DeepSeek-V3's, which a larger model has as one of its own."""
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1.*"])
    key = "model.layers.1.self_attn.o_proj.weight_scale"
    refused(variant("deepseek_v3", adding(key)), f"{key} would be left out.*quantisation")


def test_transformers_report_is_held_against_the_check(checkpoint: Checkpoints):
    """Should its loading leave out a tensor that the check took for used, that is an error."""
    opened = replace(open_model(checkpoint("qwen3_moe"), "float32"), left_out=frozenset())
    with pytest.raises(CheckpointError, match=r"transformers has no use for 6 tensors: .*experts"):
        load_dense(opened, device=CPU, show_progress=False)


def test_half_of_a_layer(variant: Callable[..., Path]):
    folder = variant("qwen3_moe", lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that the model needs: model\.layers\.1\.self_attn\.k_proj"):
        load_dense(open_model(folder, "float32"), device=CPU, show_progress=False)


# --- where the quantisation is stated, and what else the configuration names ----------------------------------------------


def quantised_text(checkpoint: Checkpoints, folder: Path, **quantisation: object) -> Path:
    """A composite model's FP8 checkpoint that states its quantisation in text_config."""
    source = zoo.make_fp8(checkpoint("gemma4_multimodal"), folder)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config") | quantisation
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_quantisation_is_found_in_text_config(checkpoint: Checkpoints, tmp_path: Path):
    opened = open_model(quantised_text(checkpoint, tmp_path / "fp8"), "auto")
    assert opened.dtype == torch.bfloat16
    assert opened.config.quantization_config["stated"]["quant_method"] == "fp8"


def test_unsupported_quantisation_in_text_config(checkpoint: Checkpoints, tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="quantised with 'hqq'"):
        open_model(quantised_text(checkpoint, tmp_path / "hqq", quant_method="hqq"), "auto")


def test_older_modelopt_checkpoints(checkpoint: Checkpoints, tmp_path: Path):
    """They state the quantisation in a file of its own, and have scales for a cache in 8 bits."""
    made = make_quantised(checkpoint("qwen3_moe"), "modelopt nvfp4", tmp_path)
    tensors = zoo.read_tensors(made.folder) | {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5)}
    folder = zoo.write_checkpoint(made.folder, tmp_path / "older", tensors, quantization_config=None)
    refused(folder, "is stored as U8, and config.json has no quantization_config")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    opened = open_model(folder, "float32")
    assert opened.config.quantization_config["stated"]["quant_algo"] == "NVFP4"
    model, plain = (load_dense(open_model(x, "float32"), device=CPU, show_progress=False) for x in (folder, made.twin))
    for name, expected in plain.state_dict().items():
        assert (model.get_parameter(name) - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("name", ["self_attn.q_scale", "self_attn.kv_scale", "self_attn.k_proj.output_scale"])
def test_scales_of_caches_are_left_out(name: str, checkpoint: Checkpoints, tmp_path: Path):
    made = make_quantised(checkpoint("qwen3_moe"), "ct fp8 tensor", tmp_path)
    tensors = zoo.read_tensors(made.folder) | {f"model.layers.0.{name}": torch.tensor(0.5)}
    open_model(zoo.write_checkpoint(made.folder, tmp_path / "cache", tensors), "float32")
    plain = zoo.read_tensors(made.twin) | {f"model.layers.0.{name}": torch.tensor(0.5)}
    refused(zoo.write_checkpoint(made.twin, tmp_path / "plain", plain), "would be left out")


def test_fp8_with_the_names_of_autofp8(checkpoint: Checkpoints, tmp_path: Path):
    made = make_quantised(checkpoint("qwen3_moe"), "fp8 whole", tmp_path)
    tensors = {key.replace("scale_inv", "scale"): tensor for key, tensor in zoo.read_tensors(made.folder).items()}
    tensors |= {key.replace("weight_scale", "input_scale"): torch.tensor(0.5) for key in tensors if "weight_scale" in key}
    folder = zoo.write_checkpoint(made.folder, tmp_path / "auto", tensors)
    model, plain = (load_dense(open_model(x, "float32"), device=CPU, show_progress=False) for x in (folder, made.twin))
    for name, expected in plain.state_dict().items():
        assert (model.get_parameter(name) - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_an_empty_quantization_config_is_refused(checkpoint: Checkpoints, tmp_path: Path):
    tensors = zoo.read_tensors(checkpoint("qwen3_moe"))
    folder = zoo.write_checkpoint(checkpoint("qwen3_moe"), tmp_path / "empty", tensors, quantization_config={})
    with pytest.raises(UnsupportedModelError, match="quantised with None"):
        open_model(folder, "float32")


def test_why_a_dense_matrix_cannot_be_unpacked(checkpoint: Checkpoints, tmp_path: Path):
    """transformers names no reason."""
    made = make_quantised(checkpoint("qwen3_moe"), "gptq", tmp_path)
    key = "model.layers.0.self_attn.q_proj.g_idx"
    tensors = zoo.read_tensors(made.folder)
    tensors[key] = tensors[key].flip(0)
    opened = open_model(zoo.write_checkpoint(made.folder, tmp_path / "mixed", tensors), "float32")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj: g_idx mixes groups, which needs desc_act=true"):
        load_dense(opened, device=CPU, show_progress=False)


def test_which_models_predict_tokens(checkpoint: Checkpoints, variant: Callable[..., Path]):
    assert has_language_head(open_model(checkpoint("qwen3_moe"), "float32").skeleton)
    folder = variant("qwen3_moe", lambda tensors: tensors.pop("lm_head.weight"), architectures=["Qwen3MoeModel"])
    opened = open_model(folder, "float32")
    assert not has_language_head(opened.model_class)
    assert not has_language_head(load_dense(opened, device=CPU, show_progress=False))
