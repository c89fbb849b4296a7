"""The cluster on real processes and gloo: killed by SIGKILL, stopped by SIGSTOP, and continued when it is too late."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.api import Cluster
from cluster.generation import Generation
from tests.support.clock_loop import ClockLoop
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.process_backend import ProcessBackend
from tests.support.rank_helpers import PATIENCE_S
from tests.support.thread_cluster import PROMPTS, expected, tokens_of

pytestmark = pytest.mark.usefixtures("clock_loops")


@pytest.fixture
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3_moe")


@pytest.fixture
def open_cluster(folder: Path, cache_dir: Path) -> Iterator[Callable[..., tuple[Cluster, ProcessBackend]]]:
    opened = []

    def make(ranks: int) -> tuple[Cluster, ProcessBackend]:
        backend = ProcessBackend()
        cluster = Cluster(
            folder,
            ranks=ranks,
            backend=backend,
            cache_dir=cache_dir,
            progress=False,
            slots=3,
            kv_tokens=1024,
            costs=TOKENS_TRAVEL,
            silence_s=PATIENCE_S,
            window_steps=0,
        )
        opened.append(cluster)
        return cluster, backend

    yield make
    for cluster in opened:
        cluster.close()


def running(cluster: Cluster, new: int) -> list[Generation]:
    """All prompts, each with some of its tokens there and more to come."""
    found = [cluster.submit(prompt, max_new_tokens=new, stop_tokens=()) for prompt in PROMPTS]
    for generation in found:
        next(generation._portions())
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_in_the_middle_of_a_step(open_cluster: Any, folder: Path, ranks: int):
    cluster, backend = open_cluster(ranks)
    first = backend.workers[0]
    generations = running(cluster, 80)
    os.kill(backend.workers[1].pid, signal.SIGKILL)
    assert not any(generation.done for generation in generations)
    assert [generation.result(PATIENCE_S).tokens for generation in generations] == expected(folder, PROMPTS, 80)
    cluster.scale(ranks)  # the replacement has joined
    assert cluster.ranks == ranks
    assert backend.workers[0] is first
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=5, stop_tokens=())) == expected(folder, PROMPTS, 5)


def test_stopped_and_continued_when_it_is_too_late(open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The stopped process isn't killed here, so that it really goes on; its messages are no longer heard."""
    cluster, backend = open_cluster(2)
    stopped, given_up = backend.workers[1], threading.Event()
    monkeypatch.setattr(stopped, "kill", given_up.set)
    generations = running(cluster, 80)
    os.kill(stopped.pid, signal.SIGSTOP)
    loop = cluster._thread._loop
    assert isinstance(loop, ClockLoop)
    loop.skip_until(given_up.is_set, settled=lambda: not any(w.owes for w in backend.workers.values() if w is not stopped))
    right = expected(folder, PROMPTS, 80)
    assert [generation.result(PATIENCE_S).tokens for generation in generations] == right
    cluster.scale(2)
    generation = cluster.stats().epoch
    stopped.said.clear()
    again = running(cluster, 40)
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.said.wait(PATIENCE_S)  # that its group is broken; and no driver listens
    assert [one.result(PATIENCE_S).tokens for one in again] == [tokens[:40] for tokens in right]
    assert cluster.stats().epoch == generation
    assert cluster.ranks == 2
    stopped.process.kill()


def test_nothing_is_left(open_cluster: Any):
    cluster, backend = open_cluster(2)
    running(cluster, 200)
    cluster.close()
    assert not any(psutil.pid_exists(worker.pid) for worker in backend.started)
