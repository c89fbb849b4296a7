"""``RecentLatencies``: the times of the requests that ended lately, for the live page."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.serve.request_summary import RequestSummary

RECENT_S = 60.0
_MOST = 4096  # requests; of a busy service's last minute the newest

Quantiles = tuple[float, float]
"""P50 and P99."""


class RecentLatencies:
    """Keeps the times to first token and per output token of requests. For one thread.

    Args:
        clock: seconds, the clock of ``RequestSummary``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended: deque[tuple[float, float | None, float | None]] = deque(maxlen=_MOST)

    def note(self, summary: RequestSummary) -> None:
        """Keep a request that has ended, if it had a token."""
        if summary.ttft_s is not None:
            self._ended.append((summary.ended_s, summary.ttft_s, summary.per_token_s))

    def quantiles(self) -> tuple[Quantiles | None, Quantiles | None]:
        """P50 and P99 of the time to first token, and of the time per output token; None without a request."""
        since_s = self._clock() - RECENT_S
        recent = [entry for entry in self._ended if entry[0] >= since_s]
        found = [sorted(entry[which] for entry in recent if entry[which] is not None) for which in (1, 2)]  # type: ignore[type-var]
        return _quantiles(found[0]), _quantiles(found[1])  # type: ignore[arg-type]


def _quantiles(ordered: Sequence[float]) -> Quantiles | None:
    """The smallest values that half, and 99 of 100, don't exceed."""
    if not ordered:
        return None
    return ordered[math.ceil(0.5 * len(ordered)) - 1], ordered[math.ceil(0.99 * len(ordered)) - 1]
