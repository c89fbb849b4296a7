"""``TrueSizes``: the bytes of a narrow model's tensor in the model that it stands for. Pure.

A timeline runs the real sequence of operations on a model of the true number of layers, experts and choices, whose widths are
tiny. Costs are those of the true widths: each dimension that is one of the tiny widths counts as the true one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch


class TrueSizes:
    """The true size of each tiny width.

    Args:
        true_of: by tiny width. No other dimension of the model, and no number of tokens, has one of these values.
    """

    def __init__(self, true_of: Mapping[int, int]) -> None:
        self._true_of = dict(true_of)

    def add(self, tiny: int, true: int) -> None:
        """Enter a further width.

        Raises:
            AssertionError: the tiny width stands for another one.
        """
        assert self._true_of.setdefault(tiny, true) == true, f"{tiny} stands for {self._true_of[tiny]} and {true}"

    def with_width(self, tiny: int, true: int) -> TrueSizes:
        """These sizes, and one more: a slot's and a record's bytes, which each run of a model may choose."""
        found = TrueSizes(self._true_of)
        found.add(tiny, true)
        return found

    def change(self, tiny: int, true: int) -> None:
        """Let a width stand for another one from now on: for operations of captured graphs, too."""
        assert tiny in self._true_of
        self._true_of[tiny] = true

    def numel(self, shape: Sequence[int]) -> int:
        """Numbers of a tensor of this shape."""
        return math.prod(self._true_of.get(size, size) for size in shape)

    def nbytes(self, tensor: torch.Tensor) -> int:
        """Bytes of a tensor; a dimension that is expanded without memory counts once."""
        shape = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return self.numel(shape) * tensor.element_size()


AS_THEY_ARE = TrueSizes({})
