"""Routing requests over many ranks: decisions a second, and tokens of prompts that needn't be computed, on a chat-like trace.

    conversations -> turns, each with all earlier ones before it -> a router -> 64 or 1,024 ranks, each with its own cache

Nothing is computed: a turn takes as many ticks as chance says. The ranks' caches are kept here, apart from the scheduler's own
idea of them.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from cluster.driver.prefix_index import BLOCK, block_hashes
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduler import Scheduler
from epslots.bench.report import BenchReport
from epslots.generation.requests import Output, Request

_TURNS = 5
_SYSTEM_PROMPTS, _SYSTEM_TOKENS = 32, 512
_TURN_TOKENS, _NEW_TOKENS = 160, 64
_KV_TOKENS, _MOST_REQUESTS = 65_536, 16
_LONGEST_TICKS = 40


@dataclass(frozen=True)
class _Scale:
    """How much is routed.

    Attributes:
        starts: conversations that begin in a tick.
        replaced_every: ticks after which a rank is lost and another one comes; None = all stay.
    """

    ranks: int
    conversations: int
    starts: int
    replaced_every: int | None = None

    @property
    def name(self) -> str:
        churn = "" if self.replaced_every is None else f", one of which is replaced every {self.replaced_every} ticks"
        return f"{self.conversations * _TURNS:,} requests on {self.ranks:,} ranks{churn}"


MANY = _Scale(ranks=1024, conversations=20_000, starts=250)
FEW = _Scale(ranks=64, conversations=20_000, starts=16)
CHURN = replace(MANY, replaced_every=2)


@dataclass(eq=False)
class _Conversation:
    number: int
    prompt: tuple[int, ...]
    turns: int = 0
    assignment: int = 0

    @property
    def id(self) -> str:
        """Of its present turn's request."""
        return f"{self.number}.{self.turns}"

    def end(self) -> Output:
        """The last output of its present turn."""
        return Output(self.id, (0,) * (_NEW_TOKENS - 1), True, "length", assignment=self.assignment)


@dataclass(eq=False)
class _Rank:
    """A rank's true cache: blocks of prompts, the ones that were used longest ago are dropped first."""

    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    running: int = 0

    def take(self, prompt: tuple[int, ...]) -> int:
        """Enter a prompt; returns its tokens that were there."""
        hashes = block_hashes(prompt)
        reused = next((n for n, block in enumerate(hashes) if block not in self.blocks), len(hashes))
        for block in reversed(hashes):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > _KV_TOKENS // BLOCK:
            self.blocks.popitem(last=False)
        return reused * BLOCK


class _Router(Protocol):
    def submit(self, request: Request) -> None: ...
    def assign(self) -> list[tuple[int, Request]]: ...
    def take(self, rank: int, output: Output) -> None: ...
    def replace(self, rank: int, by: int) -> None: ...


class _Scheduled:
    """The cluster's own scheduler."""

    def __init__(self, ranks: int, shares_prefixes: bool = True) -> None:
        self._scheduler = Scheduler()
        self._capacity = RankCapacity(_KV_TOKENS, _MOST_REQUESTS, shares_prefixes)
        self._scheduler.serve(dict.fromkeys(range(ranks), self._capacity))

    def submit(self, request: Request) -> None:
        self._scheduler.add([request])

    def assign(self) -> list[tuple[int, Request]]:
        return self._scheduler.assign()  # type: ignore[return-value]  # the keys given above

    def take(self, rank: int, output: Output) -> None:
        self._scheduler.count(rank, output)

    def replace(self, rank: int, by: int) -> None:
        self._scheduler.release(rank, blame=False)
        self._scheduler.serve({by: self._capacity})


class _Random:
    """Any rank with a free place."""

    def __init__(self, ranks: int) -> None:
        self._chance, self._waiting, self._running = random.Random(1), list[Request](), [0] * ranks

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def assign(self) -> list[tuple[int, Request]]:
        found = []
        for request in self._waiting:
            rank = self._chance.randrange(len(self._running))
            while self._running[rank] == _MOST_REQUESTS:
                rank = self._chance.randrange(len(self._running))
            self._running[rank] += 1
            found.append((rank, request))
        self._waiting.clear()
        return found

    def take(self, rank: int, output: Output) -> None:
        self._running[rank] -= output.finished

    def replace(self, rank: int, by: int) -> None:
        raise NotImplementedError("its ranks all stay")


