"""A cluster without Ray: its ranks are threads. And the tokens that its requests must get."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.api import Cluster
from cluster.generation import Result
from tests.support import zoo
from tests.support.batches import is_empty
from tests.support.equality import greedy_rows
from tests.support.fake_backend import LOADING, FakeBackend
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.rank_helpers import PATIENCE_S
from tests.support.remembered import Reference

Checkpoints = Callable[[str], Path]


PROMPTS = [zoo.random_ids(1, length, seed=length)[0].tolist() for length in (3, 40, 17, 9, 25, 5, 12, 30)]


@pytest.fixture
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe_short")


@pytest.fixture
def open_cluster(folder: Path, cache_dir: Path) -> Iterator[Callable[..., tuple[Cluster, FakeBackend]]]:
    opened = []

    def make(ranks: int = 2, backend: FakeBackend | None = None, **settings: Any) -> tuple[Cluster, FakeBackend]:
        backend = backend or FakeBackend()
        settings = {"slots": 3, "kv_tokens": 512, "costs": TOKENS_TRAVEL, "silence_s": PATIENCE_S} | settings
        cluster = Cluster(folder, ranks=ranks, backend=backend, cache_dir=cache_dir, progress=False, **settings)
        opened.append(cluster)
        return cluster, backend

    yield make
    for cluster in opened:
        cluster.close()


# Plain transformers' greedy tokens by checkpoint and prompt, as many as any test has asked for: they are the same for all.
_EXPECTED: dict[tuple[Path, tuple[int, ...]], tuple[int, ...]] = {}


_AT_ONCE = 80  # what most tests need at most


def expected(folder: Path, prompts: list[list[int]], new: int) -> list[tuple[int, ...]]:
    known = [_EXPECTED.get((folder, tuple(prompt)), ()) for prompt in prompts]
    if any(len(tokens) < new for tokens in known):
        reference = Reference(folder)
        lengths = {len(prompt) for prompt in prompts}
        for alike in [[prompt for prompt in prompts if len(prompt) == length] for length in sorted(lengths)]:
            with LOADING:
                found = greedy_rows(reference, torch.tensor(alike), max(new, _AT_ONCE))
            for prompt, ids in zip(alike, found, strict=True):
                _EXPECTED[folder, tuple(prompt)] = tuple(ids[len(prompt) :])
        known = [_EXPECTED[folder, tuple(prompt)] for prompt in prompts]
    return [tokens[:new] for tokens in known]


def until(cluster: Cluster, condition: Callable[[], bool]) -> None:
    """Wait for what the supervisor does."""
    cluster._thread.call(cluster._supervisor._changes.wait_for(condition))


def serve_again(cluster: Cluster, ranks: int) -> None:
    """Wait until so many ranks serve, without asking for them."""
    groups = cluster._supervisor.groups
    until(cluster, lambda: groups.formed and len(groups.members) == ranks)


def tokens_of(results: Iterator[Result]) -> list[tuple[int, ...]]:
    found = sorted(results, key=lambda result: result.index)
    assert [result.reason for result in found] == ["length"] * len(found), found
    return [result.tokens for result in found]


def check_empty(opened: Cluster, backend: FakeBackend) -> None:
    """No rank holds or reserves anything, and no hand-over is under way."""
    hand_overs, stopped = opened._supervisor.router.hand_overs, threading.Event()
    while len(hand_overs):  # a request may end while its cache is being read
        stopped.wait(0.001)
    opened.stats()  # after all commands
    opened._supervisor.router._scheduler.check()
    for worker in backend.workers.values():
        engine = worker.loop._engine
        assert engine is not None
        until_quiet(worker.loop.hand_overs)
        assert worker.loop._commands.between_steps(lambda engine=engine: is_empty(engine.batcher))


def until_quiet(hand_overs: Any) -> None:
    """Wait for the ends of connections, which the driver doesn't wait for."""
    done = threading.Event()
    while hand_overs._contacts:
        done.wait(0.001)
