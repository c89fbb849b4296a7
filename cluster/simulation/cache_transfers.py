"""``CacheTransfers``: the ranks' side of simulated hand-overs. It answers the driver as ``rank/hand_over_threads.py`` does.

The source holds its request between two steps, and the target makes room between two of its own. Then the bytes go as in
``rank/cache_exchange.py``: between two steps the source reads as many pieces as its ``CopyBudget`` allows, and the target
writes as many when all of these have come. Those of a prompt that is being computed follow its steps. Pieces of a rank take
turns on its network. Copies delay no step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.messages.hand_over import HandedOver
from cluster.rank.copy_budget import CopyBudget
from cluster.simulation.simulated_rank import SimulatedRank
from epslots.generation.cache_image import CacheImage
from epslots.piece_sizes import BYTES_IN_FLIGHT, PIECE_BYTES
from epslots.simulation.grouped_cluster import GroupedCluster

_IN_FLIGHT = BYTES_IN_FLIGHT // PIECE_BYTES


@dataclass(eq=False)
class _Transfer:
    """A hand-over whose source lets its request's cache be read.

    Attributes:
        began_s: when it has begun to.
        image: of the cache at the source; of a prompt that is being computed, it grows.
        room: the place at the target.
        tokens: whose pieces were cut.
        unread, read: bytes of the pieces that wait at the source until it reads them, and until they are sent.
        in_flight: pieces that were sent and aren't written.
        bursts: how many pieces each read had, of those that aren't all written.
        arrived: bytes of the first burst's pieces that have come.
        asks, writes: a read of the source is due; a write of the target is.
        early: it has begun before the prompt was computed.
        held_s: since when the request makes no step.
        waits_s: since when it waits for the prompt; None = it doesn't.
        waited_s: how long it has.
        ended: it has failed.
    """

    number: int
    id: str
    source: int
    target: int
    began_s: float
    image: CacheImage
    room: CacheImage | None = None
    tokens: int = 0
    unread: deque[int] = field(default_factory=deque)
    read: deque[int] = field(default_factory=deque)
    in_flight: int = 0
    bursts: deque[int] = field(default_factory=deque)
    arrived: deque[int] = field(default_factory=deque)
    asks: bool = False
    writes: bool = False
    early: bool = False
    held_s: float | None = None
    waits_s: float | None = None
    waited_s: float = 0.0
    ended: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether there is a piece of every token."""
        return self.tokens == self.image.layout.tokens


