"""Every quantised format: the weights that its tensors stand for, what it refuses, and matrices that the real tools wrote.

``tools/matrices.safetensors`` has the first 64 rows of one expert's down_proj, as llm-compressor 0.14 (ct-*), modelopt 0.47,
auto-round 0.15 (awq, gptq) and GPTQModel 7.6 (gptq-desc) stored it. All but one were made from the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open

from epslots.cache.unpacking import PackedWeight
from epslots.errors import UnsupportedModelError
from epslots.formats.fp8 import block_of
from epslots.formats.known_formats import FORMATS, find_format
from epslots.formats.matrix import Matrix, MissingPart, StoredParts, join, make_matrix, pack_nibbles
from epslots.formats.quantise import quantise_int4, quantise_int8
from epslots.formats.usual_forms import USUAL_FORMS
from epslots.layout import PackedMatrix
from tests.support import zoo
from tests.support.quantised import E2M1, SCHEMES, Tensors, ct, ct_mxfp4, pack_bytes, pack_words

MXFP4 = {"quant_method": "mxfp4"}
TOOLS = Path(__file__).parent / "tools/matrices.safetensors"


def read(parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any], where: str = "layers.0.mlp.up_proj") -> Matrix:
    return FORMATS[settings["quant_method"]].read(StoredParts(parts, where), settings)


def random_weight(rows: int = 48, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix_is_what_its_codes_stand_for(name: str):
    """The same form from headers alone, and nearly all of the bytes are codes."""
    scheme = SCHEMES[name]
    parts, expected = scheme.quantise(random_weight())
    matrix = read(parts, scheme.settings)
    found = matrix.weights()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    described = read({name: tensor.to("meta") for name, tensor in parts.items()}, scheme.settings)
    assert described.form == matrix.form
    assert {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in matrix.parts.items()
    } == matrix.form.tensors
    assert matrix.form.kind in ("e4m3", "int8", "int4", "e2m1")
    assert matrix.parts["codes"].nbytes * 8 == scheme.bits * expected.numel()


def test_deepseek_v4s_experts_are_fp4():
    parts, expected = ct_mxfp4(random_weight())
    stored = {"weight": parts["weight_packed"].view(torch.int8), "weight_scale_inv": parts["weight_scale"]}
    for scale in (torch.uint8, torch.float8_e8m0fnu):
        stored["weight_scale_inv"] = parts["weight_scale"].view(scale)
        matrix = read(stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
        assert torch.equal(matrix.weights(), expected) and matrix.form.kind == "e2m1"


def test_gpt_oss_matrices_are_its_outputs_by_inputs():
    blocks, scales = zoo.quantise_mxfp4(random_weight())
    matrix = read({"down_proj_blocks": blocks, "down_proj_scales": scales}, MXFP4)
    assert torch.equal(matrix.weights(), ct_mxfp4(random_weight())[1])


@pytest.mark.parametrize("shape", [(24, 64), (40, 40), (9, 33)])
def test_fp8_blocks_may_be_cut_short(shape: tuple[int, int]):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows of blocks of 128."""
    weight = random_weight(*shape)
    codes, scales = zoo.quantise_fp8(weight, 16)
    matrix = read({"weight": codes, "weight_scale_inv": scales}, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    every = scales.repeat_interleave(16, 0)[: shape[0]].repeat_interleave(16, 1)[:, : shape[1]]
    assert torch.equal(matrix.weights(), codes.float() * every)


def test_which_blocks_a_grid_stands_for():
    assert block_of(torch.Size([576, 256]), torch.Size([5, 2]), [128, 128]) == (128, 128)
    assert block_of(torch.Size([512, 256]), torch.Size([4, 2]), [64, 64]) == (128, 128), (
        "what the shapes say, if both can't be"
    )
    for shape, grid in (([576, 256], [5, 2]), ([8], [1]), ([8, 8], [0, 1])):
        with pytest.raises(ValueError, match="scales"):
            block_of(torch.Size(shape), torch.Size(grid), None)


def test_columns_of_nibbles_are_padded_to_a_byte():
    codes = torch.randint(0, 16, (3, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    matrix = make_matrix(codes, "e2m1")
    assert matrix.parts["codes"].shape == (3, 32) and torch.equal(matrix.weights(), E2M1[codes.long()])
    assert pack_nibbles(torch.arange(32).view(1, 32) % 16).tolist() == [[17 * j for j in range(16)]], (
        "j and j + 16 share a byte"
    )


def test_rows_of_one_form_are_joined():
    """Gate and up are one matrix then; where a block would span both, or each has its own order of columns, they stay two."""
    joined = {"ct int4": 1, "ct nvfp4": 1, "ct int8": 1, "ct fp8 block": 2, "gptq act order": 2}
    for name, count in joined.items():
        scheme, halves = SCHEMES[name], [random_weight(48, seed=seed) for seed in (1, 2)]
        stored = [scheme.quantise(half) for half in halves]
        matrices = join(read(parts, scheme.settings) for parts, _ in stored)
        assert len(matrices) == count, name
        packed = PackedMatrix("up", tuple(matrix.form for matrix in matrices))
        tensors = {packed.tensor(i, p): t[None] for i, matrix in enumerate(matrices) for p, t in matrix.parts.items()}
        weights = PackedWeight.of(packed, tensors, torch.float32).unpack(0).t()
        expected = torch.cat([weight for _, weight in stored])
        assert (weights - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_eight_bits_in_words():
    codes = torch.randint(-128, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    packed = (codes + 128).to(torch.uint8).view(torch.int32)
    parts = {"weight_packed": packed, "weight_scale": torch.full((4, 1), 0.5).bfloat16()}
    assert torch.equal(read(parts, ct("pack-quantized", num_bits=8, strategy="channel")).weights(), codes * 0.5)
    with pytest.raises(ValueError, match="codes of 8 bits aren't known"):
        read(parts | {"weight_zero_point": packed}, ct("pack-quantized", num_bits=8, symmetric=False))


def test_usual_forms_are_those_of_their_checkpoints():
    """But for the size of blocks, which the schemes here have smaller."""
    schemes = {
        **{"fp8": "ct fp8 block", "fp8-channels": "ct fp8 channel", "int8-channels": "ct int8", "int4-groups": "ct int4"},
        **{"awq": "awq", "gptq": "gptq", "mxfp4": "ct mxfp4", "nvfp4": "modelopt nvfp4"},
    }
    assert set(USUAL_FORMS) == set(schemes)
    for name, scheme in schemes.items():
        found = read(SCHEMES[scheme].quantise(random_weight(64))[0], SCHEMES[scheme].settings).form
        usual = USUAL_FORMS[name](found.rows, found.columns)
        assert msgspec.structs.replace(usual, block=found.block) == found, name
        assert (usual.block[0] > 1) == (found.block[0] > 1) and usual.block[1] >= found.block[1], name


def test_a_module_has_the_scheme_of_its_group():
    settings = ct("pack-quantized", group_size=32)
    eight = ct("pack-quantized", num_bits=8, group_size=32)["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]}
    settings["config_groups"] = {"four": settings["config_groups"]["group_0"], "eight": eight}
    words = {"weight_packed": torch.zeros(4, 8, dtype=torch.int32), "weight_scale": torch.ones(4, 1).bfloat16()}
    assert read(words, settings, "model.layers.0.self_attn.q_proj").form.kind == "int8"
    assert read(words, settings, "model.layers.0.mlp.up_proj").form.kind == "int4"
    settings["config_groups"]["four"]["targets"] = ["proj"]  # a name's end is no name
    with pytest.raises(ValueError, match="none of 2 config_groups matches model"):
        read(words, settings, "model.layers.0.mlp.up_proj")
    settings["config_groups"] |= {"four": eight | {"targets": ["Linear"]}, "eight": eight | {"targets": ["Linear"]}}
    with pytest.raises(ValueError, match="none of 2 config_groups matches model"):
        read(words, settings, "model.layers.0.mlp.up_proj")


def test_zeros_of_rows_are_padded_to_a_word():
    scheme = SCHEMES["ct int4 asymmetric"]
    parts, expected = scheme.quantise(random_weight(24))
    cut = parts | {name: parts[name][:20] for name in ("weight_packed", "weight_scale")}
    assert (read(cut, scheme.settings).weights() - expected[:20]).abs().max() <= 1e-6 * expected.abs().max()


def test_modelopts_blocks_and_exponents():
    """Scales of blocks in four dimensions; MXFP4, which has no scale of the matrix."""
    codes, scales = zoo.quantise_fp8(random_weight(), 16)
    stored = {"weight": codes, "weight_scale": scales.float()[:, None, :, None]}
    found = read(stored, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"})
    every = scales.float().repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(found.weights(), codes.float() * every)
    parts, expected = ct_mxfp4(random_weight())
    stored = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
    assert torch.equal(read(stored, {"quant_method": "modelopt", "quant_algo": "MXFP4"}).weights(), expected)


def test_exponents_of_one_block_a_row_are_no_row_scales():
    """Of 32 columns, MXFP8 has one exponent a row."""
    codes = random_weight(4, 32).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": torch.full((4, 1), 129, dtype=torch.uint8)}
    assert torch.equal(read(parts, ct("mxfp8-quantized", num_bits=8)).weights(), codes.float() * 4)


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'.*the unquantised checkpoint"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "gguf"}, "'gguf'.*llama.cpp"),
        ({"quant_method": "exl3", "bits": 4.0}, "'exl3'.*exllamav3"),
        ({"quant_method": "hqq"}, "'hqq'; epslots reads fp8, mxfp4, compressed-tensors, modelopt, awq, gptq"),
        ({"quant_method": ["fp8"]}, "quantised with"),
        ({"quant_method": "gptq", "bits": 2}, "with 2 bits.*reads 4 and 8 bits.*the unquantised one"),
        ({"quant_method": "gptq", "bits": 3}, "with 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'; epslots reads"),
        (ct("marlin-24"), "as marlin-24"),
        (ct("pack-quantized") | {"transform_config": {"config_groups": {"R1": {}}}}, "transformed"),
        (ct("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsified"),
        (ct("pack-quantized") | {"config_groups": {}}, "no quantised weights"),
    ],
)
def test_other_formats_are_refused_by_name(settings: dict[str, Any], said: str):
    with pytest.raises(UnsupportedModelError, match=f"the folder.*{said}"):
        find_format(settings, "the folder")


@pytest.mark.parametrize(
    ("name", "part"), [("awq", "qzeros"), ("gptq act order", "g_idx"), ("ct nvfp4", "weight_global_scale")]
)
def test_a_missing_part_is_named(name: str, part: str):
    parts, _ = SCHEMES[name].quantise(random_weight())
    with pytest.raises(MissingPart, match=part):
        read({k: t for k, t in parts.items() if k != part}, SCHEMES[name].settings)


def changed(parts: Tensors, **changes: torch.Tensor) -> Tensors:
    return {**parts, **changes}


def test_parts_that_do_not_fit_are_refused():
    gptq, settings = SCHEMES["gptq"].quantise(random_weight())[0], SCHEMES["gptq"].settings
    mixed, ordered = SCHEMES["gptq act order"].quantise(random_weight())[0], SCHEMES["gptq act order"].settings
    with pytest.raises(ValueError, match="which needs desc_act=true"):
        read(mixed, settings)
    with pytest.raises(ValueError, match="groups aren't of 32 inputs each"):
        read(changed(mixed, g_idx=torch.zeros(96, dtype=torch.int32)), ordered)
    with pytest.raises(ValueError, match="g_idx has shape"):
        read(changed(mixed, g_idx=mixed["g_idx"][:5]), ordered)
    eight, of_eight = SCHEMES["gptq int8"].quantise(random_weight())[0], SCHEMES["gptq int8"].settings
    with pytest.raises(ValueError, match="asymmetric codes of 8 bits aren't known"):
        read(changed(eight, qzeros=eight["qzeros"] + 1), of_eight)
    with pytest.raises(ValueError, match="zero has shape"):
        read(changed(gptq, qzeros=gptq["qzeros"][:, :4]), settings)
    with pytest.raises(ValueError, match=r"not \[outputs, inputs"):
        read({"down_proj_blocks": torch.zeros(4, 2, 8, dtype=torch.uint8), "down_proj_scales": gptq["scales"]}, MXFP4)
    e5m2 = torch.zeros(4, 4).to(torch.float8_e5m2)
    with pytest.raises(ValueError, match="codes are float8_e5m2"):
        read({"weight": e5m2, "weight_scale_inv": torch.ones(1, 1)}, {"quant_method": "fp8"})
    with pytest.raises(ValueError, match="scales are int32"):
        make_matrix(torch.zeros(4, 4, dtype=torch.int8), group=torch.ones(1, 1, dtype=torch.int32), block=(4, 4))
    with pytest.raises(ValueError, match="not that of a matrix"):
        make_matrix(torch.zeros(4, dtype=torch.int8))


# --- quantising -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [96, 40])
def test_int4_has_the_scale_of_least_error(columns: int):
    """No worse than 16 steps over each group's whole span, and better on the whole; what is zero stays zero."""
    weight = random_weight(48, columns)
    weight[3] = 0
    found = quantise_int4(weight).weights()
    padded = torch.nn.functional.pad(weight, (0, -columns % 32)).unflatten(1, (-1, 32))
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-20).bfloat16().float()
    zero = (-low / scale).round()
    plain = (((padded / scale + zero).round().clamp(0, 15) - zero) * scale).flatten(1)[:, :columns]
    errors = [(each - weight).square() for each in (found, plain)]
    by_group = [torch.nn.functional.pad(e, (0, -columns % 32)).unflatten(1, (-1, 32)).sum(-1) for e in errors]
    assert (by_group[0] <= by_group[1] + 1e-6).all() and errors[0].sum() < 0.98 * errors[1].sum()
    assert not found[3].any()
    positive = weight.abs() + 5
    assert (quantise_int4(positive).weights() - positive).abs().max() < 0.3 * positive.max()


def test_int8_rounds_to_steps_of_the_rows_largest():
    weight = random_weight()
    weight[5] = 0
    found = quantise_int8(weight).weights()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all() and not found[5].any()


# --- what the tools wrote ---------------------------------------------------------------------------------------------------


def test_matrices_of_the_real_tools_agree():
    """Of one weight, each tool's codes stand for nearly the same: a misread order, zero or scale is far beyond that."""
    with safe_open(TOOLS, "pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
        parts: dict[str, Tensors] = {tool: {} for tool in settings}
        for key in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            tool, _, part = key.partition("/")
            parts[tool][part] = opened.get_tensor(key)
    found = {tool: read(parts[tool], settings[tool]) for tool in settings}
    weights = {tool: matrix.weights() for tool, matrix in found.items()}
    assert len(weights) == 13 and {matrix.form.kind for matrix in found.values()} == {"e4m3", "int8", "int4", "e2m1"}
    exact = weights["ct-qwen3_moe-INT8"]
    for tool, weight in weights.items():
        if "deepseek" in tool:
            continue
        error = float((weight - exact).norm() / exact.norm())
        assert error < (0.04 if found[tool].form.kind in ("e4m3", "int8") else 0.16), (tool, error)
    assert found["gptq-desc-qwen3_moe"].form.perm


def test_words_and_bytes_are_as_the_tools_pack_them():
    """The makers' own packing, which the tests above rest on, against codes written out by hand."""
    assert pack_words(torch.arange(8).view(1, 8)).tolist() == [[0x76543210]]
    assert pack_words(torch.arange(8).view(1, 8), (0, 2, 4, 6, 1, 3, 5, 7)).tolist() == [[0x75316420]]
    assert pack_bytes(torch.tensor([[1, 2, 3, 15]])).tolist() == [[0x21, 0xF3]]
