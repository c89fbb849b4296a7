"""``GroupControllers``: a ``Controller`` for each group of the cluster, in one process, with a forecast for each role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

from cluster.controller.controller import Controller, FindForecast
from cluster.messages.controller import decode_addressed, decode_order, encode
from epslots.placement.pooled_forecast import GroupForecast, PooledForecast


class GroupControllers:
    """Answers orders about any group.

    Args:
        make: makes the controller of a group, which learns by the given forecasts.
    """

    def __init__(self, make: Callable[[FindForecast], Controller]) -> None:
        self._make = make
        self._forecasts: defaultdict[tuple[str, tuple[int, ...]], PooledForecast] = defaultdict(PooledForecast)
        """By role and the experts of each layer: one learns from all groups that have these."""
        self.by_group: dict[int, Controller] = {}

    def answer(self, message: bytes) -> bytes:
        """Carry out an addressed order; returns the ``Reply``, as bytes.

        Raises:
            ConfigError: the attached group's state is impossible.
        """
        group, order = decode_addressed(message)
        if group not in self.by_group:
            self.by_group[group] = self._make(partial(self._forecast_of, group))
        return encode(self.by_group[group].answer(decode_order(order)))

    def _forecast_of(self, group: int, role: str, num_experts: tuple[int, ...]) -> GroupForecast:
        return self._forecasts[role, num_experts].of(group)
