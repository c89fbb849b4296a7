"""Tells which row of a step continues which row of the step before.

In a batch, requests come, go and are cut in pieces. Pure. Legend of shape suffixes: T rows (tokens) of a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from epslots.arrays import IntArray


class RowTracker:
    """Follows requests from step to step, for ``UsagePredictor.set_previous_rows``."""

    def __init__(self) -> None:
        # The last row of each request of the latest step, counted from the step's end.
        self._last: dict[Hashable, int] = {}

    def next(self, requests: Sequence[tuple[Hashable, int]]) -> IntArray:
        """The row before each row of the coming step.

        Args:
            requests: (request, number of its rows, at least one), in the order of the rows.

        Returns:
            int64 [T]: 0 = none, the request wasn't in the step before; i > 0 = row i - 1 of the same step; -i = the i-th row
            from the end of the step before.
        """
        ends = np.cumsum([rows for _, rows in requests], dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        previous_T = np.arange(total)
        starts = ends - np.array([rows for _, rows in requests], np.int64)
        previous_T[starts] = [-self._last.get(name, 0) for name, _ in requests]
        self._last = {name: total - end + 1 for (name, _), end in zip(requests, ends.tolist(), strict=True)}
        return previous_T
