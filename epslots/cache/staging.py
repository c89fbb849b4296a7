"""Staging: records of a store that isn't pinned pass through a few pinned buffers on their way to a GPU.

A thread fills them, so that the caller goes on launching kernels, and one record is copied in memory while others cross the
link.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

# One that is filled, one that crosses, and one between the two.
_BUFFERS = 3


class Staging:
    """Pinned buffers and their thread.

    Args:
        nbytes: of the largest record.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(_BUFFERS)]
        self._sent: list[Any] = [None] * _BUFFERS
        self._next = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="epslots-staging")

    def send(self, record: torch.Tensor, send: Callable[[torch.Tensor], Any]) -> Future[Any]:
        """Send a record in its turn.

        Args:
            record: uint8 on the host.
            send: called in the thread with the record in pinned memory; queues its copy to the device, and returns an event
                that is reached when the memory is free again.

        Returns:
            The event, when it is there.
        """
        return self._thread.submit(self._bring, record, send)

    def _bring(self, record: torch.Tensor, send: Callable[[torch.Tensor], Any]) -> Any:
        turn, self._next = self._next, (self._next + 1) % _BUFFERS
        if self._sent[turn] is not None:
            self._sent[turn].synchronize()
        event = self._sent[turn] = send(self._buffers[turn][: record.nbytes].copy_(record))
        return event
