"""A fork after a cluster was made: the child ends like any process, and nothing of the parent's can be called in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import ClusterError
from tests.support.forks import in_a_child
from tests.support.thread_cluster import PROMPTS
from tests.support.tokenizers import TOKENIZERS

pytestmark = [
    pytest.mark.usefixtures("one_load_at_a_time"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]


def test_a_childs_calls_are_refused_by_name(open_cluster: Any):
    cluster, backend = open_cluster(1, max_queue=3)
    cluster.tokenizer = TOKENIZERS["bytes"]
    going = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    done = cluster.submit([5], max_new_tokens=1)
    done.result(60)
    stream, results = iter(going), cluster.generate([[5]] * 8, max_new_tokens=1)
    next(stream)
    next(results)
    calls: dict[str, Callable[[], Any]] = {
        **{
            name: getattr(cluster, name)
            for name in ("stats", "placement", "explain", "rebalance", "freeze", "unfreeze", "close")
        },
        "submit": lambda: cluster.submit([5]),
        "generate": lambda: cluster.generate([[5]]),
        "scale": lambda: cluster.scale(2),
        "ranks": lambda: cluster.ranks,
        "with": lambda: cluster.__exit__(None, None, None),
        "result": going.result,
        "result of one that is done": done.result,
        "cancel": going.cancel,
        "iterating": lambda: list(going),
        "an iterator from before": lambda: next(stream),
        "results from before": lambda: next(results),
    }

    def call_all() -> list[str]:
        allowed = []
        for name, call in calls.items():
            try:
                call()
            except ClusterError as error:
                if "was made before a fork" in str(error):
                    continue
            allowed.append(name)
        return allowed

    assert in_a_child(call_all) == []
    assert not backend.closed
    assert not going.done, "readers that a child drops cancel nothing of the parent's"
    assert len(list(results)) == 7
    going.cancel()
    assert going.result(60).reason == "cancelled"


def test_a_child_runs_the_exit_handlers(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    """They are inherited; and so is the block that a child may exit from."""
    handlers: list[Callable[[], Any]] = []
    monkeypatch.setattr("cluster.api.atexit.register", handlers.append)
    cluster, backend = open_cluster(1)

    def exit_from_a_block() -> list[str]:
        found = []
        try:
            with cluster:
                raise SystemExit(7)
        except SystemExit as error:
            found.append(f"exit {error.code}")
        for handler in handlers:
            handler()
            found.append("handled")
        return found

    assert in_a_child(exit_from_a_block) == ["exit 7", "handled"]
    assert not backend.closed
    assert cluster.submit([5], max_new_tokens=1).result(60).tokens
    for handler in handlers:
        handler()
    assert backend.closed
