"""``CacheLayout``: the cache of one request in words, for a hand-over, and the pieces that its bytes travel in. Pure.

A layout is agreed before a byte is sent: it names every tensor, and is all that the receiver needs to make room. The bytes of
a piece are those of its ranges, one after the other, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np
import xxhash

from epslots.models.model_shape import CACHE_ITEM_BYTES

Fact = bool | int | float | str | None


class KeptTensor(msgspec.Struct, frozen=True):
    """One tensor of a request's cache.

    Attributes:
        name: index of its layer, and its path there: "3.keys".
        dtype: a key of ``CACHE_ITEM_BYTES``.
        entries: tokens that it keeps; or numbers, for a state.
        shape: of one entry.
        whole: of the whole tensor, where its layer keeps it as an object of its own.
        grows: entry i is token i's, and final when that is computed. Other tensors are final with the last token.
    """

    name: str
    dtype: str
    entries: int
    shape: tuple[int, ...] = ()
    whole: tuple[int, ...] | None = None
    grows: bool = False

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * CACHE_ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.entries * self.entry_bytes


class TensorRange(msgspec.Struct, frozen=True):
    """Entries ``start`` to ``end`` - 1 of a layout's tensor, which is given by its index."""

    tensor: int
    start: int
    end: int


CachePiece = tuple[TensorRange, ...]


class CacheLayout(msgspec.Struct, frozen=True):
    """The tensors that a batcher keeps of one request.

    Attributes:
        kind: of the batcher's cache.
        tokens: that it holds: those of the request's sequence, but for the last.
        sequence: digest of these tokens (``sequence_digest``).
        tensors: in the order of their bytes.
        facts: numbers and flags that layers of other kinds keep beside their tensors, by name: "3.cumulative_length".
    """

    kind: Literal["pages", "rows"]
    tokens: int
    sequence: bytes
    tensors: tuple[KeptTensor, ...]
    facts: dict[str, Fact] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def grows(self) -> bool:
        """Whether a part of its bytes is final before the last token is computed."""
        return any(tensor.grows and tensor.nbytes for tensor in self.tensors)

    def pieces(self, most_bytes: int, first: int = 0, end: int | None = None) -> Iterator[CachePiece]:
        """The bytes of a part in order, in pieces of at most ``most_bytes``.

        No entry is cut: a piece of one entry may be larger.

        Args:
            first, end: the part: tokens ``first`` to ``end`` - 1 of tensors that grow, and all others with the last token.
                By default everything.
        """
        piece: list[TensorRange] = []
        left = most_bytes
        for index, tensor in enumerate(self.tensors):
            start, stop = self._part_of(tensor, first, self.tokens if end is None else end)
            while start < stop:
                fit = min(stop - start, left // tensor.entry_bytes)
                if fit < 1 and piece:
                    yield tuple(piece)
                    piece, left = [], most_bytes
                    continue
                piece.append(TensorRange(index, start, start + max(1, fit)))
                left -= max(1, fit) * tensor.entry_bytes
                start += max(1, fit)
        if piece:
            yield tuple(piece)

    def _part_of(self, tensor: KeptTensor, first: int, end: int) -> tuple[int, int]:
        if not tensor.entry_bytes:
            return 0, 0
        return (first, end) if tensor.grows else (0, tensor.entries if end == self.tokens else 0)

    def piece_bytes(self, piece: CachePiece) -> int:
        """Bytes of a piece."""
        return sum((part.end - part.start) * self.tensors[part.tensor].entry_bytes for part in piece)


def sequence_digest(tokens: Sequence[int]) -> bytes:
    """A digest of token ids (XXH3-128), the same on every machine."""
    return xxhash.xxh3_128_digest(np.array(tokens, "<i8").tobytes())
