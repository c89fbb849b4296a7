"""A Ray that ends by itself: it is started or joined again, and requests go on with the same tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.api import Cluster
from cluster.errors import ClusterError
from cluster.ray_backend import idle_agent
from cluster.ray_backend.processes import watch_joined
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.rank_helpers import PATIENCE_S, until
from tests.support.ray_driver import pids_below
from tests.support.ray_helpers import drive, process_of_own_ray, start_nodes
from tests.support.thread_cluster import PROMPTS, expected, serve_again

NEW = 120


@pytest.fixture
def cluster(ray_tokens: None, checkpoint: Callable[[str], Path], cache_dir: Path) -> Iterator[Cluster]:
    """A rank on a Ray of its own. Nothing of it may be left."""
    before = pids_below()
    with Cluster(
        checkpoint("qwen3_moe"),
        ranks=1,
        device="cpu",
        slots=3,
        kv_tokens=2048,
        costs=TOKENS_TRAVEL,
        window_steps=4,
        cache_dir=cache_dir,
        progress=False,
    ) as cluster:
        yield cluster
    assert pids_below() <= before


def agents() -> list[psutil.Process]:
    return [child for child in process_of_own_ray("raylet").children() if idle_agent.__file__ in child.cmdline()]


def test_a_ray_of_our_own_is_started_again(cluster: Cluster, checkpoint: Callable[[str], Path]):
    """Its node ends under requests, and again while the cluster closes."""
    folder = checkpoint("qwen3_moe")
    right = expected(folder, PROMPTS, NEW)
    assert cluster.explain().state
    until(lambda: len(agents()) == 2)
    helpers = agents()
    going = [cluster.submit(prompt, max_new_tokens=NEW, stop_tokens=()) for prompt in PROMPTS]
    for generation in going:
        next(generation._portions())
    process_of_own_ray("raylet").kill()
    assert not all(generation.done for generation in going)
    assert [generation.result(PATIENCE_S).tokens for generation in going] == right
    _, alive = psutil.wait_procs(helpers, timeout=PATIENCE_S)
    assert not alive
    serve_again(cluster, 1)
    process_of_own_ray("raylet").kill()  # and what is closed just then, closes


def test_a_ray_of_others_is_joined_again(ray_tokens: None):
    """The node that the driver is on ends, and another comes up in its place."""
    with start_nodes() as nodes, drive(ranks=2, address=nodes.address) as driver:
        worker = driver.start_worker(0)
        (mine,) = [process.pid for process in watch_joined()._processes]
        os.kill(mine, signal.SIGKILL)
        reason = driver.call(driver.backend.lost())
        assert "the node of this process has left the Ray at" in reason
        assert f"its raylet (pid {mine}) has ended" in reason
        with pytest.raises(ClusterError, match="the node of this process has left"):
            driver.start_worker(0)
        worker.kill()  # nothing happens
        nodes.add()
        driver.call(driver.backend.reopen(2))
        for bundle in range(2):
            assert driver.command(driver.start_worker(bundle), b"here") == b"here"
