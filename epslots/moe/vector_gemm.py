"""Grouped products on the CPU by compiled loops (``grouped_rows.py``), over torch's tensors.

torch's own product hands each matrix to oneDNN, which copies it into another order at every call: with few rows that takes
longer than the product. Here a matrix is read once, where it lies. ``fits`` says which weights can be computed so, and
``is_faster`` for how many rows that pays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba.core import config

from epslots.compiled import prepare
from epslots.moe import grouped_rows as loops
from epslots.moe.thread_memory import fork_join, thread_memory
from epslots.moe.vector_code import LANES, host_has
from epslots.moe.weight_forms import BFLOAT16, FLOAT32, FORMS

FORMS_OF = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
_ACTIVATIONS = {None: loops.NO_ACTIVATION, "silu": loops.SILU, "gelu_tanh": loops.GELU_TANH}
_ALIGNMENT = 64
# Rows of a slot from which a processor with a matrix unit (AMX), which oneDNN uses, is expected to win by its arithmetic: a
# guess, without such a processor. Others don't win at any number (Zen 4, 1 to 128 rows of a slot, bf16 and fp32).
_MATRIX_UNIT_ROWS = 16
# Rows up to which one matrix is multiplied sooner (Zen 4, 1024 x 1024).
_ALONE_ROWS = 64


def fits(weight: torch.Tensor) -> bool:
    """Whether products with these weights [Q, out, in], or [out, in], can be computed here, by dtype, shape and strides."""
    least = least_columns(weight.dtype)
    if least is None or not (weight.is_cpu or weight.is_meta):
        return False
    outer, inner = weight.shape[-2:]
    whole = outer % 2 == 0 and outer >= 2 * LANES and inner >= least
    return whole and weight.stride()[-2:] == (inner, 1)


def least_columns(dtype: torch.dtype) -> int | None:
    """Columns of a matrix at least that is multiplied here in a dtype; None: no matrix is."""
    return None if dtype not in FORMS_OF or config.DISABLE_JIT else FORMS[FORMS_OF[dtype]].run


def is_faster(rows: int, slots: int) -> bool:
    """Whether so many rows of so many slots are multiplied here sooner than by torch."""
    return (rows <= _MATRIX_UNIT_ROWS * slots or not host_has("amx-bf16")) and _has_threads()


def is_faster_alone(rows: int) -> bool:
    """Whether so many rows of one matrix with many columns are multiplied here sooner than by torch."""
    return rows <= (_MATRIX_UNIT_ROWS if host_has("amx-bf16") else _ALONE_ROWS) and _has_threads()


def _has_threads() -> bool:
    """Whether as many threads as torch has can take part."""
    return bool(fork_join()) or torch.get_num_threads() == 1


class SlotMatrices(NamedTuple):
    """Where the matrices of Q slots lie.

    Attributes:
        slots, outer, inner: Q, M and K.
        address: of the first slot's first row, of weights or of codes.
        slot_bytes: from slot to slot.
        codes: the job's fields from ``KIND`` on; (``NO_CODES``,) = weights.
        scale_bytes: that each thread needs for the scales and zeros of a pair of rows.
    """

    slots: int
    outer: int
    inner: int
    address: int
    slot_bytes: int
    codes: tuple[int, ...] = (loops.NO_CODES,)
    scale_bytes: int = 0


class RowBytes(NamedTuple):
    """Distances of weights, which may be unpacked ones, in bytes.

    Attributes:
        stride: from row to row of a half of a matrix.
        far: from a row of the first half to its fellow in the second.
        pair: bytes of both.
    """

    stride: int
    far: int
    pair: int


class ReadyProduct:
    """A product with matrices whose addresses are filled in already.

    A call fills in only its rows, and a product of few rows takes little longer than that.

    Args:
        dtype: of rows and results.
        matrices, weights: their addresses. The product's owner keeps them valid.
        bias, activation: as of ``ready_product``.

    Attributes:
        width, inner: M, or M / 2 after an activation; K.
        job: address of the job's fields, for ``grouped_rows.start``.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        matrices: SlotMatrices,
        weights: RowBytes,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        if loops.work.address is None:
            prepare()
        size, outer, self.inner = dtype.itemsize, matrices.outer, matrices.inner
        self._slots, self.width = matrices.slots, outer if activation is None else outer // 2
        most = max(loops.SMALLEST_CHUNK, min(loops.CHUNK, loops.CHUNK_BYTES // weights.pair))
        self._thread_bytes = loops.SCRATCH_BYTES
        if matrices.scale_bytes:
            unpacked = max(most, loops.LARGEST_REST) * weights.pair + matrices.scale_bytes
            self._thread_bytes += -(-unpacked // _ALIGNMENT) * _ALIGNMENT
        fields = (
            *(loops.work.address, fork_join(), 0),
            *(0, 0, matrices.inner * size, 0, self.width * size),
            *(matrices.slots, 0, matrices.address, matrices.slot_bytes, weights.stride),
            *((0, 0) if bias is None else (bias.data_ptr(), bias.stride(0) * size)),
            *(outer // 2, matrices.inner, _ACTIVATIONS[activation], FORMS_OF[dtype], size, 0, 0, self._thread_bytes),
            *(weights.far, most, *matrices.codes),
        )
        self._fields = np.zeros(loops.JOB_FIELDS, np.int64)
        self._fields[loops.WORK : loops.WORK + len(fields)] = fields
        self.job = self._fields.ctypes.data

    def scratch_bytes(self, threads: int) -> int:
        """Bytes that a call by so many threads uses."""
        return threads * self._thread_bytes + self._slots * 8 * loops.SPAN

    def __deepcopy__(self, memo: dict[int, object]) -> ReadyProduct:
        return self  # it never changes, and has its own address

    def __call__(self, rows: torch.Tensor, ends_Q: torch.Tensor | None = None) -> torch.Tensor:
        """[*, M] for rows [*, K] of its dtype, on the CPU; slot q's rows end at ``ends_Q[q]``, int32 [Q]."""
        rows = rows.contiguous()
        *shape, inner = rows.shape
        out = rows.new_empty(*shape, self.width)
        threads = torch.get_num_threads() if fork_join() else 1
        here = thread_memory()
        scratch = here.reserve(self.scratch_bytes(threads))
        loops.start(
            *(here.job, self.job, rows.numel() // inner, rows.data_ptr(), out.data_ptr()),
            *(0 if ends_Q is None else ends_Q.data_ptr(), threads, scratch),
        )
        return out


def product(
    rows_NK: torch.Tensor,
    weight: torch.Tensor,
    ends_Q: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Each slot's rows times its matrix; each row has the same bits in any batch.

    Args:
        rows_NK: of the weights' dtype, sorted by slot.
        weight, bias, activation: as of ``ready_product``.
        ends_Q: int32 [Q], where the rows of each slot end. None: all rows are the only slot's. Results of rows past
            the last end are undefined.

    Returns:
        [N, M], or [N, M / 2] after an activation, in the weights' dtype.
    """
    return ready_product(weight, bias, activation)(rows_NK, ends_Q)


def ready_product(weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None) -> ReadyProduct:
    """The product with weights that stay where they are.

    Args:
        weight: [Q, M, K] for which ``fits``.
        bias: [Q, M] in the weights' dtype, added to the results.
        activation: "silu" or "gelu_tanh": the first half of a row's results are gates then, which scale the second half,
            ``activation(gate) * up``, and all is rounded where torch's operations would round. None: results stay as they are.
    """
    slots, outer, inner = weight.shape
    row = inner * weight.element_size()
    lies = SlotMatrices(slots, outer, inner, weight.data_ptr(), weight.stride(0) * weight.element_size())
    return ReadyProduct(weight.dtype, lies, RowBytes(row, outer // 2 * row, 2 * row), bias, activation)
