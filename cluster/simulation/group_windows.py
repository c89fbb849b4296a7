"""``GroupWindows``: windows of load of simulated groups, on their way to the cluster's controller, and its placements back.

The controller is the cluster's own (``controller/group_controllers.py``), and so are the messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from cluster.controller.controller import Controller
from cluster.controller.group_controllers import GroupControllers
from cluster.messages.controller import Attach, Learn, Order, Reply, address, decode_reply, encode
from cluster.messages.placement import GroupState, LoadReport
from cluster.simulation.lockstep_group import LockstepGroup
from epslots.load_window import LoadWindow
from epslots.placement.placement import pack, unpack
from epslots.placement.rank_speeds import USUAL
from epslots.simulation.grouped_cluster import GroupedCluster


class GroupWindows:
    """The controller of a simulated cluster, and what its groups have yet to tell it.

    Args:
        cluster: its settings.
        groups: of lock-step, by number.

    Attributes:
        placements: that the controller has published.
    """

    def __init__(self, cluster: GroupedCluster, groups: Sequence[LockstepGroup]) -> None:
        self.placements = 0
        self._cluster, self._groups = cluster, groups
        self._controllers = GroupControllers(lambda forecast: Controller(lambda: 0.0, forecast=forecast))
        self._seconds = [0.0] * len(groups)
        self._speeds = [(USUAL,) * cluster.group_size] * len(groups)
        for number, group in enumerate(groups):
            role = cluster.division.role_of(number)
            self._order(number, Attach(group=self._state(number, group), role=role, offered=None, published=0, frozen=False))

    def _order(self, group: int, order: Order) -> Reply:
        return decode_reply(self._controllers.answer(address(group, encode(order))))

    def _state(self, number: int, group: LockstepGroup) -> GroupState:
        model, size = group.experts.model, self._cluster.group_size
        layers = len(model.layers)
        return GroupState(
            number=0,
            epoch=number,
            nodes=tuple(f"node {self._cluster.node_of(number * size + rank)}" for rank in range(size)),
            placement=pack(model.placement),
            pending_migrations=model.pending_migrations,
            costs=self._cluster.timing.costs,
            expert_bytes=(self._cluster.expert_bytes,) * layers,
            pools=(0,) * layers,
        )

    def step(self, number: int, seconds: float) -> tuple[int, ...] | None:
        """A group has made a step: if a window ends with it, tell the controller, and follow its placement.

        Args:
            number: of the group.
            seconds: of one layer's depth, as the group's ranks would measure them.

        Returns:
            The speeds of its ranks, ``USUAL`` for a usual one, if the controller has learned others; else None.
        """
        group = self._groups[number]
        self._seconds[number] += seconds
        every = self._cluster.window_steps
        if group.steps % every:
            return None
        reports = tuple(
            LoadReport(number, rank, group.steps // every, window) for rank, window in enumerate(self._cut(number, every))
        )
        reply = self._order(number, Learn(reports, dropped=0))
        if (placed := reply.set_placement) is not None:
            self.placements += 1
            group.experts.model.follow(unpack(placed.placement), placed.bytes_per_step)
        if reply.speeds == self._speeds[number]:
            return None
        self._speeds[number] = reply.speeds
        return reply.speeds

    def _cut(self, number: int, steps: int) -> list[bytes]:
        """The group's window, as its ranks report it.

        All tokens stand in the first rank's report, and as sent to those that computed them: the controller adds them up.
        """
        experts = self._groups[number].experts
        tokens_LE, uses_LE, reuse_LD = experts.take_window()
        work, model, zeros = experts.take_work(), experts.model, (0,) * len(tokens_LE)
        seconds, self._seconds[number] = self._seconds[number], 0.0
        windows = []
        for rank in range(self._cluster.group_size):
            pairs_L, own_LE = work.pairs[:, rank], tokens_LE if not rank else np.zeros_like(tokens_LE)
            window = LoadWindow(
                steps=steps,
                seconds=seconds,
                tokens=own_LE.astype("<i8").tobytes(),
                uses=uses_LE.astype("<i8").tobytes(),
                reuse=reuse_LD.astype("<i8").tobytes(),
                hits=tuple(work.uses[:, rank].tolist()),
                misses=zeros,
                pairs_sent=zeros if rank else tuple((tokens_LE.sum(1) - pairs_L).tolist()),
                pairs_received=tuple(pairs_L.tolist()) if rank else zeros,
                compute_s=tuple((work.ns[:, rank] / 1e9).tolist()),
                placement=model.placement.version,
                pending_migrations=model.pending_migrations,
            )
            windows.append(msgspec.msgpack.encode(window))
        return windows
