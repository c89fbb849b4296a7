"""``Scaling``: changes the number of ranks and groups while requests go on. ``group_deal.py`` decides which come and go."""

from __future__ import annotations

import asyncio

from cluster.driver.group_deal import GroupDeal
from cluster.driver.worker_groups import WorkerGroups
from cluster.driver.worker_pool import WorkerPool
from epslots.errors import ConfigError


class Scaling:
    """One change at a time. For the supervisor's thread.

    Args:
        outlives: the ranks outlive their driver, and the next one expects groups of the present size.
    """

    def __init__(self, pool: WorkerPool, groups: WorkerGroups, *, outlives: bool) -> None:
        self._pool, self._groups, self._outlives = pool, groups, outlives
        self._changing = asyncio.Lock()

    async def scale(self, ranks: int | None, groups: int | None) -> None:
        """Have so many ranks and groups (``GroupDeal.changed``); returns when they serve.

        Raises:
            ConfigError: the bundles can't be divided so.
            ClusterError: there is no room for them, or they don't come up; the others go on.
        """
        async with self._changing:
            old = self._groups.deal.with_size(self._pool.size)
            deal, count = old.changed(ranks, groups)
            self._check_heir(old, deal)
            common = old.common(deal)
            stay = min(self._pool.size, count if common.size is None else len(common.dealt))
            if stay < self._pool.size:
                self._pool.shrink(stay)
                self._groups.deal_by(common)
                try:
                    await self._pool.wait_until_serving(range(stay))
                finally:
                    await self._pool.reserve(stay)
            if count > stay:
                before = self._groups.deal
                self._groups.deal_by(deal)
                try:
                    await self._pool.reserve(count)
                except BaseException:  # one that is interrupted, too
                    self._groups.deal_by(before)
                    raise
            await self._pool.grow(count)

    def _check_heir(self, old: GroupDeal, deal: GroupDeal) -> None:
        """Refuse groups that the next driver wouldn't expect: it divides the ranks as this one did at its start."""
        if not self._outlives:
            return
        if self._groups.deal.size is None and deal.groups > 1:
            raise ConfigError(
                f"groups={deal.groups}; allowed for a cluster that was started as one group and whose ranks outlive their "
                f"driver: 1, as the next driver expects"
            )
        if deal.size is not None and deal.size != old.size:
            raise ConfigError(
                f"{deal.size} ranks a group; allowed for a cluster whose ranks outlive their driver: {old.size}, as the "
                f"next driver expects"
            )
