"""The fleet on Ray: seats are bundles of placement groups, and workers are actors on them. The controller needs no seat."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from weakref import WeakSet

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError
from cluster.rank.worker import RANK_LOOP
from cluster.ray_backend.bundles import Bundles
from cluster.ray_backend.calls import ask, refusals
from cluster.ray_backend.controller import RayController
from cluster.ray_backend.imports import actor
from cluster.ray_backend.nodes import need_of_seat, read_nodes
from cluster.ray_backend.session import SEAT, Connection, Life, RayUse
from cluster.ray_backend.worker import CONCURRENCY_GROUPS, RayWorker
from epslots.host_limits import usable_cores

logger = logging.getLogger("epslots.cluster")

LOOPBACK = "127.0.0.1"

_HIRE_S = 300.0  # it imports torch and transformers, maybe from a slow disk on a busy machine
_LOOK_EVERY_S = 1.0  # whether the node of one that is being hired is still there
_START_S = 30.0  # for a Ray that is still being started when the fleet is closed
_END_S = 20.0  # without a head, Ray takes some seconds

_worker_class = ray.remote(
    concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0, max_task_retries=0, enable_task_events=False
)(actor("cluster.rank.worker", "RankWorker"))
_controller_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, enable_task_events=False)(
    actor("cluster.controller.actor", "ControllerActor")
)


class RayBackend:
    """Bundles and workers on Ray.

    Args:
        address: None for a Ray of this process alone; "auto" or "host:port" for a running one.
        strategy: how ranks are spread over nodes; Ray's words.
        device: "cuda", "cpu", or None for GPUs if the cluster has any.
        path: of the model's folder, which all nodes must have; a hub id is left to them.
        loop: what runs a rank, as "module:name".
        place_s: how long a seat whose node is lost waits for another.
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
    ) -> None:
        self._address, self._strategy, self._device, self._path = address, strategy, device, path
        self._loop, self._place_s = loop, place_s
        self._use: RayUse | None = None
        self._connection: Connection | None = None
        self._life: Life | None = None
        self._need: dict[str, float] = {}
        self._seats = Bundles({}, strategy, None, place_s)
        self._workers: WeakSet[RayWorker] = WeakSet()
        self._controllers: WeakSet[RayController] = WeakSet()

    async def open(self, ranks: int | None) -> int:
        self._use = RayUse(self._address, ranks or 1)
        self._connection = await self._use.joined()
        self._life = self._connection.life
        return await self._reserve(ranks)

    async def _reserve(self, ranks: int | None) -> int:
        """Reserve all seats, on the nodes that there are; returns how many."""
        assert self._connection is not None
        nodes = await ask(read_nodes)
        self._need = need_of_seat(nodes, self._device)
        if ranks is None:
            ranks = int(sum(node.total.get("GPU", 0) for node in nodes)) if "GPU" in self._need else 1
        elsewhere = not self._connection.own and Path(self._path).is_dir()  # a hub id is the nodes' own to find
        folder = str(Path(self._path).absolute()) if elsewhere else None
        self._seats = Bundles(self._need, self._strategy, folder, self._place_s)
        await self._seats.add(ranks)
        return ranks

    async def lost(self) -> str:
        assert self._life is not None, "it is open"
        reason = await asyncio.wrap_future(self._life.lost)
        for worker in self._workers:
            worker.forget()
        for controller in self._controllers:
            controller.forget()
        self._workers.clear()
        self._controllers.clear()
        return reason

    async def reopen(self, ranks: int) -> None:
        assert self._life is not None, "it is open"
        while self._life.lost.done():
            self._life = await asyncio.wrap_future(self._life.next)
        await self._reserve(ranks)

    async def resize(self, ranks: int) -> None:
        if ranks > len(self._seats):
            await self._seats.add(ranks - len(self._seats))
        else:
            self._seats.keep(ranks)

    async def neighbours(self, seat: int) -> int:
        nodes = await self._seats.nodes()
        return nodes.count(nodes[seat]) if nodes[seat] else 1

    async def hire(self, seat: int) -> RayWorker:
        await self._seats.placed(seat)
        threads = await self._threads(seat)
        self._check()
        with refusals():
            actor = _worker_class.options(
                num_cpus=self._need.get("CPU", 0),
                num_gpus=self._need.get("GPU", 0),
                resources={SEAT: 1} if SEAT in self._need else None,
                scheduling_strategy=self._seats.strategy(seat),
            ).remote(self._host, threads, self._loop)
        worker = RayWorker(seat, actor)
        self._workers.add(worker)
        greeting = asyncio.ensure_future(worker.greet(_HIRE_S))
        # Whether or not anybody waits for it by then; or asyncio would complain.
        greeting.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not (await asyncio.wait({greeting}, timeout=_LOOK_EVERY_S))[0]:
                await self._seats.placed(seat)  # Ray may learn only now that the node is gone
            await greeting
        except BaseException:
            worker.kill()
            greeting.cancel()
            await asyncio.wait({greeting})
            raise
        return worker

    async def hire_controller(self) -> RayController:
        self._check()
        with refusals():
            actor = _controller_class.options(scheduling_strategy=self._here()).remote()
        controller = RayController(actor)
        self._controllers.add(controller)
        try:
            await controller.greet(_HIRE_S)
        except BaseException:
            controller.kill()
            raise
        return controller

    async def close(self) -> None:
        """End all, and leave Ray, even one that is still being started. If this is interrupted, a second call goes on."""
        for worker in self._workers:
            worker.kill()
        for controller in self._controllers:
            controller.kill()
        self._workers.clear()
        self._controllers.clear()
        self._seats.keep(0)
        if self._use is None:
            return
        left = self._use.leave()
        starting = self._life is None or self._life.lost.done()
        wait_s = _START_S + _END_S if starting else _END_S
        try:
            async with asyncio.timeout(wait_s):
                await asyncio.wrap_future(left)
        except TimeoutError:
            logger.warning("Ray did not end within %g s; it is no longer waited for", wait_s)
        except Exception:
            logger.exception("Ray did not end in peace")
        self._use = self._connection = self._life = None

    @property
    def _host(self) -> str | None:
        """Where ranks connect; None: at the address by which Ray knows their node."""
        return LOOPBACK if self._connection is not None and self._connection.own else None

    async def _threads(self, seat: int) -> int:
        """For torch on the CPU. On a Ray of our own all cores are the ranks'; another gives each what it was promised."""
        if "GPU" in self._need or self._host is None:
            return 0
        # A second rank may come, and two on all cores are very slow.
        return max(1, usable_cores() // max(2, await self.neighbours(seat)))

    def _here(self) -> NodeAffinitySchedulingStrategy:
        """On the driver's node: what lives there is lost with the driver alone."""
        return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def _check(self) -> None:
        """Ray must not be asked between two lives: it would start one by itself."""
        if self._life is not None and self._life.lost.done():
            raise ClusterError(self._life.lost.result())
