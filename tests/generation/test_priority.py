"""Priorities: of the requests that wait, the lowest number is served first; in a full cache, the highest is preempted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.generation.batcher import Batcher
from epslots.generation.batchers import batcher_for
from epslots.generation.requests import Request
from epslots.generation.settings import read_settings
from tests.support.batches import Collected, generated, prompt_of

CACHES = ("pages", "rows")


def asked(id: str, priority: int, length: int = 5, new: int = 3) -> Request:
    return Request(id, prompt_of(length), new, priority=priority)


def opened(model: PreTrainedModel, cache: str, **settings: Any) -> tuple[Batcher, Collected]:
    batcher = batcher_for(model, cache=cache, prefix_cache=False, **settings)
    return batcher, Collected(batcher)


@pytest.mark.parametrize("cache", CACHES)
def test_the_lowest_number_is_served_first(cache: str, built: Callable[[str], PreTrainedModel]):
    """Equal ones in the order of arrival. The running one isn't stopped for a better one that comes."""
    batcher, collected = opened(built("mixtral"), cache, kv_tokens=256, max_requests=1)
    for id, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0)):
        batcher.add(asked(id, priority))
    collected.run(steps=2)
    batcher.add(asked("e", -2))
    assert list(collected.run().reasons) == ["c", "e", "a", "d", "b"]
    batcher.close()


@pytest.mark.parametrize("cache", CACHES)
def test_the_highest_number_gives_way(cache: str, built: Callable[[str], PreTrainedModel]):
    """Not the newest: that is the best here. It waits at its place, and gets its tokens all the same."""
    model = built("mixtral")
    batcher, collected = opened(model, cache, kv_tokens=64, max_requests=3)
    requests = [asked("worst", 3, 10, 30), asked("middle", 1, 10, 40), asked("best", -4, 10, 40)]
    for request in requests:
        batcher.add(request)
    while not batcher.stats().preempted:
        collected.run(steps=1)
    assert "worst" not in collected.reasons
    assert list(collected.run().reasons) == ["best", "middle", "worst"]
    assert all(collected.tokens[request.id] == generated(model, request) for request in requests)
    batcher.close()


@pytest.mark.parametrize("given", [2**63, -(2**63), "high", 1.5])
def test_a_priority_is_a_number_that_messages_carry(given: Any):
    with pytest.raises(ConfigError, match="priority"):
        read_settings({"priority": given})


def test_a_request_refuses_another_kind():
    with pytest.raises(ConfigError, match="priority=True; allowed: an int"):
        Request("a", (1,), 1, priority=True)


def test_a_moved_request_keeps_its_priority():
    assert asked("a", 7).after([1]).priority == 7
