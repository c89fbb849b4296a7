"""The pairs of a layer's step, handled by compiled loops on the CPU. One call does the work of five torch operations or more.

With few tokens each of torch's operations takes longer than its work. ``pair_kernels.TorchPairKernels`` is the twin.

Arguments are addresses and integers; ids and keys are of 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from numba.core import config
from numba.extending import intrinsic

from epslots.compiled import compiled
from epslots.moe import vector_code as code
from epslots.moe.pair_kernels import Keys, SortedPairs, TorchPairKernels
from epslots.moe.product_tiles import emits, for_each, looped, read, write, write_int32
from epslots.moe.vector_code import F32, I64, LANES, Value
from epslots.moe.weight_forms import BFLOAT16, FLOAT32, FORMS, WeightForm

_FORMS = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
NO_SLOT = "the router chose an expert that no slot holds"


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def _add_counts(ids: int, pairs: int, experts: int, totals: int, uses: int, counts: int) -> int:
    """Add pairs of each id below or at ``experts`` to totals, and how many ids below it have any to uses; -1 for others."""
    for expert in range(experts + 1):
        write(counts, expert, 0)
    used = 0
    for pair in range(pairs):
        expert = read(ids, pair)
        if not 0 <= expert <= experts:
            return -1
        before = read(counts, expert)
        used += before == 0 and expert < experts
        write(counts, expert, before + 1)
    for expert in range(experts + 1):
        write(totals, expert, read(totals, expert) + read(counts, expert))
    write(uses, 0, read(uses, 0) + used)
    return used


@compiled("int64(int64, int64, int64, int64, int64)")
def _place(expert: int, keys: int, experts: int, first: int, slots: int) -> int:
    """The place of an expert's key among those from ``first`` on, ``slots`` for the one behind them; -1 if it has none."""
    if not 0 <= expert < experts:
        return -1
    place = read(keys, expert) - first
    return place if 0 <= place <= slots else -1


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def sort_pairs(
    ids: int, pairs: int, keys: int, experts: int, first: int, slots: int, ends: int, starts: int, top_k: int, out: int
) -> int:
    """Sort pairs by their keys, those without one last; returns how many have none.

    Args:
        ids, pairs: the expert of each pair, and their number.
        keys, experts: the key of each expert (-1 = none), and their number.
        first, slots: keys are ``first`` and up, so many; the next one belongs to pairs that are computed elsewhere.
        ends: int32 [slots], where the pairs of each key end.
        starts: memory for ``slots + 1`` integers.
        out: [3, pairs]: the pairs in order, their tokens and their keys.
    """
    missing = 0
    for place in range(slots + 1):
        write(starts, place, 0)
    for pair in range(pairs):
        place = _place(read(ids, pair), keys, experts, first, slots)
        if place < 0:
            missing += 1
            place = slots
        write(starts, place, read(starts, place) + 1)
    total = 0
    for place in range(slots + 1):
        count = read(starts, place)
        write(starts, place, total)
        total += count
        if place < slots:
            write_int32(ends, place, total)
    tokens, keys_out = out + 8 * pairs, out + 16 * pairs
    for pair in range(pairs):
        place = _place(read(ids, pair), keys, experts, first, slots)
        place = slots if place < 0 else place
        at = read(starts, place)
        write(starts, place, at + 1)
        write(out, at, pair)
        write(tokens, at, pair // top_k)
        write(keys_out, at, first + place)
    return missing


@for_each(FORMS)
def _sum_weighted(b: Any, form: WeightForm, *args: Value) -> None:
    results, weights, top_k, columns, out = args
    row_bytes = b.mul(columns, I64(form.item_bytes))

    def chunk(column: Value) -> list[Value]:
        at = code.offset(b, results, column, form.item_bytes)

        def one(k: Value, total: Value) -> list[Value]:
            weight = code.splat(b, code.load(b, code.offset(b, weights, k, 4), F32, 4))
            return [b.fadd(total, b.fmul(form.load(b, code.offset(b, at, k, row_bytes)), weight))]

        (total,) = looped(b, I64(0), I64(1), top_k, [code.constant(F32, 0.0)], one)
        form.store(b, total, code.offset(b, out, column, form.item_bytes))
        return []

    looped(b, I64(0), I64(LANES), columns, [], chunk)


@intrinsic(prefer_literal=True)
def sum_weighted(context, form, results, weights, top_k, columns, out):  # type: ignore[no-untyped-def]
    """A token's rows of results, weighted and summed in order.

    Args:
        form: of results and out, a number of ``FORMS``.
        weights: float32 [top_k].
        columns: a multiple of ``LANES``.
    """
    return emits(_sum_weighted, form, results, weights, top_k, columns, out)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def _sum_all(form: int, results: int, weights: int, tokens: int, top_k: int, columns: int, out: int) -> None:
    row_bytes = columns * (2 if form == BFLOAT16 else 4)
    for token in range(tokens):
        place = results + token * top_k * row_bytes
        sum_weighted(form, place, weights + 4 * token * top_k, top_k, columns, out + token * row_bytes)


@compiled("void(int64, int64, int64, int64, int64)")
def _scatter_rows(rows: int, places: int, count: int, words: int, out: int) -> None:
    for row in range(count):
        source, target = rows + 8 * words * row, out + 8 * words * read(places, row)
        for word in range(words):
            write(target, word, read(source, word))


def scatter_rows(rows_NH: torch.Tensor, place_N: torch.Tensor) -> torch.Tensor:
    """Rows [N, H] in another order: each at its place, which are 0 to N - 1."""
    words, rest = divmod(rows_NH.shape[1] * rows_NH.element_size(), 8)
    known = rows_NH.is_contiguous() and is_plain(place_N) and not rest and not config.DISABLE_JIT
    if not known or (torch.is_grad_enabled() and rows_NH.requires_grad):
        return torch.empty_like(rows_NH).index_copy_(0, place_N, rows_NH)
    out_NH = torch.empty_like(rows_NH)
    _scatter_rows(rows_NH.data_ptr(), place_N.data_ptr(), len(rows_NH), words, out_NH.data_ptr())
    return out_NH


class CompiledPairKernels(TorchPairKernels):
    """``PairKernels`` by compiled loops, for one thread at a time; torch does the rest.

    Args:
        experts: E.
    """

    def __init__(self, experts: int) -> None:
        super().__init__(experts, torch.device("cpu"))
        self._experts = experts
        self._counts = torch.empty(experts + 1, dtype=torch.int64, device="cpu")
        self._starts = torch.empty(0, dtype=torch.int64, device="cpu")

    def add_counts(
        self, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        if real is not None or not (is_plain(ids_N) and is_plain(tokens_X) and uses.dtype is torch.int64):
            super().add_counts(ids_N, tokens_X, uses, real)
            return
        totals = tokens_X.data_ptr(), uses.data_ptr(), self._counts.data_ptr()
        if _add_counts(ids_N.data_ptr(), ids_N.shape[0], self._experts, *totals) < 0:
            raise IndexError(f"the router chose an expert that isn't one of 0 to {self._experts}")

    def sort(self, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, top_k: int, *, absent: bool) -> SortedPairs:
        if not (is_plain(ids_N) and is_plain(key_E)):
            return super().sort(ids_N, key_E, keys, top_k, absent=absent)
        pairs, slots = ids_N.shape[0], keys.numbers.shape[0]
        if len(self._starts) <= slots:
            self._starts = torch.empty(slots + 1, dtype=torch.int64, device="cpu")
        ends_Q = torch.empty(slots, dtype=torch.int32, device="cpu")
        out_3N = torch.empty(3, pairs, dtype=torch.int64, device="cpu")
        missing = sort_pairs(
            *(ids_N.data_ptr(), pairs, key_E.data_ptr(), key_E.shape[0], keys.first, slots),
            *(ends_Q.data_ptr(), self._starts.data_ptr(), top_k, out_3N.data_ptr()),
        )
        if missing and not absent:
            raise IndexError(NO_SLOT)
        pair_N, token_N, key_N = out_3N.unbind()
        return SortedPairs(pair_N, token_N, key_N, ends_Q)

    def weighted_sum(self, results_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        (tokens, top_k), columns = weights_TK.shape, results_NH.shape[1]
        known = dtype is results_NH.dtype and dtype in _FORMS and columns % LANES == 0 and results_NH.is_contiguous()
        wants_gradient = torch.is_grad_enabled() and (results_NH.requires_grad or weights_TK.requires_grad)
        if not known or wants_gradient or not results_NH.numel():
            return super().weighted_sum(results_NH, weights_TK, dtype)
        weights_TK = weights_TK.float().contiguous()
        out_TH = torch.empty(tokens, columns, dtype=dtype, device="cpu")
        _sum_all(
            *(_FORMS[dtype], results_NH.data_ptr(), weights_TK.data_ptr(), tokens, top_k, columns, out_TH.data_ptr()),
        )
        return out_TH


def pair_kernels_for_cpu(experts: int) -> TorchPairKernels:
    """Compiled loops, unless nothing is compiled."""
    return TorchPairKernels(experts, torch.device("cpu")) if config.DISABLE_JIT else CompiledPairKernels(experts)


def is_plain(numbers: torch.Tensor) -> bool:
    """Whether loops can read integers by their address."""
    return numbers.dtype is torch.int64 and numbers.is_contiguous()
