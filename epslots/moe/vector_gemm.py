"""Grouped products on the CPU by compiled loops (``grouped_rows.py``), over torch's tensors.

torch's own product hands each matrix to oneDNN, which copies it into another order at every call: with few rows that takes
longer than the product. Here a matrix is read once, where it lies. ``fits`` says which weights can be computed so, and
``is_faster`` for how many rows that pays.
"""

from __future__ import annotations

import ctypes
import functools
import struct
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
    """Whether products with these weights [Q, out, in], or [out, in], can be computed here, by dtype, shape and strides."""
    least = least_columns(weight.dtype)
    if least is None or not (weight.is_cpu or weight.is_meta):
        return False
    outer, inner = weight.shape[-2:]
    whole = outer % 2 == 0 and outer >= 2 * LANES and inner >= least
    return whole and weight.stride()[-2:] == (inner, 1)


def least_columns(dtype: torch.dtype) -> int | None:
    """Columns of a matrix at least that is multiplied here in a dtype; None: no matrix is."""
    return None if dtype not in _FORMS or config.DISABLE_JIT else FORMS[_FORMS[dtype]].run


def is_faster(rows_NK: torch.Tensor, slots: int) -> bool:
    """Whether these rows of so many slots are multiplied here sooner than by torch."""
    few = rows_NK.shape[0] <= _MATRIX_UNIT_ROWS * slots or not host_has("amx-bf16")
    return rows_NK.is_cpu and few and _has_threads()


def is_faster_alone(rows: int) -> bool:
    """The same for one matrix with many columns, for which torch has no loop of its own to pay for."""
    return rows <= (_MATRIX_UNIT_ROWS if host_has("amx-bf16") else _ALONE_ROWS) and _has_threads()


def _has_threads() -> bool:
    """Whether as many threads as torch has can take part."""
    return bool(fork_join()) or torch.get_num_threads() == 1


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
    row = inner * weight.element_size()
    lies = SlotMatrices(slots, outer, inner, weight.data_ptr(), weight.stride(0) * weight.element_size())
    return compute(rows_NK, lies, RowBytes(row, outer // 2 * row, 2 * row), ends_Q, bias, activation)


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


def compute(
    rows_NK: torch.Tensor,
    matrices: SlotMatrices,
    weights: RowBytes,
    ends_Q: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """``product`` by addresses, in the rows' dtype."""
    rows_NK, outer = rows_NK.contiguous(), matrices.outer
    # Not len(): a tensor's takes as long as one of torch's operations.
    rows, width = rows_NK.shape[0], outer if activation is None else outer // 2
    out = torch.empty(rows, width, dtype=rows_NK.dtype, device="cpu")
    most = max(loops.SMALLEST_CHUNK, min(loops.CHUNK, loops.CHUNK_BYTES // weights.pair))
    threads, thread_bytes = torch.get_num_threads() if fork_join() else 1, loops.SCRATCH_BYTES
    if matrices.scale_bytes:
        unpacked = max(most, loops.LARGEST_REST) * weights.pair + matrices.scale_bytes
        thread_bytes += -(-unpacked // _ALIGNMENT) * _ALIGNMENT
    if loops.work.address is None:
        prepare()
    here = _workspace()
    spans, scratch = here.reserve(matrices.slots, threads * thread_bytes)
    ends = here.num_rows_address if ends_Q is None else ends_Q.data_ptr()
    size = out.element_size()
    here.enter(
        *(loops.work.address, fork_join(), threads),
        *(rows, rows_NK.data_ptr(), rows_NK.shape[1] * size, out.data_ptr(), width * size),
        *(matrices.slots, ends, matrices.address, matrices.slot_bytes, weights.stride),
        *((0, 0) if bias is None else (bias.data_ptr(), bias.stride(0) * size)),
        *(outer // 2, matrices.inner, _ACTIVATIONS[activation], _FORMS[out.dtype], size, spans, scratch, thread_bytes),
        *(weights.far, most, *matrices.codes),
    )
    loops.launch(here.job_address)
    return out


# A job's fields from ``WORK`` on. Those of codes are undefined where there are weights.
_FIELDS = {count: struct.Struct(f"{count}q") for count in (loops.KIND + 1 - loops.WORK, loops.JOB_FIELDS - loops.WORK)}


class _Workspace:
    """One thread's memory for a job: its fields, spans, and each worker's scratch."""

    def __init__(self) -> None:
        memory = np.zeros(loops.JOB_FIELDS + _ALIGNMENT, np.int64)
        skipped = -memory.ctypes.data % _ALIGNMENT // memory.itemsize
        job = memory[skipped : skipped + loops.JOB_FIELDS]
        self._job, self.job_address = job.data, job.ctypes.data
        # Of 32 bits: the lower half comes first on every processor that torch has wheels for.
        self.num_rows_address = self.job_address + memory.itemsize * loops.NUM_ROWS
        self._spans = self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._span_bytes = self._scratch_bytes = 0

    def enter(self, *fields: int) -> None:
        """Fill in the job. In half of the time that numpy takes for a tuple."""
        _FIELDS[len(fields)].pack_into(self._job, loops.WORK * 8, *fields)

    def reserve(self, slots: int, scratch: int) -> tuple[int, int]:
        """Addresses of memory for so many slots' spans, and of so many bytes."""
        spans = slots * 8 * loops.SPAN
        if self._span_bytes < spans:
            self._spans, self._span_bytes = torch.empty(spans, dtype=torch.uint8, device="cpu"), spans
        if self._scratch_bytes < scratch:
            self._scratch, self._scratch_bytes = torch.empty(scratch, dtype=torch.uint8, device="cpu"), scratch
        return self._spans.data_ptr(), self._scratch.data_ptr()


_THREAD = threading.local()


def _workspace() -> _Workspace:
    here: _Workspace | None = getattr(_THREAD, "workspace", None)
    if here is None:
        here = _THREAD.workspace = _Workspace()
    return here


@functools.cache
def fork_join() -> int:
    """The address of ``GOMP_parallel`` in torch's own OpenMP, whose threads are awake between torch's operations; 0 = none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another system, or a torch without OpenMP: one thread
        return 0
