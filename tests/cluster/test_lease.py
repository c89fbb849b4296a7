"""The lease of a named cluster: one driver at a time, a paused one does no harm, and orphans end when their time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.errors import ClusterError, Superseded
from cluster.lasting.descriptions import GroupName, Lasting, RankName, split_term, with_term
from cluster.lasting.lease import HELD_S, LEASE_S, RELEASED, Claim, Fate, Holder, LeaseWatch, OrphanWatch, Sight
from cluster.rank.orphan_guard import OrphanGuard
from cluster.ray_backend import driver_lease
from cluster.ray_backend.driver_lease import DriverLease
from tests.support.lease_registry import MemoryRegistry

NAME = "x"
CLAIM = Claim(3, "node a, pid 1", "w1", 5.0)


def beat(number: int) -> bytes:
    return number.to_bytes(8, "big")


# The watch.


def test_a_holder_that_beats_lives():
    watch = LeaseWatch()
    assert watch.see(0.0, Sight(CLAIM, beat(1))) is Holder.UNKNOWN
    assert watch.see(0.3, Sight(CLAIM, beat(1))) is Holder.UNKNOWN
    assert watch.see(0.6, Sight(CLAIM, beat(2))) is Holder.LIVES


@pytest.mark.parametrize(
    "sight",
    [
        Sight(None),
        Sight(CLAIM, beat(1), dead=True),
        Sight(CLAIM, RELEASED),
        Sight(Claim(4, "node a, pid 1", "w1", ends=True)),
    ],
)
def test_a_holder_may_be_gone_at_once(sight: Sight):
    assert LeaseWatch().see(0.0, sight) is Holder.GONE


def test_a_silent_holder_is_gone_after_the_lease():
    watch = LeaseWatch()
    watch.see(0.0, Sight(CLAIM, beat(1)))
    assert watch.see(LEASE_S - 0.1, Sight(CLAIM, beat(1))) is Holder.UNKNOWN
    assert watch.see(LEASE_S, Sight(CLAIM, beat(1))) is Holder.GONE


def test_time_without_a_look_is_no_silence():
    """The head was away: the holder couldn't beat."""
    watch = LeaseWatch()
    watch.see(0.0, Sight(CLAIM, beat(1)))
    watch.miss()
    assert watch.see(1000.0, Sight(CLAIM, beat(1))) is Holder.UNKNOWN


@given(st.lists(st.tuples(st.floats(0.01, 3), st.booleans()), max_size=60), st.floats(0.1, 20))
def test_an_orphan_ends_after_its_time_and_no_other(steps: list[tuple[float, bool]], orphan_s: float):
    watch, now_s, number, silent_s = OrphanWatch(), 0.0, 0, 0.0
    claim = Claim(3, "node a, pid 1", "w1", orphan_s)
    watch.see(now_s, Sight(claim, beat(number)))
    for pause_s, beats in steps:
        now_s += pause_s
        number += beats
        silent_s = 0.0 if beats else silent_s + pause_s
        fate = watch.see(now_s, Sight(claim, beat(number)))
        if fate is Fate.SERVED:
            assert silent_s < LEASE_S
        else:
            assert silent_s >= LEASE_S
        if silent_s < LEASE_S + orphan_s:
            assert fate is not Fate.END
        if silent_s >= LEASE_S + orphan_s + max(pause for pause, _ in steps):
            assert fate is Fate.END


def test_another_driver_ends_the_wait():
    watch = OrphanWatch()
    assert watch.see(0.0, Sight(CLAIM, beat(1), dead=True)) is Fate.ORPHAN
    assert watch.see(4.0, Sight(CLAIM, beat(1), dead=True)) is Fate.ORPHAN
    assert watch.see(6.0, Sight(Claim(4, "node b, pid 2", "w2"), beat(1))) is Fate.SERVED
    assert watch.see(7.0, Sight(Claim(5, "node b, pid 2", "w2", ends=True))) is Fate.END


# The names.

TEXTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@given(TEXTS, st.integers(1, 10**9), st.integers(0, 10**6), st.integers(0, 10**4), st.binary(max_size=20))
def test_names_and_terms_are_read_back(name: str, term: int, serial: int, bundle: int, message: bytes):
    rank, group = RankName(term, serial, bundle, name), GroupName(term, serial, name)
    assert RankName.of(str(rank)) == rank
    assert GroupName.of(str(group)) == group
    assert RankName.of(str(group)) is None and GroupName.of(str(rank)) is None
    assert split_term(with_term(term, message)) == (term, message)
    assert RankName(term + 1, 0, bundle, name) > rank < RankName(term, serial + 1, 0, name)


