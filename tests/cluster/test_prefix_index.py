"""Prompts that begin alike go where their beginning was computed, unless that rank has more to do than it would save."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.driver.prefix_index import BLOCK, MOST_HOLDERS, PrefixIndex, block_hashes
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduler import Scheduler
from epslots.generation.requests import Output, Request

SYSTEM = tuple(range(10 * BLOCK))
WIDE = RankCapacity(100_000, max_requests=100)


def test_blocks_are_whole_and_chained():
    assert block_hashes(range(BLOCK)) == (), "the last token is always computed"
    assert len(block_hashes(range(3 * BLOCK))) == 2
    assert len(block_hashes(range(3 * BLOCK + 1))) == 3
    one, other = block_hashes(range(100)), block_hashes((7, *range(1, 100)))
    assert len({*one, *other}) == 6, "equal blocks after unequal ones aren't equal"


def test_a_prompt_goes_where_its_beginning_was_computed():
    scheduler = Scheduler()
    scheduler.serve({"x": WIDE, "y": WIDE})
    scheduler.add([Request("a", (*SYSTEM, 1), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"]
    scheduler.count("x", Output("a", (1,), True, "stop"))
    scheduler.add([Request("b", (9,) * 40, 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"], "of equal ranks the first"
    scheduler.add([Request("c", (*SYSTEM, 2), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"], "there is more to save than x has to do"
    scheduler.add([Request("d", (9,) * 40, 400)])
    scheduler.add([Request("e", (9,) * 40, 500)])
    assert [worker for worker, _ in scheduler.assign()] == ["y", "x"], "a block saves less than that"
    scheduler.add([Request("f", (*SYSTEM, 3), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"]
    scheduler.count("y", Output("d", (1,) * 300))
    scheduler.add([Request("g", (*SYSTEM, 3), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["y"], "x has more to do than it would save"


def test_a_rank_that_keeps_no_prefix_draws_nothing():
    scheduler = Scheduler()
    apart = RankCapacity(100_000, max_requests=100, shares_prefixes=False)
    scheduler.serve({"x": apart, "y": apart})
    scheduler.add([Request("a", (*SYSTEM, 1), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"]
    scheduler.count("x", Output("a", (1,), True, "stop"))
    scheduler.add([Request("b", (9,) * 40, 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"]
    scheduler.add([Request("c", (*SYSTEM, 2), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["y"]


def test_a_lost_rank_draws_nothing():
    scheduler = Scheduler()
    scheduler.serve({"x": WIDE})
    scheduler.add([Request("a", (*SYSTEM, 1), 5)])
    scheduler.assign()
    scheduler.release("x", blame=False)
    scheduler.serve({"y": WIDE, "x": WIDE})
    scheduler.add([Request("b", (*SYSTEM, 2), 5)])
    assert [worker for worker, _ in scheduler.assign()] == ["y", "x"]


def test_a_faster_rank_gets_more():
    scheduler = Scheduler()
    scheduler.serve({"slow": WIDE, "fast": RankCapacity(100_000, max_requests=100, speed=3.0)})
    for number in range(40):
        scheduler.add([Request(str(number), (number,), 9)])
    given_to = [worker for worker, _ in scheduler.assign()]
    assert (given_to.count("slow"), given_to.count("fast")) == (10, 30)


def test_what_a_slow_rank_need_not_compute_is_its_time():
    scheduler = Scheduler()
    scheduler.serve({"slow": RankCapacity(100_000, max_requests=100, speed=0.5)})
    scheduler.add([Request("a", (*SYSTEM, 1), 5)])
    scheduler.assign()
    scheduler.count("slow", Output("a", (1,), True, "stop"))
    scheduler.add([Request("b", (9,) * 150, 50)])  # 400 of a usual rank's tokens
    scheduler.assign()
    scheduler.serve({"usual": WIDE})
    scheduler.add([Request("c", (*SYSTEM, 2), 5)])  # of whose 326 the slow rank leaves out 320
    assert [worker for worker, _ in scheduler.assign()] == ["slow"]


def test_of_a_block_that_all_ranks_have_the_latest_are_known():
    index, hashes = PrefixIndex(), block_hashes(SYSTEM)
    for rank in range(MOST_HOLDERS + 3):
        index.enter(rank, hashes, 100)
    assert index.longest(hashes)[1] == tuple(range(3, MOST_HOLDERS + 3))
    assert len(index) == MOST_HOLDERS * len(hashes)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 11), st.lists(st.integers(0, 1), max_size=5), st.booleans()), max_size=60))
def test_the_index_is_what_it_says(prompts: list[tuple[int, list[int], bool]]):
    """Against dictionaries that forget in the same order, without a bound on holders but by hand."""
    index, most = PrefixIndex(), 4
    has: dict[int, OrderedDict[int, None]] = {}
    order: dict[int, list[int]] = {}
    for rank, kinds, lost in prompts:
        hashes = block_hashes([*(kind for kind in kinds for _ in range(BLOCK)), 0])
        if lost:
            index.forget(rank)
            for block in has.pop(rank, ()):
                order[block].remove(rank)
        else:
            index.enter(rank, hashes, most)
            blocks = has.setdefault(rank, OrderedDict())
            for block in reversed(hashes[:most]):
                blocks.pop(block, None)
                blocks[block] = None
                order[block] = [each for each in order.get(block, []) if each != rank] + [rank]
                if len(order[block]) > MOST_HOLDERS:
                    del has[order[block].pop(0)][block]
            while len(blocks) > most:
                order[blocks.popitem(last=False)[0]].remove(rank)
        count = max((n for n in range(1, len(hashes) + 1) if order.get(hashes[n - 1])), default=0)
        holders = tuple(order[hashes[count - 1]]) if count else ()
        assert index.longest(hashes) == (count * BLOCK, holders)
        assert len(index) == sum(map(len, has.values())) <= most * len(has)
