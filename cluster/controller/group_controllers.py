"""``GroupControllers``: a ``Controller`` for each group of the cluster, in one process, with a forecast for each role."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cluster.controller.controller import Controller
from cluster.controller.role_forecasts import MakeForecast, RoleForecasts
from cluster.messages.controller import decode_addressed, decode_order, encode


class GroupControllers:
    """Answers orders about any group.

    Args:
        make: makes the controller of a group, which learns by the given forecasts.
    """

    def __init__(self, make: Callable[[MakeForecast], Controller]) -> None:
        self._make, self._forecasts = make, RoleForecasts()
        self.by_group: dict[int, Controller] = {}

    def answer(self, message: bytes) -> bytes:
        """Carry out an addressed order; returns the ``Reply``, as bytes.

        Raises:
            ConfigError: the attached group's state is impossible.
        """
        group, order = decode_addressed(message)
        if group not in self.by_group:
            self.by_group[group] = self._make(partial(self._forecasts.of, group))
        return encode(self.by_group[group].answer(decode_order(order)))
