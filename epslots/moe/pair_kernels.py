"""The pairs of a layer's step: counted by expert, sorted by slot, and their results summed.

``MoELayer`` and ``ExpertCompute`` call these around the experts' products. ``TorchPairKernels`` runs on a CPU, and is the
reference of Triton's kernels (``pair_triton.py``), which do each in one launch.

Legend of shape suffixes: T tokens, K experts per token, N = T * K pairs, E experts, Q keys, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Keys(NamedTuple):
    """Keys in a row: slots, or slots of passes one after the other.

    Attributes:
        first: the first key.
        numbers: int64 [Q], all of them.
    """

    first: int
    numbers: torch.Tensor

    @classmethod
    def between(cls, first: int, stop: int, device: torch.device) -> Keys:
        return cls(first, torch.arange(first, stop, device=device))

    @property
    def stop(self) -> int:
        """One more than the last key: that of pairs without a slot."""
        return self.first + self.numbers.shape[0]


class SortedPairs(NamedTuple):
    """Pairs by rising key; of equal keys in their own order.

    Attributes:
        pair_N, token_N, key_N: int64, the pair in each row, its token and its key.
        ends_Q: int32, where the rows of each key end.
    """

    pair_N: torch.Tensor
    token_N: torch.Tensor
    key_N: torch.Tensor
    ends_Q: torch.Tensor


class PairKernels(Protocol):
    """The operations of one layer, queued on the current stream. None asks the host for a value."""

    def count(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Pairs of each expert, int64 [E + 1]; the last entry counts the id E, which stands for no weights."""
        ...

    def add_counts(
        self, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        """Add the pairs of each expert to totals.

        Args:
            tokens_X: int64 [E + 1], pairs of each expert.
            uses: int64 [], experts below E that have any.
            real: int64 [1] on the device, how many pairs count: the first ones. None = all.
        """
        ...

    def sort(self, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, top_k: int, *, absent: bool) -> SortedPairs:
        """Sort pairs by their experts' keys.

        Args:
            ids_N: int64, the expert of each pair, in [0, E], or [0, E) unless ``absent``.
            key_E: int64, each expert's key; -1 = none.
            keys: those that rows may have.
            top_k: K.
            absent: whether pairs may have an expert without a key, or the id E: they go last.
        """
        ...

    def weighted_sum(self, results_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Each token's results, weighted and summed over k, [T, H] in ``dtype``. In the order of k, at least in fp32."""
        ...


class TorchPairKernels:
    """``PairKernels`` by torch's operations.

    Args:
        experts: E.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self._no_counts = torch.zeros(experts + 1, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def count(self, ids_N: torch.Tensor) -> torch.Tensor:
        return self._no_counts.scatter_add(0, ids_N, self._one.expand(ids_N.shape))

    def add_counts(
        self, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        if real is None:
            counts = self.count(ids_N)
        else:
            counted_N = (torch.arange(ids_N.shape[0], device=ids_N.device) < real).long()
            counts = self._no_counts.scatter_add(0, ids_N, counted_N)
        tokens_X.add_(counts)
        uses.add_(torch.count_nonzero(counts[:-1]))

    def sort(self, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, top_k: int, *, absent: bool) -> SortedPairs:
        if absent:
            key_E = torch.nn.functional.pad(key_E, (0, 1), value=-1)
            key_E = torch.where(key_E < 0, keys.stop, key_E)
        key_N, pair_N = torch.sort(key_E.index_select(0, ids_N), stable=True)
        ends_Q = torch.searchsorted(key_N, keys.numbers, right=True, out_int32=True)
        return SortedPairs(pair_N, pair_N // top_k, key_N, ends_Q)

    def weighted_sum(self, results_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tokens, top_k = weights_TK.shape
        exact = torch.promote_types(results_NH.dtype, torch.float32)
        results_TKH = results_NH.view(tokens, top_k, results_NH.shape[-1]).to(exact)
        return (results_TKH * weights_TK.to(exact).unsqueeze(-1)).sum(dim=1).to(dtype)
