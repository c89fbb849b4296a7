"""Requests that wait: each line gives them in their turns, and none is lost while others end or are judged anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.driver.request_queue import RequestQueue, WaitingLine, next_in_turn
from cluster.driver.scheduled_request import ScheduledRequest
from epslots.generation.requests import Request

SHORT, LONG = 5, 50


def entry_of(number: int, priority: int = 0, length: int = SHORT) -> ScheduledRequest:
    id = f"r{number}"
    return ScheduledRequest(Request(id, (1,) * length, 4, priority=priority), id, number, 0.0)


def taken(lines: list[WaitingLine]) -> list[ScheduledRequest]:
    """All that wait in these lines, in turn."""
    found = []
    while (first := next_in_turn(lines)) is not None:
        line, entry = first
        assert entry is line.first()
        line.discard(entry)
        found.append(entry)
    return found


def in_turn(entries: list[ScheduledRequest]) -> list[ScheduledRequest]:
    return sorted(entries, key=lambda entry: entry.turn)


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(-2, 2), st.sampled_from([SHORT, LONG])),
    st.tuples(st.just("end"), st.integers(0, 30), st.none()),
    st.tuples(st.just("give"), st.none(), st.none()),
    st.tuples(st.just("return"), st.integers(0, 30), st.none()),
    st.tuples(st.just("divide"), st.none(), st.none()),
)


@given(st.lists(ACTIONS, max_size=60))
def test_requests_wait_in_turn_through_all_changes(actions: list[tuple[str, int | None, int | None]]):
    """They come, end, get a rank and return from a lost one; later ones are judged by their length."""
    divided = False
    queue = RequestQueue(lambda entry: divided and len(entry.request.prompt) == SHORT)
    waiting, away = list[ScheduledRequest](), list[ScheduledRequest]()
    for number, (action, which, length) in enumerate(actions):
        if action == "add":
            waiting.append(entry := entry_of(number, which or 0, length or SHORT))
            queue.add(entry)
        elif action == "end" and waiting:
            queue.discard(waiting.pop((which or 0) % len(waiting)))
        elif action == "give" and (found := next_in_turn(queue.lines())) is not None:
            assert found[1] is in_turn(waiting)[0], "of all lines' first ones, the first"
            queue.discard(found[1])
            waiting.remove(found[1])
            away.append(found[1])
        elif action == "return" and away:
            waiting.append(entry := away.pop((which or 0) % len(away)))
            queue.add(entry)
        elif action == "divide":
            divided = True
            queue.divide()
            short = {entry for entry in waiting if len(entry.request.prompt) == SHORT}
            assert {frozenset(line) for line in queue.lines()} == {frozenset(short), frozenset(waiting) - short} - {
                frozenset()
            }
        assert len(queue) == len(waiting) and in_turn(list(queue)) == in_turn(waiting)
        assert all(line.first() is in_turn(list(line))[0] for line in queue.lines())
    assert taken(queue.lines()) == in_turn(waiting)
    assert len(queue) == 0 and queue.lines() == []


def test_a_line_gives_its_own_in_turn():
    line = WaitingLine()
    entries = [entry_of(number, priority) for number, priority in enumerate((1, 0, 1, -1))]
    for entry in entries:
        line.add(entry)
    line.discard(entries[1])
    line.discard(entry_of(9))
    assert taken([line]) == [entries[3], entries[0], entries[2]] and line.first() is None


@given(st.integers(0, 40), st.booleans())
def test_requests_that_were_ended_take_little_memory(stay: int, again: bool):
    """Also behind one that waits for long, and if the same ones come and go."""
    line, kept = WaitingLine(), [entry_of(number, priority=-1) for number in range(stay)]
    for entry in kept:
        line.add(entry)
    entry = entry_of(100)
    for number in range(300):
        entry = entry if again else entry_of(100 + number)
        line.add(entry)
        line.discard(entry)
        assert len(line._heap) <= 2 * (stay + 1) + 65
    assert taken([line]) == kept


def test_none_waits_after_clear():
    queue = RequestQueue(lambda entry: len(entry.request.prompt) == SHORT)
    for number, length in enumerate((SHORT, LONG)):
        queue.add(entry_of(number, length=length))
    assert [len(line) for line in queue.lines()] == [1, 1]
    queue.clear()
    assert len(queue) == 0 and list(queue) == [] and next_in_turn(queue.lines()) is None
