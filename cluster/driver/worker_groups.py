"""``WorkerGroups``: all groups of a cluster. Each is a whole model, and forms, breaks and serves without the others.

``group_deal.py`` says which bundle is in which group. The first groups may compute prompts for the others.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from cluster.driver.backend import WorkerDied
from cluster.driver.group_deal import GroupDeal
from cluster.driver.worker_group import WorkerGroup
from cluster.driver.workers import Worker
from cluster.errors import ClusterError
from epslots.rank_groups import RankGroups, Role, check_division

logger = logging.getLogger("epslots.cluster")


class WorkerGroups:
    """The groups, by their numbers. For the supervisor's thread.

    Args:
        make: makes the group with a number.
        end: called with a group that is no more.
        spawn: runs a coroutine in the background; its ClusterError ends the cluster.

    Attributes:
        deal: the groups of bundles, those included that are yet to come.
        division: the ranks, groups and roles at the start.
    """

    def __init__(
        self,
        make: Callable[[int], WorkerGroup],
        end: Callable[[WorkerGroup], None],
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], object],
    ) -> None:
        self._make, self._end, self._spawn = make, end, spawn
        self.deal = GroupDeal(1, None)
        self.division = RankGroups(1)
        self._groups: list[WorkerGroup] = []

    def __iter__(self) -> Iterator[WorkerGroup]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> WorkerGroup:
        return self._groups[number]

    def divide(self, ranks: int, groups: int, prefill_ranks: int = 0) -> None:
        """Divide so many ranks into groups of one size.

        Args:
            prefill_ranks: ranks of groups that compute prompts; 0 = every group computes its own.

        Raises:
            ConfigError: the numbers don't go together.
        """
        check_division(ranks, groups, prefill_ranks, 0)
        self.division = RankGroups(ranks, groups, prefill_ranks)
        self.deal = GroupDeal(groups, None if groups == 1 else self.division.group_size)

    def deal_by(self, deal: GroupDeal) -> None:
        """Deal the bundles that are yet to come otherwise from now on."""
        self.deal = deal

    def role_of(self, number: int) -> Role:
        """The role of a group, also of one that was added later."""
        return self.division.role_of(number)

    def number_of(self, bundle: int) -> int:
        """The number of a bundle's group."""
        return self.deal.group_of(bundle)

    def of(self, bundle: int) -> WorkerGroup:
        """The group of a bundle."""
        return self._groups[self.number_of(bundle)]

    def bundles_of(self, number: int, bundles: int) -> list[int]:
        """A group's bundles, where there are so many in all."""
        return [bundle for bundle in range(bundles) if self.deal.group_of(bundle) == number]

    def ranks_before(self, number: int) -> int:
        """Number of ranks in the groups before this one."""
        return number * (self.deal.size or 0)

    @property
    def formed(self) -> bool:
        """Whether all groups are formed now."""
        return bool(self._groups) and all(group.formed for group in self._groups)

    @property
    def any_formed(self) -> bool:
        """Whether some group is formed now."""
        return any(group.formed for group in self._groups)

    @property
    def serving(self) -> int:
        """Number of ranks that serve; any thread may read it."""
        return sum(group.serving for group in self._groups)

    @property
    def epoch(self) -> int:
        """The newest group's number; any thread may read it."""
        return max((group.epoch for group in self._groups), default=-1)

    @property
    def members(self) -> list[Worker]:
        """The ranks of all groups, group by group."""
        return list(itertools.chain.from_iterable(group.members for group in self._groups))

    def resize(self, bundles: int) -> None:
        """Have as many groups as so many bundles make. Groups beyond are stopped; their workers must be lost already."""
        count = max(map(self.deal.group_of, range(bundles)), default=0) + 1
        while len(self._groups) > count:
            self._groups[-1].stop()
            self._end(self._groups.pop())
        for number in range(len(self._groups), count):
            self._groups.append(group := self._make(number))
            self._spawn(partial(self._keep_formed, group))

    async def _keep_formed(self, group: WorkerGroup) -> None:
        """Keep a group formed. If it can't, its workers are started anew, as long as another group serves meanwhile.

        Raises:
            ClusterError: it can't, and no other group serves.
        """
        while True:
            try:
                await group.keep_formed()
                return
            except ClusterError as error:
                if not any(other.formed for other in self._groups if other is not group):
                    raise
                logger.error("%s. Its ranks are started anew; other groups serve meanwhile", error)
                group.lose_all(WorkerDied(str(error)))

    def stop(self) -> None:
        """Form no further group."""
        for group in self._groups:
            group.stop()
