"""Routing requests over many ranks: decisions a second, and tokens of prompts that needn't be computed, on a chat-like trace.

    conversations -> turns, each with all earlier ones before it -> a router -> 1,024 ranks, each with a cache of prefixes

Nothing is computed: a turn takes as many ticks as chance says. The ranks' caches are kept here, apart from the scheduler's own
idea of them.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cluster.driver.prefix_index import BLOCK, block_hashes
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduler import Scheduler
from epslots.bench.report import BenchReport
from epslots.generation.requests import Output, Request

_RANKS = 1024
_CONVERSATIONS, _TURNS = 20_000, 5
_SYSTEM_PROMPTS, _SYSTEM_TOKENS = 32, 512
_TURN_TOKENS, _NEW_TOKENS = 160, 64
_KV_TOKENS, _MOST_REQUESTS = 65_536, 16
_STARTS_A_TICK = 250
_LONGEST_TICKS = 40


@dataclass(eq=False)
class _Conversation:
    number: int
    prompt: tuple[int, ...]
    turns: int = 0

    @property
    def id(self) -> str:
        """Of its present turn's request."""
        return f"{self.number}.{self.turns}"


@dataclass(eq=False)
class _Rank:
    """A rank's true cache: blocks of prompts, the ones that were used longest ago are dropped first."""

    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

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


class _Scheduled:
    """The cluster's own scheduler."""

    def __init__(self, shares_prefixes: bool) -> None:
        self._scheduler = Scheduler()
        capacity = RankCapacity(_KV_TOKENS, _MOST_REQUESTS, shares_prefixes)
        self._scheduler.serve(dict.fromkeys(range(_RANKS), capacity))

    def submit(self, request: Request) -> None:
        self._scheduler.add([request])

    def assign(self) -> list[tuple[int, Request]]:
        return self._scheduler.assign()  # type: ignore[return-value]  # the keys given above

    def take(self, rank: int, output: Output) -> None:
        self._scheduler.count(rank, output)


class _Random:
    """Any rank with a free place."""

    def __init__(self, chance: random.Random) -> None:
        self._chance, self._waiting, self._running = chance, list[Request](), [0] * _RANKS

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def assign(self) -> list[tuple[int, Request]]:
        found = []
        for request in self._waiting:
            rank = self._chance.randrange(_RANKS)
            while self._running[rank] == _MOST_REQUESTS:
                rank = self._chance.randrange(_RANKS)
            self._running[rank] += 1
            found.append((rank, request))
        self._waiting.clear()
        return found

    def take(self, rank: int, output: Output) -> None:
        self._running[rank] -= output.finished


def measure_routing(report: BenchReport, _cache_dir: Path, _rounds: int) -> None:
    """Route the turns of a chat-like trace, once with each router."""
    ways: dict[str, _Router] = {
        "scheduler": _Scheduled(shares_prefixes=True),
        "scheduler, prefixes not looked at": _Scheduled(shares_prefixes=False),
        "at random": _Random(random.Random(1)),
    }
    report.table(
        f"{_CONVERSATIONS * _TURNS:,} requests on {_RANKS:,} ranks",
        [{"router": name, **_measure(router)} for name, router in ways.items()],
    )


def _measure(router: _Router) -> dict[str, float]:
    chance = random.Random(0)
    ranks = [_Rank() for _ in range(_RANKS)]
    coming = _conversations(chance)
    due: dict[int, list[tuple[int, _Conversation]]] = {}
    talking: dict[str, _Conversation] = {}
    again: dict[int, list[_Conversation]] = {}
    seconds, decisions, prompt_tokens, reused, tick, most = 0.0, 0, 0, 0, 0, 0
    running = [0] * _RANKS
    outputs: list[tuple[int, Output]] = []
    while decisions < _CONVERSATIONS * _TURNS:
        ended = due.pop(tick, [])
        asking = again.pop(tick, []) + [found for _, found in zip(range(_STARTS_A_TICK), coming, strict=False)]
        requests = [Request(one.id, one.prompt, _NEW_TOKENS) for one in asking]
        talking |= {request.id: one for request, one in zip(requests, asking, strict=True)}
        outputs += [(rank, Output(one.id, (0,) * (_NEW_TOKENS - 1), True, "length")) for rank, one in ended]
        began = time.perf_counter()
        for rank, output in outputs:
            router.take(rank, output)
        for request in requests:
            router.submit(request)
        assigned = router.assign()
        seconds += time.perf_counter() - began
        for rank, one in ended:
            running[rank] -= 1
            one.turns += 1
            if one.turns < _TURNS:
                again.setdefault(tick + chance.randint(1, _LONGEST_TICKS), []).append(one)
        outputs = [(rank, Output(request.id, (0,))) for rank, request in assigned]  # a tick later
        for rank, request in assigned:
            one = talking.pop(request.id)
            one.prompt += tuple(chance.choices(range(1000, 2000), k=_TURN_TOKENS))
            reused += ranks[rank].take(request.prompt)
            prompt_tokens += len(request.prompt)
            running[rank] += 1
            due.setdefault(tick + chance.randint(1, _LONGEST_TICKS), []).append((rank, one))
        decisions += len(assigned)
        most = max(most, max(running))
        tick += 1
    return {
        "decisions a second": decisions / seconds,
        "us a decision": 1e6 * seconds / decisions,
        "reused of prompts' tokens": reused / prompt_tokens,
        "most requests at a time on a rank": most,
    }


def _conversations(chance: random.Random) -> Iterator[_Conversation]:
    for number in range(_CONVERSATIONS):
        system = chance.randrange(_SYSTEM_PROMPTS)
        first = tuple(chance.choices(range(1000, 2000), k=_TURN_TOKENS))
        yield _Conversation(number, (*((system,) * _SYSTEM_TOKENS), *first))
