"""Tiny quantised checkpoints: a zoo model's matrices in each format's layout on disk, and the weights that they stand for.

A *scheme* turns a weight into the tensors of one module, by the ends of their names, and into the weights that their codes
stand for, worked out here from the codes before they are packed: nothing of ``epslots.formats`` takes part.

    made = make_quantised(checkpoint("qwen3_moe"), "awq", tmp_path)
    load(made.folder), Reference(made.twin)      # the twin holds the same weights unquantised
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support import zoo

Tensors = dict[str, torch.Tensor]
GROUP, NV_GROUP = 32, 16
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """How one tool stores a matrix.

    Attributes:
        settings: ``quantization_config``.
        quantise: weight [N, K] to its module's tensors, and the float32 weights that these stand for.
        bits: of a code.
    """

    settings: Mapping[str, Any]
    quantise: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    bits: int


@dataclass(frozen=True)
class Made:
    """A quantised checkpoint, and one of the same weights that isn't."""

    folder: Path
    twin: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


def groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    """[N, K / size, size]."""
    return weight.float().unflatten(1, (-1, size))


def pack_words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes [N, K] as int32 words [N, K / n], n = len(order): the code of column ``order[i]`` in bits 32 / n * i and up."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // len(order), dtype=torch.int64)
    for place, column in enumerate(order):
        words |= codes[:, column :: len(order)].long() << 32 // len(order) * place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits [N, K] as bytes [N, K / 2], the earlier column in the low half."""
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - E2M1).abs().argmin(-1)


def integers(weight: torch.Tensor, scale: torch.Tensor, zero: int | torch.Tensor, most: int = 15) -> torch.Tensor:
    """Codes [N, groups, size] of a weight's groups."""
    return (weight / scale[..., None]).round().add(zero if isinstance(zero, int) else zero[..., None]).clamp(0, most).long()


# --- compressed-tensors ---------------------------------------------------------------------------------------------------


def ct(form: str, **weights: Any) -> dict[str, Any]:
    """The settings of compressed-tensors."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": None} | weights
    group = {"targets": ["Linear"], "format": form, "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def ct_eight_bits(dtype: torch.dtype, per: str) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        most = 127.0 if dtype == torch.int8 else 448.0
        largest = weight.abs().amax(1, keepdim=True) if per == "channel" else weight.abs().max().view(1)
        scale = (largest / most).bfloat16()
        scaled = weight / scale.float()
        codes = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()

    return quantise


def ct_block(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale = zoo.quantise_fp8(weight, GROUP)
    return {"weight": codes, "weight_scale": scale}, codes.float() * by_block(scale, GROUP, weight)


def by_block(scale: torch.Tensor, block: int, weight: torch.Tensor) -> torch.Tensor:
    """Scales of blocks, one for each weight."""
    return scale.float().repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)[:, : weight.shape[1]]


def ct_int4(*, symmetric: bool, permuted: bool = False) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        of_column = mixed_groups(weight.shape[1]) if permuted else torch.arange(weight.shape[1]) // GROUP
        together = torch.argsort(of_column, stable=True)
        parts = groups(weight[:, together], GROUP)
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = ((torch.maximum(high, -low) / 7.5) if symmetric else (high - low) / 15).bfloat16().float()
        zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)
        sorted_codes = integers(parts, scale, zero).flatten(1)
        codes = torch.empty_like(sorted_codes)
        codes[:, together] = sorted_codes
        found = (codes - zero[:, of_column]) * scale[:, of_column]
        tensors = {
            "weight_packed": pack_words(codes),
            "weight_scale": scale.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_words(zero.t().long()).t()
        if permuted:
            tensors["weight_g_idx"] = of_column.int()
        return tensors, found

    return quantise


def mixed_groups(columns: int) -> torch.Tensor:
    """The group of each column where act order has mixed them."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return (torch.arange(columns) // GROUP)[order]


def nvfp4(*, divided: bool) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """Two scales: of 16 weights in e4m3, and of the matrix; compressed-tensors divides by the latter."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts = groups(weight, NV_GROUP)
        whole = 6 * 448 / weight.abs().max().float()
        scale = (parts.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
        codes = to_e2m1(parts / (scale.float() / whole)[..., None])
        found = (E2M1[codes] * (scale.float() / whole)[..., None]).flatten(1)
        packed = pack_bytes(codes.flatten(1))
        if divided:
            return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole.view(1)}, found
        tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": 1 / whole, "input_scale": torch.tensor(0.5)}
        return tensors, found

    return quantise


def ct_mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    packed, exponents = zoo.quantise_mxfp4(weight)
    packed = packed.flatten(1)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    return (
        {"weight_packed": packed, "weight_scale": exponents},
        E2M1[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(GROUP, 1),
    )


# --- AWQ, GPTQ, modelopt, DeepSeek-V4 -----------------------------------------------------------------------------------


def asymmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], zeros and float16 scales [N, groups]."""
    parts = groups(weight, GROUP)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    return integers(parts, scale.float(), zero).flatten(1), zero.long(), scale


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, zero, scale = asymmetric(weight)
    each = torch.arange(weight.shape[1]) // GROUP
    tensors = {
        "qweight": pack_words(codes.t(), AWQ_ORDER),
        "qzeros": pack_words(zero.t(), AWQ_ORDER),
        "scales": scale.t().contiguous(),
    }
    return tensors, (codes - zero[:, each]) * scale.float()[:, each]


