"""Tensors and settings that tools write less often: other dtypes and shapes of scales, other names of a layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from epslots.errors import UnsupportedModelError
from epslots.formats.known_formats import find_format
from epslots.formats.matrix import Matrix, StoredParts
from tests.support import zoo
from tests.support.quantised import GROUP, SCHEMES, Tensors, ct, ct_int4, gptq, nvfp4

ACT_ORDER = ct("pack-quantized", group_size=GROUP, actorder="group")


def read(parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> Matrix:
    return find_format(settings, "it").read(StoredParts(parts, "layers.0.mlp.up_proj"), settings)


def random_weight(rows: int = 48, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def stored(name: str) -> tuple[Tensors, torch.Tensor, Mapping[str, Any]]:
    scheme = SCHEMES[name]
    return *scheme.quantise(random_weight()), scheme.settings


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divided", [True, False])
def test_nvfp4_scales_may_have_another_dtype(divided: bool, scale: torch.dtype):
    """compressed-tensors' scale_dtype; the scale of the matrix still counts."""
    parts, expected = nvfp4(divided=divided)(random_weight())
    parts["weight_scale"] = parts["weight_scale"].to(scale)
    settings = SCHEMES["ct nvfp4" if divided else "modelopt nvfp4"].settings
    assert (read(parts, settings).weights() - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["ct nvfp4", "modelopt nvfp4"])
def test_bytes_beside_a_matrix_scale_are_refused(name: str):
    """They may be exponents or e4m3: nothing says which."""
    parts, _, settings = stored(name)
    with pytest.raises(ValueError, match="uint8"):
        read(parts | {"weight_scale": parts["weight_scale"].view(torch.uint8)}, settings)


def test_the_exponent_of_a_whole_matrix():
    """A matrix within one block has one scale, and an exponent isn't a number to multiply by."""
    codes = random_weight().to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = torch.tensor([[125]], dtype=torch.uint8).view(dtype)
        assert torch.equal(read({"weight": codes, "weight_scale_inv": scale}, settings).weights(), codes.float() / 4)
    one = codes[:1, :GROUP]
    parts = {"weight": one, "weight_scale": torch.tensor([[125]], dtype=torch.uint8)}
    assert torch.equal(read(parts, ct("mxfp8-quantized", num_bits=8, type="float")).weights(), one.float() / 4)


@pytest.mark.parametrize("name", ["checkpoint_format", "format"])
def test_either_name_of_gptqs_layout_is_read(name: str):
    """transformers and GPTQModel write format, checkpoint_format, or both; the latter counts."""
    plain = {key: value for key, value in SCHEMES["gptq"].settings.items() if key != "checkpoint_format"}
    weight = random_weight()
    for layout in ("gptq", "gptq_v2", "GPTQ_V2"):
        parts, expected = gptq(first_version=layout == "gptq")(weight)
        assert (read(parts, plain | {name: layout}).weights() - expected).abs().max() <= 1e-6 * expected.abs().max()
    with pytest.raises(UnsupportedModelError, match="'marlin'"):
        read(parts, plain | {name: "marlin"})


def test_either_name_of_awqs_layout_is_checked():
    """gemv's square matrices would fit gemm's shapes, with other weights."""
    parts, expected, settings = stored("awq")
    plain = {key: value for key, value in settings.items() if key != "version"}
    assert (read(parts, plain | {"format": "gemm"}).weights() - expected).abs().max() <= 1e-6 * expected.abs().max()
    for other in ({"format": "gemv"}, {"version": "GEMV"}, {"format": "llm-awq"}, {"backend": "llm-awq"}):
        with pytest.raises(UnsupportedModelError, match=r"gemv|llm-awq"):
            read(parts, plain | other)


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_groups_are_of_single_outputs(name: str):
    """Scales of blocks with several outputs are another layout's."""
    parts, _, settings = stored(name)
    few = {key: parts[key][:, : parts[key].shape[1] // 2].contiguous() for key in ("qzeros", "scales")}
    with pytest.raises(ValueError, match="24 x 3"):
        read(parts | few, settings)


def test_awq_groups_are_as_wide_as_stated():
    """Another size that happens to divide the inputs would be a guess."""
    parts, _, settings = stored("awq")
    with pytest.raises(ValueError, match="group_size=64"):
        read(parts, settings | {"group_size": 64})


def test_a_group_index_that_was_never_set():
    """llm-compressor starts with -1, and leaves it for experts that no calibration token reached: columns in their order."""
    parts, expected = ct_int4(symmetric=True)(random_weight())
    unset = parts | {"weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    matrix = read(unset, ACT_ORDER)
    assert (matrix.weights() - expected).abs().max() <= 1e-6 * expected.abs().max()
    described = read({name: tensor.to("meta") for name, tensor in unset.items()}, ACT_ORDER)
    assert described.form == matrix.form, "the same as of experts that were reached"


def test_blocks_may_be_stated_as_text():
    """Older versions of compressed-tensors wrote "32x32"."""
    codes = random_weight(40, 72).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    settings = ct("float-quantized", num_bits=8, type="float", strategy="block", block_structure="32x32")
    every = scales.repeat_interleave(32, 0)[:40].repeat_interleave(32, 1)[:, :72]
    assert torch.equal(read({"weight": codes, "weight_scale": scales}, settings).weights(), codes.float() * every)


@pytest.mark.parametrize("shape", [(), (1,), (48,)])
def test_scales_of_words_need_no_second_dimension(shape: tuple[int, ...]):
    """compressed-tensors' strategies tensor and channel."""
    parts, _ = ct_int4(symmetric=True)(random_weight())
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    codes = torch.stack([parts["weight_packed"] >> 4 * place & 15 for place in range(8)], -1).flatten(1) - 8
    strategy = "channel" if len(shape) and shape[0] > 1 else "tensor"
    settings = ct("pack-quantized", strategy=strategy)
    found = read({"weight_packed": parts["weight_packed"], "weight_scale": scale}, settings).weights()
    assert torch.equal(found, codes * scale.reshape(-1, 1))


def test_asymmetric_codes_need_their_zeros():
    parts, _, settings = stored("ct int4 asymmetric")
    del parts["weight_zero_point"]
    with pytest.raises(ValueError, match="weight_zero_point"):
        read(parts, settings)


def test_modelopts_settings_may_be_one_level_deeper():
    """As vLLM reads them: the content of hf_quant_config.json under quantization_config."""
    parts, expected, settings = stored("modelopt nvfp4")
    deeper = {"quant_method": "modelopt", "quantization": {"quant_algo": settings["quant_algo"], "kv_cache_quant_algo": "FP8"}}
    assert (read(parts, deeper).weights() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_targets_that_take_for_ever_are_refused():
    parts, _, settings = stored("ct int4")
    group = settings["config_groups"]["group_0"]
    endless = group | {"targets": ["re:" + "(.|..|...)+" * 4 + "[0-9]{3}"]}
    stated = settings | {"config_groups": {"a": endless, "b": group}}
    with pytest.raises(ValueError, match="takes more than"):
        find_format(stated, "it").read(StoredParts(parts, "model.layers.0.mlp.experts.0.up_proj"), stated)


def test_gpt_oss_scales_are_exponents():
    """As floats they would be taken for numbers to multiply by."""
    blocks, scales = zoo.quantise_mxfp4(random_weight())
    parts = {"down_proj_blocks": blocks, "down_proj_scales": scales.float()}
    with pytest.raises(ValueError, match="float32; known are exponents"):
        read(parts, {"quant_method": "mxfp4"})