# A driver's lease, and a rank's guard, at one registry.


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> MemoryRegistry:
    """Asked without Ray's threads."""

    async def ask(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(driver_lease, "ask", ask)
    return MemoryRegistry()


def run(work: Awaitable[Any]) -> Any:
    async def body() -> Any:
        return await work

    return asyncio.run(body())


def make(registry: MemoryRegistry, clock: Clock, worker: str) -> DriverLease:
    async def body() -> DriverLease:
        lease = DriverLease(NAME, 30.0, registry, clock)
        sight = await lease.wait_until_free()
        assert await lease.claim(sight.term, f"node a, {worker}", worker)
        return lease

    return asyncio.run(body())


def test_the_second_driver_is_refused_while_the_first_lives(registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    first = make(registry, clock, "w1")

    async def sleep(_: float) -> None:
        assert await first.confirm()

    monkeypatch.setattr(driver_lease.asyncio, "sleep", sleep)
    with pytest.raises(ClusterError, match=r"the cluster 'x' has a driver, which lives \(node a, w1\)"):
        run(DriverLease(NAME, 30.0, registry, clock).wait_until_free())
    assert first.term == 1 and first.held


def test_a_dead_driver_is_followed_at_once(registry: MemoryRegistry):
    make(registry, Clock(), "w1")
    registry.ended.add("w1")
    assert make(registry, Clock(), "w2").term == 2


def test_one_of_two_that_claim_at_once_has_it(registry: MemoryRegistry):
    async def body() -> list[bool]:
        leases = [DriverLease(NAME, 30.0, registry, Clock()) for _ in range(2)]
        return [await lease.claim(0, "node a", f"w{number}") for number, lease in enumerate(leases)]

    assert asyncio.run(body()) == [True, False]


def test_a_driver_ends_its_own_ranks_alone(registry: MemoryRegistry):
    """It was paused, its deadlines have passed meanwhile, and it would kill ranks for that."""
    lease, done = make(registry, Clock(), "w1"), list[str]()

    async def body() -> None:
        lease.guard("rank 0", lambda: done.append("its own"))
        assert await lease.confirm() and done == ["its own"]
        registry.put_claim(NAME, Claim(2, "node b, pid 2", "w2"))
        lease.guard("rank 1", lambda: done.append("another's"))
        with pytest.raises(Superseded, match=r"are another driver's now \(node b, pid 2\)"):
            await lease.keep()
        lease.guard("rank 2", lambda: done.append("another's"))
        assert not await lease.confirm()

    run(body())
    assert done == ["its own"] and registry.dooms[NAME] == {"rank 0", "rank 1"}


@pytest.mark.parametrize("order", sorted(set(map("".join, permutations("ooonnn")))))
def test_no_driver_ends_a_rank_that_another_adopts(registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch, order: str):
    """Wherever either is paused: "o" is a step of the old driver, which ends a rank, and "n" one of the new driver."""
    old, turns = make(registry, Clock(), "w1"), Turns()
    ended, adopted = list[str](), set[str]()

    async def ask(function: Any, *arguments: Any) -> Any:  # it dooms the rank, looks at the claims, and beats
        await turns.mine("o")
        return function(*arguments)

    monkeypatch.setattr(driver_lease, "ask", ask)

    async def adopt() -> None:
        await turns.mine("n")
        registry.put_claim(NAME, Claim(2, "node b, pid 2", "w2"))
        await turns.mine("n")
        doomed = registry.dooms.get(NAME, set()).copy()
        await turns.mine("n")
        adopted.update({"rank 0"} - doomed)

    async def body() -> None:
        old.guard("rank 0", lambda: ended.append("rank 0"))
        adopting = asyncio.create_task(adopt())
        for who in order:
            await turns.give(who)
        await turns.give("nobody")
        await adopting

    run(body())
    assert bool(ended) == (order.index("n") > order.index("o", order.index("o") + 1)), "it looks in its second step"
    assert not (ended and adopted)


class Turns:
    """Lets tasks make their steps in an order that a test gives."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def mine(self, who: str) -> None:
        self._waiting[who] = asyncio.get_running_loop().create_future()
        await self._waiting[who]

    async def give(self, who: str) -> None:
        for _ in range(10):  # rounds of the loop, until it waits for its turn; it may have ended
            await asyncio.sleep(0)
        if who in self._waiting:
            self._waiting.pop(who).set_result(None)


def test_a_head_that_is_away_loses_no_lease(registry: MemoryRegistry):
    clock, done = Clock(), list[str]()
    lease = make(registry, clock, "w1")

    async def body() -> None:
        registry.away = True
        clock.now_s += HELD_S
        assert not await lease.confirm()
        lease.guard("rank 0", lambda: done.append("later"))
        assert not await lease.confirm() and not done
        registry.away = False
        assert await lease.confirm() and done == ["later"]

    run(body())


def test_ranks_that_no_driver_adopts_any_more_end_at_once(registry: MemoryRegistry):
    lease, done = make(registry, Clock(), "w1"), list[str]()
    assert run(lease.end())
    lease.guard("rank 0", lambda: done.append("ended"))
    assert done == ["ended"]


def test_a_lost_registry_is_claimed_anew_with_a_greater_term(registry: MemoryRegistry):
    lease = make(registry, Clock(), "w1")
    lease.forget()
    registry.claims.clear()
    assert not run(lease.confirm())
    assert run(lease.claim(0, "node a", "w9")) and lease.term == 2 and lease.held


@pytest.mark.parametrize("ends", [False, True])
def test_a_lease_that_is_given_up_is_free_at_once(registry: MemoryRegistry, ends: bool):
    lease = make(registry, Clock(), "w1")
    run(lease.end() if ends else lease.release())
    found = run(DriverLease(NAME, 30.0, registry, Clock()).wait_until_free())
    assert found.claim.ends is ends
    assert ends or not lease.held


def guard(registry: MemoryRegistry, clock: Clock, orphaned: list[str], worker: str = "r0") -> OrphanGuard:
    return OrphanGuard(
        Lasting(NAME), registry, where="node c", worker=worker, on_orphan=lambda: orphaned.append(worker), clock=clock
    )


def test_orphans_end_together_and_their_places_are_freed(registry: MemoryRegistry):
    clock, orphaned = Clock(), []
    make(registry, clock, "w1")
    guards = [guard(registry, clock, orphaned, f"r{rank}") for rank in range(2)]
    assert [each.look() for each in guards] == [False, False]
    registry.ended.add("w1")
    clock.now_s += 2
    assert [each.look() for each in guards] == [False, False]  # a beat is missing: the holder is looked after from now on
    clock.now_s += 2
    assert [each.look() for each in guards] == [False, False]
    assert orphaned == ["r0", "r1"]
    clock.now_s += 30
    assert [each.look() for each in guards] == [True, True]
    assert registry.removed == [(NAME, 2), (NAME, 2)]
    assert registry.claims[NAME][2].ends


def test_an_orphan_that_is_adopted_in_its_last_moment_stays(registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    make(registry, clock, "w1")
    registry.beats[NAME, 1] = RELEASED
    rank, put_claim = guard(registry, clock, []), registry.put_claim
    rank.look()
    clock.now_s += 30

    def too_late(name: str, claim: Claim) -> bool:
        put_claim(name, Claim(2, "node b", "w2"))
        return put_claim(name, claim)

    monkeypatch.setattr(registry, "put_claim", too_late)
    assert not rank.look()
    assert not registry.removed
    clock.now_s += 1
    assert not rank.look()


def test_a_head_that_is_away_ends_no_orphan(registry: MemoryRegistry):
    clock = Clock()
    make(registry, clock, "w1")
    registry.ended.add("w1")
    rank = guard(registry, clock, [])
    for _ in range(3):
        rank.look()
        clock.now_s += 2
    registry.away = True
    clock.now_s += 1000
    assert not rank.look()
    registry.away = False
    assert not rank.look()


class Drivers(RuleBasedStateMachine):
    """Drivers that start, beat, pause, die and leave; ranks that watch. At most one driver has any effect at a time."""

    @initialize()
    def begin(self) -> None:
        async def ask(function: Any, *arguments: Any) -> Any:
            return function(*arguments)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(driver_lease, "ask", ask)
        self.clock, self.registry = Clock(), MemoryRegistry()
        self.drivers: dict[str, DriverLease] = {}
        self.watches: dict[str, LeaseWatch] = {}
        self.rank = OrphanWatch()
        self.started = 0

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule()
    def a_driver_begins_to_watch(self) -> None:
        self.started += 1
        self.watches[f"w{self.started}"] = LeaseWatch()

    @precondition(lambda self: self.watches)
    @rule(data=st.data())
    def it_looks(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.watches)))
        sight = self.registry.look(NAME)
        match self.watches[worker].see(self.clock(), sight):
            case Holder.LIVES:
                del self.watches[worker]
            case Holder.GONE:
                lease = DriverLease(NAME, 20.0, self.registry, self.clock)
                del self.watches[worker]
                if asyncio.run(lease.claim(sight.term, worker, worker)):
                    self.drivers[worker] = lease

    @precondition(lambda self: self.drivers)
    @rule(data=st.data(), deed=st.sampled_from(["beat", "die", "leave"]))
    def a_driver_acts(self, data: st.DataObject, deed: str) -> None:
        worker = data.draw(st.sampled_from(sorted(self.drivers)))
        lease = self.drivers[worker]
        if deed == "beat":
            asyncio.run(lease.confirm())
            return
        if deed == "leave" and asyncio.run(lease.confirm()):
            asyncio.run(lease.release())
        del self.drivers[worker]
        self.registry.ended.add(worker)

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def the_rank_looks(self) -> None:
        sight = self.registry.look(NAME)
        before = self.rank._waited_s
        fate = self.rank.see(self.clock(), sight)
        assert fate is not Fate.END or (before is not None and not any(d.held for d in self.drivers.values()))

    @invariant()
    def at_most_one_driver_acts(self) -> None:
        holding = [lease for lease in getattr(self, "drivers", {}).values() if lease.held]
        assert len(holding) <= 1
        newest = self.registry.look(NAME).claim if holding else None
        assert newest is None or newest.term == holding[0].term


TestDrivers = Drivers.TestCase
