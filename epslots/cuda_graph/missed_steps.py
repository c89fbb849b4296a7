"""``MissedSteps``: the number of steps in which a layer missed, counted on the device without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class MissedSteps:
    """Counts steps in which any of some counters has grown.

    Args:
        misses: int64 [L] on one device, counters of each layer's misses; of each pool.
    """

    def __init__(self, misses: Sequence[torch.Tensor]) -> None:
        self._misses = tuple(misses)
        self._seen = torch.zeros((), dtype=torch.int64, device=misses[0].device)
        self._count = torch.zeros_like(self._seen)

    def end_step(self) -> None:
        """Count the step that ends here. May be captured: it reads and writes tensors that stay in place."""
        total = torch.cat(self._misses).sum()
        self._count.add_(total != self._seen)
        self._seen.copy_(total)

    def take(self) -> int:
        """The count since the last call; the counters begin at 0 again. Synchronises with the device."""
        found = int(self._count)
        self._count.zero_()
        self._seen.zero_()
        return found