class CacheTransfers:
    """All hand-overs of a simulated cluster.

    Args:
        cluster: its settings.
        ranks: of all groups.
        put: has a rank carry out a command before its next step.
        at: calls a function at a time, in simulated seconds.
        report: sends the driver a source's news.
        now: returns the time, in simulated seconds.
    """

    def __init__(
        self,
        cluster: GroupedCluster,
        ranks: Sequence[SimulatedRank],
        put: Callable[[int, Callable[[], None]], None],
        at: Callable[[float, Callable[[float], None]], None],
        report: Callable[[int, HandedOver], None],
        now: Callable[[], float],
    ) -> None:
        self._cluster, self._ranks = cluster, ranks
        self._put, self._at, self._report, self._now = put, at, report, now
        self._targets: dict[int, int] = {}
        target_ms = cluster.engine.step_target_ms
        self._budgets = [CopyBudget(None if target_ms is None else target_ms / 1e3) for _ in ranks]
        self._growing: dict[int, list[_Transfer]] = {}
        """By source: those that wait for its prompts."""
        self._free_s = [0.0] * len(ranks)
        """When each rank's network is free."""

    def take(self, number: int, target: int) -> None:
        """Begin a hand-over at its target."""
        self._targets[number] = target

    def give(self, number: int, id: str, source: int, now_s: float) -> None:
        """Begin a hand-over of a request's cache at its source."""
        self._put(source, partial(self._hold, number, id, source, now_s))

    def observe_step(self, ranks: Iterable[int], seconds: float) -> None:
        """These ranks have made a step."""
        for rank in ranks:
            self._budgets[rank].observe_step(seconds)

    def _copy(self, rank: int, nbytes: int) -> None:
        """A rank copies bytes between two steps."""
        self._budgets[rank].take(nbytes)
        self._budgets[rank].observe_copy(nbytes, nbytes / self._cluster.hand_over.host_bytes_s)

    def follow(self, source: int) -> None:
        """A source has made a step: more of its prompts may be read."""
        for one in self._growing.pop(source, ()):
            self._put(source, partial(self._read, one))

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
        else:
            self._ask(one)

    # The source.

    def _ask(self, one: _Transfer) -> None:
        one.asks = True
        self._put(one.source, partial(self._read, one))

    def _read(self, one: _Transfer) -> None:
        """Read the next pieces, between two steps; of a prompt, only its computed tokens. If these were read, wait."""
        if one.ended:
            return
        if one.image.gone:
            self._give_up(one)
            return
        now_s, tokens = self._now(), one.image.advance()
        if tokens == one.image.layout.tokens and one.held_s is None:
            one.held_s = now_s if one.early else one.began_s
        if not one.unread:
            if tokens == one.tokens:
                one.early, one.waits_s = True, now_s if one.waits_s is None else one.waits_s
                self._growing.setdefault(one.source, []).append(one)
                return
            self._cut(one, tokens, now_s)
        chosen = [one.unread.popleft() for _ in range(min(self._budgets[one.source].pieces(), len(one.unread)))]
        self._copy(one.source, sum(chosen))
        one.read.extend(chosen)
        one.bursts.append(len(chosen))
        one.asks = False
        self._at(now_s, partial(self._send, one))

    def _cut(self, one: _Transfer, tokens: int, now_s: float) -> None:
        """Cut a part into pieces: up to so many tokens."""
        if one.waits_s is not None:
            one.waited_s, one.waits_s = one.waited_s + now_s - one.waits_s, None
        one.early |= tokens < one.image.layout.tokens
        whole, rest = divmod((tokens - one.tokens) * self._cluster.kv_token_bytes, PIECE_BYTES)
        one.unread.extend([PIECE_BYTES] * whole + [rest] * (rest > 0))
        one.tokens = tokens

    def _send(self, one: _Transfer, now_s: float) -> None:
        """Send the pieces that were read, up to the bytes in flight that are allowed; then have the source read on."""
        if one.ended:
            return
        while one.read and one.in_flight < _IN_FLIGHT:
            one.in_flight += 1
            nbytes = one.read.popleft()
            self._at(self._carry(one, nbytes, now_s), partial(self._arrive, one, nbytes))
        if one.read or one.asks:
            return
        if one.unread or not one.is_cut:
            self._ask(one)
        elif not one.in_flight:
            self._at(now_s + self._cluster.hand_over.fixed_s, partial(self._complete, one))

    def _carry(self, one: _Transfer, nbytes: int, now_s: float) -> float:
        """When a piece is there: it goes as soon as both ranks' networks are free."""
        timing, source, target = self._cluster.hand_over, one.source, one.target
        same_node = self._cluster.node_of(source) == self._cluster.node_of(target)
        begins_s = max(now_s, self._free_s[source], self._free_s[target])
        self._free_s[source] = self._free_s[target] = begins_s + timing.busy_s(nbytes, same_node=same_node)
        return begins_s + timing.piece_s(nbytes, same_node=same_node)

    # The target.

    def _arrive(self, one: _Transfer, nbytes: int, _: float) -> None:
        one.arrived.append(nbytes)
        self._write_next(one)

    def _write_next(self, one: _Transfer) -> None:
        if one.bursts and len(one.arrived) >= one.bursts[0] and not one.writes:
            one.writes = True
            self._put(one.target, partial(self._write, one))

    def _write(self, one: _Transfer) -> None:
        """Write some pieces of a burst, between two steps; the next ones are written after another step."""
        if one.ended:
            return
        assert one.room is not None
        if one.room.gone:
            self._give_up(one)
            return
        count = min(self._budgets[one.target].pieces(), one.bursts[0])
        self._copy(one.target, sum(one.arrived.popleft() for _ in range(count)))
        one.in_flight -= count
        one.bursts[0] -= count
        if not one.bursts[0]:
            one.bursts.popleft()
        self._at(self._now(), partial(self._go_on, one))

    def _go_on(self, one: _Transfer, now_s: float) -> None:
        one.writes = False
        self._write_next(one)
        self._send(one, now_s)

    # The end.

    def _complete(self, one: _Transfer, now_s: float) -> None:
        if one.image.gone or one.room is None or one.room.gone:
            self._give_up(one)
            return
        one.room.complete()
        assert one.held_s is not None, "all of it was read"
        done = HandedOver(
            number=one.number,
            failure=None,
            seconds=now_s - one.held_s,
            copying_s=now_s - one.began_s - one.waited_s,
            nbytes=one.tokens * self._cluster.kv_token_bytes,
            tokens=one.tokens,
            prompt_token_s=self._ranks[one.source].prompt_token_s,
            step_bytes=self._budgets[one.source].step_bytes,
        )
        self._report(one.source, done)

    def _give_up(self, one: _Transfer) -> None:
        self._put(one.target, partial(self._ranks[one.target].release, one.id))
        self._fail(one)

    def _fail(self, one: _Transfer) -> None:
        one.ended = True
        self._put(one.source, partial(self._ranks[one.source].resume, one.id))
        self._report(one.source, HandedOver(number=one.number, failure="the target has no room, or the source no cache"))
