"""Crafted and damaged JSON of a checkpoint is refused by name, before it costs memory or minutes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from epslots import CheckpointError, ConfigError, EpslotsError, UnsupportedModelError
from epslots.generation.end_tokens import end_tokens
from epslots.models.json_file import MAX_BYTES, read_json_object
from epslots.models.opening import load_dense, open_model, read_generation_config
from epslots.models.pretrained import build_skeleton, read_config, resolve_class

NAME = "qwen3_moe"
Checkpoints = Callable[[str], Path]


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(NAME), tmp_path / "model"))


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder: Path, message: str, error: type[EpslotsError] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        load_dense(open_model(folder, "auto"), device=torch.device("cpu"), show_progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17, and there are 16 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": -3}, "num_experts_per_tok is -3"),
        ({"num_local_experts": "16"}, "describes no Qwen3MoeForCausalLM"),
        ({"num_local_experts": 10**9}, r"gate\.weight has shape"),
        ({"num_local_experts": 15}, r"gate\.weight has shape"),
        ({"hidden_size": 0}, "describes no Qwen3MoeForCausalLM"),
        ({"hidden_size": -64}, "negative dimension"),
        ({"hidden_size": 10**12}, "the model expects"),
        ({"vocab_size": 0}, "describes no Qwen3MoeForCausalLM"),
        ({"vocab_size": 10**400}, "describes no Qwen3MoeForCausalLM"),
        ({"vocab_size": 10**12}, r"lm_head\.weight has shape \[320, 64\]"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 8}, r"o_proj\.weight has shape"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"head_dim": 0}, "describes no Qwen3MoeForCausalLM"),
        ({"head_dim": -1}, "describes no Qwen3MoeForCausalLM"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06: allowed: 0 and more"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"attention_dropout": [float("nan")]}, r"attention_dropout\[\] is nan"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "inv_freq isn't finite"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, "inv_freq isn't finite"),
        ({"rope_parameters": {"rope_type": "none such"}}, "none such"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000: allowed: up to 10,000"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 9999}, "far more than the weight files hold"),
        ({"num_labels": 10**9}, "num_labels is 1000000000: allowed: up to 100,000"),
        ({"text_config": {"num_labels": 10**9}}, r"text_config\.num_labels is 1000000000"),
        ({"first_k_dense_replace": 10**9}, "first_k_dense_replace is 1000000000"),
        ({"vision_config": {"depth": 10**8}}, r"vision_config\.depth is 100000000"),
        ({"layer_types": ["full_attention"] * 10_001}, "layer_types has 10,001 entries"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0: allowed: 1 and more"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "architectures"),
        ({"architectures": [5]}, "architectures is"),
        ({"architectures": ["MixtralForCausalLM"]}, "none of model_type qwen3_moe"),
        ({"quantization_config": 5}, "config.json"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}}, "weight_block_size is"),
        ({"hidden_act": "none such"}, "none such"),
        ({"extra": json.loads("[" * 900 + "]" * 900)}, "RecursionError"),
    ],
)
def test_settings_that_no_model_has(settings: dict[str, Any], message: str, folder: Path):
    edit(folder, **settings)
    refused(folder, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["os.system"]}, "which transformers"),
        ({"num_local_experts": 0}, "has no experts"),
        ({"quantization_config": {"quant_method": ["fp8"]}}, "quantised with"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised with 'bitsandbytes'"),
    ],
)
def test_settings_that_slots_cannot_serve(settings: dict[str, Any], message: str, folder: Path):
    edit(folder, **settings)
    refused(folder, message, UnsupportedModelError)


def test_a_dtype_of_no_weights(folder: Path):
    edit(folder, dtype="int8")
    refused(folder, "auto found it in the checkpoint", ConfigError)


def test_an_endless_range_is_allowed(checkpoint: Checkpoints, folder: Path):
    """mamba2's time_step_limit ends in infinity, in many published configurations."""
    edit(folder, time_step_limit=[0.0, float("inf")], quantization_config=None, some_list=list(range(10_000)))
    assert read_config(folder).time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON in UTF-8"),
        (b"{", "is not JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a": "\u00e9"}'.encode("latin-1"), "is not JSON in UTF-8"),
        (b"null", "not an object"),
        (b"[]", "not an object"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not JSON in UTF-8"),
    ],
)
def test_files_that_are_no_json_object(content: bytes, message: str, folder: Path):
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        refused(folder, rf"{name} .*{message}")
        (folder / name).write_bytes(original)


def test_a_large_file_is_not_read(tmp_path: Path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"100,000,001 bytes; at most"):
        read_json_object(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_configuration_that_is_no_file(make: Callable[[Path], None], folder: Path):
    """A FIFO would be waited for."""
    (folder / "config.json").unlink()
    make(folder / "config.json")
    refused(folder, "holds no config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": "x"}', "eos_token_id is 'x': allowed: an integer or a list"),
        ('{"eos_token_id": [1, null]}', "eos_token_id"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"max_new_tokens": -5}', "max_new_tokens"),
    ],
)
def test_a_broken_generation_config(content: str, message: str, folder: Path):
    """transformers would go on without it, or fail when it first generates."""
    (folder / "generation_config.json").write_text(content)
    refused(folder, rf"generation_config\.json: .*{message}")


def test_generation_settings_are_the_checkpoints(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.5}')
    model = load_dense(open_model(folder, "auto"), device=torch.device("cpu"), show_progress=False)
    assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([7, 9], 0.5)
    (folder / "generation_config.json").unlink()
    edit(folder, eos_token_id=3)
    assert read_generation_config(folder).eos_token_id == 3


def test_end_tokens_are_tokens_of_the_model(folder: Path):
    """Others end nothing, and a number of any length fits into no message."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 7, 10**30]}))
    model = load_dense(open_model(folder, "auto"), device=torch.device("cpu"), show_progress=False)
    assert end_tokens(model, ignore_tokenizer_eos=True) == {7}


def test_a_skeleton_is_stopped_where_it_outgrows_the_files(checkpoint: Checkpoints):
    """The parameters made are counted, by any name of its layers."""
    config = AutoConfig.from_pretrained(checkpoint(NAME))
    config.num_hidden_layers = 500
    config.layer_types = ["full_attention"] * 500
    made: list[str] = []

    class Counted(resolve_class(config)):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            made.append("all")

    with pytest.raises(CheckpointError, match="more than 800 tensors"):
        build_skeleton(Counted, config, torch.float32, tensors=100)
    assert not made
