"""``CacheTransfers``: the ranks' side of simulated hand-overs. It answers the driver as ``rank/hand_over_threads.py`` does.

The source holds its request before a step, the target makes room before one of its own, and the bytes take their time. The
transfers of a rank take turns on its link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.messages.hand_over import HandedOver
from cluster.simulation.simulated_rank import SimulatedRank
from epslots.generation.cache_image import CacheImage
from epslots.simulation.grouped_cluster import GroupedCluster


@dataclass(frozen=True)
class _Transfer:
    """A hand-over whose source holds its request.

    Attributes:
        began_s: when it has begun to.
        image: of the request's cache at the source.
    """

    number: int
    id: str
    source: int
    target: int
    began_s: float
    image: CacheImage


class CacheTransfers:
    """All hand-overs of a simulated cluster.

    Args:
        cluster: its settings.
        ranks: of all groups.
        put: has a rank carry out a command before its next step.
        at: calls a function at a time, in simulated seconds.
        report: sends the driver a source's news.
    """

    def __init__(
        self,
        cluster: GroupedCluster,
        ranks: Sequence[SimulatedRank],
        put: Callable[[int, Callable[[], None]], None],
        at: Callable[[float, Callable[[float], None]], None],
        report: Callable[[int, HandedOver], None],
    ) -> None:
        self._cluster, self._ranks = cluster, ranks
        self._put, self._at, self._report = put, at, report
        self._targets: dict[int, int] = {}
        self._free_s = [0.0] * len(ranks)
        """When each rank's link is free."""

    def take(self, number: int, target: int) -> None:
        """A rank is to take the cache of a hand-over."""
        self._targets[number] = target

    def give(self, number: int, id: str, source: int, now_s: float) -> None:
        """A rank is to give a request's cache to the one that takes it."""
        self._put(source, partial(self._hold, number, id, source, now_s))

    def _hold(self, number: int, id: str, source: int, now_s: float) -> None:
        target, image = self._targets.pop(number), self._ranks[source].hold(id)
        if image is None:
            self._report(source, HandedOver(number=number, failure="the request isn't decoding now"))
            return
        self._put(target, partial(self._reserve, _Transfer(number, id, source, target, now_s, image)))

    def _reserve(self, one: _Transfer) -> None:
        room = None if one.image.gone else self._ranks[one.target].reserve(one.id, one.image.layout)
        if room is None:
            self._fail(one)
            return
        self._at(0.0, partial(self._send, one, room))

    def _send(self, one: _Transfer, room: CacheImage, now_s: float) -> None:
        """The bytes go as soon as both links are free."""
        timing, nbytes = self._cluster.hand_over, self._nbytes(one)
        same_node = self._cluster.node_of(one.source) == self._cluster.node_of(one.target)
        begins_s = max(now_s, self._free_s[one.source], self._free_s[one.target])
        ends_s = begins_s + timing.transfer_s(nbytes, same_node=same_node)
        self._free_s[one.source] = self._free_s[one.target] = ends_s
        self._at(ends_s + timing.fixed_s, partial(self._complete, one, room))

    def _nbytes(self, one: _Transfer) -> int:
        return one.image.layout.tokens * self._cluster.kv_token_bytes

    def _complete(self, one: _Transfer, room: CacheImage, now_s: float) -> None:
        if one.image.gone or room.gone:
            self._put(one.target, partial(self._ranks[one.target].release, one.id))
            self._fail(one)
            return
        room.complete()
        done = HandedOver(
            number=one.number,
            failure=None,
            seconds=now_s - one.began_s,
            nbytes=self._nbytes(one),
            tokens=one.image.layout.tokens,
            prompt_token_s=self._ranks[one.source].prompt_token_s,
        )
        self._report(one.source, done)

    def _fail(self, one: _Transfer) -> None:
        self._put(one.source, partial(self._ranks[one.source].resume, one.id))
        self._report(one.source, HandedOver(number=one.number, failure="the target has no room, or the source no cache"))
