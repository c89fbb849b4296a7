"""Which requests have rows, and which wait: in turn, none passes another, and none is admitted to be given up at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedModel

from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from tests.support.batches import Collected, RowsModelFree, prompt_of

Built = Callable[[str], PreTrainedModel]
# Prompts of these lengths have nothing in common.
SIZES = {"a": (20, 8), "large": (50, 2), "small": (3, 2), "b": (9, 30)}


def asked(id: str) -> Request:
    length, new = SIZES[id]
    return Request(id, prompt_of(length, seed=length), new)


def opened(built: Built, **given: Any) -> tuple[RowBatcher, RowsModelFree, Collected]:
    settings: dict[str, Any] = {"kv_tokens": 64, "max_requests": 4, "max_batch_tokens": 64} | given
    batcher = RowBatcher(built("mixtral"), **settings)
    return batcher, RowsModelFree(batcher), Collected(batcher)


def test_a_small_request_passes_no_large_one(built: Built):
    """It would fit beside the first, and so would any that come after it: the large one would wait for ever."""
    batcher, free, collected = opened(built)
    batcher.add(asked("a"))
    collected.run(2)
    batcher.add(asked("large"))
    batcher.add(asked("small"))
    collected.run()
    assert list(dict.fromkeys(id for ids, _ in free.passes for id in ids)) == ["a", "large", "small"]
    assert list(collected.reasons) == ["a", "large", "small"]
    batcher.close()


def test_a_prepared_pass_stays_as_it_is(built: Built):
    """Ranks have told each other of it. A newcomer waits for the next one, also if this one fails and is made in parts."""
    batcher, free, collected = opened(built)
    forward, parts = batcher._forward, list[tuple[str, ...]]()

    def fail(part: Sequence[Any], *of: Any, **keywords: Any) -> Any:
        parts.append(tuple(running.entry.request.id for running in part))
        if len(parts) == 1:
            raise RuntimeError("once")
        return forward(part, *of, **keywords)

    batcher._forward = fail  # type: ignore[method-assign]
    batcher.add(Request("a", prompt_of(5), 2))
    batcher.add(Request("b", prompt_of(5, seed=1), 2))
    assert batcher.prepare()
    batcher.add(Request("c", prompt_of(5, seed=3), 2))
    for _ in range(3):
        assert batcher.prepare() and batcher.stats().running == 2
        batcher.step()
    assert parts == [("a", "b"), ("a",), ("b",)]
    collected.run()
    assert free.passes[2][0] == ("a", "b") and ("c",) in [ids for ids, _ in free.passes]
    batcher.close()


@pytest.mark.parametrize(("length", "beside"), [(41, True), (42, False)])
def test_every_running_row_has_room_for_a_token(length: int, beside: bool, built: Built):
    """Else the newcomer would be given up in the next step, and its prompt computed again."""
    batcher, _, collected = opened(built)
    batcher.add(asked("a"))
    collected.run(1)
    # The row of "a" holds 20 tokens, its 21st is to be computed, and each of two rows needs room for one more.
    batcher.add(Request("new", prompt_of(length, seed=7), 1))
    collected.run(1)
    assert batcher.stats().running == 1 + beside
    collected.run()
    assert batcher.stats().preempted == 0
    batcher.close()


def test_uncomputed_prompts_keep_their_room(built: Built):
    """Of two prompts in chunks, the second finds no room beside what is left of the first."""
    batcher, free, collected = opened(built, max_batch_tokens=8)
    batcher.add(asked("large"))
    collected.run(1)
    batcher.add(asked("a"))
    collected.run()
    assert batcher.stats().preempted == 0
    order = [ids for ids, _ in free.passes]
    assert order == sorted(order, reverse=True), "one after the other"
    batcher.close()


def test_rows_of_a_pass_stand_in_the_order_of_their_places(built: Built):
    """The lowest free place is taken first: those of a full batch are neighbours, also after others left."""
    batcher, free, collected = opened(built, kv_tokens=256, prefix_cache=False)
    for id, new in (("a", 9), ("b", 3), ("c", 9), ("d", 2)):
        batcher.add(Request(id, prompt_of(5, seed=ord(id)), new))
    collected.run(3)
    assert free.passes == [(("a", "b", "c", "d"), 5), (("a", "b", "c", "d"), 1), (("a", "b", "c"), 1)]
    batcher.add(Request("e", prompt_of(5, seed=9), 9))
    collected.run(2)
    assert free.passes[3:] == [(("e",), 5), (("a", "e", "c"), 1)]
    batcher.close()
