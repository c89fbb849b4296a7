"""A rank's hand-overs beside its steps, with a batcher and connections as told: what ends early, and what begins later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.messages.hand_over import ConnectionOrder, HandedOver, HandOver, HandOverContact, TakeOver
from cluster.rank import hand_over_threads
from cluster.rank.contact_store import ContactStore
from cluster.rank.hand_over_threads import HandOverThreads
from epslots.errors import PeerLost
from epslots.transport.pair_connection import PairConnection
from tests.support.rank_helpers import PATIENCE_S


class Rank:
    """A rank, and all that its hand-overs do.

    Attributes:
        told: news for the driver.
        asked: of the batcher, in order.
    """

    def __init__(self, connect: Callable[[ContactStore], PairConnection]) -> None:
        self.told: list[HandedOver | HandOverContact] = []
        self.asked: list[str] = []
        batcher: Any = SimpleNamespace(
            hold=lambda id: self.asked.append(f"hold {id}"),  # None: the request has no cache now
            resume=lambda id: self.asked.append(f"resume {id}"),
            release=lambda id: self.asked.append(f"release {id}"),
            reserve=lambda id, _: self.asked.append(f"reserve {id}"),
        )
        self.threads = HandOverThreads(
            lambda: batcher,
            lambda function: function(),
            self.told.append,
            lambda _, contacts, *, source: connect(contacts),
        )

    def give(self, number: int = 0) -> None:
        """Hand a request over, as far as it goes; returns when it has ended."""
        self.threads.give(HandOver("a", order(number)))
        self.join()

    def take(self, number: int = 0) -> None:
        self.threads.take(TakeOver("a", order(number)))
        self.join()

    def join(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "epslots-hand-over":
                thread.join(PATIENCE_S)
        assert not self.threads._contacts and not self.threads._connections

    @property
    def failures(self) -> list[str | None]:
        return [event.failure for event in self.told if isinstance(event, HandedOver)]


def order(number: int) -> ConnectionOrder:
    return ConnectionOrder(number=number, secret=b"", kind="gloo", form_s=PATIENCE_S, deadline_s=PATIENCE_S)


def connection(aborted: list[str] | None = None) -> Any:
    return SimpleNamespace(abort=lambda: None if aborted is None else aborted.append("aborted"))


def test_hand_overs_begin_again_after_another_driver_came():
    """Those of the last one are broken off; after the rank's end none begins."""
    rank = Rank(lambda _: connection())
    rank.threads.abort_all("another driver has come")
    rank.give()
    assert rank.asked == ["hold a", "resume a"] and len(rank.told) == 1
    rank.threads.abort_all("the rank has ended", end=True)
    rank.give(1)
    rank.take(2)
    assert len(rank.asked) == 2 and len(rank.told) == 1


def test_what_is_broken_off_while_ranks_meet_ends():
    """Both the wait for the other rank's address, and a connection that is there just then."""

    def wait(contacts: ContactStore) -> PairConnection:
        rank.threads.abort_all("the test says so")
        try:
            contacts.get("never")
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        raise AssertionError("nothing is there")

    rank = Rank(wait)
    rank.give()
    assert rank.failures == ["the test says so"] and rank.asked == ["resume a"]
    aborted: list[str] = []

    def open_late(_: ContactStore) -> PairConnection:
        late.threads.abort_all("the test says so")
        return connection(aborted)

    late = Rank(open_late)
    before: list[int] = []
    late.threads._between_steps = lambda function: before.append(len(aborted)) or function()  # type: ignore[func-returns-value]
    late.give()
    assert before[0] == 1, "it was aborted before it was used"


def test_a_place_of_an_earlier_try_is_given_back(monkeypatch: pytest.MonkeyPatch):
    """Its request has failed to move, and comes again: two places would be held, and one never be freed."""
    monkeypatch.setattr(hand_over_threads, "take_cache", lambda _connection, reserve, _between, _budget: reserve(None))
    rank = Rank(lambda _: connection())
    rank.take()
    assert rank.asked == ["release a", "reserve a"]
