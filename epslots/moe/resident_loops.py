"""The experts of a few pairs, all in slots, by one compiled call. Pairs are sorted, multiplied, and put back in order.

By the loops that ``ExpertCompute`` otherwise calls one by one, with tensors of torch between them: to the same bits.

A *job* is an array of integers, whose fields are named below. Addresses, and sizes in bytes; ids and keys are of 64 bits.
"""

from __future__ import annotations

import torch
from numba.core import config

from epslots.compiled import compiled, prepare
from epslots.moe.grouped_rows import JOB_FIELDS, start, work
from epslots.moe.pair_kernels import Keys
from epslots.moe.pair_loops import NO_SLOT, is_plain, sort_pairs
from epslots.moe.product_tiles import copy_bytes, read
from epslots.moe.thread_memory import FIELDS, fork_join, thread_memory
from epslots.moe.vector_gemm import ReadyProduct

# More are worth tensors of their own: a thread keeps its memory.
MOST_PAIRS = 512
# As ``sort_pairs`` has them; hidden states and bytes of one, results, the products' jobs and threads.
IDS, PAIRS, KEYS, EXPERTS, FIRST, SLOTS, TOP_K, HIDDEN, HIDDEN_BYTES, OUT, FIRST_JOB, DOWN_JOB, THREADS = range(13)
# Memory: where slots end, and begin; the sorted pairs; their rows before, between and after the products; the products' own.
ENDS, STARTS, SORTED, ROWS, MIDDLE, RESULTS, SCRATCH = range(13, 20)
# The products' own job, in another cache line.
_PRODUCT = 24
assert _PRODUCT + JOB_FIELDS <= FIELDS


@compiled("int64(int64)")
def _compute(job: int) -> int:
    """Compute a job; returns how many pairs have no slot: then nothing else is done."""
    pairs, row_bytes, order = read(job, PAIRS), read(job, HIDDEN_BYTES), read(job, SORTED)
    missing = sort_pairs(
        read(job, IDS),
        pairs,
        read(job, KEYS),
        read(job, EXPERTS),
        read(job, FIRST),
        read(job, SLOTS),
        read(job, ENDS),
        read(job, STARTS),
        read(job, TOP_K),
        order,
    )
    if missing:
        return missing
    rows, middle, results, out = read(job, ROWS), read(job, MIDDLE), read(job, RESULTS), read(job, OUT)
    ends, threads, scratch, product = read(job, ENDS), read(job, THREADS), read(job, SCRATCH), job + 8 * _PRODUCT
    for place in range(pairs):
        copy_bytes(read(job, HIDDEN) + read(order, pairs + place) * row_bytes, rows + place * row_bytes, row_bytes)
    start(product, read(job, FIRST_JOB), pairs, rows, middle, ends, threads, scratch)
    start(product, read(job, DOWN_JOB), pairs, middle, results, ends, threads, scratch)
    for place in range(pairs):
        copy_bytes(results + place * row_bytes, out + read(order, place) * row_bytes, row_bytes)
    return 0


def fits(hidden_TH: torch.Tensor, ids_N: torch.Tensor, key_E: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether so many pairs of these hidden states can be computed here, without gradients."""
    if config.DISABLE_JIT or not hidden_TH.is_cpu or hidden_TH.dtype is not dtype or not 0 < ids_N.shape[0] <= MOST_PAIRS:
        return False
    return is_plain(ids_N) and is_plain(key_E) and not (hidden_TH.requires_grad and torch.is_grad_enabled())


def execute(
    hidden_TH: torch.Tensor, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, first: ReadyProduct, down: ReadyProduct
) -> torch.Tensor:
    """Each pair's result [N, H], of pairs that ``fits``.

    Args:
        key_E: int64, each expert's key; -1 = none.
        keys: those that rows may have.
        first, down: the products of the experts' matrices, the first one with its activation.

    Raises:
        IndexError: an expert has no slot.
    """
    if work.address is None:
        prepare()
    hidden_TH = hidden_TH.contiguous()
    (tokens, hidden), pairs, slots, item = hidden_TH.shape, ids_N.shape[0], keys.numbers.shape[0], hidden_TH.element_size()
    out_NH = hidden_TH.new_empty(pairs, down.width)
    threads = torch.get_num_threads() if fork_join() else 1
    here = thread_memory()
    row_bytes, middle_bytes = hidden * item, first.width * item
    products = max(one.scratch_bytes(threads) for one in (first, down))
    sizes = 4 * slots, 8 * slots + 8, 24 * pairs, pairs * row_bytes, pairs * middle_bytes, pairs * row_bytes, products
    places = here.places(*sizes)
    here.enter(
        IDS,
        *(ids_N.data_ptr(), pairs, key_E.data_ptr(), key_E.shape[0], keys.first, slots, pairs // tokens),
        *(hidden_TH.data_ptr(), row_bytes, out_NH.data_ptr(), first.job, down.job, threads, *places),
    )
    if _compute(here.job):
        raise IndexError(NO_SLOT)
    return out_NH
