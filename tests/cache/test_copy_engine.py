"""Links: urgent transfers go first, of prefetches the newest; cancelled ones never come; each takes the link's time."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from epslots.cache.copy_engine import EmulatedEngine, SynchronousEngine
from epslots.cache.cuda_engine import CudaEngine, make_copy_engine
from epslots.errors import ConfigError
from epslots.units import LinkSpeed, parse_link
from tests.support.fake_cuda import FakeCuda
from tests.support.rank_helpers import PATIENCE_S

CPU = torch.device("cpu")
FAST = LinkSpeed(10**12)


def records(*numbers: int) -> list[torch.Tensor]:
    return [torch.full((4,), number, dtype=torch.uint8) for number in numbers]


def copy(slot: torch.Tensor, record: torch.Tensor) -> None:
    slot.copy_(record)


def slots(count: int) -> list[torch.Tensor]:
    return [torch.zeros(4, dtype=torch.uint8) for _ in range(count)]


class Clock:
    """Time that passes when somebody sleeps, and when we say so."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("epslots.cache.copy_engine.perf_counter", lambda: clock.now)
    monkeypatch.setattr("epslots.cache.copy_engine.sleep", clock.sleep)
    return clock


def second() -> EmulatedEngine:
    """4 bytes take a second and a half."""
    return EmulatedEngine(LinkSpeed(8, 1.0))


def test_the_cpu_copies_at_once():
    link, there = make_copy_engine(None, CPU), slots(2)
    assert isinstance(link, SynchronousEngine) and not link.concurrent
    assert link.start(there, records(1, 2), copy, urgent=False) == []
    assert [int(slot[0]) for slot in there] == [1, 2]


def due(clock: Clock, link: EmulatedEngine, transfer: Any) -> float:
    """When a transfer has been waited for, seconds from the start."""
    link.wait(transfer)
    return round(clock.now - 100, 3)


def test_each_record_takes_its_time_on_the_link(clock: Clock):
    link, there = second(), slots(3)
    transfers = link.start(there, records(1, 2, 3), copy, urgent=True)
    clock.now += 2.0
    assert [link.poll(transfer) for transfer in transfers] == [True, False, False]
    assert link.busy
    assert [due(clock, link, transfer) for transfer in transfers[1:]] == [3.0, 4.5]
    assert [int(slot[0]) for slot in there] == [1, 2, 3]
    assert not link.busy
    clock.now += 10
    (late,) = link.start(slots(1), records(4), copy, urgent=True)
    assert due(clock, link, late) == 16.0, "an idle link begins at once"


def test_urgent_first_then_the_newest_guess(clock: Clock):
    link = second()
    first = link.start(slots(1), records(9), copy, urgent=False)
    clock.now += 0.1
    prefetches = link.start(slots(2), records(1, 2), copy, urgent=False)
    clock.now += 0.1
    newer = link.start(slots(2), records(3, 4), copy, urgent=False)
    urgent = link.start(slots(2), records(5, 6), copy, urgent=True)
    clock.now += 100
    link.poll(first[0])
    order = sorted((*first, *prefetches, *newer, *urgent), key=lambda transfer: transfer.due)
    assert order == [*first, *urgent, *newer, *prefetches]
    assert [transfer.due - 100 for transfer in order] == [1.5 * (number + 1) for number in range(7)]


def test_what_is_hurried_goes_before_what_is_started_later(clock: Clock):
    link = second()
    (first,) = link.start(slots(1), records(0), copy, urgent=True)
    prefetches = link.start(slots(3), records(1, 2, 3), copy, urgent=False)
    for prefetch in prefetches[1:]:
        link.set_urgent(prefetch)
        link.set_urgent(prefetch)  # twice is once
    (missed,) = link.start(slots(1), records(4), copy, urgent=True)
    expected = {prefetches[1]: 3.0, prefetches[2]: 4.5, missed: 6.0, prefetches[0]: 7.5}
    assert {transfer: due(clock, link, transfer) for transfer in expected} == expected
    link.set_urgent(first)
    assert link.poll(first)


def test_what_is_waited_for_becomes_urgent(clock: Clock):
    link = second()
    link.start(slots(1), records(9), copy, urgent=True)
    clock.now += 0.1
    older, wanted, newest = (link.start(slots(1), records(n), copy, urgent=False)[0] for n in (1, 2, 3))
    assert due(clock, link, wanted) == 3.0
    assert due(clock, link, newest) == 4.5
    assert due(clock, link, older) == 6.0


@pytest.mark.parametrize("urgent", [False, True])
def test_what_is_dropped_takes_no_time_unless_it_has_begun(clock: Clock, urgent: bool):
    link = second()
    (begun,) = link.start(slots(1), records(9), copy, urgent=True)
    clock.now += 0.1
    (dropped,) = link.start(slots(1), records(1), copy, urgent=urgent)
    assert link.begun(begun) and link.cancel(begun), "it crosses all the same"
    assert not link.begun(dropped) and not link.cancel(dropped)
    (last,) = link.start(slots(1), records(2), copy, urgent=False)
    assert due(clock, link, last) == 3.0


def large(number: int) -> torch.Tensor:
    return torch.full((1 << 20,), number, dtype=torch.uint8)


