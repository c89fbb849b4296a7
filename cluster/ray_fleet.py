"""The fleet on Ray: seats are bundles of placement groups, and workers are actors on them."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.errors import ClusterError
from cluster.local_ray import SEAT, Connection, connect, disconnect
from cluster.ray_nodes import NODE_LABEL, Node, NoRoom, choose_nodes, lacks_model, need_of_seat, read_nodes
from cluster.ray_worker import CONCURRENCY_GROUPS, RayWorker, kill, reason_of
from cluster.rendezvous import Rendezvous
from cluster.worker import RANK_LOOP, Worker

LOOPBACK = "127.0.0.1"
_NAME = "epslots, "

_FREE_S = 3.0  # in which the places of what has just ended become free
_RESERVE_S = 20.0
_LOOK_S = 60.0  # the first task on a node may have to wait for a process, and that for a slow disk
_PLACE_S = 30.0  # in which Ray notices that a node is gone, and finds another one
_HIRE_S = 120.0
_ANSWER_S = 2.0
_POLL_S = 0.2


@dataclass(frozen=True)
class _Seat:
    """A bundle of a placement group."""

    group: PlacementGroup
    bundle: int

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, self.bundle)


class RayFleet:
    """Seats and workers on Ray.

    Args:
        address: None for a Ray of this process alone; "auto" or "host:port" for a running one.
        strategy: how ranks are spread over nodes; Ray's words.
        device: "cuda", "cpu", or None for GPUs if the cluster has any.
        path: of the model's folder, which all nodes must have; a hub id is left to them.
        loop: what runs a rank, as "module:name".
    """

    def __init__(self, *, address: str | None, strategy: str, device: str | None, path: str, loop: str = RANK_LOOP) -> None:
        self._address, self._strategy, self._device, self._loop = address, strategy, device, loop
        self._path = path
        self._connection: Connection | None = None
        self._need: dict[str, float] = {}
        self._seats: list[_Seat] = []
        self._spare: list[_Seat] = []
        """Bundles of groups that are in use, without ranks now."""
        self._checked: set[str] = set()
        self._workers: set[RayWorker] = set()
        self._store: Any = None
        self._store_answered = False
        self._name = f"{_NAME}process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"

    async def open(self, ranks: int | None) -> int:
        self._connection = await connect(self._address, ranks or 1)
        nodes = await asyncio.to_thread(read_nodes)
        self._need = need_of_seat(nodes, self._device)
        if ranks is None:
            ranks = max(1, int(sum(node.total.get("GPU", 0) for node in nodes))) if "GPU" in self._need else 1
        await self._reserve(ranks)
        self._start_store()
        return ranks

    async def resize(self, ranks: int) -> None:
        if ranks > len(self._seats):
            await self._reserve(ranks - len(self._seats))
        self._spare += self._seats[ranks:]
        del self._seats[ranks:]
        for group in {seat.group.id: seat.group for seat in self._spare}.values():
            if all(seat.group.id != group.id for seat in self._seats):
                self._spare = [seat for seat in self._spare if seat.group.id != group.id]
                _remove(group)

    async def neighbours(self, seat: int) -> int:
        nodes = await self._nodes_of_seats()
        return max(1, nodes.count(nodes[seat])) if nodes[seat] else 1

    async def hire(self, seat: int) -> RayWorker:
        await self._placed(seat)
        actor = _worker_class.options(
            num_cpus=self._need.get("CPU", 0),
            num_gpus=self._need.get("GPU", 0),
            resources={SEAT: 1} if SEAT in self._need else None,
            scheduling_strategy=self._seats[seat].strategy,
        ).remote(self._host, await self._threads(seat), self._loop)
        worker = RayWorker(seat, actor)
        self._workers.add(worker)
        try:
            await worker.greet(_HIRE_S)
        except BaseException:
            self._dismiss(worker)
            raise
        return worker

    async def rendezvous(self) -> tuple[str, int]:
        reason = ""
        for _ in range(2):
            wait_s = _ANSWER_S if self._store_answered else _LOOK_S
            try:
                host, port = msgspec.msgpack.decode(
                    await asyncio.wait_for(self._store.address.remote(), wait_s), type=tuple[str, int]
                )
                self._store_answered = True
                return host, port
            except TimeoutError:
                reason = f"it did not answer within {wait_s:g} s"
            except RayError as error:
                reason = reason_of(error)
            kill(self._store)
            self._start_store()
        raise ClusterError(f"the store where ranks meet didn't come up on the driver's node: {reason}")

    async def close(self) -> None:
        if self._connection is None:
            return
        connection, self._connection = self._connection, None
        for worker in self._workers:
            worker.kill()
        if self._store is not None:
            kill(self._store)
        for group in {seat.group.id: seat.group for seat in self._seats + self._spare}.values():
            _remove(group)
        self._seats, self._spare = [], []
        self._workers.clear()
        await disconnect(connection)

    @property
    def _host(self) -> str | None:
        """Where ranks connect; None: at the address by which Ray knows their node."""
        return LOOPBACK if self._connection is not None and self._connection.own else None

    async def _threads(self, seat: int) -> int:
        """For torch on the CPU. On a Ray of our own all cores are the ranks'; another gives each what it was promised."""
        if "GPU" in self._need or self._host is None:
            return 0
        cores = psutil.cpu_count(logical=False) or 1
        return max(1, cores // max(2, await self.neighbours(seat)))  # a second rank may come: two on all cores are very slow

    async def _reserve(self, count: int) -> None:
        """Add seats: spare ones first."""
        seats = self._spare[:count]
        if len(seats) < count:
            seats += await self._make_seats(count - len(seats))
        self._spare = self._spare[count:]
        self._seats += seats

    async def _make_seats(self, count: int) -> list[_Seat]:
        selector = await self._find_room(count)
        group = placement_group(
            [self._need] * count,
            strategy=self._strategy,
            name=f"{self._name} {uuid.uuid4().hex[:8]}",
            bundle_label_selector=None if selector is None else [{NODE_LABEL: selector}] * count,
        )
        try:
            if not await asyncio.to_thread(group.wait, _RESERVE_S):
                raise ClusterError(
                    f"Ray did not reserve places for {count} ranks within {_RESERVE_S:g} s, though there was room; others may "
                    f"have taken it (`ray status -v` shows what waits). Try again"
                )
            await self._check_model(group)
        except BaseException:
            _remove(group)
            raise
        return [_Seat(group, bundle) for bundle in range(count)]

    async def _find_room(self, count: int) -> str | None:
        """Which nodes new seats may go to. What has just ended may still hold places for a moment."""
        ends = asyncio.get_running_loop().time() + _FREE_S
        while True:
            nodes, taken = await asyncio.to_thread(read_nodes), await self._nodes_of_seats()
            try:
                return choose_nodes(nodes, self._need, count, self._strategy, [node for node in taken if node])
            except NoRoom as error:
                if not error.later or asyncio.get_running_loop().time() > ends:
                    raise ClusterError(f"{error}{await self._holders() if error.later else ''}") from None
            await asyncio.sleep(_POLL_S)

    async def _holders(self) -> str:
        """Other clusters of ours that hold places, for messages."""
        tables = await asyncio.to_thread(placement_group_table)
        others = [
            f"\n  {table['name'].rpartition(' ')[0]}: {len(table['bundles'])} ranks"
            for table in tables.values()
            if table["name"].startswith(_NAME) and not table["name"].startswith(self._name) and table["state"] == "CREATED"
        ]
        return "\nAmong those who hold the rest:" + "".join(others) if others else ""

    async def _nodes_of_seats(self) -> list[str]:
        """The node of each seat; "" if Ray is looking for another."""
        groups = {seat.group.id: seat.group for seat in self._seats}
        tables = await asyncio.gather(*(asyncio.to_thread(placement_group_table, group) for group in groups.values()))
        nodes = {id: table.get("bundles_to_node_id", {}) for id, table in zip(groups, tables, strict=True)}
        return [nodes[seat.group.id].get(seat.bundle, "") for seat in self._seats]

    async def _placed(self, seat: int) -> None:
        """Wait until a seat is on a node that is there: when one is lost, Ray finds others for its seats."""
        ends = asyncio.get_running_loop().time() + _PLACE_S
        while True:
            node = (await self._nodes_of_seats())[seat]
            if node in {node.id for node in await asyncio.to_thread(read_nodes)}:
                return
            if asyncio.get_running_loop().time() > ends:
                raise ClusterError(
                    f"the node of rank {seat} is gone, and Ray found no place on another within {_PLACE_S:g} s; start a node "
                    f"(`ray start --address=...`), or go on with fewer ranks (scale)"
                )
            await asyncio.sleep(_POLL_S)

    async def _check_model(self, group: PlacementGroup) -> None:
        """See that a folder is there on all nodes with a seat.

        Raises:
            ClusterError: by node.
        """
        folder = Path(self._path)
        if not folder.is_dir():
            return  # a hub id
        table = await asyncio.to_thread(placement_group_table, group)
        nodes = {node.id: node for node in await asyncio.to_thread(read_nodes)}
        new = sorted(set(table["bundles_to_node_id"].values()) & nodes.keys() - self._checked)
        lacking = await asyncio.gather(*(self._look(nodes[node]) for node in new))
        if any(lacking):
            where = "\n".join(f"  {nodes[node]}: {reason}" for node, reason in zip(new, lacking, strict=True) if reason)
            raise ClusterError(
                f"every node needs the model at the same path, and not all have {folder.absolute()}:\n{where}\nCopy it "
                f"there, or give a folder that all nodes share, or a hub id"
            )
        self._checked.update(new)

    async def _look(self, node: Node) -> str:
        """Why a node can't be used; empty if it can."""
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        look = _look.options(scheduling_strategy=there).remote(str(Path(self._path).absolute()))
        try:
            answer = await asyncio.wait_for(look, _LOOK_S)
        except TimeoutError:
            return f"did not answer within {_LOOK_S:g} s"
        except RayError as error:
            return f"can't run epslots: {reason_of(error)}"
        return msgspec.msgpack.decode(answer, type=str) if answer else ""

    def _start_store(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._store = _rendezvous_class.options(scheduling_strategy=here).remote(self._host)
        self._store_answered = False

    def _dismiss(self, worker: RayWorker) -> None:
        worker.kill()
        self._workers.discard(worker)


_worker_class = ray.remote(
    concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0, max_task_retries=0, enable_task_events=False
)(Worker)
_rendezvous_class = ray.remote(num_cpus=0, max_restarts=0)(Rendezvous)
_look = ray.remote(num_cpus=0, max_retries=0)(lacks_model)


def _remove(group: PlacementGroup) -> None:
    with suppress(Exception):
        remove_placement_group(group)
