"""Room in the queue: a prompt's choices get it together, and waiting callers in the order of asking."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from cluster.queue_room import QueueRoom


def waiting(room: QueueRoom, count: int, then: Callable[[], object]) -> threading.Thread:
    """A thread that waits for so many places."""
    before = len(room._waiting)
    thread = threading.Thread(target=lambda: room.take(count, wait=True) and then(), daemon=True)
    thread.start()
    while len(room._waiting) == before:
        assert thread.is_alive()
    return thread


def test_places_are_taken_together_or_not_at_all():
    room = QueueRoom(3)
    assert room.take(2, wait=False)
    assert not room.take(2, wait=False)
    assert room.take(1, wait=False)
    assert not room.take(1, wait=False)
    room.give(2)
    assert room.take(2, wait=True)
    room.give(3)
    assert room.take(3, wait=False)


def test_callers_that_wait_get_their_places_in_order():
    """Requests that need few places don't keep one that needs many waiting for ever."""
    room, order = QueueRoom(3), list[str]()
    assert room.take(2, wait=False)
    many = waiting(room, 3, lambda: order.append("many"))
    few = waiting(room, 1, lambda: order.append("few"))
    assert not room.take(1, wait=False), "one place is free, and others wait"
    assert order == []
    room.give(2)
    many.join(60)
    assert order == ["many"]
    assert few.is_alive()
    room.give(1)
    few.join(60)
    assert order == ["many", "few"]
    room.give(2)
    assert room.take(2, wait=False)
    assert not room.take(1, wait=False)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=30))
def test_taken_places_never_exceed_those_there_are(steps: list[tuple[bool, int]]):
    room, taken = QueueRoom(5), list[int]()
    for take, count in steps:
        if take:
            assert room.take(count, wait=False) == (sum(taken) + count <= 5)
            taken += [count] if sum(taken) + count <= 5 else []
        elif taken:
            room.give(taken.pop())


def test_held_places_are_used_once_or_go_back():
    room = QueueRoom(5)
    held = room.hold(3)
    assert held is not None and room.free == 2 and room.hold(3) is None
    assert held.use(2) and not held.use(2)
    held.close()
    assert room.free == 3, "the two that are used go back when their requests are done"
    held.close()
    assert not held.use(1) and room.free == 3
    room.give(2)
    assert room.free == 5
