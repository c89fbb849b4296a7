"""``Bundles``: places for ranks, in Ray's placement groups, each on a node that has the model."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.driver.group_deal import runs
from cluster.errors import ClusterError
from cluster.ray_backend.calls import ANSWER_S, ask, begin
from cluster.ray_backend.handles import RAY_ERRORS, reason_of
from cluster.ray_backend.imports import function
from cluster.ray_backend.nodes import NODE_LABEL, Node, NoRoom, choose_nodes, read_nodes
from cluster.ray_backend.topology import near_labels

logger = logging.getLogger("epslots.cluster")

_NAME = "epslots, "  # of placement groups
_FREE_S = 3.0  # wait for the places of processes that have just ended
_RESERVE_S = 20.0
_RESERVE_NEAR_S = 5.0  # near each other, before that is given up
_REMOVE_S = 5.0
_LOOK_S = 60.0  # the first task on a node may have to wait for a process, and that for a slow disk
_POLL_S = 0.2  # between looks at Ray's tables: Ray sends no message when a place becomes free or a node joins

_look = ray.remote(num_cpus=0, max_retries=0)(function("cluster.ray_backend.nodes", "lacks_model"))


@dataclass(frozen=True)
class _Bundle:
    """A bundle, by its index in its placement group; ``within``: the label that it is bound to, for people."""

    group: PlacementGroup
    index: int
    within: str = ""


class NotReserved(ClusterError):
    """Ray didn't reserve places in time."""


class LastingGroups(Protocol):
    """A cluster whose placement groups may be another driver's one day."""

    def name_group(self) -> str:
        """A name for the next placement group."""

    def end_group(self, group: PlacementGroup, effect: Callable[[], None]) -> None:
        """Have a placement group removed by ``effect``, if it is certainly this driver's."""


