"""``StaticPages``: a decoding step over pages whose tensors stay in place, so that it can be captured.

transformers has most of a step's inputs in tensors of its own that stay in place. A few numbers say how many of them count;
the host overwrites these before the step, and the rest follows from them on the device.

Legend of shape suffixes: B requests of the step, S positions that they read, A kinds of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from epslots.arrays import IntArray
from epslots.device_copy import copy_to_device
from epslots.generation.paged_decoding import PagedDecoding, aligned

_COUNT, _PLACE, _LENGTHS = range(3)


class StaticPages:
    """One new token for each of B requests, at most S positions each.

    Args:
        processor: transformers' batch processor.
        decoding: the attention of steps that only decode.
        batch: B.
        spans: S, of each kind of attention.

    Attributes:
        count: requests that are no repetition, of the latest ``begin``.
        new_states: none: what a step writes is kept by writing it.
    """

    def __init__(self, processor: Any, decoding: PagedDecoding, batch: int, spans: Sequence[int]) -> None:
        self._batch, self._decoding = processor.inputs_and_outputs, decoding
        self._size, self._spans = batch, spans
        self._numbers = torch.zeros(_LENGTHS + len(spans), batch, dtype=torch.int64, device=self._batch.device)
        self.count = 0
        self.new_states: list[Any] = []

    def begin(self, places: Sequence[int]) -> None:
        """Set the requests to those of the prepared batch. Spare places repeat the first one.

        Args:
            places: of each request, as ``row_B``.
        """
        self.count = len(places)
        numbers: IntArray = np.array([[len(places)] * len(places), places, *self._decoding.lengths], np.int64)
        spare = np.zeros((len(numbers), self._size - len(places)), np.int64)
        copy_to_device(np.concatenate([numbers, spare], axis=1), self._numbers)

    @property
    def count_1(self) -> torch.Tensor:
        """How many requests are no repetition, int64 [1]."""
        return self._numbers[_COUNT, :1]

    @property
    def row_B(self) -> torch.Tensor:
        """The place of each request."""
        return self._numbers[_PLACE].index_select(0, self._picked())

    def _picked(self) -> torch.Tensor:
        """The request that each place stands for, int64 [B]."""
        number_B = torch.arange(self._size, device=self._numbers.device)
        return torch.where(number_B < self.count_1, number_B, 0)

    @contextmanager
    def inputs(self) -> Iterator[dict[str, Any]]:
        """The model's arguments, by its own names; to be captured together with the call."""
        batch, picked_B = self._batch, self._picked()
        lengths = self._numbers[_LENGTHS:]
        ends = lengths.cumsum(1)
        kinds = zip(batch.read_index_storage, ends, lengths, self._spans, strict=True)
        reads = [aligned(index, end[picked_B], length[picked_B], span) for index, end, length, span in kinds]
        tensors = {
            "input_ids": batch.input_ids[: self._size].index_select(0, picked_B)[None],
            "position_ids": batch.position_ids[: self._size].index_select(0, picked_B)[None],
            "write_index": [index[: self._size].index_select(0, picked_B) for index in batch.write_index_storage],
            "read_index": [read.cells for read in reads],
        }
        with self._decoding.reading(reads):
            yield {**batch.get_model_kwargs(), **tensors}

    def keep_states(self) -> None:
        """Do nothing: the step has kept its states itself."""
