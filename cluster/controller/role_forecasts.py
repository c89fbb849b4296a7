"""``RoleForecasts``: one forecast for each role, from the windows of all groups that have it."""

from __future__ import annotations

from collections.abc import Callable

from epslots.placement.pooled_forecast import GroupForecast, PooledForecast

MakeForecast = Callable[[str, tuple[int, ...]], GroupForecast]
"""Gives a group its way to the forecast of its role and of a model with so many experts in its layers."""


class RoleForecasts:
    """The forecasts of a cluster, made as groups ask for them."""

    def __init__(self) -> None:
        self._pooled: dict[tuple[str, tuple[int, ...]], PooledForecast] = {}

    def of(self, group: int, role: str, num_experts: tuple[int, ...]) -> GroupForecast:
        """A group's way to the forecast of its role.

        Args:
            num_experts: of each MoE layer.
        """
        key = role, num_experts
        if key not in self._pooled:
            self._pooled[key] = PooledForecast()
        return self._pooled[key].of(group)