class Bundles:
    """Reserved bundles, numbered from 0. Placement groups have a fixed size, so each growth makes another group.

    Ray packs the bundles of one placement group onto few nodes, not runs of them: so every expert-parallel group, whose ranks
    exchange tokens in each layer, has a placement group of its own. One that fits on no node is kept within a rack, zone or
    region by the nodes' labels (``topology.py``); bundles of a lost node move within that, too.

    Args:
        need: resources of one bundle.
        strategy: Ray's placement strategy.
        folder: the model's folder, which every node must have; None = don't look.
        place_s: seconds that Ray has to find another node for a bundle whose node is lost.
        group_size: ranks of an expert-parallel group, which "PACK" packs by itself; None = all ranks are one.
        lasting: the cluster that the placement groups outlive this process with; None = they don't.
    """

    def __init__(
        self,
        need: dict[str, float],
        strategy: str,
        folder: str | None,
        place_s: float,
        group_size: int | None = None,
        lasting: LastingGroups | None = None,
    ) -> None:
        self._need, self._strategy, self._place_s = need, strategy, place_s
        self._group_size = group_size if strategy == "PACK" else None
        self._lasting = lasting
        self._folder = folder
        self._bundles: list[_Bundle] = []
        self._unused: list[_Bundle] = []
        """Bundles of placement groups with others in use: those that follow in the groups' order."""
        self._checked: set[str] = set()
        """Nodes that have the model's folder."""
        self._name = f"{_NAME}process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"

    def __len__(self) -> int:
        return len(self._bundles)

    def strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        """Ray's scheduling strategy for an actor on a bundle."""
        return PlacementGroupSchedulingStrategy(self._bundles[bundle].group, self._bundles[bundle].index)

    def inherit(self, groups: Sequence[tuple[PlacementGroup, int]], count: int) -> None:
        """Take over the last driver's placement groups, each with its number of bundles, in their order.

        Args:
            count: bundles that are needed; groups without one are removed, and missing ones aren't reserved.
        """
        self._bundles = [_Bundle(group, index) for group, bundles in groups for index in range(bundles)]
        self.keep(min(count, len(self._bundles)))

    async def add(self, count: int, group_of: Sequence[int] = ()) -> None:
        """Reserve further bundles.

        Args:
            group_of: the expert-parallel group of each bundle, by number; () = groups of ``group_size`` follow each other.

        Raises:
            ClusterError: there is no room, or a node lacks the model; the bundles are unchanged.
        """
        bundles = self._unused[:count]
        if len(bundles) < count:
            first = len(self._bundles) + len(bundles)
            bundles += await self._make(first, self._groups_of(len(self._bundles) + count, group_of))
        self._unused = self._unused[count:]
        self._bundles += bundles

    def keep(self, count: int) -> None:
        """Release the bundles from number ``count`` on. One that shares a placement group with a kept one is reused later."""
        self._unused = self._bundles[count:] + self._unused
        del self._bundles[count:]
        kept = {bundle.group.id for bundle in self._bundles}
        for group in {bundle.group.id: bundle.group for bundle in self._unused if bundle.group.id not in kept}.values():
            self._remove(group)
        self._unused = [bundle for bundle in self._unused if bundle.group.id in kept]

    def _remove(self, group: PlacementGroup) -> None:
        if self._lasting is None:
            remove_group(group)
        else:
            self._lasting.end_group(group, partial(remove_group, group))

    async def nodes(self) -> list[str]:
        """Ray's id of each bundle's node; "" while Ray looks for another node."""
        groups = {bundle.group.id: bundle.group for bundle in self._bundles}
        tables = await asyncio.gather(*(ask(placement_group_table, group) for group in groups.values()))
        nodes_of = {id: table.get("bundles_to_node_id", {}) for id, table in zip(groups, tables, strict=True)}
        return [nodes_of[bundle.group.id].get(bundle.index, "") for bundle in self._bundles]

    async def placed(self, bundle: int) -> str:
        """Wait until the node of a bundle is alive, and return it. Ray finds another node for the bundles of a lost one.

        Raises:
            ClusterError: Ray finds none, or one that lacks the model.
        """
        ends = asyncio.get_running_loop().time() + self._place_s
        while True:
            node = (await self.nodes())[bundle]
            if node in {node.id for node in await ask(read_nodes)}:
                await self._check([node])
                return node
            if asyncio.get_running_loop().time() > ends:
                raise ClusterError(
                    f"the node of rank {bundle} is gone, and Ray found no place on another"
                    f"{self._bundles[bundle].within} within {self._place_s:g} s; start a node (`ray start --address=...`), "
                    f"or go on with fewer ranks (scale)"
                )
            await asyncio.sleep(_POLL_S)

    def _groups_of(self, count: int, group_of: Sequence[int]) -> list[int]:
        """The group of each of ``count`` bundles; all are one unless Ray packs each of them by itself."""
        if self._strategy == "PACK" and group_of:
            return list(group_of[:count])
        return [0 if self._group_size is None else bundle // self._group_size for bundle in range(count)]

    async def _make(self, first: int, group_of: Sequence[int]) -> list[_Bundle]:
        """Reserve bundles from number ``first`` on: a placement group for each expert-parallel group."""
        selector = await self._find_room(len(group_of) - first)
        parts = runs(group_of[first:])
        labels: list[dict[str, str]] = [{}] * len(parts)
        if selector is not None:
            labels = [{NODE_LABEL: selector}] * len(parts)
        elif self._strategy == "PACK":
            nodes, taken = await ask(read_nodes), await self.nodes()
            beside: dict[int, list[str]] = {}
            for node, group in zip(taken, group_of, strict=False):
                beside.setdefault(group, []).append(node)
            labels = near_labels(nodes, self._need, [(count, beside.get(group, ())) for group, count in parts])
        made: list[_Bundle] = []
        try:
            for (_, count), label in zip(parts, labels, strict=True):
                made += await self._reserve_near(count, label)
        except BaseException:
            for group in {bundle.group.id: bundle.group for bundle in made}.values():
                self._remove(group)
            raise
        return made

    async def _reserve_near(self, count: int, label: dict[str, str]) -> list[_Bundle]:
        """One placement group on nodes with this label; on any, if others have taken the room there."""
        if label and NODE_LABEL not in label:
            try:
                return await self._reserve(count, label, wait_s=_RESERVE_NEAR_S)
            except NotReserved as error:
                logger.warning("a group of %d ranks is not placed near each other, by %s: %s", count, label, error)
                label = {}
        return await self._reserve(count, label)

    async def _reserve(self, count: int, label: dict[str, str], wait_s: float = _RESERVE_S) -> list[_Bundle]:
        """One placement group, on nodes with this label.

        Raises:
            NotReserved: Ray didn't reserve it in time, though there was room.
            ClusterError: there is no room any more, or a node lacks the model.
        """
        group = await ask(
            lambda: placement_group(
                [self._need] * count,
                strategy=self._strategy,
                name=f"{self._name} {uuid.uuid4().hex[:8]}" if self._lasting is None else self._lasting.name_group(),
                lifetime=None if self._lasting is None else "detached",
                bundle_label_selector=[label] * count if label else None,
            )
        )
        try:
            if not await ask(group.wait, wait_s, deadline_s=wait_s + ANSWER_S):
                self._remove(group)
                await self._find_room(count)  # raises if a node was lost meanwhile
                raise NotReserved(
                    f"Ray did not reserve places for {count} ranks within {wait_s:g} s, though there was room; others may "
                    f"have taken it (`ray status -v` shows what waits). Try again"
                )
            table = await ask(placement_group_table, group)
            await self._check(table["bundles_to_node_id"].values())
        except BaseException:
            self._remove(group)
            raise
        near = "" if NODE_LABEL in label else "".join(f" with the label {key}={value}" for key, value in label.items())
        return [_Bundle(group, index, near) for index in range(count)]

    async def _find_room(self, count: int) -> str | None:
        """Ray's selector of nodes for new bundles. Processes that have just ended may hold places for a moment."""
        ends = asyncio.get_running_loop().time() + _FREE_S
        while True:
            nodes, taken = await ask(read_nodes), await self.nodes()
            try:
                return choose_nodes(nodes, self._need, count, self._strategy, [node for node in taken if node])
            except NoRoom as error:
                if not error.later:
                    raise
                if asyncio.get_running_loop().time() > ends:
                    raise ClusterError(f"{error}{await self._holders()}") from None
            await asyncio.sleep(_POLL_S)

    async def _holders(self) -> str:
        """The other epslots clusters that hold places, for messages."""
        tables = await ask(placement_group_table)
        others = [
            f"\n  {table['name'].removeprefix(_NAME).rpartition(', ')[0]}: {len(table['bundles'])} ranks"
            for table in tables.values()
            if table["name"].startswith(_NAME) and not table["name"].startswith(self._name) and table["state"] == "CREATED"
        ]
        return "\nOther clusters of epslots hold:" + "".join(others) if others else ""

    async def _check(self, ids: Iterable[str]) -> None:
        """Refuse nodes that lack the model's folder."""
        if self._folder is None or not set(ids) - self._checked:
            return
        nodes = {node.id: node for node in await ask(read_nodes)}
        new = sorted(set(ids) & nodes.keys() - self._checked)
        lacking = await asyncio.gather(*(self._look(nodes[node], self._folder) for node in new))
        if any(lacking):
            where = "\n".join(f"  {nodes[node]}: {reason}" for node, reason in zip(new, lacking, strict=True) if reason)
            raise ClusterError(
                f"every node needs the model at the same path, and not all have {self._folder}:\n{where}\nCopy it there, or "
                f"give a folder that all nodes share, or a hub id"
            )
        self._checked.update(new)

    async def _look(self, node: Node, folder: str) -> str:
        """Why a node can't be used; "" if it can."""
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        try:
            async with asyncio.timeout(_LOOK_S):
                answer = await _look.options(scheduling_strategy=there).remote(folder)
        except TimeoutError:
            return f"did not answer within {_LOOK_S:g} s"
        except RAY_ERRORS as error:
            return f"can't run epslots: {reason_of(error)}"
        return msgspec.msgpack.decode(answer, type=str) if answer else ""


def remove_group(group: PlacementGroup) -> None:
    """Remove a placement group, and end the actors on it; does nothing without a Ray that answers."""
    with suppress(ClusterError):
        if ray.is_initialized():  # or Ray would be started for it
            wait([begin(remove_placement_group, group)], _REMOVE_S)
