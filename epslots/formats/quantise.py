"""Quantising the weights of experts while the host store is built: an approximation, for checkpoints that aren't quantised.

    int8   one scale for each row, from its largest weight
    int4   one scale and one zero for 32 weights of a row, the pair of least squared error among some

The larger the error of a weight, the more of an expert's outputs change; the figures are in RESULTS.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from epslots.formats.matrix import Matrix, make_matrix
from epslots.layout import PackedForm

GROUP = 32
# Parts of a group's span that its 16 steps cover, from all of it downwards.
_SPANS = tuple(1 - 0.02 * number for number in range(20))
# A row or a group of zeros has some scale, too.
_LEAST = 1e-20


def quantise_int8(weight: torch.Tensor) -> Matrix:
    """``weight``, [rows, columns], in eight bits with a scale for each row."""
    row = (weight.float().abs().amax(1) / 127).clamp(min=_LEAST)
    codes = (weight.float() / row[:, None]).round().clamp(-127, 127).to(torch.int8)
    return make_matrix(codes, row=row)


def quantise_int4(weight: torch.Tensor) -> Matrix:
    """``weight``, [rows, columns], in four bits with a scale and a zero for each 32 columns."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP))
    groups = padded.view(rows, padded.shape[1] // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best: list[torch.Tensor] = []
    for span in _SPANS:
        scale = ((high - low) * span / 15).clamp(min=_LEAST).bfloat16()
        zero = (-low * span / scale.float()).round().clamp(0, 15)
        codes = (groups / scale.float() + zero).round().clamp(0, 15)
        error = ((codes - zero) * scale.float() - groups).square().sum(-1, keepdim=True)
        found = [error, codes, zero, scale]
        if best:
            better = error < best[0]
            found = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    _, codes, zero, scale = best
    codes = codes.flatten(1)[:, :columns]
    return make_matrix(codes, "int4", group=scale[..., 0], zero=zero[..., 0], block=(1, GROUP))


QUANTISED: dict[str, Callable[[torch.Tensor], Matrix]] = {"int8": quantise_int8, "int4": quantise_int4}
"""By name, how the weights of a matrix are quantised."""


@functools.cache
def quantised_form(name: str, rows: int, columns: int) -> PackedForm:
    """The form of matrices that are quantised so."""
    return QUANTISED[name](torch.zeros(rows, columns, device="meta")).form
