"""``CacheTransfers``: the ranks' side of simulated hand-overs. It answers the driver as ``rank/hand_over_threads.py`` does.

The source holds its request before a step, the target makes room before one of its own, and the bytes take their time; those
of a prompt that is being computed follow its steps. The transfers of a rank take turns on its link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.messages.hand_over import HandedOver
from cluster.simulation.simulated_rank import SimulatedRank
from epslots.generation.cache_image import CacheImage
from epslots.simulation.grouped_cluster import GroupedCluster


@dataclass(eq=False)
class _Transfer:
    """A hand-over whose source lets its request's cache be read.

    Attributes:
        began_s: when it has begun to.
        image: of the cache at the source; of a prompt that is being computed, it grows.
        room: the place at the target.
        sent: tokens that are on their way, or there.
        arrives_s: when they are all there.
        copying_s: that they have taken.
        early: it has begun before the prompt was computed.
        held_s: since when the request makes no step.
    """

    number: int
    id: str
    source: int
    target: int
    began_s: float
    image: CacheImage
    room: CacheImage | None = None
    sent: int = 0
    arrives_s: float = 0.0
    copying_s: float = 0.0
    early: bool = False
    held_s: float = 0.0


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
        self._growing: dict[int, list[_Transfer]] = {}
        """By source: those whose prompts are being computed."""
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
        one.room = None if one.image.gone else self._ranks[one.target].reserve(one.id, one.image.layout)
        if one.room is None:
            self._fail(one)
            return
        self._at(0.0, partial(self._send, one))

    def _send(self, one: _Transfer, now_s: float) -> None:
        """Send what is computed of a cache; the rest follows the steps."""
        if one.image.gone:
            self._give_up(one)
            return
        tokens = one.image.advance()
        self._send_part(one, tokens, now_s)
        if tokens < one.image.layout.tokens:
            one.early = True
            self._growing.setdefault(one.source, []).append(one)
            return
        one.held_s = now_s if one.early else one.began_s
        self._at(one.arrives_s + self._cluster.hand_over.fixed_s, partial(self._complete, one))

    def follow(self, source: int, now_s: float) -> None:
        """A source has made a step: more of its prompts can be sent."""
        for one in self._growing.pop(source, ()):
            self._send(one, now_s)

    def _send_part(self, one: _Transfer, tokens: int, now_s: float) -> None:
        """The bytes go as soon as both links are free."""
        nbytes = (tokens - one.sent) * self._cluster.kv_token_bytes
        same_node = self._cluster.node_of(one.source) == self._cluster.node_of(one.target)
        seconds = self._cluster.hand_over.transfer_s(nbytes, same_node=same_node)
        one.arrives_s = max(now_s, self._free_s[one.source], self._free_s[one.target]) + seconds
        self._free_s[one.source] = self._free_s[one.target] = one.arrives_s
        one.sent, one.copying_s = tokens, one.copying_s + seconds

    def _complete(self, one: _Transfer, now_s: float) -> None:
        if one.image.gone or one.room is None or one.room.gone:
            self._give_up(one)
            return
        one.room.complete()
        done = HandedOver(
            number=one.number,
            failure=None,
            seconds=now_s - one.held_s,
            copying_s=one.copying_s + self._cluster.hand_over.fixed_s,
            nbytes=one.sent * self._cluster.kv_token_bytes,
            tokens=one.sent,
            prompt_token_s=self._ranks[one.source].prompt_token_s,
        )
        self._report(one.source, done)

    def _give_up(self, one: _Transfer) -> None:
        self._put(one.target, partial(self._ranks[one.target].release, one.id))
        self._fail(one)

    def _fail(self, one: _Transfer) -> None:
        self._put(one.source, partial(self._ranks[one.source].resume, one.id))
        self._report(one.source, HandedOver(number=one.number, failure="the target has no room, or the source no cache"))