def measure_routing(report: BenchReport, _cache_dir: Path, _rounds: int) -> None:
    """Route the turns of a chat-like trace with each router. Then on fewer ranks, and while ranks come and go."""
    ways: dict[str, Callable[[int], _Router]] = {
        "scheduler": _Scheduled,
        "scheduler, prefixes not looked at": partial(_Scheduled, shares_prefixes=False),
        "at random": _Random,
    }
    report.table(MANY.name, [{"router": name, **route(make, MANY)} for name, make in ways.items()])
    for scale in (FEW, CHURN):
        report.table(scale.name, [{"router": "scheduler", **route(_Scheduled, scale)}])


def route(make: Callable[[int], _Router], scale: _Scale) -> dict[str, float]:
    """The figures of one router."""
    return _TurnTrace(make(scale.ranks), scale).run()


class _TurnTrace:
    """Conversations, tick by tick, and the true caches of the ranks."""

    def __init__(self, router: _Router, scale: _Scale) -> None:
        self._router, self._scale, self._chance = router, scale, random.Random(0)
        self._ranks = {number: _Rank() for number in range(scale.ranks)}
        self._numbers = itertools.count(scale.ranks)
        self._coming = _conversations(self._chance, scale.conversations)
        self._due: dict[int, list[tuple[int, _Conversation]]] = {}
        """By tick: turns that end."""
        self._again: dict[int, list[_Conversation]] = {}
        self._talking: dict[str, _Conversation] = {}
        self._seconds, self._decisions, self._prompt_tokens, self._reused, self._most = 0.0, 0, 0, 0, 0
        self._done = 0

    def run(self) -> dict[str, float]:
        """Route all turns; returns the figures."""
        tick, outputs = 0, list[tuple[int, Output]]()
        while self._done < self._scale.conversations * _TURNS:
            if self._scale.replaced_every is not None and tick % self._scale.replaced_every == 0:
                self._replace()
            ended = [(rank, one) for rank, one in self._due.pop(tick, []) if rank in self._ranks]
            starting = [found for _, found in zip(range(self._scale.starts), self._coming, strict=False)]
            asking = self._again.pop(tick, []) + starting
            outputs += [(rank, one.end()) for rank, one in ended]
            assigned = self._route(asking, [output for output in outputs if output[0] in self._ranks])
            for rank, one in ended:
                self._end(tick, rank, one)
            outputs = [
                (rank, Output(request.id, (0,), assignment=request.assignment)) for rank, request in assigned
            ]  # a tick later
            for rank, request in assigned:
                self._begin(tick, rank, request)
            self._most = max(self._most, max(rank.running for rank in self._ranks.values()))
            tick += 1
        return {
            "decisions a second": self._decisions / self._seconds,
            "us a decision": 1e6 * self._seconds / self._decisions,
            "reused of prompts' tokens": self._reused / self._prompt_tokens,
            "most requests at a time on a rank": self._most,
        }

    def _route(self, asking: list[_Conversation], outputs: list[tuple[int, Output]]) -> list[tuple[int, Request]]:
        requests = [Request(one.id, one.prompt, _NEW_TOKENS) for one in asking]
        self._talking |= {one.id: one for one in asking}
        began = time.perf_counter()
        for rank, output in outputs:
            self._router.take(rank, output)
        for request in requests:
            self._router.submit(request)
        assigned = self._router.assign()
        self._seconds += time.perf_counter() - began
        self._decisions += len(assigned)
        return assigned

    def _replace(self) -> None:
        """A rank is lost with its cache, and its requests begin anew elsewhere."""
        lost, new = self._chance.choice(list(self._ranks)), next(self._numbers)
        del self._ranks[lost]
        self._ranks[new] = _Rank()
        began = time.perf_counter()
        self._router.replace(lost, new)
        self._seconds += time.perf_counter() - began

    def _begin(self, tick: int, rank: int, request: Request) -> None:
        self._reused += self._ranks[rank].take(request.prompt)
        self._prompt_tokens += len(request.prompt)
        self._ranks[rank].running += 1
        self._talking[request.id].assignment = request.assignment
        due = tick + self._chance.randint(1, _LONGEST_TICKS)
        self._due.setdefault(due, []).append((rank, self._talking[request.id]))

    def _end(self, tick: int, rank: int, one: _Conversation) -> None:
        self._ranks[rank].running -= 1
        del self._talking[one.id]
        one.prompt += tuple(self._chance.choices(range(1000, 2000), k=_TURN_TOKENS))
        one.turns += 1
        self._done += 1
        if one.turns < _TURNS:
            self._again.setdefault(tick + self._chance.randint(1, _LONGEST_TICKS), []).append(one)


def _conversations(chance: random.Random, count: int) -> Iterator[_Conversation]:
    for number in range(count):
        system = chance.randrange(_SYSTEM_PROMPTS)
        first = tuple(chance.choices(range(1000, 2000), k=_TURN_TOKENS))
        yield _Conversation(number, (*((system,) * _SYSTEM_TOKENS), *first))
