"""``PooledForecast``: one forecast of the traffic of several groups that serve alike, each of which adds its own windows.

    windows of the groups -> added up, one of each -> a forecast -> scaled to a group's own traffic -> its expected load

Groups of one role get requests from one queue, so their experts are loaded alike, and a window of all says more than one of a
group alone. A group that is idle has no windows, and keeps none waiting.

Pure. Legend of shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from epslots.arrays import FloatArray, IntArray
from epslots.placement.forecast import ExpectedLoad, Forecast

_RECENT = 0.7  # the weight of a group's window over the next one's, in the group's own traffic


@dataclass
class _Own:
    """A group's own traffic a window: pairs of each layer, and steps; the latest windows count most."""

    pairs_L: FloatArray
    steps: float


class PooledForecast:
    """The forecast of some groups, named by any numbers."""

    def __init__(self) -> None:
        self._forecast = Forecast()
        self._open: dict[int, tuple[IntArray, IntArray, int]] = {}
        """By group: a window that isn't learned from yet."""
        self._last: frozenset[int] = frozenset()
        """The groups whose windows were added up last."""
        self._own: dict[int, _Own] = {}

    @property
    def groups(self) -> int:
        """Number of groups whose windows were added up last."""
        return len(self._last)

    def of(self, group: int) -> GroupForecast:
        """A group's way to it."""
        return GroupForecast(self, group)

    def add(self, group: int, tokens_LE: IntArray, uses_LE: IntArray, steps: int) -> None:
        """Add a group's next window. It is learned from when those groups have added theirs that did so last time."""
        if group in self._open:
            self._close()  # the others are idle
        self._open[group] = (tokens_LE, uses_LE, steps)
        pairs_L = np.asarray(tokens_LE, np.float64).sum(1)
        if (own := self._own.get(group)) is None:
            self._own[group] = _Own(pairs_L, steps)
        else:
            own.pairs_L = _RECENT * own.pairs_L + (1 - _RECENT) * pairs_L
            own.steps = _RECENT * own.steps + (1 - _RECENT) * steps
        if self._open.keys() >= self._last:
            self._close()

    def _close(self) -> None:
        tokens, uses, steps = zip(*self._open.values(), strict=True)
        self._forecast.add(sum(tokens), sum(uses), sum(steps))
        self._last = frozenset(self._open)
        self._open = {}

    def expected(self, group: int) -> ExpectedLoad:
        """The load of a group's coming window. All groups' shares of experts, and as many pairs as the group has had.

        Raises:
            ConfigError: no window was learned from yet.
        """
        found = self._forecast.expected()
        if len(self._own) == 1 or (own := self._own.get(group)) is None:
            return found
        steps = own.steps / max(1, found.steps)
        pairs_L = own.pairs_L / np.maximum(1, found.tokens_LE.sum(1))
        return replace(
            found,
            tokens_LE=np.rint(found.tokens_LE * pairs_L[:, None]).astype(np.int64),
            uses_LE=np.rint(found.uses_LE * steps).astype(np.int64),
            steps=round(own.steps),
        )


class GroupForecast:
    """One group's way to a ``PooledForecast``, used as a ``Forecast`` is."""

    def __init__(self, pooled: PooledForecast, group: int) -> None:
        self._pooled, self._group = pooled, group

    @property
    def groups(self) -> int:
        """Number of groups that it learns from."""
        return self._pooled.groups

    def add(self, tokens_LE: IntArray, uses_LE: IntArray, steps: int) -> None:
        """Add the group's next window."""
        self._pooled.add(self._group, tokens_LE, uses_LE, steps)

    def expected(self) -> ExpectedLoad:
        """The load of the group's coming window."""
        return self._pooled.expected(self._group)
