"""``Adoption``: a named cluster's lease, and the ranks and placement groups that its last driver has left in Ray.

    the last driver is gone -> its ranks describe themselves -> refuse other settings, or claim the next term -> adopt

Nothing is changed before the claim. Ranks that don't answer, or haven't begun to load, are ended and started anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NoReturn

import msgspec
import ray
from ray.util.placement_group import PlacementGroup

from cluster.actor_process import ActorProcess
from cluster.driver.backend import WorkerDied
from cluster.errors import ClusterError
from cluster.lasting import ray_registry
from cluster.lasting.descriptions import GroupName, Lasting, RankName
from cluster.lasting.lease import LEASE_S
from cluster.lasting.settings import differences
from cluster.messages.rank import Load
from cluster.ray_backend.bundles import remove_group
from cluster.ray_backend.calls import ask
from cluster.ray_backend.driver_lease import DriverLease
from cluster.ray_backend.handles import RayWorkerHandle
from cluster.ray_backend.lasting_ray import users_file

logger = logging.getLogger("epslots.cluster")

_DESCRIBE_S = 10.0
_ENDED_S = 20.0  # for ended ranks to be gone
_POLL_S = 0.2


@dataclass(frozen=True)
class Outliving:
    """How ranks outlive their driver.

    Attributes:
        name: of the cluster, by which the next driver finds them.
        orphan_s: seconds that they wait for it.
        replace: end the ranks that the last driver has left, and start new ones.
        load: the order that ranks are to have loaded by.
    """

    name: str
    orphan_s: float
    replace: bool
    load: Load


class Adoption:
    """One driver's part. For the supervisor's thread.

    Attributes:
        lease: the driver's.
        groups: placement groups of the last driver, each with its number of bundles, in their order.
        lasting: a new rank's ``Lasting``, as msgpack.
    """

    def __init__(self, outliving: Outliving) -> None:
        self.name = outliving.name
        self._outliving = outliving
        self.lease = DriverLease(outliving.name, outliving.orphan_s)
        self.groups: Sequence[tuple[PlacementGroup, int]] = ()
        self.lasting = b""
        self._survivors: dict[int, RayWorkerHandle] = {}
        self._serial = 0

    async def begin(self, *, own_ray: bool) -> None:
        """Claim the cluster, and find its last driver's ranks and placement groups.

        Raises:
            ClusterError: its driver lives, or its ranks were loaded with other settings.
        """
        users = str(users_file(self.name)) if own_ray else ""
        self.lasting = msgspec.msgpack.encode(Lasting(self.name, users))
        where, worker = str(ActorProcess.of_this(ray.util.get_node_ip_address())), ray_registry.own_id()
        while True:
            sight = await self.lease.wait_until_free()
            ending = sight.claim is not None and sight.claim.ends
            survivors: dict[int, RayWorkerHandle] = {}
            rest: list[RayWorkerHandle] = []
            if not ending and not self._outliving.replace:
                survivors, rest = await self._find()
            if await self.lease.claim(sight.term, where, worker):
                break
        if survivors:
            await ask(lambda: ray_registry.remove_groups(self.name, self.lease.term, pending=True))
            survivors = await self._keep_undoomed(survivors, rest)
        self._survivors = survivors
        for handle in rest:
            handle.kill()
        if survivors:
            logger.warning("%d ranks of the cluster %r were adopted, with their model", len(survivors), self.name)
        else:
            self.groups = ()
            await self._remove_all()

    async def _keep_undoomed(
        self, survivors: dict[int, RayWorkerHandle], rest: list[RayWorkerHandle]
    ) -> dict[int, RayWorkerHandle]:
        """The survivors that no earlier driver is about to end, and the placement groups likewise. After the claim.

        Args:
            rest: gets the other ranks.
        """
        doomed = await ask(ray_registry.doomed, self.name)
        found = await ask(ray_registry.groups_of, self.name)
        there = {group.id.hex() for _, group, _ in found} | {handle.name for handle in (*survivors.values(), *rest)}
        await ask(ray_registry.forget_doomed, self.name, doomed - there)
        kept = list(takewhile(lambda each: each[1].id.hex() not in doomed, found))  # a driver removes the last ones
        for _, group, _ in found[len(kept) :]:
            self.end_group(group, partial(remove_group, group))
        self.groups = [(group, bundles) for _, group, bundles in kept]
        places = sum(bundles for _, bundles in self.groups)
        stay = {bundle for bundle, handle in survivors.items() if bundle < places and handle.name not in doomed}
        rest += [handle for bundle, handle in survivors.items() if bundle not in stay]
        return {bundle: handle for bundle, handle in survivors.items() if bundle in stay}

    async def _find(self) -> tuple[dict[int, RayWorkerHandle], list[RayWorkerHandle]]:
        """The ranks that can be adopted, by bundle; and the others.

        Raises:
            ClusterError: they were loaded with other settings.
        """
        actors = await ask(ray_registry.actors_of, self.name)
        handles = [(name, RayWorkerHandle(name.bundle, actor, self.lease, str(name), adopted=True)) for name, actor in actors]
        loads = await asyncio.gather(*(self._describe(handle) for _, handle in handles))
        found: dict[int, tuple[RayWorkerHandle, Load]] = {}
        rest = []
        for (name, handle), load in zip(handles, loads, strict=True):
            if load is None:
                rest.append(handle)
                continue
            if older := found.pop(name.bundle, None):
                rest.append(older[0])
            found[name.bundle] = handle, load
        await self._check_settings([load for _, load in found.values()])
        return {bundle: handle for bundle, (handle, _) in found.items()}, rest

    async def _describe(self, handle: RayWorkerHandle) -> Load | None:
        """The order that a rank loads or has loaded by; None if it can't be adopted."""
        try:
            await handle.wait_until_up(_DESCRIBE_S)
            async with asyncio.timeout(_DESCRIBE_S):
                description = await handle.describe()
        except (TimeoutError, WorkerDied):
            return None
        return description.load if description.running else None

    async def _check_settings(self, loads: Sequence[Load]) -> None:
        wanted = self._outliving.load
        for load in loads:
            if found := differences(load, wanted):
                raise ClusterError(
                    f"the cluster {self.name!r} has ranks that wait for a driver, but they were loaded with other settings: "
                    f"{'; '.join(found)}. Ask for the same, or end them with replace=True (--replace), or give another name"
                )

    async def _remove_all(self) -> None:
        """End the last driver's ranks and placement groups, and wait until their places are free."""
        await ask(ray_registry.remove_groups, self.name, self.lease.term)
        ends_s = asyncio.get_running_loop().time() + _ENDED_S
        while await ask(ray_registry.ranks_of, self.name):
            if asyncio.get_running_loop().time() > ends_s:
                raise ClusterError(f"the last ranks of the cluster {self.name!r} did not end within {_ENDED_S:g} s; try again")
            await asyncio.sleep(_POLL_S)

    @property
    def bundles(self) -> frozenset[int]:
        """Bundles whose ranks can be adopted."""
        return frozenset(self._survivors)

    def take_survivor(self, bundle: int) -> RayWorkerHandle | None:
        """The rank on a bundle that is to be adopted; asked once."""
        return self._survivors.pop(bundle, None)

    def drop_survivors(self, count: int) -> None:
        """End the ranks on bundles from this number on: fewer are wanted."""
        for bundle in [bundle for bundle in self._survivors if bundle >= count]:
            self._survivors.pop(bundle).kill()

    def end_group(self, group: PlacementGroup, effect: Callable[[], None]) -> None:
        """Have a placement group removed, if it is certainly this driver's."""
        self.lease.guard(group.id.hex(), effect)

    def name_group(self) -> str:
        """Ray's name of the next placement group."""
        self._serial += 1
        return str(GroupName(self.lease.term, self._serial, self.name))

    def actor_options(self, bundle: int) -> dict[str, Any]:
        """Ray's options of the next rank.

        Raises:
            ClusterError: it isn't certain that the ranks are still this driver's.
        """
        if not self.lease.held:
            raise ClusterError(f"no rank is started while Ray's head hasn't heard of this driver for {LEASE_S / 2:g} s")
        self._serial += 1
        name = RankName(self.lease.term, self._serial, bundle, self.name)
        return {"name": str(name), "namespace": ray_registry.NAMESPACE, "lifetime": "detached"}

    async def keep(self) -> NoReturn:
        """Keep the lease.

        Raises:
            Superseded: another driver has taken over.
        """
        await self.lease.keep()

    async def end(self, leave_ranks: bool) -> bool:
        """Give the lease up; returns whether the ranks are to be ended, because they are this driver's and don't stay."""
        if not await self.lease.confirm():
            return False
        if leave_ranks:
            await self.lease.release()
            return False
        return await self.lease.end()
