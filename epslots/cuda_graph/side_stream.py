"""``SideStream``: a stream of a GPU beside the current one. Its work runs in the order of its queueing.

It may be captured: a capture follows both streams from where they part to where they join. On a CPU all is done at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Work beside the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._promised: torch.cuda.Event | None = None
        self._read: torch.Tensor | None = None

    @contextmanager
    def after_here(self) -> Iterator[None]:
        """Within the context, queue on the side stream, behind all that the current one has so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The work so far, for ``wait_for``."""
        return None if self._stream is None else self._stream.record_event()

    def wait_for(self, mark: torch.cuda.Event | None) -> None:
        """Put the current stream behind this work."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def promise(self, read: torch.Tensor) -> None:
        """Remember the work so far for ``wait_for_promised``.

        Args:
            read: a tensor of the current stream that it reads: until then its memory isn't used again.
        """
        self._promised, self._read = self.mark(), read

    def wait_for_promised(self) -> None:
        """Put the current stream behind the work that was promised last, if any was."""
        self.wait_for(self._promised)
        self._promised = self._read = None

    def join(self) -> None:
        """Put the current stream behind all of the side stream's work."""
        self.wait_for(self.mark())
        self._promised = self._read = None
