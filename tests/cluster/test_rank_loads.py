"""``RankLoads`` against its rule written down a second time: heaps find the rank that a look at all ranks would."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.driver.rank_loads import _TRIES, RankCapacity, RankLoads

CAPACITIES = [RankCapacity(20 + 15 * (n % 4), max_requests=1 + n % 3, speed=(1.0, 4.0, 0.5)[n % 3]) for n in range(7)]
OPERATIONS = ("ask",) * 4 + ("serve", "serve", "drop", "drop", "pause", "remove")


@dataclass(frozen=True)
class Load:
    held_tokens: int
    due_tokens: int
    alone: bool


@dataclass
class Rank:
    """A rank, and its requests."""

    capacity: RankCapacity
    serves: bool = True
    has: list[Load] = field(default_factory=list)

    @property
    def open(self) -> bool:
        reserved = any(load.alone for load in self.has)
        return self.serves and not reserved and len(self.has) < self.capacity.most_requests

    @property
    def cost(self) -> float:
        return sum(load.due_tokens for load in self.has) / self.capacity.speed

    @property
    def free(self) -> int:
        return self.capacity.kv_tokens - sum(load.held_tokens for load in self.has)

    def fits(self, load: Load) -> bool:
        return self.open and (not self.has or (not load.alone and load.held_tokens <= self.free))


def least_loaded(ranks: dict[int, Rank], load: Load) -> int | None:
    """The first of the least loaded ranks with room; else the one with the most free cache, if that has room."""
    open_ones = [worker for worker, rank in ranks.items() if rank.open]
    by_cost = sorted(open_ones, key=lambda worker: ranks[worker].cost)[:_TRIES]
    by_free = sorted(open_ones, key=lambda worker: -ranks[worker].free)[:1]
    return next((worker for worker in by_cost + by_free if ranks[worker].fits(load)), None)


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 6), st.integers(1, 45), st.integers(1, 60), st.integers(0, 9)),
        max_size=60,
    )
)
def test_the_least_loaded_rank_is_the_rules(operations: list[tuple[str, int, int, int, int]]):
    loads, ranks = RankLoads(), {n: Rank(capacity) for n, capacity in enumerate(CAPACITIES)}
    for worker, capacity in enumerate(CAPACITIES):
        loads.serve(worker, capacity)
    for kind, worker, held, due, chance in operations:
        if kind == "ask":
            load = Load(held, due, alone=not chance)
            found = loads.least_loaded(load)
            assert found == least_loaded(ranks, load)
            if isinstance(found, int):
                loads.add(found, load)
                ranks[found].has.append(load)
        elif kind == "serve":  # also anew: behind all others
            loads.serve(worker, CAPACITIES[worker])
            ranks.setdefault(worker, Rank(CAPACITIES[worker])).serves = True
        elif worker in ranks and kind == "pause":
            loads.pause(worker)
            ranks[worker].serves = False
        elif worker in ranks and kind == "remove":
            loads.remove(worker)
            del ranks[worker]
        elif worker in ranks and ranks[worker].has:
            loads.drop(worker, ranks[worker].has.pop(0))
        loads.check((worker, load) for worker, rank in ranks.items() for load in rank.has)


def test_the_most_free_cache_is_found_beyond_the_least_loaded():
    """Time and again: a rank that is asked stays where it was."""
    loads = RankLoads()
    for worker in range(_TRIES + 2):
        loads.serve(worker, RankCapacity(100, max_requests=9))
        loads.add(worker, Load(90 - 10 * worker, 1 + worker, alone=False))
    asked = Load(50, 1, alone=False)  # the last two have room, and most to do
    assert [loads.least_loaded(asked) for _ in range(3)] == [_TRIES + 1] * 3
    assert loads.least_loaded(Load(70, 1, alone=False)) is None


@given(st.lists(st.integers(5, 50), min_size=60, max_size=90), st.sampled_from([2.0, 4.0]))
def test_a_slow_rank_gets_its_share_of_the_work(due: list[int], times: float):
    """A rank that is found to be so many times slower, in the middle of its work."""
    loads = RankLoads()
    for worker in range(3):
        loads.serve(worker, RankCapacity(10**6, 10**3))
    loads.serve(0, RankCapacity(10**6, 10**3, speed=1 / times))
    given_R = [0, 0, 0]
    for tokens in due:
        worker = loads.least_loaded(load := Load(1, tokens, alone=False))
        assert isinstance(worker, int)
        loads.add(worker, load)
        given_R[worker] += tokens
    assert abs(given_R[0] * times - (given_R[1] + given_R[2]) / 2) <= 50 * (times + 1), "but for a request or two"
