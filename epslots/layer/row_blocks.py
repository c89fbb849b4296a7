"""Matrix products whose rows don't depend on how many rows there are: ``product``.

A library picks its kernel, and with it the order in which it adds up, by the number of rows: on a CPU, MKL's fp32 rows come
out in other bits for 1 to 3 rows than for 4 and more, and cuBLAS splits sums for few rows. So every product here is made of
products of ``ROWS`` rows, the last one filled up with zeros. Larger blocks (``ROWS`` times a power of two) replace runs of
these where a check on this device found the same bits, which makes long prompts nearly free.

The same shape takes the same kernel, in which a row's sum depends neither on the other rows nor on their number: that is what
batch-invariant kernels build on as well (Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025, and its
``batch_invariant_ops``; vLLM's ``VLLM_BATCH_INVARIANT``). On CPUs tests hold it; on CUDA it has never run.

Legend of shape suffixes: M rows, K inner size, N outer size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

# Rows of the smallest block. On a CPU, decoding one sequence costs 1.1 times as much in bf16 with 8, and 1.6 times with 16.
ROWS = 8
MOST_ROWS = 512
# The check needs a second weight of the same shape: for larger ones, blocks stay small.
_MOST_WEIGHT_BYTES = 2**30

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Whether blocks of so many rows have the bits of small ones: by device, threads, dtype, the weight's shape and strides, rows.
_checked: dict[tuple[object, ...], bool] = {}


def product(rows_MK: torch.Tensor, weight_KN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """``rows_MK @ weight_KN + bias_N``, [M, N], each row in the same bits whatever M is."""
    if bias_N is None:
        return _in_blocks(rows_MK, weight_KN, torch.mm)
    return _in_blocks(rows_MK, weight_KN, lambda rows, weight: torch.addmm(bias_N, rows, weight))


def _in_blocks(rows_MK: torch.Tensor, weight_KN: torch.Tensor, multiply: Multiply) -> torch.Tensor:
    count = len(rows_MK)
    if not count:
        return rows_MK.new_zeros(0, weight_KN.shape[1])
    whole = count - count % ROWS
    parts, start = [], 0
    for size in _sizes(whole, weight_KN, multiply):
        parts.append(multiply(rows_MK[start : start + size], weight_KN))
        start += size
    if start < count:
        last = rows_MK.new_zeros(ROWS, rows_MK.shape[1])
        last[: count - start] = rows_MK[start:]
        parts.append(multiply(last, weight_KN)[: count - start])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sizes(whole: int, weight_KN: torch.Tensor, multiply: Multiply) -> Iterator[int]:
    """Sizes of blocks that make up ``whole`` rows, the largest first."""
    size = MOST_ROWS
    while whole:
        while size > whole or not _same_bits(size, weight_KN, multiply):
            size //= 2
        yield size
        whole -= size


def _same_bits(size: int, weight_KN: torch.Tensor, multiply: Multiply) -> bool:
    """Whether a block of ``size`` rows has the bits of small blocks; checked once for each kind of product."""
    if size == ROWS:
        return True
    kind = (multiply is torch.mm, weight_KN.device, torch.get_num_threads(), weight_KN.dtype)
    key = (*kind, weight_KN.shape, weight_KN.stride(), size)
    if key not in _checked:
        _checked[key] = weight_KN.nbytes <= _MOST_WEIGHT_BYTES and _check(size, weight_KN, multiply)
    return _checked[key]


def _check(size: int, weight_KN: torch.Tensor, multiply: Multiply) -> bool:
    """Compare a block with small ones on numbers that show any other order of adding up.

    The second half of each sum is the negative of the first, so that the result is nothing but what rounding left. Without
    that, bf16 would hide most differences. The weight is drawn, because a checkpoint's may be zeros or powers of two.
    """
    inner, outer = weight_KN.shape
    half = inner // 2
    numbers = torch.Generator(weight_KN.device).manual_seed(size)
    weight = torch.empty_strided(weight_KN.shape, weight_KN.stride(), dtype=weight_KN.dtype, device=weight_KN.device)
    weight.normal_(generator=numbers)
    weight[half : 2 * half] = weight[:half]
    rows = torch.empty(size, inner, dtype=weight.dtype, device=weight.device).normal_(generator=numbers)
    rows[:, half : 2 * half] = -rows[:, :half]
    small = torch.cat([multiply(block, weight) for block in rows.split(ROWS)])
    return torch.equal(multiply(rows, weight), small)
