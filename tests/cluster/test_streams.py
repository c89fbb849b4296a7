"""Readers of a stream that leave: the last one cancels the request, however it leaves, and its place is free again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Cluster
from cluster.errors import Overloaded
from cluster.generation import Generation
from cluster.token_stream import TokenStream
from tests.support.fake_backend import FakeBackend
from tests.support.thread_cluster import PROMPTS, expected, tokens_of
from tests.support.tokenizers import TOKENIZERS

TOKENS = TOKENIZERS["bytes"].encode("one two three four", add_special_tokens=False)


class Submitted:
    """A request without a cluster: it is done when it is cancelled, or when the test says so."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.arrivals = TokenStream(lambda: None)
        self.generation: Generation | None = Generation(
            0,
            "prompt",
            stop=(),
            tokenizer=TOKENIZERS["bytes"],
            stream=self.arrivals,
            cancel=self._cancel,
            check_process=lambda: None,
        )
        self.arrivals.arrive(TOKENS[:4], None, None)

    def _cancel(self) -> None:
        self.cancelled += 1
        if not self.arrivals.done:
            self.arrivals.arrive((), "cancelled", None)

    def take(self) -> Generation:
        """The only reference to the generation."""
        assert self.generation is not None
        generation, self.generation = self.generation, None
        return generation


def leave_the_loop(stream: Iterator[str]) -> None:
    for _ in stream:
        break


def raise_in_the_loop(stream: Iterator[str]) -> None:
    def consume() -> None:
        for _ in stream:
            raise LookupError("of the consumer's own")

    with pytest.raises(LookupError):
        consume()


def close_it(stream: Any) -> None:
    next(stream)
    stream.close()
    assert next(stream, None) is None
    stream.close()


def close_it_before_the_first_piece(stream: Any) -> None:
    stream.close()
    assert list(stream) == []


def take_only_some(stream: Iterator[str]) -> None:
    assert len(list(zip(range(1), stream, strict=False))) == 1


LEAVE = (leave_the_loop, raise_in_the_loop, close_it, close_it_before_the_first_piece, take_only_some)


@pytest.mark.parametrize("leave", LEAVE)
def test_the_last_reader_that_leaves_cancels(leave: Callable[[Any], None]):
    there = Submitted()
    assert there.generation is not None
    leave(iter(there.generation))
    assert there.cancelled == 1
    result = there.generation.result()
    assert (result.reason, result.tokens) == ("cancelled", tuple(TOKENS[:4]))
    assert "".join(there.generation) == result.text  # what there was can be read again


@pytest.mark.parametrize("leave", LEAVE)
def test_a_generation_without_another_reference(leave: Callable[[Any], None]):
    there = Submitted()
    leave(iter(there.take()))
    gc.collect()
    assert there.cancelled
    assert there.arrivals.reason == "cancelled"


def test_a_generation_that_is_dropped_is_cancelled():
    there = Submitted()
    there.take()
    assert there.cancelled == 1


@pytest.mark.parametrize("leave", LEAVE)
def test_the_request_goes_on_while_another_reads(leave: Callable[[Any], None]):
    there = Submitted()
    assert there.generation is not None
    other = iter(there.generation)
    first = next(other)
    leave(iter(there.generation))
    assert not there.cancelled
    there.arrivals.arrive(TOKENS[4:], "length", None)
    assert first + "".join(other) == TOKENIZERS["bytes"].decode(TOKENS)
    assert not there.cancelled


def test_the_request_goes_on_while_its_result_is_awaited():
    there = Submitted()
    generation = there.take()
    results = []
    waiting = threading.Thread(target=lambda: results.append(generation.result()))
    waiting.start()
    while not there.arrivals.users:
        assert waiting.is_alive()
    leave_the_loop(iter(generation))
    assert not there.cancelled
    there.arrivals.arrive(TOKENS[4:], "stop", None)
    waiting.join()
    assert results[0].reason == "stop"


def test_a_wait_that_times_out_cancels_nothing():
    there = Submitted()
    assert there.generation is not None
    with pytest.raises(TimeoutError):
        there.generation.result(0)
    assert not there.cancelled


def test_another_thread_closes_what_is_being_read():
    there = Submitted()
    stream: Any = iter(there.take())
    first, pieces = threading.Event(), []

    def read() -> None:
        for piece in stream:
            pieces.append(piece)
            first.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert first.wait(60)
    stream.close()
    reading.join()
    assert there.cancelled == 1


def test_leaving_after_the_end_changes_nothing():
    there = Submitted()
    generation = there.take()
    there.arrivals.arrive(TOKENS[4:], "length", None)
    stream: Any = iter(generation)
    assert "".join(stream) == TOKENIZERS["bytes"].decode(TOKENS)
    stream.close()
    generation.close()
    with generation:
        pass
    assert generation.result().reason == "length"
    del generation, stream
    gc.collect()
    assert not there.cancelled


def test_a_block_ends_its_generation():
    there = Submitted()
    with there.take() as generation:
        assert next(iter(generation))
    assert generation.result().reason == "cancelled"


def with_text(open_cluster: Any, **settings: Any) -> tuple[Cluster, FakeBackend]:
    cluster, backend = open_cluster(1, **settings)
    cluster.tokenizer = TOKENIZERS["bytes"]
    return cluster, backend


def test_a_place_is_free_as_soon_as_its_reader_has_left(open_cluster: Any, folder: Path):
    cluster, _ = with_text(open_cluster, max_queue=1)
    for leave in LEAVE:
        leave(iter(cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())))
        with cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=()) as going:
            leave(iter(going))
            result = going.result()
            assert result.reason == "cancelled"
            assert result.tokens[:80] == expected(folder, PROMPTS[:1], 80)[0][: len(result.tokens)]
        held = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
        with pytest.raises(Overloaded):
            cluster.submit(PROMPTS[1])
        held.close()
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=3, stop_tokens=())) == expected(folder, PROMPTS, 3)


def test_a_batch_whose_reader_has_left_takes_no_steps(open_cluster: Any):
    cluster, _ = with_text(open_cluster, max_queue=8)
    for result in cluster.generate([*PROMPTS[:1], [5]], max_new_tokens=1, stop_tokens=()):
        assert result.reason == "length"
        break
    results = cluster.generate(PROMPTS * 3, max_new_tokens=400, stop_tokens=())
    going = cluster.submit([5], max_new_tokens=1)
    results.close()  # before the first result, nothing was sent
    assert going.result().reason in ("length", "stop")
    results = cluster.generate([*PROMPTS[:7], {"prompt": [5], "max_new_tokens": 1}], max_new_tokens=400, stop_tokens=())
    assert next(results).index == 7
    del results
    gc.collect()
    for _ in range(8):
        held = [cluster.submit([5], max_new_tokens=400, stop_tokens=()) for _ in range(8)]
        del held
    cluster.stats()
    assert cluster._supervisor.router._calls == {}


def test_no_step_is_made_after_the_last_reader_has_left(open_cluster: Any):
    """Counters that are asked for right after that are the last ones."""
    cluster, backend = with_text(open_cluster)
    for _ in range(5):
        leave_the_loop(iter(cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())))
        before = cluster.stats().ranks[0].steps
        loop = backend.workers[0].loop
        with loop._news:
            assert loop._news.wait_for(lambda loop=loop: loop._asleep and not loop._commands, 60)
        assert cluster.stats().ranks[0].steps == before