def gptq(*, first_version: bool = True, permuted: bool = False) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        of_column = mixed_groups(weight.shape[1]) if permuted else torch.arange(weight.shape[1]) // GROUP
        together = torch.argsort(of_column, stable=True)
        sorted_codes, zero, scale = asymmetric(weight[:, together])
        codes = torch.empty_like(sorted_codes)
        codes[:, together] = sorted_codes
        tensors = {
            "qweight": pack_words(codes).t(),
            "qzeros": pack_words(zero.t() - int(first_version)),
            "scales": scale.t().contiguous(),
            "g_idx": of_column.int(),
        }
        return tensors, (codes - zero[:, of_column]) * scale.float()[:, of_column]

    return quantise


def gptq_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    parts, bytes_ = groups(weight, GROUP), tuple(range(4))
    scale = (parts.abs().amax(-1) / 127).half()
    codes = integers(parts, scale.float(), 128, most=255).flatten(1)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 127)
    tensors = {
        "qweight": pack_words(codes, bytes_).t(),
        "qzeros": pack_words(zeros, bytes_),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return tensors, (codes - 128) * scale.float().repeat_interleave(GROUP, 1)


def modelopt_fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max().float() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


def fp8_whole(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, found = modelopt_fp8(weight)
    return {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"]}, found


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_ASYMMETRIC = ct("pack-quantized", symmetric=False, group_size=GROUP)

SCHEMES: dict[str, Scheme] = {
    "fp8 whole": Scheme(_FP8, fp8_whole, 8),
    "ct fp8 channel": Scheme(
        ct("float-quantized", num_bits=8, type="float", strategy="channel"), ct_eight_bits(torch.float8_e4m3fn, "channel"), 8
    ),
    "ct fp8 tensor": Scheme(
        ct("float-quantized", num_bits=8, type="float", strategy="tensor"), ct_eight_bits(torch.float8_e4m3fn, "tensor"), 8
    ),
    "ct fp8 block": Scheme(
        ct("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[GROUP, GROUP]), ct_block, 8
    ),
    "ct int8": Scheme(ct("int-quantized", num_bits=8, strategy="channel"), ct_eight_bits(torch.int8, "channel"), 8),
    "ct int4": Scheme(ct("pack-quantized", group_size=GROUP), ct_int4(symmetric=True), 4),
    "ct int4 asymmetric": Scheme(_ASYMMETRIC, ct_int4(symmetric=False), 4),
    "ct int4 act order": Scheme(_ASYMMETRIC, ct_int4(symmetric=False, permuted=True), 4),
    "ct nvfp4": Scheme(
        ct("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16), nvfp4(divided=True), 4
    ),
    "ct mxfp4": Scheme(ct("mxfp4-pack-quantized", type="float", group_size=GROUP), ct_mxfp4, 4),
    "modelopt fp8": Scheme({"quant_method": "modelopt", "quant_algo": "FP8"}, modelopt_fp8, 8),
    "modelopt nvfp4": Scheme({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4(divided=False), 4),
    "awq": Scheme({"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": GROUP, "zero_point": True}, awq, 4),
    "gptq": Scheme(_GPTQ, gptq(), 4),
    "gptq v2": Scheme(_GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(first_version=False), 4),
    "gptq int8": Scheme(_GPTQ | {"bits": 8, "sym": True}, gptq_int8, 8),
    "gptq act order": Scheme(_GPTQ | {"desc_act": True}, gptq(permuted=True), 4),
}


def is_quantised(key: str, weight: torch.Tensor) -> bool:
    """Projections alone, as by the tools' defaults: no embedding, norm, router or output layer."""
    return key.endswith(".weight") and weight.dim() == 2 and "_proj" in key


def make_quantised(source: Path, scheme: str, folder: Path) -> Made:
    """A checkpoint's projections in a scheme, experts and dense layers, and their twin."""
    chosen, tensors, plain = SCHEMES[scheme], {}, {}
    for key, weight in zoo.read_tensors(source).items():
        plain[key] = weight
        if not is_quantised(key, weight):
            tensors[key] = weight
            continue
        parts, plain[key] = chosen.quantise(weight)
        tensors |= {key.removesuffix("weight") + name: tensor.contiguous() for name, tensor in parts.items()}
    stored = zoo.write_checkpoint(source, folder / "quantised", tensors, quantization_config=chosen.settings)
    return Made(stored, zoo.write_checkpoint(source, folder / "twin", plain), chosen.settings)


def make_deepseek_v4(source: Path, folder: Path) -> Made:
    """DeepSeek-V4 as published: experts in FP4 (I8, two codes a byte; E8M0 scales), dense layers in FP8 blocks of 16."""
    tensors, plain = {}, {}
    for key, weight in zoo.read_tensors(source).items():
        tensors[key] = plain[key] = weight
        scale = key.removesuffix("weight") + "scale"
        if ".experts." in key and key.endswith(".weight"):
            parts, plain[key] = ct_mxfp4(weight)
            tensors[key], tensors[scale] = parts["weight_packed"].view(torch.int8), parts["weight_scale"]
            tensors[scale] = tensors[scale].view(torch.float8_e8m0fnu)
        elif ".attn." in key and key.endswith((".wq_b.weight", ".wo_b.weight")):
            _, exact = zoo.quantise_fp8(weight, 16)
            power = torch.exp2(torch.ceil(torch.log2(exact)))
            tensors[key] = (weight / by_block(power, 16, weight)).to(torch.float8_e4m3fn)
            tensors[scale], plain[key] = power.to(torch.float8_e8m0fnu), tensors[key].float() * by_block(power, 16, weight)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}
    stored = zoo.write_checkpoint(source, folder / "v4", tensors, quantization_config=settings, expert_dtype="fp4")
    return Made(stored, zoo.write_checkpoint(source, folder / "v4-twin", plain), settings)
