"""``PairKernels`` as Triton kernels: one launch each. Optional: needs ``triton``.

A step of a few tokens has a few hundred pairs, and each launch costs the host more than they cost the GPU. So a row's place
isn't found by a sort, but by counting the pairs that come before it: every program reads all pairs, and none waits for
another. Steps of more than ``MOST_PAIRS`` take torch's operations, whose launches don't matter there.

Tests hold them to ``TorchPairKernels`` by Triton's interpreter; no test of the project runs them on a GPU.

Legend of shape suffixes: N pairs, E experts, Q keys, H hidden size; B, C: a program's own pairs or keys, and those it reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from epslots.moe.pair_kernels import Keys, SortedPairs, TorchPairKernels

# The work grows with the square of the pairs: 2,048 tokens of 8 experts.
MOST_PAIRS = 1 << 14
_OWN, _READ = 32, 128
_COLUMNS = 1024
_SUMMED = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["pairs", "experts"])  # type: ignore[untyped-decorator]
def _count_pairs(  # type: ignore[no-untyped-def]
    ids,
    counts,
    uses,
    real,
    pairs,
    experts,
    ADD: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count the pairs of BLOCK_B experts. Grid: enough programs for E + 1.

    Args:
        ids: int64 [pairs], from 0 to ``experts``.
        counts: int64 [E + 1]; written, or added to if ADD.
        uses: int64 [1], if ADD: the experts with pairs are added.
        real: int64 [1], if SOME: how many pairs count.
    """
    if SOME:
        pairs = tl.minimum(tl.load(real), pairs).to(tl.int32)
    expert_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    count_B = tl.zeros([BLOCK_B], tl.int64)
    first = 0
    while first < pairs:
        pair_C = first + tl.arange(0, BLOCK_C)
        id_C = tl.load(ids + pair_C, mask=pair_C < pairs, other=-1)
        count_B += tl.sum((expert_B[:, None] == id_C[None, :]).to(tl.int64), axis=1)
        first += BLOCK_C
    real_B = expert_B <= experts
    if ADD:
        tl.atomic_add(uses, tl.sum(((count_B > 0) & (expert_B < experts)).to(tl.int64), axis=0))
        count_B += tl.load(counts + expert_B, mask=real_B, other=0)
    tl.store(counts + expert_B, count_B, mask=real_B)


@triton.jit
def _key_of(ids, key_of, pair, pairs, experts, stop, beyond):  # type: ignore[no-untyped-def]
    """The keys of pairs: ``stop`` for those without a slot, ``beyond`` past the last pair."""
    real = pair < pairs
    expert = tl.load(ids + pair, mask=real, other=experts)
    key = tl.load(key_of + expert, mask=expert < experts, other=-1)
    return tl.where(real, tl.where(key < 0, stop, key), beyond)


