"""Attention of one query a row, from hidden states to hidden states, by one compiled call.

    queries, keys, values   products with three matrices (grouped_rows.py)
    norms                   of each head's queries and keys, if there are any (row_norm.py)
    rotation                of queries and keys by the rows' positions (row_rotation.py)
    cells                   new keys and values enter their cells; all that a row attends to is read out of its cells
    attention               (query_attention.py), and the product with a fourth matrix

By the loops that transformers' attention otherwise calls one by one, to the same bits. With few rows, what lies between these
takes longer than they do: torch's tensors, and Python.

A *job* is an array of integers, whose fields are named below; addresses, and sizes in bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from epslots.compiled import compiled, prepare
from epslots.moe import grouped_rows, query_attention
from epslots.moe.grouped_rows import start
from epslots.moe.product_tiles import copy_bytes, read
from epslots.moe.query_attention import float_bits, launch, threads_for
from epslots.moe.row_norm import norm_rows
from epslots.moe.row_rotation import rotate
from epslots.moe.thread_memory import FIELDS, fork_join, thread_memory
from epslots.moe.vector_code import LANES
from epslots.moe.vector_gemm import FORMS_OF, ReadyProduct

# The size of a head in numbers, and of all heads of queries, and of keys, in bytes.
ROWS, FORM, HEADS, GROUPS, SIZE, QUERY_BYTES, KEY_BYTES = range(7)
# Inputs and outputs; the products' jobs; the norms' weights (0 = none) and epsilons; angles.
HIDDEN, OUT, Q_JOB, K_JOB, V_JOB, O_JOB, Q_NORM, K_NORM, Q_EPSILON, K_EPSILON, COS, SIN, ANGLE_ROW = range(7, 20)
# Pools, whose cells hold ``KEY_BYTES``, and bytes from cell to cell; the cells of new keys and values, int64.
KEYS, KEYS_NEXT, VALUES, VALUES_NEXT, NEW_CELLS = range(20, 25)
# Memory for queries, keys, values and what attention finds; the products' own, and their threads; the attention's threads.
QUERY, KEY, VALUE, FOUND, SCRATCH, THREADS, ATTENTION_THREADS, WORK, FORK_JOIN = range(25, 34)
# The jobs of the products and of the attention, in other cache lines.
_PRODUCT, _ATTENTION = 40, 112
assert _PRODUCT + grouped_rows.JOB_FIELDS <= _ATTENTION and _ATTENTION + query_attention.JOB_FIELDS <= FIELDS


@compiled("void(int64, int64, int64, int64, int64)")
def _norm_and_rotate(job: int, states: int, heads: int, weight: int, epsilon: int) -> None:
    """Heads of all rows, where they lie."""
    form, size, rows = read(job, FORM), read(job, SIZE), read(job, ROWS)
    if weight:
        norm_rows(form, states, weight, states, rows * heads, size, epsilon)
    head_bytes = read(job, KEY_BYTES) // read(job, GROUPS)
    for row in range(rows):
        angles = row * read(job, ANGLE_ROW)
        for head in range(row * heads, (row + 1) * heads):
            at = states + head * head_bytes
            rotate(form, at, read(job, COS) + angles, read(job, SIN) + angles, size, size, at)


@compiled("void(int64)")
def _attend(job: int) -> None:
    rows, key_bytes, threads, scratch = read(job, ROWS), read(job, KEY_BYTES), read(job, THREADS), read(job, SCRATCH)
    query, key, value, hidden, product = (
        read(job, QUERY),
        read(job, KEY),
        read(job, VALUE),
        read(job, HIDDEN),
        job + 8 * _PRODUCT,
    )
    start(product, read(job, Q_JOB), rows, hidden, query, 0, threads, scratch)
    start(product, read(job, K_JOB), rows, hidden, key, 0, threads, scratch)
    start(product, read(job, V_JOB), rows, hidden, value, 0, threads, scratch)
    _norm_and_rotate(job, query, read(job, HEADS), read(job, Q_NORM), read(job, Q_EPSILON))
    _norm_and_rotate(job, key, read(job, GROUPS), read(job, K_NORM), read(job, K_EPSILON))
    for row in range(rows):
        cell = read(read(job, NEW_CELLS), row)
        copy_bytes(key + row * key_bytes, read(job, KEYS) + cell * read(job, KEYS_NEXT), key_bytes)
        copy_bytes(value + row * key_bytes, read(job, VALUES) + cell * read(job, VALUES_NEXT), key_bytes)
    launch(job + 8 * _ATTENTION, read(job, WORK), read(job, FORK_JOIN), read(job, ATTENTION_THREADS))
    start(product, read(job, O_JOB), rows, read(job, FOUND), read(job, OUT), 0, threads, scratch)


class AttentionShape(NamedTuple):
    """Heads of queries, heads of keys and values, numbers of a head, and the factor of scores."""

    heads: int
    groups: int
    size: int
    scale: float

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether such attention can be computed here."""
        whole = self.size % (2 * LANES) == 0 and self.heads % self.groups == 0
        return whole and dtype in FORMS_OF and self.heads // self.groups <= query_attention.MOST_SHARED


