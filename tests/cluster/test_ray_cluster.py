"""The whole cluster on Ray nodes of this machine, with token authentication: ranks and nodes die, nodes join, jobs run."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.node import Node

from cluster.api import Cluster
from cluster.driver.backend import WorkerHandle
from cluster.driver.controller_client import ControllerStats
from cluster.errors import ClusterError
from cluster.generation import Generation
from cluster.ray_backend.handles import RayWorkerHandle
from tests.support import zoo
from tests.support.clock_loop import ClockLoop, use_clock_loops
from tests.support.grouped_ranks import COPIES_TRAVEL, TOKENS_TRAVEL
from tests.support.http_service import COMPLETIONS, read_until, serving
from tests.support.rank_helpers import PATIENCE_S
from tests.support.ray_helpers import RayNodes
from tests.support.thread_cluster import PROMPTS, expected, tokens_of
from tests.support.tokenizers import byte_level

NEW = 80
HTTP_SETTINGS = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True}
WORDS = [f"word {number} " for number in range(zoo.VOCAB - 256)]


OWING: Counter[RayWorkerHandle] = Counter()
"""Answers that are awaited, by worker."""


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """No deadline passes but those that are skipped."""
    real = RayWorkerHandle.command

    async def command(worker: RayWorkerHandle, message: bytes) -> bytes:
        OWING[worker] += 1
        try:
            return await real(worker, message)
        finally:
            OWING[worker] -= 1

    with pytest.MonkeyPatch.context() as patch:
        use_clock_loops(patch)
        patch.setattr(RayWorkerHandle, "command", command)
        yield


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3_moe")


@contextmanager
def clusters(ray_nodes: RayNodes, folder: Path, cache_dir: Path) -> Iterator[Callable[..., Cluster]]:
    opened: list[Cluster] = []

    def make(ranks: int, **settings: Any) -> Cluster:
        usual = {"slots": 3, "kv_tokens": 2048, "costs": TOKENS_TRAVEL, "device": "cpu", "progress": False}
        settings = usual | {"silence_s": PATIENCE_S} | settings
        opened.append(Cluster(folder, ranks=ranks, address=ray_nodes.address, cache_dir=cache_dir, **settings))
        return opened[-1]

    try:
        yield make
    finally:
        for cluster in opened:
            cluster.close()


def running(cluster: Cluster, prompts: list[list[int]] = PROMPTS) -> list[Generation]:
    """Prompts, each with some of its tokens there and more to come."""
    found = [cluster.submit(prompt, max_new_tokens=NEW, stop_tokens=()) for prompt in prompts]
    for generation in found:
        next(generation._portions())
    return found


def tokens(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [generation.result(PATIENCE_S).tokens for generation in generations]


def token_texts(answer: bytes) -> list[str]:
    """The texts of the tokens in an answer over HTTP."""
    lists = re.findall(rb'"logprobs":\{"tokens":(\[.*?\]),"token_logprobs"', answer)
    return [text for texts in lists for text in json.loads(texts)]


def token_text(token: int) -> str:
    """A token's text, as in ``byte_level`` and OpenAI's API: token b is byte b, and others are words."""
    return WORDS[token - 256] if token >= 256 else chr(token) if token < 128 else f"bytes:\\x{token:02x}"


def skip_silence(cluster: Cluster, stopped: int) -> None:
    """Skip the time until a rank that is stopped is given up. The others have all the time that they need to answer."""
    loop, workers = cluster._thread._loop, cluster._supervisor.workers
    assert isinstance(loop, ClockLoop)

    def is_stopped(worker: WorkerHandle) -> bool:
        return worker.where.endswith(f"pid {stopped}")

    loop.skip_until(
        lambda: not any(is_stopped(worker.handle) for worker in workers),
        settled=lambda: all(is_stopped(worker) for worker in OWING.elements()),
    )


def pids(cluster: Cluster, group: int = 0) -> list[int]:
    return [int(re.findall(r"pid (\d+)", place)[0]) for place in cluster.placement(group).ranks]


def controllers(cluster: Cluster) -> ControllerStats:
    stats = cluster.stats().controller
    assert stats is not None
    return stats


def controller_pid(cluster: Cluster) -> int:
    return int(re.findall(r"pid (\d+)", controllers(cluster).where)[0])


def hosts(cluster: Cluster) -> list[str]:
    return [re.findall(r"node (\S+),", place)[0] for place in cluster.placement().ranks]


@pytest.fixture(scope="class")
def second(ray_nodes: RayNodes) -> Iterator[Node]:
    with ray_nodes.further(1) as second:
        yield second


@pytest.fixture(scope="class")
def joining() -> Iterator[ExitStack]:
    """Nodes that join stay until the cluster is closed: it may keep its ranks there when it shrinks."""
    with ExitStack() as nodes:
        yield nodes


@pytest.fixture(scope="class")
def cluster(ray_nodes: RayNodes, second: Node, joining: ExitStack, folder: Path, tmp_path_factory: Any) -> Iterator[Cluster]:
    with ray_nodes.further(1), clusters(ray_nodes, folder, tmp_path_factory.mktemp("cache")) as make:
        cluster = make(3, strategy="STRICT_SPREAD", slots=10, costs=COPIES_TRAVEL, window_steps=2)
        yield cluster
        processes = [psutil.Process(pid) for pid in (*pids(cluster), controller_pid(cluster))]
        cluster.close()
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
        assert not alive


class TestThreeNodes:
    """One cluster lives through it all."""

    def test_a_stopped_rank_is_killed_and_replaced(self, cluster: Cluster, folder: Path):
        """One that is killed goes with its node, below."""
        right = expected(folder, PROMPTS, NEW)
        assert len(set(hosts(cluster))) == 3
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=())) == right
        before = pids(cluster)
        lost = before[1]
        going = running(cluster)
        os.kill(lost, signal.SIGSTOP)
        assert not any(generation.done for generation in going)
        skip_silence(cluster, lost)
        assert tokens(going) == right
        cluster.scale(3)
        now = pids(cluster)
        assert set(before) - set(now) == {lost}, "the others stayed"
        assert len(set(now)) == 3
        psutil.wait_procs([psutil.Process(lost)] if psutil.pid_exists(lost) else [], timeout=PATIENCE_S)
        assert not psutil.pid_exists(lost)

    def test_a_node_dies_and_others_join(
        self,
        ray_nodes: RayNodes,
        second: Node,
        joining: ExitStack,
        cluster: Cluster,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """Requests of Python and over HTTP, streamed and whole, go on where they were."""
        right = expected(folder, PROMPTS, NEW)
        lost = second.node_ip_address
        assert lost in hosts(cluster)
        assert len(set(hosts(cluster))) == 3
        monkeypatch.setattr(cluster, "tokenizer", byte_level(WORDS))  # the checkpoint has none, and a service answers in text
        with serving(cluster) as client, ExitStack() as connections:
            bodies = [{"prompt": prompt, "logprobs": 0} | HTTP_SETTINGS for prompt in PROMPTS[:4]]
            whole = connections.enter_context(client.asking(COMPLETIONS, bodies[0]))
            streams = [connections.enter_context(client.asking(COMPLETIONS, body | {"stream": True})) for body in bodies[1:]]
            begun = [read_until(stream, b"data: {") for stream in streams]
            going = running(cluster, PROMPTS[4:])
            assert client.service.running == 4
            ray_nodes.kill(second)
            assert not any(generation.done for generation in going)
            assert tokens(going) == right[4:]
            streamed = [begin + read_until(stream, b"data: [DONE]") for begin, stream in zip(begun, streams, strict=True)]
            found = [read_until(whole, b"usage"), *streamed]
        assert [token_texts(answer) for answer in found] == [[token_text(token) for token in own] for own in right[:4]]
        assert lost not in hosts(cluster)
        joined = joining.enter_context(ray_nodes.further(1))
        cluster.scale(3)
        assert joined.node_ip_address in hosts(cluster)
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=9, stop_tokens=())) == [own[:9] for own in right]
        cluster.scale(2)
        assert cluster.ranks == 2

    def test_requests_outlive_a_killed_and_a_stopped_controller(self, cluster: Cluster, folder: Path):
        right = expected(folder, PROMPTS, NEW)
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=())) == right
        found = cluster.explain()
        assert found.state in ("watching", "moving")
        assert found.windows > 0
        assert found.refused == 0, found.refusals
        assert (asked := cluster.rebalance().latest) is not None
        assert asked.asked
        assert asked.plan_s > 0
        newest = found.placement
        before = controllers(cluster).started
        for number in (signal.SIGKILL, signal.SIGSTOP):
            lost = controller_pid(cluster)
            going = running(cluster)
            os.kill(lost, number)
            assert not any(generation.done for generation in going)
            assert tokens(going) == right
            if number == signal.SIGSTOP:
                continue  # no request has had to wait for it, and closing ends it (see the fixture)
            found = cluster.explain()  # by the next one
            assert controller_pid(cluster) != lost
            assert found.placement >= newest
            newest = found.placement
            assert cluster.ranks == 2
        assert controllers(cluster).started == before + 1


def test_more_ranks_than_there_is_room_for(ray_nodes: RayNodes, folder: Path, cache_dir: Path):
    refused = pytest.raises(ClusterError, match=r"no room for 7 ranks(.|\n)*What helps: ask for fewer ranks")
    with clusters(ray_nodes, folder, cache_dir) as make, refused:
        make(7)


@contextmanager
def asking(cluster: Cluster, right: list[tuple[int, ...]]) -> Iterator[None]:
    """Requests follow each other all the while, one prompt after the other; each gets its tokens, and some did so in time."""
    over, found = threading.Event(), list[bool]()

    def ask() -> None:
        while not over.is_set():
            number = len(found) % len(PROMPTS)
            found.append(cluster.submit(PROMPTS[number], max_new_tokens=NEW, stop_tokens=()).result().tokens == right[number])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE_S)
    assert found and all(found)


@pytest.mark.skipif(not os.environ.get("EPSLOTS_MORE_RAY"), reason="four ranks more, half a minute")
def test_groups_grow_and_shrink_while_requests_go_on(ray_nodes: RayNodes, folder: Path, cache_dir: Path):
    """Two groups of one rank, then of two, on a further node; what came last goes first. Each rank is a process of its own."""
    right = expected(folder, PROMPTS, NEW)
    with ray_nodes.further(2), clusters(ray_nodes, folder, cache_dir) as make:
        cluster = make(2, groups=2, costs=COPIES_TRAVEL)
        first = [pids(cluster, group) for group in range(2)]
        with asking(cluster, right):
            cluster.scale(ranks=4, groups=2)
        grown = [pids(cluster, group) for group in range(2)]
        assert [group.ranks for group in cluster.state().groups] == [2, 2]
        assert [set(before) < set(after) for before, after in zip(first, grown, strict=True)] == [True, True]
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=())) == right
        assert all(rank.engine.new_tokens for rank in cluster.stats().ranks), "each of the four serves"
        with asking(cluster, right):
            cluster.scale(ranks=2, groups=2)
        assert [pids(cluster, group) for group in range(2)] == first
