"""When a rank's events are sent: a first token at once, everything else in batches."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages.rank import Asleep, Outputs, decode_events
from cluster.rank.event_pace import EVENTS_EVERY_S, EventPace
from cluster.rank.rank_loop import RankLoop
from epslots.generation.requests import Output, Reason


def outputs(id: str, tokens: tuple[int, ...] = (5,), reason: Reason | None = None) -> Outputs:
    return Outputs((Output(id, tokens, reason is not None, reason),))


def paced(*ids: str) -> EventPace:
    """A pace that has just sent a batch, with requests that have no token yet."""
    pace = EventPace()
    for id in ids:
        pace.expect(id)
    pace.sent(10.0)
    return pace


def test_the_pace_is_one_that_readers_dont_notice():
    assert EVENTS_EVERY_S <= 0.02


def test_after_a_pause_an_event_waits_for_nothing():
    pace = EventPace()
    pace.note(Asleep(0, 1))
    assert pace.wait_s(10.0) == 0
    pace.sent(10.0)
    assert pace.wait_s(10.0 + EVENTS_EVERY_S) == 0


def test_events_wait_for_others():
    pace = paced()
    pace.note(outputs("a"))
    assert pace.wait_s(10.005) == pytest.approx(EVENTS_EVERY_S - 0.005)


def test_a_first_token_waits_for_nothing():
    pace = paced("a", "b")
    pace.note(outputs("a", ()))  # a portion of its prompt's log-probabilities
    assert pace.wait_s(10.0) > 0
    pace.note(outputs("a"))
    assert pace.wait_s(10.0) == 0
    pace.sent(10.0)
    pace.note(outputs("a"))
    assert pace.wait_s(10.0) > 0, "its second one does"
    pace.note(outputs("b", (), "stop"))
    assert pace.wait_s(10.0) == 0, "an end without a token is news as good"


def test_a_request_that_moved_here_has_tokens_already():
    pace = paced()
    pace.note(outputs("moved"))
    assert pace.wait_s(10.0) > 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 0.03)), max_size=30))
def test_no_event_waits_longer_than_the_pace(events: list[tuple[str, bool, float]]):
    pace, now_s, oldest = EventPace(), 0.0, None
    for id in "abc":
        pace.expect(id)
    for id, ends, pause_s in events:
        now_s += pause_s
        if oldest is not None and pace.wait_s(now_s) == 0:
            pace.sent(now_s)
            oldest = None
        pace.note(outputs(id, reason="stop" if ends else None))
        oldest = now_s if oldest is None else oldest
        assert now_s + pace.wait_s(now_s) <= oldest + EVENTS_EVERY_S + 1e-9


def test_a_rank_sends_at_its_pace():
    """Two batches: the first at once, the others together when the clock says so."""
    now = [100.0]
    loop = RankLoop(lambda *_: None, clock=lambda: now[0])  # type: ignore[arg-type,return-value]
    loop._send(Asleep(0, 1))
    assert decode_events(loop.events()) == [Asleep(0, 1)]
    loop._send(Asleep(0, 2))
    found: list[Any] = []
    reading = threading.Thread(target=lambda: found.append(loop.events()))
    reading.start()
    loop._send(Asleep(0, 3))
    now[0] += EVENTS_EVERY_S
    with loop._news:
        loop._news.notify_all()
    reading.join(60)
    assert decode_events(found[0]) == [Asleep(0, 2), Asleep(0, 3)]
