"""Requests wait in order for each role, never for ranks of another role, and never for ever."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.driver.hand_over_costs import FIRST_SHORT_TOKENS
from cluster.driver.prefix_index import BLOCK
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduled_request import MoveClaim
from cluster.driver.scheduler import Scheduler
from cluster.messages.hand_over import HandedOver, PromptProgress
from epslots.generation.requests import Output, Request

PREFILL, DECODE = RankCapacity(10_000, 1, role="prefill"), RankCapacity(10_000, 16, role="decode")
END = Output("", (), True, "stop")


def request(id: str, tokens: int, new: int = 20, first: int = 0) -> Request:
    return Request(id, tuple(range(first, first + tokens)), new)


def add(scheduler: Scheduler, *requests: Request) -> list[tuple[Hashable, str]]:
    for each in requests:
        scheduler.add([each])
    return given_by(scheduler)


def given_by(scheduler: Scheduler) -> list[tuple[Hashable, str]]:
    return [(worker, each.id) for worker, each in scheduler.assign()]


def end(scheduler: Scheduler, worker: Hashable, id: str) -> None:
    assert scheduler.count(worker, Output(id, (1,), True, "stop")) is not None


LONG = [request(id, 500, first=1000 * number) for number, id in enumerate("abcd")]
SHORT = request("s", 10)


def test_a_short_prompt_passes_those_that_wait_for_another_role():
    scheduler = Scheduler()
    scheduler.serve({"p": PREFILL, "d": DECODE})
    assert add(scheduler, *LONG, SHORT) == [("p", "a"), ("p", "b"), ("d", "s")]
    end(scheduler, "p", "a")
    assert given_by(scheduler) == [("p", "c")], "among themselves they keep their order"
    scheduler.check()


def test_a_short_prompt_waits_for_no_group_that_forms_anew():
    scheduler = Scheduler()
    scheduler.serve({"p": PREFILL, "d": DECODE})
    scheduler.pause(["p"], soon=True)
    assert add(scheduler, LONG[0], SHORT) == [("d", "s")]
    scheduler.serve({"p": PREFILL})
    assert given_by(scheduler) == [("p", "a")]


def test_short_prompts_have_their_turns_among_long_ones():
    """Where the decode rank is full, they want the same rank as the long ones, and have their turns among them."""
    scheduler, full = Scheduler(), RankCapacity(10_000, 1, role="decode")
    scheduler.serve({"p": PREFILL, "d": full})
    assert add(scheduler, *(request(f"s{number}", 10) for number in range(2))) == [("d", "s0"), ("d", "s1")]
    assert add(scheduler, *LONG[:3], SHORT, LONG[3]) == [("p", "a"), ("p", "b")]
    end(scheduler, "p", "a")
    end(scheduler, "p", "b")
    assert given_by(scheduler) == [("p", "c"), ("p", "s")]
    end(scheduler, "p", "s")
    assert given_by(scheduler) == [("p", "d")]


def test_none_passes_one_that_waits_for_the_same_rank():
    """Not even from the other line, though it needs less of the cache."""
    scheduler, full = Scheduler(), RankCapacity(10_000, 1, role="decode")
    scheduler.serve({"p": RankCapacity(800, 16, role="prefill"), "d": full})
    assert add(scheduler, request("s0", 10), request("s1", 10)) == [("d", "s0"), ("d", "s1")]
    assert add(scheduler, LONG[0], LONG[1], SHORT) == [("p", "a")]
    end(scheduler, "p", "a")
    assert given_by(scheduler) == [("p", "b"), ("p", "s")]
    scheduler = Scheduler()
    scheduler.serve({"p": RankCapacity(800, 16, role="prefill"), "d": full})
    assert add(scheduler, request("s0", 10), request("s1", 10)) == [("d", "s0"), ("d", "s1")]
    assert add(scheduler, request("l", 780), request("s2", 30), LONG[2], SHORT) == [("p", "l")]
    scheduler.end("c")
    assert given_by(scheduler) == [], "a short one waits for it, too"


def test_prompts_are_judged_anew_when_decode_ranks_come():
    scheduler = Scheduler()
    scheduler.serve({"p": PREFILL})
    assert add(scheduler, *LONG, SHORT) == [("p", "a"), ("p", "b")]
    scheduler.serve({"d": DECODE})
    assert given_by(scheduler) == [("d", "s")]
    scheduler.end("c")
    scheduler.check()
    assert scheduler.queued == 1


def test_a_prompt_that_is_cached_where_it_decodes_is_short():
    scheduler = Scheduler()
    scheduler.serve({"p": PREFILL, "d": DECODE})
    scheduler.pause(["p"])
    assert add(scheduler, request("before", 16 * BLOCK + 1)) == [("d", "before")]
    scheduler.serve({"p": PREFILL})
    assert add(scheduler, *LONG[1:], request("after", 16 * BLOCK + 9)) == [("p", "b"), ("p", "c"), ("d", "after")]


def test_ways_are_judged_by_their_own_hand_overs():
    """Between nodes a hand-over takes ten times as long: there, longer prompts stay where they decode."""
    here, there = (RankCapacity(10_000, 16, role="decode", machine=machine) for machine in ("m", "n"))
    found = list[str]()
    for decode in (here, there):
        scheduler = Scheduler()
        costs = scheduler._ranks.costs
        for _ in range(20):
            for tokens in (100, 200):
                costs.observe(tokens, 1e-4 * tokens, prompt_token_s=1e-3, near=True)
                costs.observe(tokens, 1.5e-3 * tokens, prompt_token_s=1e-3, near=False)
        scheduler.serve({"p": RankCapacity(10_000, 1, role="prefill", machine="m"), "d": decode})
        scheduler.add([LONG[0]])
        found += [str(worker) for worker, _ in scheduler.assign()]
    assert found == ["p", "d"], "as if each were alone"
    scheduler = Scheduler()
    scheduler._ranks.costs = costs
    scheduler.serve({"p": RankCapacity(10_000, 1, role="prefill", machine="m"), "d": here})
    costs.observe(100, 0.01, prompt_token_s=1e-3, near=True)
    for _ in range(2):
        scheduler._ranks._decoding.add("d", MoveClaim(1, 1))
    assert add(scheduler, *LONG[:3]) == [("p", "a"), ("p", "b")], "where no rank is free to hand it over, by the latest way"


def test_an_early_hand_over_is_judged_by_its_own_way():
    """Little is hidden within a node, where a copy takes no time; much between nodes."""
    begun = list[bool]()
    for machine in ("m", "n"):
        scheduler = Scheduler()
        costs = scheduler._ranks.costs
        costs.prompt_token_s, costs.far.token_s = 1e-3, 5e-4
        decode = RankCapacity(10_000, 16, role="decode", machine=machine)
        scheduler.serve({"p": RankCapacity(10_000, 1, role="prefill", machine="m"), "d": decode})
        costs.near.fixed_s = costs.far.fixed_s = 0.0
        add(scheduler, LONG[0])
        move = scheduler.begin_early_move("p", PromptProgress("a", 400, 100))
        begun.append(move is not None)
        if move is not None:
            scheduler.observe_move(move, HandedOver(number=0, failure=None, copying_s=5.0, nbytes=1000, tokens=500))
            assert costs.far.token_s == pytest.approx(0.01) and costs.near.token_s == 0.0
    assert begun == [False, True]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("lse"), st.integers(1, 900), st.integers(0, 99)), min_size=5, max_size=60),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_a_wait_is_bounded_by_those_before_it(events: Sequence[tuple[str, int, int]], prefill: int, decode: int):
    """Of one priority: no later request of its line gets a rank of the kind that it gets, first."""
    scheduler, chance = Scheduler(), random.Random(0)
    scheduler.serve({f"p{n}": RankCapacity(1000, 1 + n, role="prefill") for n in range(prefill)})
    scheduler.serve({f"d{n}": RankCapacity(1000, 1 + n, role="decode") for n in range(decode)})
    number, running, waiting = itertools.count(), list[tuple[Hashable, str]](), dict[str, int]()
    passed = Counter[tuple[str, str]]()  # by request and kind: later ones that got a rank of this kind before it

    def assign() -> None:
        for worker, id in given_by(scheduler):
            kind = str(worker)[0]
            assert not passed[id, kind], f"{passed[id, kind]} later ones of its line got such a rank before it"
            del waiting[id]
            passed.update((other, kind) for other, place in waiting.items() if place < int(id[1:]) and other[0] == id[0])
            running.append((worker, id))

    def end_one(place: int) -> None:
        end(scheduler, *running.pop(place))

    for event, tokens, place in events:
        if event == "e" and running:
            end_one(place % len(running))
        elif event != "e":
            id = f"{event}{next(number)}"
            waiting[id] = int(id[1:])
            size = tokens if event == "l" else 1 + tokens % FIRST_SHORT_TOKENS
            scheduler.add([request(id, size + (FIRST_SHORT_TOKENS if event == "l" else 0), first=chance.randrange(10**6))])
        assign()
    ends = 0
    while running:
        end_one(0)
        ends += 1
        assign()
    assert not waiting and ends <= next(number), "each of them was given a rank, and none twice"
