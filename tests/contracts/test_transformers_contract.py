"""One test for each part of transformers' internals that epslots leans on: what breaks first when its version moves."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    _IdentityOp,
    apply_renamings,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

import epslots.models.quantiser  # noqa: F401 - registers it
from tests.support import zoo

FLAGS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel"}


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_experts_functions_are_registered_and_chosen_by_name(checkpoint: Callable[[str], Path]):
    seen = []

    def mine(module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((hidden.shape, index.shape, weights.shape))
        return torch.zeros_like(hidden)

    ALL_EXPERTS_FUNCTIONS.register("contract", mine)
    model = zoo.reference(checkpoint("mixtral"), experts_implementation="contract")
    model(zoo.random_ids(2, 5))
    assert seen == [((10, zoo.HIDDEN), (10, 2), (10, 2))] * 2


@pytest.mark.parametrize("name", [n for n, tiny in zoo.ZOO.items() if tiny.interface])
def test_experts_modules_carry_flags_weights_and_gate(name: str):
    found = [m for m in zoo.ZOO[name].build().modules() if hasattr(m, "_is_expert_parallel") and hasattr(m, "has_gate")]
    assert len(found) == zoo.ZOO[name].moe_layers
    for module in found:
        assert set(module.__dict__) >= FLAGS
        first = "gate_up_proj" if module.has_gate else "up_proj"
        expected = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if module.has_bias else set())
        assert module._parameters.keys() == expected
        assert hasattr(module, "_apply_gate") if module.has_gate else hasattr(module, "act_fn")
        assert hasattr(module, "post_expert_norm") == module.has_post_expert_norm


def test_conversions_are_kept_on_the_model_and_run_by_hand(checkpoint: Callable[[str], Path]):
    model = zoo.reference(checkpoint("qwen3_moe"))
    (converter,) = [c for c in model._weight_conversions if c.target_patterns == ["mlp.experts.gate_up_proj"]]
    assert isinstance(converter, WeightConverter)
    assert converter.source_patterns == ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]
    assert any(isinstance(c, WeightRenaming) for c in zoo.reference(checkpoint("granitemoe"))._weight_conversions)
    tensors: dict[str, object] = {p: [torch.full((2, 3), float(i))] for i, p in enumerate(converter.source_patterns)}
    for operation in converter.operations:
        tensors = operation.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name="model.layers.0.mlp.experts.gate_up_proj",
            model=model,
            config=model.config,
            missing_keys=None,
        )
    (fused,) = tensors.values()
    assert torch.equal(torch.as_tensor(fused), torch.tensor([[[0.0] * 3] * 2 + [[1.0] * 3] * 2]))


def test_keys_are_renamed_by_a_function():
    assert parameters(rename_source_key)[:5] == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ]  # fmt: skip
    assert sorted(["a.10.b", "a.9.b"], key=dot_natural_key) == ["a.9.b", "a.10.b"]


def test_a_default_gate_exists():
    assert parameters(_default_apply_gate) == ["self", "gate_up_out"]


def test_models_are_built_without_weights():
    config = MixtralConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM._model_mapping[MixtralConfig]._from_config(
            config, dtype=torch.bfloat16, experts_implementation="eager"
        )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config._experts_implementation_internal == "eager"
    assert isinstance(model._keys_to_ignore_on_load_unexpected, set)
    assert model.get_decoder() is model.model


def test_a_subclass_with_the_same_name_finds_the_conversions(checkpoint: Callable[[str], Path]):
    original = transformers.Qwen3MoeForCausalLM
    twin: type[PreTrainedModel] = type(original.__name__, (original,), {"__module__": original.__module__})
    model, report = twin.from_pretrained(checkpoint("qwen3_moe"), output_loading_info=True)
    assert not report["missing_keys"]
    assert model._weight_conversions


@pytest.mark.parametrize(
    ("name", "block", "parts"),
    [
        ("dbrx", "DbrxFFN", {"router", "experts", "experts.mlp"}),
        ("jetmoe", "JetMoeMoE", {"router.layer", "input_linear", "output_linear"}),
        ("jetmoe", "JetMoeMoA", {"router.layer", "input_linear", "output_linear"}),
        ("llama4", "Llama4TextMoe", {"router", "experts", "shared_expert"}),
        ("doge", "DogeCDMoE", {"router_gate", "down_embed", "up_embed", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_blocks_that_are_rebuilt_have_these_parts(name: str, block: str, parts: set[str]):
    """Their computation is held by tests/equality; their attributes, by its running at all."""
    (found, *_) = [module for module in zoo.ZOO[name].build().modules() if type(module).__name__ == block]
    assert parts <= dict(found.named_modules()).keys()


def test_a_conversion_may_leave_tensors_as_they_are():
    assert _IdentityOp().convert({"a": [1]}) == {"a": [1]}
    assert parameters(register_checkpoint_conversion_mapping) == ["model_type_or_class_name", "mapping", "overwrite"]


def test_a_quantiser_adds_names_and_an_operation():
    assert parameters(HfQuantizer.update_weight_conversions) == ["self", "weight_conversions", "model"]
    assert HfQuantizer.serialized_names == {} and HfQuantizer.get_load_operations(object()) == {}  # type: ignore[arg-type]
    assert isinstance(AUTO_QUANTIZER_MAPPING["epslots"], type) and "epslots" in AUTO_QUANTIZATION_CONFIG_MAPPING
    alternatives, _, _ = build_glob_alternation(["norm", "router.*.bias"])
    assert alternatives.search("model.norm.weight") and not alternatives.search("lm_head.weight")
    assert parameters(PreTrainedModel._get_dtype_plan) == ["self", "dtype"]
    assert apply_renamings("a.scale", [WeightRenaming(r"\.scale", ".weight_scale_inv")]) == "a.weight_scale_inv"


def test_a_fallback_of_grouped_matmul_exists():
    rows, weight = torch.randn(5, 3), torch.randn(2, 3, 7)
    out = torch.ops.transformers.grouped_mm_fallback(rows, weight, torch.tensor([2, 5], dtype=torch.int32))
    assert torch.allclose(out, torch.cat([rows[:2] @ weight[0], rows[2:] @ weight[1]]), atol=1e-6)


def test_tokenizers_and_configs_say_when_they_would_run_code(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)


def test_chat_templates_are_rendered_without_torch():
    """So the process that renders them starts within a second."""
    code = (
        "import sys; from transformers.utils.chat_template_utils import render_jinja_template as render;"
        "turns = [{'role': 'user', 'content': 'x'}];"
        "template = '{{ messages[0].content }}{{ eos }}{{ add_generation_prompt }}';"
        "print(render([turns], chat_template=template, add_generation_prompt=True, eos='e'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(['xeTrue'], []) False\n"
