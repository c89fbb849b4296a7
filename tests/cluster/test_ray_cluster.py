"""The whole cluster on Ray nodes of this machine, with token authentication: ranks and nodes die, nodes join, jobs run."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.api import Cluster
from cluster.errors import ClusterError
from cluster.generation import Generation
from tests.cluster.ray_helpers import RayNodes
from tests.cluster.test_cluster import PROMPTS, expected, tokens_of
from tests.grouped import COPIES_TRAVEL, TOKENS_TRAVEL

pytestmark = pytest.mark.timeout(240)
NEW = 80


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3_moe")


@pytest.fixture
def open_cluster(ray_nodes: RayNodes, folder: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    opened: list[Cluster] = []

    def make(ranks: int, **settings: Any) -> Cluster:
        settings = {"slots": 3, "kv_tokens": 2048, "costs": TOKENS_TRAVEL, "device": "cpu", "progress": False} | settings
        opened.append(Cluster(folder, ranks=ranks, address=ray_nodes.address, cache_dir=tmp_path / "cache", **settings))
        return opened[-1]

    yield make
    for cluster in opened:
        cluster.close()


def running(cluster: Cluster) -> list[Generation]:
    """All prompts, each with some of its tokens there and more to come."""
    found = [cluster.submit(prompt, max_new_tokens=NEW, stop_tokens=()) for prompt in PROMPTS]
    for generation in found:
        next(generation._arrivals())
    return found


def tokens(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [generation.result(120).tokens for generation in generations]


def pids(cluster: Cluster) -> list[int]:
    return [int(re.findall(r"pid (\d+)", place)[0]) for place in cluster.placement().ranks]


def hosts(cluster: Cluster) -> list[str]:
    return [re.findall(r"node (\S+),", place)[0] for place in cluster.placement().ranks]


def test_two_nodes_a_killed_rank_and_a_stopped_one(ray_nodes: RayNodes, open_cluster: Any, folder: Path):
    right = expected(folder, PROMPTS, NEW)
    with ray_nodes.further():
        cluster = open_cluster(2, strategy="STRICT_SPREAD", silence_s=2.0)
        assert len(set(hosts(cluster))) == 2
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=())) == right
        for number in (signal.SIGKILL, signal.SIGSTOP):
            first, second = pids(cluster)
            going = running(cluster)
            os.kill(second, number)
            assert not any(generation.done for generation in going)
            assert tokens(going) == right
            cluster.scale(2)
            now = pids(cluster)
            assert now[0] == first
            assert now[1] != second
            psutil.wait_procs([psutil.Process(second)] if psutil.pid_exists(second) else [], timeout=20)
            assert not psutil.pid_exists(second)
        processes = [psutil.Process(pid) for pid in pids(cluster)]
        cluster.close()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive


def test_three_nodes_one_dies_and_another_joins(ray_nodes: RayNodes, open_cluster: Any, folder: Path):
    right = expected(folder, PROMPTS, NEW)
    with ray_nodes.further(1) as second, ray_nodes.further(1):
        cluster = open_cluster(3, strategy="STRICT_SPREAD", silence_s=2.0)
        lost = second.node_ip_address
        assert lost in hosts(cluster)
        assert len(set(hosts(cluster))) == 3
        going = running(cluster)
        ray_nodes.kill(second)
        assert not any(generation.done for generation in going)
        assert tokens(going) == right
        assert lost not in hosts(cluster)
        with ray_nodes.further(1) as joined:
            cluster.scale(3)
            assert joined.node_ip_address in hosts(cluster)
            assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=9, stop_tokens=())) == [own[:9] for own in right]
            with ray_nodes.further(1) as fourth:
                cluster.scale(4)
                assert fourth.node_ip_address in hosts(cluster)
                assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=9, stop_tokens=())) == [own[:9] for own in right]
                cluster.scale(2)
                assert cluster.ranks == 2


def test_more_ranks_than_there_is_room_for(open_cluster: Any):
    with pytest.raises(ClusterError, match=r"no room for 7 ranks(.|\n)*What helps: ask for fewer ranks"):
        open_cluster(7)


def controller_pid(cluster: Cluster) -> int:
    stats = cluster.stats().controller
    assert stats is not None
    return int(re.findall(r"pid (\d+)", stats.where)[0])


def test_the_controller_is_asked_killed_and_stopped_while_requests_go_on(open_cluster: Any, folder: Path):
    right = expected(folder, PROMPTS, NEW)
    cluster = open_cluster(2, slots=10, costs=COPIES_TRAVEL, window_steps=2)
    assert cluster.explain().state == "watching"
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=())) == right
    found = cluster.explain()
    assert found.windows > 0
    assert found.refused == 0, found.refusals
    assert (asked := cluster.rebalance().latest) is not None
    assert asked.asked
    assert asked.plan_s > 0
    newest = found.placement
    for number in (signal.SIGKILL, signal.SIGSTOP):
        lost = controller_pid(cluster)
        going = running(cluster)
        os.kill(lost, number)
        assert not any(generation.done for generation in going)
        assert tokens(going) == right
        if number == signal.SIGSTOP:
            continue  # nobody has had to wait for it, and closing ends it
        found = cluster.explain()  # by the next one
        assert controller_pid(cluster) != lost
        assert found.placement >= newest
        newest = found.placement
        assert cluster.ranks == 2
    stats = cluster.stats().controller
    assert stats is not None
    assert stats.hired == 2
    cluster.close()
    psutil.wait_procs([psutil.Process(lost)] if psutil.pid_exists(lost) else [], timeout=20)
    assert not psutil.pid_exists(lost)
