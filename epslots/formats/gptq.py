"""GPTQ, as AutoGPTQ and GPTQModel store it.

qweight   I32 [columns / 8, rows], eight codes of four bits a word, lowest bits first; of eight bits, four codes
qzeros    I32 [groups, rows / 8], likewise: zero - 1 in checkpoints of the first version, zero in ``gptq_v2``
scales    F16 [groups, rows]
g_idx     I32 [columns], each column's group. With act order (``desc_act``) the groups are mixed: columns are kept sorted by
          group then, with the input that each reads
"""

from __future__ import annotations

import torch

from epslots.errors import UnsupportedModelError
from epslots.formats.fp8 import group_of
from epslots.formats.matrix import Matrix, StoredParts, check_columns, make_matrix, sort_columns, split_words
from epslots.formats.stored_format import Settings, StoredFormat

# The zero of symmetric codes of eight bits.
_MIDDLE = 128


def check(settings: Settings) -> None:
    """Refuse other numbers of bits, and layouts of other kernels."""
    bits, layout = settings.get("bits"), _layout(settings)
    if bits not in (4, 8) or layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(
            f"GPTQ stored it with {bits!r} bits in the layout {layout!r}; epslots reads 4 and 8 bits in gptq's and gptq_v2's: "
            f"use such a checkpoint of the same model, or the unquantised one"
        )


def _layout(settings: Settings) -> str:
    """As transformers finds it: the older name counts."""
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def read(parts: StoredParts, settings: Settings) -> Matrix:
    """The matrix of ``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
    bits = settings["bits"]
    codes = split_words(parts["qweight"].t().contiguous(), bits)
    group = parts["scales"].t().contiguous()
    zero = split_words(parts["qzeros"], bits).t().contiguous()
    if _layout(settings) == "gptq":
        zero = zero + 1
    # Some modules may have groups of another size (``dynamic``), which g_idx shows.
    block, perm = group_of(codes.shape, group.shape, settings.get("group_size"), exact="g_idx" not in parts), None
    if settings.get("desc_act"):
        codes, perm = sort_columns(codes, parts["g_idx"], block[1])
    elif "g_idx" in parts:
        check_columns(parts["g_idx"], block[1])
    if bits == 4:
        return make_matrix(codes, "int4", group=group, zero=zero, perm=perm, block=block)
    if not zero.is_meta and not bool((zero == _MIDDLE).all()):
        raise ValueError("asymmetric codes of 8 bits aren't known; symmetric ones are")
    return make_matrix((codes.to(torch.int16) - _MIDDLE).to(torch.int8), group=group, perm=perm, block=block)


FORMAT = StoredFormat(
    "gptq",
    {"weight": ("weight", "qweight", "qzeros", "scales", "g_idx")},
    ("qweight", "qzeros", "scales", "g_idx"),
    read,
    check,
)
