"""``RankLoads``: the ranks by what their requests cost them; the least loaded one with room is found in log(ranks). Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

from epslots.rank_groups import Role

BACKLOG_PART = 4
"""A rank is given a fourth more requests than it runs, and at least one more: one of them starts when another ends."""
_TRIES = 4
"""Of the least loaded ranks, those that are asked for room; after them, the rank with the most free cache."""


class Costly(Protocol):
    """A request, as far as it is a load."""

    @property
    def held_tokens(self) -> int:
        """Tokens that its rank's cache holds now."""

    @property
    def due_tokens(self) -> int:
        """Tokens that its rank has yet to compute, at most."""

    @property
    def alone(self) -> bool:
        """Whether it gets a rank to itself."""


@dataclass(frozen=True)
class RankCapacity:
    """The capacity of a rank.

    Attributes:
        kv_tokens: tokens that its cache holds.
        max_requests: requests that it runs at a time.
        shares_prefixes: it doesn't compute what it has in its cache of another prompt that begins alike.
        speed: its tokens a second over a usual rank's.
        role: of its group.
        machine: equal for ranks that can share memory; "" = this one can't.
    """

    kv_tokens: int
    max_requests: int
    shares_prefixes: bool = True
    speed: float = 1.0
    role: Role = "mixed"
    machine: str = ""

    @property
    def most_requests(self) -> int:
        """Requests that it is given, those that wait there included."""
        return self.max_requests + max(1, self.max_requests // BACKLOG_PART)


@dataclass(eq=False)
class _RankLoad:
    """The requests of a rank, in numbers.

    Attributes:
        number: its place in its group, and in the order of arrival; of equal ranks the lowest is taken, so that few requests
            are spread over the groups: those of a group wait for each other in every step.
        serves: it takes requests.
        reserved: one of its requests gets it to itself.
    """

    number: tuple[int, int]
    capacity: RankCapacity
    serves: bool = True
    requests: int = 0
    held_tokens: int = 0
    due_tokens: int = 0
    reserved: int = 0

    @property
    def open(self) -> bool:
        """Whether it takes one more request of some size."""
        return self.serves and not self.reserved and self.requests < self.capacity.most_requests

    @property
    def free_tokens(self) -> int:
        return self.capacity.kv_tokens - self.held_tokens

    @property
    def cost(self) -> float:
        """Tokens that it has yet to compute, in tokens of a usual rank: their time."""
        return self.due_tokens / self.capacity.speed

    def fits(self, request: Costly) -> bool:
        """Whether it has room for one more request; an idle rank has room for any."""
        if not self.requests:
            return self.serves
        return self.open and not request.alone and request.held_tokens <= self.free_tokens

    def change(self, request: Costly, sign: int) -> None:
        self.requests += sign
        self.held_tokens += sign * request.held_tokens
        self.due_tokens += sign * request.due_tokens
        self.reserved += sign * request.alone


class _LoadHeap:
    """Open ranks by a key; the lowest is found in log(ranks).

    Each open rank has one live node, whose key is at most its own: a key that grew is corrected when it comes to the top.

    Args:
        key: a rank's key.
    """

    def __init__(self, loads: dict[Hashable, _RankLoad], key: Callable[[_RankLoad], float]) -> None:
        self._loads, self._key = loads, key
        self._nodes: list[tuple[float, tuple[int, int], Hashable]] = []
        self._live: dict[Hashable, float] = {}
        """By rank: the key of its live node."""

    def push(self, worker: Hashable) -> None:
        """A rank's key may have fallen, or it may be open again."""
        load = self._loads[worker]
        key = self._key(load)
        if load.open and key < self._live.get(worker, math.inf):
            self._live[worker] = key
            heappush(self._nodes, (key, load.number, worker))
            if len(self._nodes) > 2 * len(self._live) + 64:
                self._nodes = [(key, self._loads[worker].number, worker) for worker, key in self._live.items()]
                heapify(self._nodes)

    def forget(self, worker: Hashable) -> None:
        """A rank is lost."""
        self._live.pop(worker, None)

    def pop(self) -> Hashable | None:
        """Take out the open rank with the lowest key, which must be pushed again; None if no rank is open."""
        while self._nodes:
            key, number, worker = self._nodes[0]
            if self._live.get(worker) != key or self._loads[worker].number != number:
                heappop(self._nodes)
            elif not (load := self._loads[worker]).open:
                heappop(self._nodes)
                del self._live[worker]
            elif key < (now := self._key(load)):
                self._live[worker] = now
                heapreplace(self._nodes, (now, number, worker))
            else:
                heappop(self._nodes)
                del self._live[worker]
                return worker
        return None


class RankLoads:
    """All ranks of one kind that serve or have requests. A ``worker`` is any key that stands for a rank's process.

    Attributes:
        serving: number of ranks that serve.
    """

    def __init__(self) -> None:
        self.serving = 0
        self._loads: dict[Hashable, _RankLoad] = {}
        self._cost = 0.0
        """Of all ranks."""
        self._numbers = itertools.count()
        self._by_cost = _LoadHeap(self._loads, lambda load: load.cost)
        self._by_free = _LoadHeap(self._loads, lambda load: -load.free_tokens)

    def __contains__(self, worker: Hashable) -> bool:
        return worker in self._loads

    def __len__(self) -> int:
        return len(self._loads)

    def serve(self, worker: Hashable, capacity: RankCapacity, place: int = 0) -> None:
        """A rank takes requests from now on, with this capacity.

        Args:
            place: in its group.
        """
        self.pause(worker)
        if worker in self._loads:
            load = self._loads[worker]
            self._cost -= load.cost
            load.capacity, load.serves = capacity, True
            self._cost += load.cost
        else:
            self._loads[worker] = _RankLoad((place, next(self._numbers)), capacity)
        self.serving += 1
        self._push(worker)

    def pause(self, worker: Hashable) -> None:
        """A rank keeps its requests, and takes no further ones until it serves again."""
        if worker in self._loads and self._loads[worker].serves:
            self._loads[worker].serves = False
            self.serving -= 1

    def remove(self, worker: Hashable) -> None:
        """A rank is lost."""
        self.pause(worker)
        if (load := self._loads.pop(worker, None)) is not None:
            self._cost -= load.cost
        self._by_cost.forget(worker)
        self._by_free.forget(worker)

    def add(self, worker: Hashable, request: Costly) -> None:
        """A rank has a further request."""
        self._change(worker, request, 1)

    def drop(self, worker: Hashable, request: Costly) -> None:
        """A rank has a request no more, which must have its tokens of now."""
        if worker in self._loads:
            self._change(worker, request, -1)
            self._push(worker)

    def _change(self, worker: Hashable, request: Costly, sign: int) -> None:
        load = self._loads[worker]
        before = load.cost
        load.change(request, sign)
        self._cost += load.cost - before

    def _push(self, worker: Hashable) -> None:
        self._by_cost.push(worker)
        self._by_free.push(worker)

    def capacity(self, worker: Hashable) -> RankCapacity:
        """The capacity of a rank that is known."""
        return self._loads[worker].capacity

    def requests(self, worker: Hashable) -> int:
        """The number of a rank's requests."""
        return self._loads[worker].requests

    def fits(self, worker: Hashable, request: Costly) -> bool:
        """Whether a rank serves and has room for a request."""
        return worker in self._loads and self._loads[worker].fits(request)

    def cost(self, worker: Hashable, further: int = 0) -> float:
        """Tokens that a rank has yet to compute, and ``further`` ones, in tokens of a usual rank."""
        load = self._loads[worker]
        return load.cost + further / load.capacity.speed

    @property
    def mean_cost(self) -> float:
        """``cost`` of a rank on average."""
        return self._cost / len(self._loads) if self._loads else 0.0

    def least_loaded(self, request: Costly) -> Hashable | None:
        """A rank with room for a request; None if there is none.

        It is the least loaded one, unless the request fits into none of the ``_TRIES`` least loaded ones.
        """
        asked: list[Hashable] = []
        found = None
        while found is None and len(asked) < _TRIES and (worker := self._by_cost.pop()) is not None:
            asked.append(worker)
            found = worker if self.fits(worker, request) else None
        for worker in asked:
            self._by_cost.push(worker)
        return self.freest(request) if found is None else found

    def freest(self, request: Costly) -> Hashable | None:
        """The open rank with the most free cache; None if it has no room for a request."""
        worker = self._by_free.pop()
        if worker is None:
            return None
        self._by_free.push(worker)
        return worker if self.fits(worker, request) else None

    def check(self, served: Iterable[tuple[Hashable, Costly]]) -> None:
        """Assert that the sums are those of the requests that ranks have."""
        sums = {worker: _RankLoad(load.number, load.capacity, load.serves) for worker, load in self._loads.items()}
        for worker, request in served:
            sums[worker].change(request, 1)
        for worker, load in self._loads.items():
            assert vars(load) == vars(sums[worker]), (vars(load), vars(sums[worker]))