@triton.jit  # type: ignore[untyped-decorator]
def _place_pairs(  # type: ignore[no-untyped-def]
    ids,
    key_of,
    sorted_pairs,
    sorted_tokens,
    sorted_keys,
    pairs,
    experts,
    stop,
    turn,
    TOP_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write BLOCK_B pairs to their rows."""
    pair_B = turn * BLOCK_B + tl.arange(0, BLOCK_B)
    key_B = _key_of(ids, key_of, pair_B, pairs, experts, stop, stop + 1)
    row_B = tl.zeros([BLOCK_B], tl.int32)
    first = 0
    while first < pairs:
        other_C = first + tl.arange(0, BLOCK_C)
        key_C = _key_of(ids, key_of, other_C, pairs, experts, stop, stop + 1)
        same_BC = (key_C[None, :] == key_B[:, None]) & (other_C[None, :] < pair_B[:, None])
        row_B += tl.sum(((key_C[None, :] < key_B[:, None]) | same_BC).to(tl.int32), axis=1)
        first += BLOCK_C
    real_B = pair_B < pairs
    tl.store(sorted_pairs + row_B, pair_B.to(tl.int64), mask=real_B)
    tl.store(sorted_tokens + row_B, (pair_B // TOP_K).to(tl.int64), mask=real_B)
    tl.store(sorted_keys + row_B, key_B, mask=real_B)


@triton.jit  # type: ignore[untyped-decorator]
def _find_ends(  # type: ignore[no-untyped-def]
    ids, key_of, ends, pairs, experts, first_key, stop, turn, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write where the rows of BLOCK_B keys end."""
    number_B = turn * BLOCK_B + tl.arange(0, BLOCK_B)
    end_B = tl.zeros([BLOCK_B], tl.int32)
    first = 0
    while first < pairs:
        key_C = _key_of(ids, key_of, first + tl.arange(0, BLOCK_C), pairs, experts, stop, stop + 1)
        end_B += tl.sum((key_C[None, :] <= first_key + number_B[:, None]).to(tl.int32), axis=1)
        first += BLOCK_C
    tl.store(ends + number_B, end_B, mask=first_key + number_B < stop)


@triton.jit(do_not_specialize=["pairs", "experts", "first_key", "stop", "programs"])  # type: ignore[untyped-decorator]
def _sort_pairs(  # type: ignore[no-untyped-def]
    ids,
    key_of,
    sorted_pairs,
    sorted_tokens,
    sorted_keys,
    ends,
    pairs,
    experts,
    first_key,
    stop,
    programs,
    TOP_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Place BLOCK_B pairs, or find the ends of as many keys. Grid: ``programs`` for the pairs, then those for the keys.

    Args:
        ids: int64 [pairs]; key_of: int64 [experts].
        sorted_pairs, sorted_tokens, sorted_keys: int64 [pairs].
        ends: int32 [stop - first_key].
    """
    turn = tl.program_id(0)
    if turn < programs:
        _place_pairs(
            ids, key_of, sorted_pairs, sorted_tokens, sorted_keys, pairs, experts, stop, turn, TOP_K, BLOCK_B, BLOCK_C
        )
    else:
        _find_ends(ids, key_of, ends, pairs, experts, first_key, stop, turn - programs, BLOCK_B, BLOCK_C)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_sum(  # type: ignore[no-untyped-def]
    results, weights, sums, columns, token_stride, k_stride, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """One token's weighted sum, BLOCK_H columns of it. Grid: (T, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    real_H = column_H < columns
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(TOP_K):
        weight = tl.load(weights + token * token_stride + k * k_stride).to(tl.float32)
        result_H = tl.load(results + (token * TOP_K + k) * columns + column_H, mask=real_H, other=0.0)
        sum_H += result_H.to(tl.float32) * weight
    tl.store(sums + token * columns + column_H, sum_H.to(sums.dtype.element_ty), mask=real_H)


class TritonPairKernels(TorchPairKernels):
    """``PairKernels`` on a GPU."""

    def count(self, ids_N: torch.Tensor) -> torch.Tensor:
        if ids_N.shape[0] > MOST_PAIRS:
            return super().count(ids_N)
        counts = torch.empty_like(self._no_counts)
        self._count(ids_N, counts, None, None)
        return counts

    def add_counts(
        self, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        if ids_N.shape[0] > MOST_PAIRS:
            super().add_counts(ids_N, tokens_X, uses, real)
        else:
            self._count(ids_N, tokens_X, uses, real)

    def _count(self, ids_N: torch.Tensor, counts: torch.Tensor, uses: torch.Tensor | None, real: torch.Tensor | None) -> None:
        numbers = counts.shape[0]
        _count_pairs[(triton.cdiv(numbers, _OWN),)](
            ids_N,
            counts,
            counts if uses is None else uses,
            counts if real is None else real,
            ids_N.shape[0],
            numbers - 1,
            ADD=uses is not None,
            SOME=real is not None,
            BLOCK_B=_OWN,
            BLOCK_C=_READ,
        )

    def sort(self, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, top_k: int, *, absent: bool) -> SortedPairs:
        pairs, ends = ids_N.shape[0], keys.numbers.shape[0]
        if pairs > MOST_PAIRS:
            return super().sort(ids_N, key_E, keys, top_k, absent=absent)
        rows = torch.empty((3, pairs), dtype=torch.int64, device=ids_N.device)
        found = SortedPairs(rows[0], rows[1], rows[2], torch.empty(ends, dtype=torch.int32, device=ids_N.device))
        programs = triton.cdiv(pairs, _OWN)
        sizes = {"TOP_K": top_k, "BLOCK_B": _OWN, "BLOCK_C": _READ}
        numbers = pairs, key_E.shape[0], keys.first, keys.stop, programs
        _sort_pairs[(programs + triton.cdiv(ends, _OWN),)](ids_N, key_E, *found, *numbers, **sizes)
        return found

    def weighted_sum(self, results_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if results_NH.dtype not in _SUMMED:
            return super().weighted_sum(results_NH, weights_TK, dtype)
        (tokens, top_k), columns = weights_TK.shape, results_NH.shape[1]
        sums_TH = torch.empty((tokens, columns), dtype=dtype, device=results_NH.device)
        block = min(_COLUMNS, triton.next_power_of_2(columns))
        _weighted_sum[(tokens, triton.cdiv(columns, block))](
            results_NH, weights_TK, sums_TH, columns, *weights_TK.stride(), TOP_K=top_k, BLOCK_H=block
        )
        return sums_TH
