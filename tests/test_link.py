"""Links: what is urgent goes first, of guesses the newest; what is given up never comes; and as late as it says."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from epslots.errors import ConfigError
from epslots.link import AtOnce, CopyStreams, EmulatedLink, copy, make_link
from epslots.units import LinkSpeed, parse_link

CPU = torch.device("cpu")
FAST = LinkSpeed(10**12)


def records(*numbers: int) -> list[torch.Tensor]:
    return [torch.full((4,), number, dtype=torch.uint8) for number in numbers]


def slots(count: int) -> list[torch.Tensor]:
    return [torch.zeros(4, dtype=torch.uint8) for _ in range(count)]


class Gate:
    """A ``Put`` that copies once it is let, and remembers the order."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.order: list[int] = []

    def __call__(self, slot: torch.Tensor, record: torch.Tensor) -> None:
        self.waiting.set()
        assert self.open.wait(20)
        self.order.append(int(record[0]))
        slot.copy_(record)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_the_cpu_copies_at_once():
    link, there = make_link(None, CPU), slots(2)
    assert isinstance(link, AtOnce) and not link.concurrent
    assert link.start(there, records(1, 2), copy, urgent=False) == []
    assert [int(slot[0]) for slot in there] == [1, 2]


def test_urgent_first_then_the_newest_guess(gate: Gate):
    link = EmulatedLink(FAST)
    first = link.start(slots(1), records(9), gate, urgent=False)
    assert gate.waiting.wait(20)
    guesses = link.start(slots(2), records(1, 2), gate, urgent=False)
    newer = link.start(slots(2), records(3, 4), gate, urgent=False)
    urgent = link.start(slots(2), records(5, 6), gate, urgent=True)
    gate.open.set()
    for landing in (*urgent, *newer, *guesses, *first):
        link.land(landing)
    assert gate.order == [9, 5, 6, 3, 4, 1, 2]


def test_what_is_waited_for_becomes_urgent(gate: Gate):
    link = EmulatedLink(FAST)
    link.start(slots(1), records(9), gate, urgent=True)
    assert gate.waiting.wait(20)
    link.start(slots(1), records(1), gate, urgent=False)
    wanted = link.start(slots(1), records(2), gate, urgent=False)
    link.start(slots(1), records(3), gate, urgent=False)
    waiter = threading.Thread(target=link.land, args=wanted)
    waiter.start()
    until(lambda: wanted[0] in link._queue.urgent)
    gate.open.set()
    waiter.join(20)
    assert gate.order[:2] == [9, 2]


def until(true: Callable[[], bool]) -> None:
    for _ in range(10**7):
        if true():
            return
    raise AssertionError("it never was")


@pytest.mark.parametrize("urgent", [False, True])
def test_what_is_dropped_never_comes(gate: Gate, urgent: bool):
    link = EmulatedLink(FAST)
    first = link.start(slots(1), records(9), gate, urgent=True)
    assert gate.waiting.wait(20)
    (dropped,) = link.start(slots(1), records(1), gate, urgent=urgent)
    link.drop(dropped)
    gate.open.set()
    (last,) = link.start(slots(1), records(2), gate, urgent=False)
    link.land(first[0])
    link.land(last)
    assert gate.order == [9, 2]


def test_what_has_begun_is_waited_for_before_its_slot_is_another_s(gate: Gate):
    link, there = EmulatedLink(FAST), slots(1)
    (begun,) = link.start(there, records(1), gate, urgent=True)
    assert gate.waiting.wait(20)
    gate.open.set()
    link.drop(begun)
    assert int(there[0][0]) == 1, "and is written no more"


