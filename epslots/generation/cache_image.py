"""``CacheImage``: one request's place in a batcher's cache, read and written piece by piece, for a hand-over.

    image = batcher.hold("a")                  # the source: the request pauses
    other = target.reserve("a", image.layout)  # the target: an equal place, still empty
    for piece in image.layout.pieces(2**22):
        other.write(piece, image.read(piece))
    other.complete()
    target.add(request.after(tokens))          # goes on from there
    batcher.cancel("a")

``page_images.py`` and ``row_images.py`` make them. An image is ``gone`` when its place is needed, or its request has ended.
That of an unfinished prompt has the whole prompt's layout; ``advance`` says how many of its tokens can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from epslots.errors import EpslotsError
from epslots.generation.cache_layout import CacheLayout, CachePiece, KeptTensor


class CacheGone(EpslotsError):
    """A request's place in the cache is another's now, or free."""


@dataclass(frozen=True)
class TensorPlace:
    """The place of one ``KeptTensor``.

    Attributes:
        memory: [N, *shape] of its dtype.
        index: entry numbers of the memory, int64 [entries] on its device; None = all of them, in order.
        most: entries that it keeps, at most: those of a window's last tokens; None = one for each token.
    """

    memory: torch.Tensor
    index: torch.Tensor | None = None
    most: int | None = None

    def kept(self, name: str, tokens: int) -> KeptTensor:
        """Its description, for a cache of so many tokens."""
        grows, entries = self.index is not None and self.most is None, len(self.memory)
        if self.index is not None:
            entries = tokens if self.most is None else min(tokens, self.most)
        dtype = str(self.memory.dtype).removeprefix("torch.")
        return KeptTensor(name, dtype, entries, tuple(self.memory.shape[1:]), grows=grows)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Entries as uint8 [bytes]."""
        found = self.memory[start:end] if self.index is None else self.memory.index_select(0, self.index[start:end])
        return found.contiguous().view(-1).view(torch.uint8)

    def write(self, start: int, end: int, data: torch.Tensor) -> None:
        """Set entries to uint8 [bytes]."""
        new = data.clone().view(self.memory.dtype).view(end - start, *self.memory.shape[1:])  # a clone is aligned
        if self.index is None:
            self.memory[start:end] = new
        else:
            self.memory.index_copy_(0, self.index[start:end], new)


Places = Sequence[TensorPlace]


class CacheImage:
    """A request's place in a cache. For the batcher's thread.

    Args:
        places: of the layout's tensors, in their order.
        on_complete: called by ``complete``.
        look: of a prompt that is being computed: returns the tokens that the cache holds, and their places; None = a step has
            to be repeated first.

    Attributes:
        tokens: that can be read, as far as is known.
        gone: it stands for nothing any more.
        whole: all has been written; of a source, always.
    """

    def __init__(
        self,
        layout: CacheLayout,
        places: Places,
        *,
        on_complete: Callable[[], None] | None = None,
        look: Callable[[], tuple[int, Places] | None] | None = None,
    ) -> None:
        assert len(places) == len(layout.tensors)
        self.layout = layout
        self.tokens = layout.tokens if look is None else 0
        self._places, self._on_complete, self._look = places, on_complete, look
        self.gone = False
        self.whole = on_complete is None

    @property
    def device(self) -> torch.device:
        """The cache's device."""
        return self._places[0].memory.device if self._places else torch.device("cpu")

    def advance(self) -> int:
        """Look how far a prompt is computed; returns the tokens whose part of the layout can be read.

        Raises:
            CacheGone: the place is another's.
        """
        self._check()
        if self._look is not None and (found := self._look()) is not None:
            self.tokens, self._places = found
        return self.tokens

    @torch.no_grad()
    def read(self, piece: CachePiece) -> torch.Tensor:
        """A piece's bytes, uint8, on the cache's device. They are a copy.

        Raises:
            CacheGone: the place is another's.
        """
        self._check()
        parts = [self._places[part.tensor].read(part.start, part.end) for part in piece]
        return torch.cat(parts)

    @torch.no_grad()
    def write(self, piece: CachePiece, data: torch.Tensor) -> None:
        """Put a piece's bytes into their places.

        Raises:
            CacheGone: the place is another's.
        """
        self._check()
        start = 0
        for part in piece:
            place, size = self._places[part.tensor], (part.end - part.start) * self.layout.tensors[part.tensor].entry_bytes
            place.write(part.start, part.end, data[start : start + size].to(place.memory.device))
            start += size
        assert start == len(data), "a piece has the bytes of its ranges"

    def complete(self) -> None:
        """All pieces were written, and their digest is right: the request may begin with it.

        Raises:
            CacheGone: the place is another's.
        """
        self._check()
        if self._on_complete is not None:
            self._on_complete()
        self.whole = True

    def end(self) -> None:
        """The place is another's from now on."""
        self.gone = True

    def _check(self) -> None:
        if self.gone:
            raise CacheGone("the request's place in the cache is another's now")
