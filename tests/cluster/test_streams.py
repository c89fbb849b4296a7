"""Readers of a stream that leave: the last one cancels the request, however it leaves, and its place is free again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Cluster
from cluster.errors import ClusterError, Overloaded, RequestFailed
from cluster.generation import Generation, PromptChoice
from cluster.reports import ClusterState, GroupReport
from cluster.token_stream import TokenStream
from epslots.errors import ConfigError
from epslots.generation.portions import Portion
from epslots.generation.requests import Output, Request, TokenLogprobs
from epslots.generation.settings import read_settings
from tests.support.fake_backend import FakeBackend
from tests.support.thread_cluster import PROMPTS, expected, tokens_of
from tests.support.tokenizers import TOKENIZERS

TOKENS = TOKENIZERS["bytes"].encode("one two three four", add_special_tokens=False)


def output(tokens: list[int], reason: Any = None, **more: Any) -> Output:
    return Output("0", tuple(tokens), reason is not None, reason, **more)


class Submitted:
    """A request without a cluster: it is done when it is cancelled, or when the test says so."""

    def __init__(self, first: int = 4, tokenizer: Any = TOKENIZERS["bytes"], **settings: Any) -> None:
        self.cancelled = 0
        self.arrivals = TokenStream(lambda: None)
        read = read_settings(settings)
        request = Request("0", (5, 6), 10, logprobs=read.logprobs, prompt_logprobs=read.prompt_logprobs)
        self.generation: Generation | None = Generation(
            PromptChoice(0, "prompt", read, 0, request),
            tokenizer=tokenizer,
            stream=self.arrivals,
            cancel=self._cancel,
            check_process=lambda: None,
        )
        if first:
            self.arrivals.arrive(output(TOKENS[:first]))

    def _cancel(self) -> None:
        self.cancelled += 1
        if not self.arrivals.done:
            self.arrivals.arrive(output([], "cancelled"))

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


@pytest.mark.parametrize("read", [iter, Generation.portions])
@pytest.mark.parametrize("leave", LEAVE)
def test_the_last_reader_that_leaves_cancels(leave: Callable[[Any], None], read: Callable[[Generation], Iterator[Any]]):
    there = Submitted()
    assert there.generation is not None
    leave(read(there.generation))
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
    there.arrivals.arrive(output(TOKENS[4:], "length"))
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
    there.arrivals.arrive(output(TOKENS[4:], "stop"))
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
    there.arrivals.arrive(output(TOKENS[4:], "length"))
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


# --- portions ----------------------------------------------------------------------------------------------------------------

OF_PROMPT = (TokenLogprobs(6, -0.5, ((6, -0.5),)),)
OF_TEXT = tuple(TokenLogprobs(token, -1.0) for token in TOKENS)


def joined(portions: list[Portion]) -> Portion:
    """All portions as one; only the last one may have a reason."""
    assert [portion.reason for portion in portions[:-1]] == [None] * (len(portions) - 1)
    return Portion(
        tokens=sum((portion.tokens for portion in portions), ()),
        text="".join(str(portion.text) for portion in portions),
        logprobs=sum((portion.logprobs for portion in portions), ()),
        prompt_logprobs=sum((portion.prompt_logprobs for portion in portions), ()),
        reason=portions[-1].reason,
    )


def test_portions_together_are_the_whole():
    """Whether they are read as they come or later; the text alone is a part of them."""
    there = Submitted(first=0, logprobs=0, prompt_logprobs=1)
    assert there.generation is not None
    early, found = there.generation.portions(), []
    arriving = [
        output([], prompt_logprobs=OF_PROMPT),
        *(output([t], logprobs=(o,)) for t, o in zip(TOKENS, OF_TEXT, strict=True)),
    ]
    for each in arriving:
        there.arrivals.arrive(each)
        found.append(next(early))
        assert (found[-1].tokens, found[-1].logprobs) == (each.tokens, each.logprobs)
    text = TOKENIZERS["bytes"].decode(TOKENS)
    pieces, read = iter(there.generation), ""
    while read != text:
        read += next(pieces)
    there.arrivals.arrive(output([], "length"))
    assert list(pieces) == [], "an end without text is no piece"
    found += early
    whole = Portion(tuple(TOKENS), text, OF_TEXT, OF_PROMPT, "length")
    assert joined(found) == joined(list(there.generation.portions())) == whole
    result = there.generation.result()
    assert (result.tokens, result.text, result.reason) == (whole.tokens, whole.text, whole.reason)
    assert (result.logprobs, result.prompt_logprobs) == (whole.logprobs, whole.prompt_logprobs)
    assert (result.prompt_tokens, result.choice, result.choices) == ((5, 6), 0, 1)
    assert "".join(there.generation) == text
    assert not there.cancelled


def test_logprobs_that_nobody_asked_for_are_none():
    there = Submitted()
    assert there.generation is not None
    there.arrivals.arrive(output(TOKENS[4:], "stop"))
    result = there.generation.result()
    assert (result.logprobs, result.prompt_logprobs) == (None, None)


def test_without_a_tokenizer_portions_have_no_text():
    there = Submitted(tokenizer=None)
    assert there.generation is not None
    there.arrivals.arrive(output(TOKENS[4:], "stop"))
    assert list(there.generation.portions()) == [Portion(tuple(TOKENS), None, reason="stop")]
    with pytest.raises(ConfigError, match=r"no tokenizer, so there is no text; use portions\(\) or result\(\).tokens"):
        list(there.generation)


def test_an_error_follows_the_tokens_before_it():
    there = Submitted()
    assert there.generation is not None
    there.arrivals.arrive(output([], "error", error="NaN, says the test"))
    reader = there.generation.portions()
    assert next(reader).tokens == tuple(TOKENS[:4])
    with pytest.raises(ClusterError, match="NaN, says the test"):
        next(reader)
    assert there.generation.result().reason == "error"


# --- in a cluster ------------------------------------------------------------------------------------------------------------


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


# --- polling -----------------------------------------------------------------------------------------------------------------


def polled(poll: Iterator[Portion | None]) -> list[Portion]:
    """The events that have come."""
    found = []
    for portion in poll:
        if portion is None:
            break
        found.append(portion)
    return found


def test_polling_never_waits():
    """It tells when there is news, and returns what has come since the last time."""
    there, news = Submitted(first=2), []
    assert there.generation is not None
    poll = there.generation.poll(lambda waited_for: news.append((len(there.arrivals.tokens), waited_for)))
    assert joined(polled(poll)).tokens == tuple(TOKENS[:2])
    assert polled(poll) == []
    assert news == []
    there.arrivals.arrive(output(TOKENS[2:5]))
    there.arrivals.arrive(output(TOKENS[5:]))
    assert news == [(5, True), (len(TOKENS), False)]
    assert joined(polled(poll)).tokens == tuple(TOKENS[2:])
    there.arrivals.arrive(output([], "length"))
    assert news[-1] == (len(TOKENS), True)
    assert polled(poll)[-1].reason == "length"
    assert next(poll, "over") == "over"
    assert not there.cancelled


def test_a_poll_that_is_closed_cancels():
    there = Submitted()
    assert there.generation is not None
    poll = there.generation.poll(lambda waited_for: None)
    assert polled(poll)
    poll.close()
    assert there.cancelled == 1
    assert polled(poll) == []


def test_a_poll_raises_what_ended_it():
    for reason, kind in (("error", RequestFailed), (None, ClusterError)):
        there, news = Submitted(first=0), []
        assert there.generation is not None
        poll = there.generation.poll(lambda waited_for, news=news: news.append(1))
        if reason:
            there.arrivals.arrive(output([], reason, error="NaN, says the test"))
        else:
            there.arrivals.fail(ClusterError("all ranks are lost"))
        assert news
        with pytest.raises(kind, match="NaN, says the test" if reason else "all ranks are lost"):
            polled(poll)


def test_text_with_special_tokens_lacks_the_one_that_ends_it():
    tokenizer = TOKENIZERS["bytes"]
    special = tokenizer.eos_token_id
    there = Submitted(first=0, stop_tokens=(special,))
    assert there.generation is not None
    there.generation._choice.request.__dict__["stop_tokens"] = frozenset((special,))
    there.arrivals.arrive(output([*TOKENS, special], "stop"))
    shown = joined(polled(there.generation.poll(lambda waited_for: None, special_tokens=True)))
    assert (shown.text, shown.tokens) == (tokenizer.decode(TOKENS), (*TOKENS, special))
    there = Submitted(first=0)
    assert there.generation is not None
    there.arrivals.arrive(output([*TOKENS[:2], special, *TOKENS[2:]], "length"))
    shown = joined(polled(there.generation.poll(lambda waited_for: None, special_tokens=True)))
    assert shown.text == tokenizer.decode(TOKENS[:2]) + tokenizer.eos_token + tokenizer.decode(TOKENS[2:])


def test_the_state_is_known_without_asking_a_rank(open_cluster: Any):
    cluster, _ = with_text(open_cluster, max_queue=4)
    epoch = cluster.state().epoch
    groups = (GroupReport(0, "mixed", epoch, formed=True, ranks=1, handing_over=0),)
    assert cluster.state() == ClusterState(
        ranks=1, epoch=epoch, queued=0, running=0, free=4, places=4, failure=None, groups=groups
    )
    assert cluster.limits.capacity >= 512
    held = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    assert cluster.state().free == 3
    reader = held.portions()
    next(reader)
    assert cluster.group_of(held) == 0
    held.close()
    assert cluster.group_of(held) is None
    cluster.close()
    assert cluster.state().failure == "the cluster was closed"
