"""AWQ, in the layout of AutoAWQ's gemm kernels (also auto-round's, llm-awq's conversions).

qweight   I32 [columns, rows / 8], eight codes of four bits a word, in the order 0 2 4 6 1 3 5 7
qzeros    I32 [groups, rows / 8], likewise
scales    F16 [groups, rows]
"""

from __future__ import annotations

from epslots.errors import UnsupportedModelError
from epslots.formats.fp8 import group_of
from epslots.formats.matrix import Matrix, StoredParts, make_matrix, split_words
from epslots.formats.stored_format import Settings, StoredFormat

# Where in a word the code of each of eight neighbouring rows is.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def check(settings: Settings) -> None:
    """Refuse other layouts and numbers of bits."""
    # As transformers: the older name counts, and one of its backends is a layout.
    stated = settings.get("version") or settings.get("format") or "gemm"
    version = str("llm-awq" if settings.get("backend") == "llm-awq" else stated).lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise UnsupportedModelError(
            f"AWQ stored it in {bits!r} bits in the layout {version!r}; epslots reads 4 bits in gemm's"
        )


def read(parts: StoredParts, settings: Settings) -> Matrix:
    """The matrix of ``qweight``, ``qzeros`` and ``scales``."""
    codes = split_words(parts["qweight"], order=_PLACES).t()
    group = parts["scales"].t().contiguous()
    zero = split_words(parts["qzeros"], order=_PLACES).t().contiguous()
    block = group_of(codes.shape, group.shape, settings.get("group_size", settings.get("q_group_size")), exact=True)
    return make_matrix(codes, "int4", group=group, zero=zero, block=block)


FORMAT = StoredFormat(
    "awq", {"weight": ("weight", "qweight", "qzeros", "scales")}, ("qweight", "qzeros", "scales"), read, check
)
