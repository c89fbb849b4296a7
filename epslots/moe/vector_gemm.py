"""Grouped products on the CPU by compiled loops (``grouped_rows.py``), over torch's tensors.

torch's own product hands each matrix to oneDNN, which copies it into another order at every call: with few rows that takes
longer than the product. Here a matrix is read once, where it lies. ``fits`` says which weights can be computed so, and
``is_faster`` for how many rows that pays.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba.core import config

from epslots.compiled import prepare
from epslots.moe import grouped_rows as loops
from epslots.moe.vector_code import LANES, host_has
from epslots.moe.weight_forms import BFLOAT16, FLOAT32, FORMS

_FORMS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
_ACTIVATIONS = {None: loops.NO_ACTIVATION, "silu": loops.SILU, "gelu_tanh": loops.GELU_TANH}
_ALIGNMENT = 64
# Rows of a slot from which a processor with a matrix unit (AMX), which oneDNN uses, is expected to win by its arithmetic: a
# guess, without such a processor. Others don't win at any number (Zen 4, 1 to 128 rows of a slot, bf16 and fp32).
_MATRIX_UNIT_ROWS = 16
# Rows up to which one matrix is multiplied sooner (Zen 4, 1024 x 1024).
_ALONE_ROWS = 64


def fits(weight: torch.Tensor) -> bool:
    """Whether products with these weights [Q, out, in] can be computed here, by their dtype, shape and strides."""
    if weight.dtype not in _FORMS or weight.device.type not in ("cpu", "meta") or config.DISABLE_JIT:
        return False
    outer, inner = weight.shape[1:]
    whole = outer % 2 == 0 and outer >= 2 * LANES and inner >= FORMS[_FORMS[weight.dtype]].run
    return whole and weight.stride()[1:] == (inner, 1)


def is_faster(rows_NK: torch.Tensor, slots: int) -> bool:
    """Whether these rows of so many slots are multiplied here sooner than by torch."""
    few = len(rows_NK) <= _MATRIX_UNIT_ROWS * slots or not host_has("amx-bf16")
    return rows_NK.device.type == "cpu" and few and _has_threads()


def is_faster_alone(rows: int) -> bool:
    """The same for one matrix with many columns, for which torch has no loop of its own to pay for."""
    return rows <= (_MATRIX_UNIT_ROWS if host_has("amx-bf16") else _ALONE_ROWS) and _has_threads()


def _has_threads() -> bool:
    """Whether as many threads as torch has can take part."""
    return bool(_fork_join()) or torch.get_num_threads() == 1


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
        weight: [Q, M, K] for which ``fits``.
        ends_Q: int32 [Q], where the rows of each slot end; None: all rows are the only slot's. Results of rows past
            the last end are undefined.
        bias: [Q, M] in the weights' dtype, added to the results.
        activation: "silu" or "gelu_tanh": the first half of a row's results are gates then, which scale the second half,
            ``activation(gate) * up``, and all is rounded where torch's operations would round. None: results stay as they are.

    Returns:
        [N, M], or [N, M / 2] after an activation, in the weights' dtype.
    """
    slots, outer, inner = weight.shape
    size = weight.element_size()
    matrix = SlotMatrices(
        slots, outer, inner, weight.data_ptr(), weight.stride(0) * size, inner * size, outer // 2 * inner * size
    )
    return compute(rows_NK, matrix, ends_Q, bias, activation, weight.dtype)


class SlotMatrices(NamedTuple):
    """Where the matrices of Q slots lie, in bytes.

    Attributes:
        slots, outer, inner: Q, M and K.
        address: of the first slot's first row.
        slot_stride, row_stride: from slot to slot, and from row to row.
        far: from a row of the first half of a matrix to its fellow in the second.
        codes: the job's fields from ``KIND`` on; (``NO_CODES``,) = weights.
        scale_bytes: that each thread needs for the scales of a row.
    """

    slots: int
    outer: int
    inner: int
    address: int
    slot_stride: int
    row_stride: int
    far: int
    codes: tuple[int, ...] = (loops.NO_CODES,)
    scale_bytes: int = 0


def compute(
    rows_NK: torch.Tensor,
    matrix: SlotMatrices,
    ends_Q: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``product`` in ``dtype``, by addresses."""
    rows_NK = rows_NK.contiguous()
    out = torch.empty(len(rows_NK), matrix.outer if activation is None else matrix.outer // 2, dtype=dtype)
    threads, thread_bytes = torch.get_num_threads() if _fork_join() else 1, loops.SCRATCH_BYTES + matrix.scale_bytes
    if loops.work.address is None:
        prepare()
    here = _workspace()
    spans, scratch = here.reserve(matrix.slots, threads * thread_bytes)
    ends = here.num_rows_address if ends_Q is None else ends_Q.data_ptr()
    size = out.element_size()
    here.job[loops.WORK : loops.KIND] = (
        *(loops.work.address, _fork_join(), threads),
        *(len(rows_NK), rows_NK.data_ptr(), rows_NK.shape[1] * rows_NK.element_size(), out.data_ptr(), out.shape[1] * size),
        *(matrix.slots, ends, matrix.address, matrix.slot_stride, matrix.row_stride),
        *((0, 0) if bias is None else (bias.data_ptr(), bias.stride(0) * size)),
        *(matrix.outer // 2, matrix.inner, _ACTIVATIONS[activation], _FORMS[dtype], size, spans, scratch, thread_bytes),
        matrix.far,
    )
    here.job[loops.KIND : loops.KIND + len(matrix.codes)] = matrix.codes
    loops.launch(here.job_address)
    return out


class _Workspace:
    """One thread's memory for a job: its fields, spans, and each worker's scratch."""

    def __init__(self) -> None:
        memory = np.zeros(loops.JOB_FIELDS + _ALIGNMENT, np.int64)
        skipped = -memory.ctypes.data % _ALIGNMENT // memory.itemsize
        self.job = memory[skipped : skipped + loops.JOB_FIELDS]
        self.job_address = self.job.ctypes.data
        # Of 32 bits: the lower half comes first on every processor that torch has wheels for.
        self.num_rows_address = self.job_address + self.job.itemsize * loops.NUM_ROWS
        self._spans = self._scratch = torch.empty(0, dtype=torch.uint8)

    def reserve(self, slots: int, scratch: int) -> tuple[int, int]:
        """Addresses of memory for so many slots' spans, and of so many bytes."""
        spans = slots * 8 * loops.SPAN
        if len(self._spans) < spans:
            self._spans = torch.empty(spans, dtype=torch.uint8)
        if len(self._scratch) < scratch:
            self._scratch = torch.empty(scratch, dtype=torch.uint8)
        return self._spans.data_ptr(), self._scratch.data_ptr()


_THREAD = threading.local()


def _workspace() -> _Workspace:
    here: _Workspace | None = getattr(_THREAD, "workspace", None)
    if here is None:
        here = _THREAD.workspace = _Workspace()
    return here


@functools.cache
def _fork_join() -> int:
    """The address of ``GOMP_parallel`` in torch's own OpenMP, whose threads are awake between torch's operations; 0 = none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another system, or a torch without OpenMP: one thread
        return 0
