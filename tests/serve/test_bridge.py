"""From the cluster's threads to asyncio: no news is lost, none waits, and a reader that ends cancels its choices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from cluster.errors import RequestFailed
from cluster.serve.bridge import ChoiceReader, ClientLeft, NewsRelay
from cluster.serve.errors import ApiError
from cluster.serve.part_pace import PartPace
from epslots.generation.portions import Portion
from tests.support.scripted_cluster import ScriptedCluster


class FakePoll:
    """A choice whose portions a test puts in; None between them."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.closed = 0
        self.on_news: Callable[[bool], None] = lambda waited_for: None

    def poll(self, on_news: Callable[[bool], None], *, special_tokens: bool = False, whole: bool = False) -> FakePoll:
        self.on_news = on_news
        return self

    def put(self, *items: Any) -> None:
        self.waiting += items
        self.on_news(True)

    def __next__(self) -> Portion | None:
        item = self.waiting.pop(0) if self.waiting else None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self.closed += 1


def portion(text: str, reason: Any = None) -> Portion:
    return Portion((5,), text, reason=reason)


async def read(reader: ChoiceReader, keepalive_s: float | None = None) -> list[tuple[int, str | None]]:
    return [(choice, each.text) async for news in reader.portions(keepalive_s) for choice, each in news]


def test_news_from_other_threads_arrive():
    """Of three choices, each told by a thread of its own."""

    async def main() -> None:
        choices = [FakePoll() for _ in range(3)]
        reader = ChoiceReader(NewsRelay(asyncio.get_running_loop()), choices)

        def tell(number: int) -> None:
            for step in range(200):
                choices[number].put(portion(str(step), "stop" if step == 199 else None))

        threads = [threading.Thread(target=tell, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        found = await read(reader)
        for number in range(3):
            assert [text for choice, text in found if choice == number] == [str(step) for step in range(200)]
        assert [choice.closed for choice in choices] == [1, 1, 1]
        for thread in threads:
            thread.join()

    asyncio.run(main())


@pytest.mark.parametrize("waited_for", [False, True])
def test_a_relay_wakes_once_for_all_news(waited_for: bool):
    async def main() -> None:
        relay, calls = NewsRelay(asyncio.get_running_loop()), []
        wake = lambda: calls.append(1)  # noqa: E731
        for times in (1, 2):
            for _ in range(100):
                relay.tell(wake, waited_for)
            while len(calls) < times:
                await asyncio.sleep(0)
            assert len(calls) == times

    asyncio.run(main())


class HandLoop:
    """A loop whose time a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calls: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, wait_s: float, call: Callable[[], None]) -> None:
        self._calls.append((self.now_s + wait_s, call))

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.call_later(0.0, call)

    def run_until(self, now_s: float) -> None:
        self.now_s = now_s
        due = [call for when_s, call in self._calls if when_s <= now_s]
        self._calls = [(when_s, call) for when_s, call in self._calls if when_s > now_s]
        for call in due:
            call()


def test_parts_of_many_streams_are_spaced_out():
    """News that are waited for aren't, and don't bring the others before their time."""
    loop, woken = HandLoop(), list[str]()
    relay = NewsRelay(loop)  # type: ignore[arg-type]

    def tell(name: str, waited_for: bool = False) -> None:
        relay.tell(partial(woken.append, name), waited_for)

    for stream in range(50):
        tell(f"part of {stream}")
    loop.run_until(0.0)
    assert len(woken) == 50
    woken.clear()
    tell("next part")
    tell("first part", waited_for=True)
    loop.run_until(0.049)
    assert woken == ["first part"]
    tell("another part")
    loop.run_until(0.05)
    assert woken == ["first part", "next part", "another part"]


def test_no_part_waits_for_long():
    pace = PartPace()
    assert pace.wait_s(5.0) == 0
    pace.delivered(5.0, 16)
    assert pace.wait_s(5.0) == pytest.approx(0.016)
    assert pace.wait_s(5.1) == 0
    pace.delivered(5.0, 10_000)
    assert pace.wait_s(5.0) == pytest.approx(0.1)


def test_news_for_a_closed_loop_are_dropped():
    loop = asyncio.new_event_loop()
    relay = NewsRelay(loop)
    loop.close()
    relay.tell(lambda: None, True)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda reader, choice: reader.leave(), ClientLeft),
        (lambda reader, choice: reader.fail(ApiError(503, "no")), ApiError),
        (lambda reader, choice: choice.put(RequestFailed("NaN")), RequestFailed),
        (lambda reader, choice: choice.put(portion("", "cancelled"), StopIteration()), ApiError),
    ],
)
def test_an_end_cancels_the_other_choices(end: Any, kind: type[Exception]):
    async def main() -> None:
        choices = [FakePoll(), FakePoll()]
        reader = ChoiceReader(NewsRelay(asyncio.get_running_loop()), choices)
        choices[1].put(portion("a"))
        found: list[Any] = []

        async def read_all() -> None:
            async for news in reader.portions():
                found.extend(news)
                end(reader, choices[0])

        with pytest.raises(kind):
            await read_all()
        assert [each.text for _, each in found][:1] == ["a"]
        assert all(each.reason is None for _, each in found)
        assert all(choice.closed for choice in choices)

    asyncio.run(main())


def test_an_error_follows_the_portions_before_it():
    async def main() -> None:
        choice = FakePoll()
        reader = ChoiceReader(NewsRelay(asyncio.get_running_loop()), [choice])
        choice.put(portion("a"), RequestFailed("NaN"))
        portions = reader.portions()
        assert [each.text for _, each in await anext(portions)] == ["a"]
        with pytest.raises(RequestFailed):
            await anext(portions)

    asyncio.run(main())


def test_quiet_times_are_told():
    async def main() -> None:
        choice = FakePoll()
        reader = ChoiceReader(NewsRelay(asyncio.get_running_loop()), [choice])
        quiet = 0
        async for news in reader.portions(0.001):
            quiet += not news
            if quiet == 3:
                choice.put(portion("a", "stop"))
        assert quiet >= 3

    asyncio.run(main())


def test_news_without_a_portion_is_no_quiet_time():
    """It would become a comment in the stream, and a write to the socket, for nothing."""

    async def main() -> None:
        choice = FakePoll()
        reader = ChoiceReader(NewsRelay(asyncio.get_running_loop()), [choice])
        asyncio.get_running_loop().call_later(0.001, choice.on_news, False)
        asyncio.get_running_loop().call_later(0.002, choice.put, portion("a", "stop"))
        assert [len(news) async for news in reader.portions(3600)] == [1]

    asyncio.run(main())


def test_a_reader_of_the_whole_is_woken_twice():
    """For the first token, whose time is noted, and for the end."""
    with ScriptedCluster(held=True) as cluster:
        (generation,) = cluster.submit_choices([5], max_new_tokens=8)
        woken: list[bool] = []
        poll = generation.poll(lambda waited_for: woken.append(waited_for), whole=True)
        cluster.wait_for(lambda: len(cluster.requests) == 1)
        for _ in range(4):
            cluster.go_on(1)
        assert len(woken) == 1
        cluster.go_on()
        assert len(woken) == 2
        assert [each.reason for each in poll if each is not None][-1] == "length"


def test_a_reader_has_its_time():
    async def main() -> None:
        choice = FakePoll()
        reader = ChoiceReader(NewsRelay(asyncio.get_running_loop()), [choice], timeout_s=0.001)
        with pytest.raises(ApiError, match=r"more than 0\.001 s") as raised:
            await read(reader)
        assert raised.value.status == 504
        assert choice.closed

    asyncio.run(main())
