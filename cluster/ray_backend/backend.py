"""``RayBackend``: ranks' workers are Ray actors on bundles of placement groups; the controller is an actor without one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from weakref import WeakSet

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError
from cluster.rank.actor import RANK_LOOP
from cluster.ray_backend.adoption import Adoption, Outliving
from cluster.ray_backend.bundles import Bundles
from cluster.ray_backend.calls import ask, refusals
from cluster.ray_backend.connect import RANK_RESOURCE
from cluster.ray_backend.handles import CONCURRENCY_GROUPS, RayActorHandle, RayControllerHandle, RayWorkerHandle
from cluster.ray_backend.imports import actor
from cluster.ray_backend.nodes import need_of_bundle, read_nodes
from cluster.ray_backend.session import Connection, Life, RayUse
from epslots.host_limits import usable_cores

logger = logging.getLogger("epslots.cluster")

LOOPBACK = "127.0.0.1"

_START_WORKER_S = 300.0  # it imports torch and transformers, maybe from a slow disk on a busy machine
_LOOK_EVERY_S = 1.0  # at the node of a worker that is being started
_START_RAY_S = 30.0  # longest wait for a Ray that is still being started when the backend is closed
_END_RAY_S = 20.0  # without a head, Ray takes some seconds

_worker_class = ray.remote(
    concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0, max_task_retries=0, enable_task_events=False
)(actor("cluster.rank.actor", "WorkerActor"))
_controller_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, enable_task_events=False)(
    actor("cluster.controller.actor", "ControllerActor")
)


class RayBackend:
    """Bundles and workers on Ray.

    Args:
        address: None for a Ray of only this process; "auto" or "host:port" for a running one.
        strategy: Ray's placement strategy: "PACK", "SPREAD", "STRICT_PACK" or "STRICT_SPREAD".
        device: "cuda", "cpu", or None for GPUs if the cluster has any.
        path: the model's folder, which all nodes must have; a hub id is each node's to find.
        loop: class that runs a rank, as "module:name".
        place_s: seconds that Ray has to find another node for a bundle whose node is lost.
        groups: into which the ranks are divided; one's ranks are near each other.
        outliving: if the ranks are to outlive this driver.
    """

    def __init__(
        self,
        *,
        address: str | None,
        strategy: str,
        device: str | None,
        path: str,
        loop: str = RANK_LOOP,
        place_s: float = 30.0,
        groups: int = 1,
        outliving: Outliving | None = None,
    ) -> None:
        self._address, self._strategy, self._device, self._path = address, strategy, device, path
        self._loop, self._place_s, self._groups = loop, place_s, groups
        self._adoption = None if outliving is None else Adoption(outliving)
        self._use: RayUse | None = None
        self._connection: Connection | None = None
        self._life: Life | None = None
        self._need: dict[str, float] = {}
        self._bundles = Bundles({}, strategy, None, place_s)
        self._actors: WeakSet[RayActorHandle] = WeakSet()

    async def open(self, ranks: int | None) -> int:
        self._use = RayUse(self._address, ranks or 1, None if self._adoption is None else self._adoption.name)
        self._connection = await self._use.joined()
        self._life = self._connection.life
        return await self._reserve(ranks)

    async def _reserve(self, ranks: int | None, group_of: Sequence[int] = ()) -> int:
        """Reserve all bundles, on the present nodes; returns their number."""
        assert self._connection is not None
        if self._adoption is not None:
            await self._adoption.begin(own_ray=self._connection.own)
        nodes = await ask(read_nodes)
        self._need = need_of_bundle(nodes, self._device)
        if ranks is None and self.survivors:
            ranks = max(self.survivors) + 1
        if ranks is None:
            ranks = int(sum(node.total.get("GPU", 0) for node in nodes)) if "GPU" in self._need else 1
        elsewhere = not self._connection.own and Path(self._path).is_dir()  # a hub id is the nodes' own to find
        folder = str(Path(self._path).absolute()) if elsewhere else None
        size = None if self._groups == 1 else max(1, ranks // self._groups)
        self._bundles = Bundles(self._need, self._strategy, folder, self._place_s, size, self._adoption)
        if self._adoption is not None:
            self._adoption.drop_survivors(ranks)
            self._bundles.inherit(self._adoption.groups, ranks)
        if ranks > len(self._bundles):
            await self._bundles.add(ranks - len(self._bundles), group_of)
        return ranks

    @property
    def survivors(self) -> frozenset[int]:
        return frozenset() if self._adoption is None else self._adoption.bundles

    async def keep_lease(self) -> NoReturn:
        if self._adoption is None:
            await asyncio.Event().wait()
            raise AssertionError("it is never set")
        await self._adoption.keep()

    async def lost(self) -> str:
        assert self._life is not None, "it is open"
        reason = await asyncio.wrap_future(self._life.lost)
        if self._adoption is not None:
            self._adoption.lease.forget()
        for handle in self._actors:
            handle.forget()
        self._actors.clear()
        return reason

    async def reopen(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        assert self._life is not None, "it is open"
        while self._life.lost.done():
            self._life = await asyncio.wrap_future(self._life.next)
        await self._reserve(ranks, group_of)

    async def resize(self, ranks: int, group_of: Sequence[int] = ()) -> None:
        if ranks > len(self._bundles):
            await self._bundles.add(ranks - len(self._bundles), group_of)
        else:
            self._bundles.keep(ranks)

    async def neighbours(self, bundle: int) -> int:
        nodes = await self._bundles.nodes()
        return nodes.count(nodes[bundle]) if nodes[bundle] else 1

    async def start_worker(self, bundle: int) -> RayWorkerHandle:
        if self._adoption is not None and (survivor := self._adoption.take_survivor(bundle)) is not None:
            self._actors.add(survivor)
            return survivor
        await self._bundles.placed(bundle)
        threads = await self._threads(bundle)
        self._check()
        options, lasting, lease = {}, b"", None
        if self._adoption is not None:
            options, lasting, lease = self._adoption.actor_options(bundle), self._adoption.lasting, self._adoption.lease
        with refusals():
            actor = _worker_class.options(
                num_cpus=self._need.get("CPU", 0),
                num_gpus=self._need.get("GPU", 0),
                resources={RANK_RESOURCE: 1} if RANK_RESOURCE in self._need else None,
                scheduling_strategy=self._bundles.strategy(bundle),
                **options,
            ).remote(self._host, threads, self._loop, lasting)
        worker = RayWorkerHandle(bundle, actor, lease, options.get("name", ""))
        self._actors.add(worker)
        starting = asyncio.ensure_future(worker.wait_until_up(_START_WORKER_S))
        # Read its error even if this call ends before; or asyncio would complain.
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not (await asyncio.wait({starting}, timeout=_LOOK_EVERY_S))[0]:
                await self._bundles.placed(bundle)  # Ray may learn only now that the node is gone
            await starting
        except BaseException:
            worker.kill(unused=True)
            starting.cancel()
            await asyncio.wait({starting})
            raise
        return worker

    async def start_controller(self) -> RayControllerHandle:
        self._check()
        with refusals():
            actor = _controller_class.options(scheduling_strategy=self._here()).remote()
        controller = RayControllerHandle(actor)
        self._actors.add(controller)
        try:
            await controller.wait_until_up(_START_WORKER_S)
        except BaseException:
            controller.kill()
            raise
        return controller

    async def close(self, *, leave_ranks: bool = False) -> None:
        """End all actors, and leave Ray, even one that is still being started. After an interrupt, call it again."""
        leave_ranks = await self._end_adoption(leave_ranks)
        for handle in self._actors:
            if not (leave_ranks and isinstance(handle, RayWorkerHandle)):
                handle.kill()
        self._actors.clear()
        if not leave_ranks:
            self._bundles.keep(0)
        if self._use is None:
            return
        if leave_ranks and self._connection is not None:
            self._connection.ranks_stay.set()
        left = self._use.leave()
        starting = self._life is None or self._life.lost.done()
        wait_s = _START_RAY_S + _END_RAY_S if starting else _END_RAY_S
        try:
            async with asyncio.timeout(wait_s):
                await asyncio.wrap_future(left)
        except TimeoutError:
            logger.warning("Ray did not end within %g s; no longer waiting for it", wait_s)
        except Exception:
            logger.exception("Ray ended with an error")
        self._use = self._connection = self._life = None

    async def _end_adoption(self, leave_ranks: bool) -> bool:
        """Give the lease up; returns whether the ranks stay, because they are to or aren't this driver's."""
        if self._adoption is None or self._life is None or self._life.lost.done():
            return leave_ranks
        return not await self._adoption.end(leave_ranks)

    @property
    def _host(self) -> str | None:
        """Address of the ranks' connections; None = the one by which Ray knows their node."""
        return LOOPBACK if self._connection is not None and self._connection.own else None

    async def _threads(self, bundle: int) -> int:
        """CPU threads of a worker's torch: on a Ray of our own an equal share of all cores; else 0, Ray's choice."""
        if "GPU" in self._need or self._host is None:
            return 0
        # At least for two ranks: one may be added, and two that use all cores are very slow.
        return max(1, usable_cores() // max(2, await self.neighbours(bundle)))

    def _here(self) -> NodeAffinitySchedulingStrategy:
        """The driver's node: an actor there is lost only with the driver."""
        return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def _check(self) -> None:
        """Refuse to call Ray between two lives: it would start a Ray by itself."""
        if self._life is not None and self._life.lost.done():
            raise ClusterError(self._life.lost.result())
