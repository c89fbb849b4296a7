"""A rank's commands and errands: in order, again where an errand asks for that, and none is left waiting at the end."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cluster.messages.rank import GiveUp
from cluster.rank.command_queue import CommandQueue, Errand, NotYet
from epslots.errors import PeerLost


@pytest.fixture
def queue() -> CommandQueue:
    return CommandQueue(threading.Condition())


def asked(pool: ThreadPoolExecutor, queue: CommandQueue, function: object) -> tuple[Errand[int], Future[int]]:
    """An errand that another thread has asked for, as the stepping thread takes it."""
    future = pool.submit(queue.between_steps, function)  # type: ignore[arg-type]
    (errand,) = queue.take(lambda: False)
    assert isinstance(errand, Errand)
    return errand, future


def test_an_errand_is_run_again_until_it_has_a_result(queue: CommandQueue):
    """After the commands that came meanwhile: one of them may be what it waits for."""
    ready: list[int] = []

    def function() -> int:
        if not ready:
            raise NotYet
        return ready[0]

    with ThreadPoolExecutor(1) as pool:
        errand, future = asked(pool, queue, function)
        for _ in range(3):
            assert not errand.run()
            queue.put_again(errand)
            queue.put(GiveUp())
            assert queue.take(lambda: False) == [GiveUp(), errand]
        queue.put_again(errand)
        assert queue.take(lambda: True) == [errand], "and before each step"
        ready.append(7)
        assert errand.run()
        assert future.result() == 7
        assert not queue._open and queue.take(lambda: True) == []


def test_an_errands_error_is_the_asking_threads(queue: CommandQueue):
    with ThreadPoolExecutor(1) as pool:
        errand, future = asked(pool, queue, lambda: 1 // 0)
        assert errand.run()
        with pytest.raises(ZeroDivisionError):
            future.result()


@pytest.mark.parametrize("waits", ["in the queue", "to be run again", "taken"])
def test_no_errand_waits_for_a_rank_that_has_ended(queue: CommandQueue, waits: str):
    """One that was taken behind the command that ends the rank isn't run any more."""
    with ThreadPoolExecutor(1) as pool:
        errand, future = asked(pool, queue, lambda: 1)
        if waits == "to be run again":
            queue.put_again(errand)
        elif waits == "in the queue":
            queue._commands.append(errand)
        queue.end()
        with pytest.raises(PeerLost, match="the rank has ended"):
            future.result()
        with pytest.raises(PeerLost):
            queue.between_steps(lambda: 1)