def test_a_large_record_is_brought_by_a_thread_and_waited_for():
    link, there, who = EmulatedEngine(FAST), [large(0)], []
    go = threading.Event()

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        who.append(threading.current_thread())
        assert go.wait(PATIENCE_S)
        slot.copy_(record)

    (transfer,) = link.start(there, [large(1)], put, urgent=True)
    assert not link.poll(transfer)
    go.set()
    link.wait(transfer)
    assert (there[0] == 1).all()
    assert threading.current_thread() not in who


def test_nothing_of_what_was_dropped_is_written_later():
    """Not even by a record whose copying has begun: the slot's next writer may be a peer."""
    link, there = EmulatedEngine(FAST), [large(0)]
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        begun.set()
        assert go.wait(PATIENCE_S)
        slot.copy_(record)

    (copying,) = link.start(there, [large(1)], put, urgent=True)
    (waiting,) = link.start([large(0)], [large(2)], put, urgent=True)
    assert begun.wait(PATIENCE_S)
    dropping = threading.Thread(target=lambda: (link.cancel(waiting), link.cancel(copying), done.set()))
    dropping.start()
    assert not done.is_set()
    go.set()
    dropping.join(PATIENCE_S)
    assert done.is_set() and (there[0] == 1).all()


def test_what_cannot_be_brought_is_told_to_whoever_waits():
    def broken(slot: torch.Tensor, record: torch.Tensor) -> None:
        raise MemoryError("no room")

    link = EmulatedEngine(FAST)
    (transfer,) = link.start([torch.zeros(1 << 20)], [torch.zeros(1 << 20)], broken, urgent=True)
    for _ in range(2):
        with pytest.raises(MemoryError):
            link.wait(transfer)


def test_its_thread_ends_with_the_link():
    link = EmulatedEngine(FAST)
    threads: list[threading.Thread] = []
    large = torch.zeros(1 << 20)
    for transfer in link.start([large], [large], lambda *_: threads.append(threading.current_thread()), urgent=True):
        link.wait(transfer)
    del link, transfer
    threads[0].join(PATIENCE_S)
    assert not threads[0].is_alive()


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("8GB/s,20us", LinkSpeed(8 * 10**9, 20e-6)),
        ("512 MiB/s", LinkSpeed(512 * 2**20)),
        ("1.5GB/s , 1ms", LinkSpeed(1_500_000_000, 1e-3)),
    ],
)
def test_speeds(text: str, speed: LinkSpeed):
    assert parse_link(text) == speed


@pytest.mark.parametrize("text", ["", "8GB", "8GB/s,", "8GB/s,20", "fast", "0GB/s", "8GB/s,20us,3", "-1GB/s"])
def test_what_is_no_speed(text: str):
    with pytest.raises(ConfigError, match="link"):
        parse_link(text)


def test_a_gpu_has_its_own():
    with pytest.raises(ConfigError, match="of its own"):
        make_copy_engine("8GB/s", torch.device("cuda:0"))


@pytest.mark.parametrize("seed", range(30))
def test_copies_on_streams_are_in_order_with_what_computes(seed: int):
    """Random fetches, reads and evictions of six slots: each read finds the record last fetched there."""
    cuda = FakeCuda(seed)
    link = CudaEngine(CPU, cuda=cuda)
    choose = random.Random(seed)
    there, names = slots(6), [0] * 6
    in_flight: dict[int, Any] = {}

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        cuda.here.work.append(lambda: slot.copy_(record))

    reads: list[tuple[int, list[int]]] = []
    for number in range(1, 120):
        slot = choose.randrange(6)
        if choose.random() < 0.5:
            if slot in in_flight:
                link.cancel(in_flight.pop(slot))
            names[slot] = number
            (in_flight[slot],) = link.start([there[slot]], records(number), put, urgent=choose.random() < 0.4)
        else:
            if slot in in_flight:
                link.wait(in_flight.pop(slot))
            found: list[int] = []
            cuda.here.work.append(lambda slot=slot, found=found: found.append(int(there[slot][0])))
            reads.append((names[slot], found))
        cuda.some()
    for transfer in in_flight.values():
        link.wait(transfer)
    cuda.finish()
    assert [found for _, found in reads] == [[name] for name, _ in reads]
    assert [int(slot[0]) for slot in there] == names


def test_fetches_that_can_wait_queue_a_few_and_drop_the_rest():
    cuda = FakeCuda(0)
    link = CudaEngine(CPU, cuda=cuda)
    copied: list[int] = []

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        cuda.here.work.append(lambda: copied.append(int(record[0])))

    transfers = link.start(slots(6), records(1, 2, 3, 4, 5, 6), put, urgent=False)
    assert [link.begun(transfer) for transfer in transfers] == [True] * 2 + [False] * 4
    for transfer in transfers[4:]:
        link.cancel(transfer)
    cuda.finish()
    assert copied == [1, 2]
    link.set_urgent(transfers[3])
    link.set_urgent(transfers[0])
    link.start(slots(1), records(9), put, urgent=True)
    cuda.finish()
    assert sorted(copied) == [1, 2, 3, 4, 9], "the host came by"
    assert copied.index(4) < copied.index(9)
