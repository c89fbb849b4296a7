"""Conversations stay where their cache is while ranks come and go."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.driver.prefix_index import BLOCK
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduler import Scheduler
from epslots.generation.requests import Output, Request

CAPACITY = RankCapacity(100_000, max_requests=8)
SYSTEM = tuple(range(4 * BLOCK))
"""All conversations begin alike."""


class Talks:
    """Conversations on ranks that come, go and pause; one turn at a time."""

    def __init__(self, ranks: int) -> None:
        self.scheduler = Scheduler()
        self.ranks: dict[str, bool] = {}
        """By name: whether it serves."""
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.home: dict[int, str] = {}
        """By conversation: the rank that had its last turn, as long as it lives."""
        self.turns = self.stayed = 0
        for _ in range(ranks):
            self.come()

    def come(self) -> None:
        name = f"r{self.turns}.{len(self.ranks)}"
        while name in self.ranks:
            name += "+"
        self.ranks[name] = True
        self.scheduler.serve({name: CAPACITY})

    def go(self, rank: str) -> None:
        self.scheduler.release(rank)
        del self.ranks[rank]
        self.home = {talk: home for talk, home in self.home.items() if home != rank}

    def pause_or_serve(self, rank: str) -> None:
        self.ranks[rank] = not self.ranks[rank]
        if self.ranks[rank]:
            self.scheduler.serve({rank: CAPACITY})
        else:
            self.scheduler.pause([rank])

    def turn(self, talk: int) -> None:
        """A turn that is served at once; it goes to the rank that has the last one, if that serves."""
        self.turns += 1
        first = 1000 * (100 * self.turns + talk + 1)
        said = tuple(range(first, first + BLOCK + 8))
        self.prompts[talk] = (*self.prompts.get(talk, SYSTEM), *said)
        request = Request(str(self.turns), self.prompts[talk], 10)
        self.scheduler.add([request])
        ((worker, _),) = self.scheduler.assign()
        assert isinstance(worker, str) and self.ranks[worker]
        home = self.home.get(talk)
        if home is not None and self.ranks[home]:
            assert worker == home, "it has the longest beginning"
            self.stayed += 1
        self.home[talk] = worker
        assert self.scheduler.count(worker, Output(request.id, (1,), True, "stop")) is not None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("tttttcgp"), st.integers(0, 99)), max_size=80))
def test_talks_stay_with_their_rank_while_others_come_and_go(events: list[tuple[str, int]]):
    talks = Talks(4)
    for event, place in events:
        rank = sorted(talks.ranks)[place % len(talks.ranks)]
        serving = sum(talks.ranks.values())
        if event == "t":
            talks.turn(place % 20)
        elif event == "c":
            talks.come()
        elif serving > 1 or not talks.ranks[rank]:
            talks.go(rank) if event == "g" else talks.pause_or_serve(rank)
        talks.scheduler.check()


def test_most_turns_under_churn_find_their_cache():
    """A rank of eight is replaced after every tenth turn: those whose rank lives all stay."""
    talks, chance = Talks(8), random.Random(0)
    for number in range(800):
        if number % 10 == 9:
            talks.go(chance.choice(sorted(talks.ranks)))
            talks.come()
        talks.turn(chance.randrange(40))
    assert set(talks.scheduler._prefixes._blocks) <= set(talks.ranks), "of lost ranks nothing is remembered"
    assert talks.stayed / talks.turns == pytest.approx(0.6, abs=0.15)


def test_a_talk_leaves_a_rank_that_is_too_busy():
    """Sticky, but not at any price: where it would wait longer than its cache saves."""
    for busy in (0.5, 2):
        talks = Talks(2)
        talks.turn(0)
        home, other = talks.home[0], next(rank for rank in talks.ranks if rank != talks.home[0])
        cached = len(talks.prompts[0])
        talks.scheduler.pause([other])
        talks.scheduler.add([Request("long", tuple(range(50_000, 50_000 + int(busy * cached))), 10)])
        assert [worker for worker, _ in talks.scheduler.assign()] == [home]
        talks.scheduler.serve({other: CAPACITY})
        talks.scheduler.add([Request("next", (*talks.prompts[0], 1), 10)])
        assert [worker for worker, _ in talks.scheduler.assign()] == [home if busy < 1 else other]
