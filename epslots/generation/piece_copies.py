"""``PieceReader`` and ``PieceWriter``: pieces of a cache between a rank's device and its host, for a hand-over's two ends.

The stepping thread calls ``read`` and ``write``, between two steps; the hand-over's own thread calls all others. On a GPU the
bytes cross the link on a stream of its own, through pinned memory: between two steps kernels gather and scatter them, at the
speed of the device's memory, and neither the stepping thread nor what it computes waits for the link. On the CPU ``read`` and
``write`` copy at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epslots.devices import make_current
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CachePiece

Observe = Callable[[int, float], object]
"""Told how many bytes were copied, in how many seconds: on a GPU by its link."""


class _Link:
    """A GPU's link on a stream of its own, with pinned memory at its end. Made by a hand-over's own thread.

    Attributes:
        host: uint8 [bytes], pinned.
    """

    def __init__(self, device: torch.device, nbytes: int, observe: Observe) -> None:
        make_current(device)  # of this thread: pinned memory takes the current one
        self.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._device, self._observe = device, observe
        self._stream = torch.cuda.Stream(device)

    def follow(self) -> None:
        """Let later copies come after all that this thread has queued on its current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def come_after(self, event: Any) -> None:
        """Let later copies come after an event."""
        self._stream.wait_event(event)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> tuple[Any, Any]:
        """Queue a copy; returns the events of its begin and end."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            begin.record(self._stream)
            into.copy_(source, non_blocking=True)
            end.record(self._stream)
        return begin, end

    def await_copy(self, nbytes: int, events: tuple[Any, Any]) -> None:
        """Wait for a copy."""
        begin, end = events
        end.synchronize()
        self._observe(nbytes, begin.elapsed_time(end) / 1e3)

    def close(self) -> None:
        """Wait for all copies: their memory is free afterwards."""
        self._stream.synchronize()


@dataclass(eq=False)
class ReadPiece:
    """A piece that was read.

    Attributes:
        data: uint8 [bytes] on the host; on a GPU's, complete when ``PieceReader.arrived`` has returned.
        gathered: the same on a GPU, kept until then; None on the CPU.
        events: of its copy.
    """

    data: torch.Tensor
    gathered: torch.Tensor | None = None
    events: tuple[Any, Any] | None = None


class PieceReader:
    """The source's end.

    Args:
        device: of the cache.
        nbytes: bytes of pieces that are read together, at most.
        observe: told of each copy.
    """

    def __init__(self, device: torch.device, nbytes: int, observe: Observe) -> None:
        self._observe = observe
        self._link = _Link(device, nbytes, observe) if device.type == "cuda" else None
        self._under_way: list[ReadPiece] = []
        """The last ones: a hand-over that breaks drops none while it is copied."""

    def read(self, image: CacheImage, pieces: Sequence[CachePiece]) -> list[ReadPiece]:
        """Begin to read pieces; all of the last call have arrived.

        Raises:
            CacheGone: the image's place is another's.
        """
        began_s = time.perf_counter()
        found = [ReadPiece(image.read(piece)) for piece in pieces]
        if self._link is None:
            self._observe(sum(len(piece.data) for piece in found), time.perf_counter() - began_s)
            return found
        self._link.follow()
        sizes = [len(piece.data) for piece in found]
        for piece, memory in zip(found, self._link.host[: sum(sizes)].split(sizes), strict=True):
            piece.gathered, piece.data = piece.data, memory
            piece.events = self._link.copy(piece.data, piece.gathered)
        self._under_way = found
        return found

    def arrived(self, piece: ReadPiece) -> torch.Tensor:
        """Wait for a piece; returns its bytes, uint8 on the host."""
        if self._link is not None and piece.events is not None:
            self._link.await_copy(len(piece.data), piece.events)
            piece.gathered = None
        return piece.data

    def close(self) -> None:
        """End all copies."""
        if self._link is not None:
            self._link.close()
        self._under_way = []


class PieceWriter:
    """The target's end.

        staged = [writer.bring(data) for data in some]
        writer.settle()
        writer.write(image, pieces, staged)     # in one call, or in several
        writer.free()

    Args:
        device: of the cache.
        nbytes: bytes of pieces that are staged together, at most.
        observe: told of each copy.
    """

    def __init__(self, device: torch.device, nbytes: int, observe: Observe) -> None:
        self._observe = observe
        self._link = None
        if device.type == "cuda":
            self._link = _Link(device, nbytes, observe)
            self._staging = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._link.follow()  # what this memory was before may still be read
            self._written = torch.cuda.Event()
        self._used = 0
        self._on_their_way: list[tuple[int, tuple[Any, Any]]] = []

    def bring(self, data: torch.Tensor) -> torch.Tensor:
        """Begin to bring a piece to the device.

        Args:
            data: uint8 [bytes] on the host; on the CPU it is the result, on a GPU it is free on return.
        """
        if self._link is None:
            return data
        here = slice(self._used, self._used + len(data))
        self._link.host[here].copy_(data)
        self._on_their_way.append((len(data), self._link.copy(self._staging[here], self._link.host[here])))
        self._used = here.stop
        return self._staging[here]

    def settle(self) -> None:
        """Wait until all pieces are on the device: no step does."""
        for nbytes, events in self._on_their_way:
            assert self._link is not None
            self._link.await_copy(nbytes, events)
        self._on_their_way.clear()

    def write(self, image: CacheImage, pieces: Sequence[CachePiece], staged: Sequence[torch.Tensor]) -> None:
        """Put pieces into their places.

        Raises:
            CacheGone: the image's place is another's.
        """
        began_s = time.perf_counter()
        try:
            for piece, data in zip(pieces, staged, strict=True):
                image.write(piece, data)
        finally:
            if self._link is not None:
                self._written.record(torch.cuda.current_stream(image.device))
        if self._link is None:
            self._observe(sum(map(len, staged)), time.perf_counter() - began_s)

    def free(self) -> None:
        """All staged pieces were written: the next ones may be brought."""
        self._used = 0
        if self._link is not None:
            self._link.come_after(self._written)

    def close(self) -> None:
        """End all copies."""
        if self._link is not None:
            self._written.synchronize()
            self._link.close()