class AttentionWeights(NamedTuple):
    """Products with the matrices of queries, keys, values and outputs; weights and epsilons of the norms, or None.

    Attributes:
        q_norm, k_norm: contiguous [D], and float32 [1].
    """

    q: ReadyProduct
    k: ReadyProduct
    v: ReadyProduct
    o: ReadyProduct
    q_norm: tuple[torch.Tensor, torch.Tensor] | None
    k_norm: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def addresses(self) -> tuple[int, ...]:
        """The job's fields from ``Q_JOB`` on."""
        norms = [(0, 0) if each is None else (each[0].data_ptr(), each[1].data_ptr()) for each in (self.q_norm, self.k_norm)]
        jobs = (self.q.job, self.k.job, self.v.job, self.o.job)
        return *jobs, norms[0][0], norms[1][0], norms[0][1], norms[1][1]


class Cells(NamedTuple):
    """Where keys and values are.

    Attributes:
        keys, values: pools [C, G, D] that ``cell_loops.has_whole_cells``.
        new_B: int64, the cell of each row's new token.
        read_BS: int32, the cells that rows attend to, new ones included; contiguous, flat.
    """

    keys: torch.Tensor
    values: torch.Tensor
    new_B: torch.Tensor
    read_BS: torch.Tensor


def attend(
    hidden_BH: torch.Tensor,
    shape: AttentionShape,
    weights: AttentionWeights,
    angles: tuple[torch.Tensor, torch.Tensor],
    cells: Cells,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """[B, H], for one token of each row.

    Args:
        hidden_BH: contiguous, of the products' dtype, which ``shape`` fits.
        angles: cosines and sines [B or 1, 1, D], of the same dtype, with neighbouring numbers.
        mask: bool [B, 1, 1, S], False where a row has no key, with neighbouring numbers.
    """
    if query_attention.work.address is None:
        prepare()
    rows, (heads, groups, size, scale), item = hidden_BH.shape[0], shape, hidden_BH.element_size()
    out_BH = torch.empty_like(hidden_BH)
    head_bytes, span = size * item, cells.read_BS.shape[0] // rows
    query_bytes, key_bytes = heads * head_bytes, groups * head_bytes
    keys_next, values_next = cells.keys.stride(0) * item, cells.values.stride(0) * item
    threads = torch.get_num_threads() if fork_join() else 1
    attending = threads_for(rows * groups, 2 * rows * span * key_bytes)
    thread_bytes = 4 * (span + LANES) * (heads // groups)
    here = thread_memory()
    products = max(one.scratch_bytes(threads) for one in weights[:4])
    sizes = rows * query_bytes, rows * key_bytes, rows * key_bytes, rows * query_bytes, products, attending * thread_bytes
    places = here.places(*sizes)
    cos, sin = angles
    here.enter(
        ROWS,
        *(rows, FORMS_OF[hidden_BH.dtype], heads, groups, size, query_bytes, key_bytes),
        *(hidden_BH.data_ptr(), out_BH.data_ptr(), *weights.addresses),
        *(cos.data_ptr(), sin.data_ptr(), cos.stride(0) * item if cos.shape[0] > 1 else 0),
        *(cells.keys.data_ptr(), keys_next, cells.values.data_ptr(), values_next, cells.new_B.data_ptr()),
        *(*places[:5], threads, attending, query_attention.work.address, fork_join()),
    )
    here.enter(
        _ATTENTION + query_attention.TASKS,
        *(rows * groups, FORMS_OF[hidden_BH.dtype], heads // groups, groups, span, size),
        *(places[0], query_bytes, head_bytes, cells.keys.data_ptr(), 0, head_bytes, keys_next),
        *(cells.values.data_ptr(), 0, head_bytes, values_next, size),
        *((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))),
        *(places[3], query_bytes, head_bytes, float_bits(scale), places[5], thread_bytes),
        *(cells.read_BS.data_ptr(), 4 * span),
    )
    _attend(here.job)
    return out_BH
