"""The zoo itself is sound: its checkpoints load to what was saved, its models route, its flags are true."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.zoo import (
    FIRST_PLAIN_ID,
    VOCAB,
    ZOO,
    experts_modules,
    make_checkpoint,
    make_fp8,
    make_fused,
    make_mxfp4,
    make_single_file,
    mixed_inputs,
    random_ids,
    read_tensors,
    reference,
    reference_dequantised,
    routing,
)

MODELS = sorted(ZOO)
ROUTED = [name for name in MODELS if ZOO[name].interface or ZOO[name].decorate]
OPAQUE = [name for name in MODELS if name not in ROUTED]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return cast(torch.Tensor, model(input_ids=random_ids()).logits)


def assert_same_output(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: the same weights at other addresses take other vector paths, seen as 2e-7."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_one_saved(name: str, checkpoint: Callable[[str], Path]) -> None:
    built, folder = ZOO[name].build(), checkpoint(name)
    if ZOO[name].interface:
        built.set_experts_implementation("eager")
    loaded = reference(folder)
    expected, actual = built.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []
    assert_same_output(logits(loaded), logits(built))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_looks_like_a_published_one(name: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(name)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < names
    shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    assert shards < names
    assert json.loads((folder / "config.json").read_text())["architectures"] == [ZOO[name].architecture]


@pytest.mark.parametrize("name", MODELS)
def test_building_repeats_and_leaves_the_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, second = ZOO[name].build().state_dict(), ZOO[name].build().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [key for key, tensor in first.items() if not tensor.any()] == []


def assert_spread(ids: torch.Tensor) -> None:
    choices = {tuple(sorted(row)) for row in ids.tolist()}
    assert len(choices) > 1
    assert len(set().union(*choices)) > ids.shape[1]


@pytest.mark.parametrize("name", ROUTED)
def test_routing_spreads_over_experts(name: str) -> None:
    tiny, model = ZOO[name], ZOO[name].build()
    if not tiny.aligned:
        model.set_experts_implementation("eager")
    chosen = routing(model, **mixed_inputs(length=80)) if tiny.idle_layers else routing(model, input_ids=random_ids())
    assert len(chosen) == tiny.moe_layers
    for ids, weights in chosen.values():
        assert ids.shape == weights.shape == (40, tiny.top_k)
        assert set(ids.flatten().tolist()) <= set(range(tiny.num_experts + tiny.zero_experts))
        assert_spread(ids)
    if tiny.zero_experts:
        assert any((ids >= tiny.num_experts).any() for ids, _ in chosen.values())


@pytest.mark.parametrize("name", [name for name in OPAQUE if ZOO[name].num_experts])
def test_routing_spreads_where_the_interface_does_not_reach(name: str) -> None:
    tiny = ZOO[name]
    with torch.no_grad():
        outputs = tiny.build()(input_ids=random_ids(), output_router_logits=True)
    for router_logits_te in outputs.router_logits:
        # Doge's logits are of keys, of which two make an expert: [2, T, keys].
        assert router_logits_te.shape in {(40, tiny.num_experts), (2, 40, tiny.num_experts**0.5)}
        ids = router_logits_te.flatten(0, -2).topk(min(tiny.top_k, router_logits_te.shape[-1] - 1)).indices
        assert_spread(ids)


@pytest.mark.parametrize("name", MODELS)
def test_flags_are_true(name: str, checkpoint: Callable[[str], Path]) -> None:
    tiny = ZOO[name]
    model: Any = tiny.build()
    modules: dict[str, Any] = dict(experts_modules(model))
    text = model.config.get_text_config()
    assert tiny.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    heads = ("lm_head.weight", "unembed.weight")
    assert tiny.tied == (not any(key.endswith(heads) or key == "head.weight" for key in read_tensors(checkpoint(name))))
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    assert tiny.hybrid == (not set(getattr(text, "layer_types", None) or []) <= attention)

    if name in OPAQUE:
        assert not any(hasattr(module, "has_gate") for module in model.modules())
        return
    assert len(modules) == tiny.moe_layers
    for module in modules.values():
        assert tiny.interface == hasattr(module, "has_gate")
        assert module.down_proj.shape[0] == tiny.num_experts
        names = [*inspect.signature(module.forward).parameters]
        assert tiny.decorate <= (names == ["hidden_states", "top_k_index", "top_k_weights"])
        aligned = all(
            stride == 1 or stride * 2 % 16 == 0
            for _, weight in module.named_parameters(recurse=False)
            for stride in weight.stride()
        )
        assert tiny.aligned == aligned


def test_unaligned_strides_stop_the_default_implementation(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        logits(reference(checkpoint("olmoe_unaligned"), experts_implementation="grouped_mm"))


def test_random_ids_repeat_and_avoid_special_tokens() -> None:
    ids = random_ids(3, 100)
    assert ids.shape == (3, 100)
    assert set(ids.flatten().tolist()) <= set(range(FIRST_PLAIN_ID, VOCAB))
    assert torch.equal(ids, random_ids(3, 100))
    assert not torch.equal(ids, random_ids(3, 100, seed=1))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe_tied"])
@pytest.mark.parametrize("layout", [make_single_file, make_fused])
def test_other_layouts_hold_the_same_weights(
    name: str, layout: Callable[[Path, Path], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint(name)
    folder = layout(source, tmp_path / "other")
    fused = [key for key in read_tensors(folder) if key.endswith("experts.gate_up_proj")]
    assert len(fused) == (ZOO[name].moe_layers if layout is make_fused else 0)
    assert (folder / "model.safetensors.index.json").exists() == (layout is make_fused)
    assert len(list(folder.glob("*.safetensors"))) == 1 or layout is make_fused
    assert_same_output(logits(reference(folder)), logits(reference(source)))


# Rounding at the largest weight of a block: half a step of e4m3's 3 bits of mantissa, and e2m1's saturation at 6 of 8.
@pytest.mark.parametrize(
    ("name", "quantise", "error"),
    [("deepseek_v3", make_fp8, 2**-4), ("kimi", make_fp8, 2**-4), ("gpt_oss", make_mxfp4, 2**-2)],
)
def test_quantised_checkpoints_are_close_to_their_source(
    name: str,
    quantise: Callable[[Path, Path], Path],
    error: float,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = checkpoint(name)
    folder = quantise(source, tmp_path / "quantised")
    model = reference_dequantised(folder)
    expected = reference(source).state_dict()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert (tensor - expected[key]).abs().max() <= error * expected[key].abs().max()
    differing = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, expected[key])}
    assert {key for key in expected if "experts." in key and "bias" not in key} <= differing
    assert not any(part in key for key in differing for part in ("norm", "gate.", "router", "embed_tokens", "lm_head"))
    assert logits(model).isfinite().all()


def test_fp8_layout_is_deepseeks(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8", block=16)
    tensors = read_tensors(folder)
    key = "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert tensors[key].dtype == torch.float8_e4m3fn
    assert tensors[f"{key}_scale_inv"].dtype == torch.float32
    assert tensors[f"{key}_scale_inv"].shape == (2, 4)
    # 24 rows in blocks of 16, as the published 576 in blocks of 128.
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 4)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [16, 16],
        "activation_scheme": "dynamic",
    }


def test_mxfp4_layout_is_gpt_oss(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = read_tensors(make_mxfp4(checkpoint("gpt_oss"), tmp_path / "mxfp4"))
    key = "model.layers.1.mlp.experts.gate_up_proj"
    assert key not in tensors
    assert (tensors[f"{key}_blocks"].shape, tensors[f"{key}_scales"].shape) == ((8, 64, 2, 16), (8, 64, 2))
    assert tensors[f"{key}_blocks"].dtype == tensors[f"{key}_scales"].dtype == torch.uint8