def test_each_record_takes_its_time_on_the_link(monkeypatch: pytest.MonkeyPatch):
    """4 bytes at 8 bytes/s and a latency of a second: one and a half each, one after the other. The clock is ours."""
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("epslots.link.perf_counter", lambda: now[0])
    monkeypatch.setattr("epslots.link.sleep", sleep)
    gate = Gate()
    link = EmulatedLink(LinkSpeed(8, 1.0))
    landings = link.start(slots(3), records(1, 2, 3), gate, urgent=True)
    gate.open.set()
    with link._queue.changed:
        link._queue.changed.wait_for(lambda: all(landing.begun for landing in landings), 20)
    assert [landing.due for landing in landings] == [101.5, 103.0, 104.5]


def test_its_thread_ends_with_the_link():
    link = EmulatedLink(FAST)
    thread = link._thread
    for landing in link.start(slots(1), records(1), copy, urgent=True):
        link.land(landing)
    del link, landing
    thread.join(20)
    assert not thread.is_alive()


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
        make_link("8GB/s", torch.device("cuda:0"))


class FakeCuda:
    """Streams whose work is done when it must be, or by chance: whatever an order of events leaves open may happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[FakeStream] = []
        self.here = self.Stream()

    def Stream(self, *_: Any, **__: Any) -> FakeStream:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, _: Any) -> FakeStream:
        return self.here

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.here = self.here, stream
        yield
        self.here = before

    def some(self) -> None:
        """Do a few things that may be done now."""
        for _ in range(self.random.randrange(4)):
            self.random.choice(self.streams).advance()

    def finish(self) -> None:
        while any(stream.advance() for stream in self.streams):
            pass
        assert not any(stream.work for stream in self.streams), "streams wait for each other"


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.done = cuda, False

    def record(self, stream: FakeStream) -> None:
        stream.work.append(lambda: setattr(self, "done", True) or True)

    def query(self) -> bool:
        self.cuda.some()
        return self.done


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.work: deque[Callable[[], Any]] = deque()

    def advance(self) -> bool:
        """Do the next thing; False if there is none, or it must wait."""
        if not self.work or self.work[0]() is False:
            return False
        self.work.popleft()
        return True

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(lambda: event.done)

    def wait_stream(self, other: FakeStream) -> None:
        event = self.cuda.Event()
        event.record(other)
        self.wait_event(event)


@pytest.mark.parametrize("seed", range(30))
def test_copies_on_streams_are_in_order_with_what_computes(seed: int):
    """Random fetches, reads and evictions of six slots: each read finds what was last fetched there, whatever runs when."""
    cuda = FakeCuda(seed)
    link = CopyStreams(CPU, cuda=cuda)
    choose = random.Random(seed)
    there, names = slots(6), [0] * 6
    flying: dict[int, Any] = {}

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        cuda.here.work.append(lambda: slot.copy_(record))

    reads: list[tuple[int, list[int]]] = []
    for number in range(1, 120):
        slot = choose.randrange(6)
        if choose.random() < 0.5:
            if slot in flying:
                link.drop(flying.pop(slot))
            names[slot] = number
            (flying[slot],) = link.start([there[slot]], records(number), put, urgent=choose.random() < 0.4)
        else:
            if slot in flying:
                link.land(flying.pop(slot))
            found: list[int] = []
            cuda.here.work.append(lambda slot=slot, found=found: found.append(int(there[slot][0])))
            reads.append((names[slot], found))
        cuda.some()
    for landing in flying.values():
        link.land(landing)
    cuda.finish()
    assert [found for _, found in reads] == [[name] for name, _ in reads]
    assert [int(slot[0]) for slot in there] == names


def test_of_what_is_not_urgent_only_some_is_queued_and_the_rest_can_be_dropped():
    cuda = FakeCuda(0)
    link = CopyStreams(CPU, cuda=cuda)
    copied: list[int] = []

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        cuda.here.work.append(lambda: copied.append(int(record[0])))

    landings = link.start(slots(5), records(1, 2, 3, 4, 5), put, urgent=False)
    for landing in landings[3:]:
        link.drop(landing)
    cuda.finish()
    assert copied == [1, 2]
    link.start(slots(1), records(9), put, urgent=True)
    cuda.finish()
    assert sorted(copied) == [1, 2, 3, 9], "the host came by"
