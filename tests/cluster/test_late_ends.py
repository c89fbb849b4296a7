"""Hand-overs of a driver that is no more: their ends reach no other driver, whose requests may have the same ids."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from cluster.driver.request_router import RequestRouter
from cluster.driver.workers import Deadlines
from cluster.messages.hand_over import ConnectionOrder, HandedOver, HandOver
from cluster.rank.hand_over_threads import HandOverThreads
from epslots.errors import PeerLost
from tests.support.rank_helpers import PATIENCE_S


@pytest.mark.parametrize("forget", [True, False])
def test_a_connection_that_ends_late_belongs_to_none(forget: bool):
    """Unless the driver is still the same: then its request goes on here."""
    told, resumed, opening, ends = list[object](), list[str](), threading.Event(), threading.Event()

    def open_late(*_: object, **__: object) -> NoReturn:
        opening.set()
        assert ends.wait(PATIENCE_S)
        raise PeerLost("no peer came, says the test")

    batcher: Any = SimpleNamespace(resume=resumed.append)
    threads = HandOverThreads(lambda: batcher, lambda function: function(), told.append, open_late)
    threads.give(HandOver("a", ConnectionOrder(number=7, secret=b"", kind="memory", form_s=1.0, deadline_s=1.0)))
    assert opening.wait(PATIENCE_S)
    threads.abort_all("says the test", forget=forget)
    ends.set()
    for thread in threading.enumerate():
        if thread.name == "epslots-hand-over":
            thread.join(PATIENCE_S)
    assert resumed == ([] if forget else ["a"])
    assert told == ([] if forget else [HandedOver(number=7, failure="no peer came, says the test")])


def test_no_two_drivers_number_alike():
    """An end that was on its way when the next driver came is of none of its hand-overs."""
    routers = [RequestRouter(lambda *_: None, lambda: None, Deadlines()) for _ in range(2)]
    first, other = (next(router.hand_overs._numbers) for router in routers)
    assert abs(first - other) > 10**6
