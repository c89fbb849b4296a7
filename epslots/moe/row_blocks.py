"""Matrix products whose rows don't depend on the number of rows: ``product``.

A library picks its kernel, and with it the order of its sums, by the number of rows: on a CPU, MKL's fp32 rows have other bits
for 1 to 3 rows than for 4 and more, and cuBLAS splits sums for few rows. So every product here is made of products of ``ROWS``
rows, the last one padded with zeros. Larger blocks (``ROWS`` times a power of two) replace runs of these where a check on this
device found the same bits, which makes long prompts nearly free. The same shape takes the same kernel, in which a row's sum
depends neither on the other rows nor on its place, which is checked as well. Batch-invariant kernels build on that ("Defeating
Nondeterminism in LLM Inference", Thinking Machines Lab 2025; vLLM's ``VLLM_BATCH_INVARIANT``). Tested on CPUs, never on CUDA.

Legend of shape suffixes: M rows, K inner size, N outer size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

# Rows of the smallest block. On a CPU, decoding one sequence costs 1.1 times as much in bf16 with 8, and 1.6 times with 16.
ROWS = 8
MAX_ROWS = 512
# The check needs a second weight of the same shape: larger weights use small blocks, unchecked.
_MAX_CHECKED_BYTES = 2**30

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Whether blocks of a number of rows are allowed, by the kind of product, device, threads, dtype, the weight's shape and
# strides.
_checked: dict[tuple[object, ...], bool] = {}


def product(rows_MK: torch.Tensor, weight_KN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """``rows_MK @ weight_KN + bias_N``, [M, N]; each row has the same bits for any M."""
    outer = weight_KN.shape[1]
    if outer < ROWS:  # a product with a vector computes several rows at once, each in another order
        filled = F.pad(weight_KN, (0, ROWS - outer))
        return product(rows_MK, filled, None if bias_N is None else F.pad(bias_N, (0, ROWS - outer)))[:, :outer]
    if bias_N is None:
        return _in_blocks(rows_MK, weight_KN, torch.mm)
    return _in_blocks(rows_MK, weight_KN, lambda rows, weight: torch.addmm(bias_N, rows, weight))


def _in_blocks(rows_MK: torch.Tensor, weight_KN: torch.Tensor, multiply: Multiply) -> torch.Tensor:
    parts, start = [rows_MK.new_zeros(0, weight_KN.shape[1])], 0
    for size, block in _sizes(len(rows_MK), weight_KN, multiply):
        rows = rows_MK[start : start + size]
        if size < block:
            rows = F.pad(rows, (0, 0, 0, block - size))
        parts.append(multiply(rows, weight_KN)[:size])
        start += size
    return parts[1] if len(parts) == 2 else torch.cat(parts)


def _sizes(rows: int, weight_KN: torch.Tensor, multiply: Multiply) -> Iterator[tuple[int, int]]:
    """Rows of each block, and the size that it is padded to; the largest first."""
    if not _is_allowed(ROWS, weight_KN, multiply):  # the place in a block changes the bits
        yield from [(1, ROWS)] * rows
        return
    size = MAX_ROWS
    while rows >= ROWS:
        while size > rows or not _is_allowed(size, weight_KN, multiply):
            size //= 2
        yield size, size
        rows -= size
    if rows:
        yield rows, ROWS


def _is_allowed(size: int, weight_KN: torch.Tensor, multiply: Multiply) -> bool:
    """Whether rows in a block of ``size`` have the same bits as in small blocks; checked once for a kind of product."""
    if weight_KN.is_meta:  # no bits
        return size == ROWS
    kind = (multiply is torch.mm, weight_KN.device, torch.get_num_threads(), weight_KN.dtype)
    key = (*kind, weight_KN.shape, weight_KN.stride(), size)
    if key not in _checked:
        _checked[key] = size == ROWS if weight_KN.nbytes > _MAX_CHECKED_BYTES else _check(size, weight_KN, multiply)
    return _checked[key]


def _check(size: int, weight_KN: torch.Tensor, multiply: Multiply) -> bool:
    """Compare a block with small ones, or a small one with rotated rows.

    The numbers reveal any other order: the second half of each sum is the negative of the first, so the result consists of
    rounding errors alone. Otherwise, bf16 would hide most differences. The weight is random, because a checkpoint's may be
    zeros or powers of two.
    """
    inner = len(weight_KN)
    half = inner // 2
    numbers = torch.Generator(weight_KN.device).manual_seed(size)
    weight = torch.empty_strided(weight_KN.shape, weight_KN.stride(), dtype=weight_KN.dtype, device=weight_KN.device)
    weight.normal_(generator=numbers)
    weight[half : 2 * half] = weight[:half]
    rows = torch.empty(size, inner, dtype=weight.dtype, device=weight.device).normal_(generator=numbers)
    rows[:, half : 2 * half] = -rows[:, :half]
    result = multiply(rows, weight)
    if size > ROWS:
        return torch.equal(result, torch.cat([multiply(block, weight) for block in rows.split(ROWS)]))
    return all(torch.equal(multiply(rows.roll(by, 0), weight), result.roll(by, 0)) for by in range(1, ROWS))
