"""compressed-tensors, which llm-compressor writes (Kimi-K2-Thinking, RedHatAI's checkpoints).

    float-, int-, naive-quantized  weight F8_E4M3 or I8 [rows, columns]; weight_scale of the matrix, rows [rows, 1] or blocks
    mxfp8-quantized                weight F8_E4M3; weight_scale U8 [rows, columns / 32]
    pack-quantized                 weight_packed I32 [rows, columns / 8], eight codes a word, lowest bits first; weight_scale
                                   [rows, groups]; weight_zero_point I32 [rows / 8, groups]; weight_g_idx with act order
    nvfp4-pack-quantized           weight_packed U8 [rows, columns / 2], low half first; weight_scale F8_E4M3
                                   [rows, columns / 16]; weight_global_scale F32 [1], which divides
    mxfp4-pack-quantized           weight_packed U8; weight_scale U8 [rows, columns / 32]

Layouts follow from the tensors; only settings that no shape shows are read. Scales of activations (input_scale) aren't used.
"""

from __future__ import annotations

from typing import Any

import regex
import torch

from epslots.errors import UnsupportedModelError
from epslots.formats.fp8 import block_of
from epslots.formats.matrix import (
    Matrix,
    StoredParts,
    is_exponents,
    is_of_rows,
    make_matrix,
    make_nvfp4,
    sort_columns,
    split_bytes,
    split_words,
)
from epslots.formats.stored_format import Settings, StoredFormat

_KNOWN = {
    *("float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized", "dense"),
    *("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
}

_SECONDS = 1  # crafted patterns take for ever


def check(settings: Settings) -> None:
    """Refuse compressions that ``read`` doesn't know, and transformed weights."""
    groups = _groups(settings)
    formats = {str(group.get("format") or settings.get("format")) for group in groups}
    if unknown := sorted(formats - _KNOWN):
        raise UnsupportedModelError(
            f"it is stored by compressed-tensors as {', '.join(unknown)}; epslots reads {', '.join(sorted(_KNOWN))}"
        )
    transforms, sparsity = (settings.get(name) or {} for name in ("transform_config", "sparsity_config"))
    if transforms.get("config_groups") or sparsity.get("format", "dense") != "dense":
        raise UnsupportedModelError(
            "compressed-tensors transformed or sparsified its weights (transform_config, sparsity_config), which epslots "
            "doesn't undo; use a checkpoint of the same model without"
        )


def read(parts: StoredParts, settings: Settings) -> Matrix:
    """The matrix of ``weight`` or ``weight_packed``, and its scales."""
    scales = parts["weight_scale"]
    if "weight_packed" not in parts:
        return _plain(parts["weight"], scales, parts, settings)
    packed = parts["weight_packed"]
    if packed.dtype == torch.int32:
        return _words(packed, scales, parts, settings)
    codes = split_bytes(packed)
    if "weight_global_scale" in parts or not is_exponents(scales):
        return make_nvfp4(codes, scales, 1 / parts["weight_global_scale"].float())
    return make_matrix(codes, "e2m1", group=scales, block=block_of(codes.shape, scales.shape, None))


def _plain(codes: torch.Tensor, scales: torch.Tensor, parts: StoredParts, settings: Settings) -> Matrix:
    if "weight_zero_point" in parts:
        raise ValueError("asymmetric codes of 8 bits aren't known; symmetric ones are")
    if is_of_rows(scales, codes.shape[0]):
        return make_matrix(codes, row=scales)
    stated = _scheme(parts, settings).get("block_structure")
    if isinstance(stated, str):  # of older versions, as "128x128"
        stated = [int(size) for size in stated.split("x") if size.isdecimal()]
    return make_matrix(codes, group=scales, block=block_of(codes.shape, scales.shape, stated))


def _words(packed: torch.Tensor, scales: torch.Tensor, parts: StoredParts, settings: Settings) -> Matrix:
    scheme = _scheme(parts, settings)
    bits, kind = scheme.get("num_bits"), None
    asymmetric = "weight_zero_point" in parts or scheme.get("symmetric") is False
    permuted = "weight_g_idx" in parts
    if scales.dim() < 2:  # of the matrix, or of its rows
        scales = scales.reshape(-1, 1).expand(len(packed), 1)
    if bits == 4:
        codes, kind = split_words(packed), "int4"
    elif bits == 8 and not asymmetric and not permuted:
        codes = (split_words(packed, 8).to(torch.int16) - 128).to(torch.int8)
    else:
        raise ValueError(f"codes of {bits} bits aren't known; those of 4 are, and symmetric ones of 8 in their order")
    zero = split_words(parts["weight_zero_point"].t().contiguous()).t()[: len(codes)] if asymmetric else None
    block = block_of(codes.shape, scales.shape, (1, scheme.get("group_size")))
    codes, perm = sort_columns(codes, _column_groups(parts["weight_g_idx"], block[1]), block[1]) if permuted else (codes, None)
    return make_matrix(codes, kind, group=scales, zero=zero, perm=perm, block=block)


def _column_groups(stored: torch.Tensor, width: int) -> torch.Tensor:
    """The group of each column. llm-compressor leaves -1 where no token reached an expert: there is no act order then."""
    unset = not stored.is_meta and bool((stored < 0).any())
    return torch.arange(len(stored), device=stored.device) // width if unset else stored


def _groups(settings: Settings) -> list[dict[str, Any]]:
    groups = settings.get("config_groups") or {}
    listed = list(groups.values()) if isinstance(groups, dict) else []
    if not listed or not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in listed):
        raise UnsupportedModelError("its quantization_config names no quantised weights (config_groups): which are they?")
    return listed


def _scheme(parts: StoredParts, settings: Settings) -> dict[str, Any]:
    """The settings of the weights of a module: those of the one group, or of the group whose targets match it."""
    groups = _groups(settings)
    if len(groups) == 1:
        return dict(groups[0]["weights"])
    for group in groups:
        for target in group.get("targets") or ():
            pattern = target[3:] if str(target).startswith("re:") else rf"(.*\.)?{regex.escape(str(target))}$"
            if _matches(pattern, parts.where):
                return dict(group["weights"])
    every = [group for group in groups if "Linear" in (group.get("targets") or ())]
    if len(every) != 1:
        raise ValueError(f"none of {len(groups)} config_groups matches {parts.where}")
    return dict(every[0]["weights"])


def _matches(pattern: str, path: str) -> bool:
    try:
        return regex.match(pattern, path, timeout=_SECONDS) is not None
    except TimeoutError:
        raise ValueError(f"config_groups has the target {pattern!r}, which takes more than {_SECONDS} s to match") from None


FORMAT = StoredFormat(
    "compressed-tensors",
    {
        "weight": (
            *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
            *("weight_g_idx", "input_scale", "input_zero_point", "input_global_scale"),
        )
    },
    ("weight_scale", "weight_packed"),
    read,
    check,
)
