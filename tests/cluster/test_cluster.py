"""The whole cluster but Ray: real ranks in threads, lost and replaced at will. Every token equals plain transformers'."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.api import Cluster
from cluster.driver.retries import Pace
from cluster.driver.worker_group import MOST_FAILURES
from cluster.errors import ClusterError, Overloaded
from cluster.rank import rank_loop
from epslots.errors import CheckpointError, ConfigError, RankMismatchError
from tests.support import zoo
from tests.support.fake_backend import FakeBackend, Fault
from tests.support.guilty_requests import WAYS, Guilt, error_of
from tests.support.rank_helpers import PATIENCE_S
from tests.support.thread_cluster import PROMPTS, expected, serve_again, tokens_of, until

pytestmark = pytest.mark.usefixtures("one_load_at_a_time", "clock_loops")


AT_ONCE = Pace(first_s=0.001, most_s=0.001)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_token_is_the_models_own(open_cluster: Any, folder: Path, ranks: int):
    cluster, _ = open_cluster(ranks)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, stop_tokens=())) == expected(folder, PROMPTS, 12)
    assert tokens_of(cluster.generate(PROMPTS[:1], max_new_tokens=5, stop_tokens=())) == expected(folder, PROMPTS[:1], 5)
    stats = cluster.stats()
    assert len(stats.ranks) == ranks
    assert stats.total.hits == sum(rank.stats.hits for rank in stats.ranks) > 0
    assert sum(sum(layer.tokens_per_expert) for layer in stats.total.layers) > 0
    assert stats.engine.new_tokens == sum(rank.engine.new_tokens for rank in stats.ranks) == 12 * len(PROMPTS) + 5
    assert stats.engine.prompt_tokens + stats.engine.reused_tokens == sum(map(len, PROMPTS)) + len(PROMPTS[0])
    assert (stats.engine.running, stats.engine.waiting, stats.engine.kv_used) == (0, 0, 0)
    assert msgspec.json.decode(msgspec.json.encode(stats))["engine"]["preempted"] == 0
    placement = cluster.placement()
    assert len(placement.ranks) == ranks
    assert all(set(layer.home) <= set(range(ranks)) for layer in placement.layers)


@pytest.mark.parametrize("way", ["nan", "RuntimeError"])
def test_a_request_that_the_model_fails_with_ends_no_rank(open_cluster: Any, folder: Path, way: str):
    """It costs itself an error, and not even an epoch."""
    cluster, backend = open_cluster(2)
    right = expected(folder, PROMPTS, 12)
    token = next(t for t in range(16, zoo.VOCAB) if not any(t in (*p, *r) for p, r in zip(PROMPTS, right, strict=True)))
    for worker in backend.workers.values():
        assert worker.loop._engine is not None
        Guilt(worker.loop._engine.model, token, 0, WAYS[way]())
    guilty = [[*PROMPTS[0], token], [token, *PROMPTS[1]], [token]]
    mixed = [prompt for pair in zip(guilty, PROMPTS, strict=False) for prompt in pair] + PROMPTS[len(guilty) :]
    found = {result.index: result for result in cluster.generate(mixed, max_new_tokens=12, stop_tokens=())}
    for index, prompt in enumerate(mixed):
        if token in prompt:
            assert (found[index].reason, found[index].tokens) == ("error", ())
            assert error_of(way) in str(found[index].error)
        else:
            assert found[index].tokens == right[PROMPTS.index(prompt)]
    assert cluster.stats().epoch == 0
    assert backend.started == 2
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, stop_tokens=())) == right


FAULTS: tuple[Fault, ...] = ("crash", "vanish", "freeze", "raise")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", [1, 12])
def test_a_rank_is_lost_in_the_middle_of_a_step(
    open_cluster: Any, folder: Path, fault: Fault, operation: int, caplog: pytest.LogCaptureFixture
):
    cluster, backend = open_cluster(3)
    lost = backend.workers[1]
    backend.at(1, operation, fault)
    with caplog.at_level(logging.WARNING, logger="epslots.cluster"):
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=25, stop_tokens=())) == expected(folder, PROMPTS, 25)
    assert backend.faults_done == [(1, fault)]
    assert backend.workers[0].number == 1  # the others stayed
    assert backend.workers[2].number == 3
    (record,) = caplog.records
    said = "failed while serving: ValueError: a bug" if fault == "raise" else "is lost: "
    assert f"rank 1 (node fake, worker 2) {said}" in record.message
    cluster.scale(3)  # waits for the replacement
    assert cluster.ranks == 3
    assert backend.workers[1] is not lost
    before = cluster.stats().epoch
    lost.thaw()  # continued after it was given up: nothing of it counts
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=7, stop_tokens=())) == expected(folder, PROMPTS, 7)
    assert cluster.stats().epoch == before


def test_all_ranks_are_lost_at_once(open_cluster: Any, folder: Path):
    cluster, backend = open_cluster(2)
    backend.at(0, 9, "crash")
    backend.at(1, 9, "crash")
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=20, stop_tokens=())) == expected(folder, PROMPTS, 20)


def test_losses_follow_each_other(open_cluster: Any, folder: Path):
    """Each replacement is lost as well, also while the next group forms."""
    cluster, backend = open_cluster(3)
    results = cluster.generate(PROMPTS, max_new_tokens=60, stop_tokens=())
    for bundle, operation in ((1, 5), (2, 9), (0, 7), (1, 1), (2, 2)):
        cluster.scale(3)
        backend.at(bundle, operation, "crash")
    assert tokens_of(results) == expected(folder, PROMPTS, 60)


def test_a_request_that_ends_ranks_does_not_end_them_all(open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    cluster, _ = open_cluster(2)
    poison = [7] * 50

    from epslots.generation.batcher import Batcher

    add = Batcher.add

    def deadly(self: Any, request: Any) -> None:
        if request.prompt[:50] == tuple(poison):
            raise MemoryError("a poisoned prompt")
        add(self, request)

    monkeypatch.setattr(Batcher, "add", deadly)
    results = sorted(cluster.generate([*PROMPTS, poison], max_new_tokens=9, stop_tokens=()), key=lambda r: r.index)
    assert [r.tokens for r in results[:-1]] == expected(folder, PROMPTS, 9)
    assert results[-1].reason == "error"
    assert "given up after 5 ranks in a row were lost while they served this request" in str(results[-1].error)
    assert "failed while serving: MemoryError: a poisoned prompt" in str(results[-1].error)


def test_ranks_come_and_go(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(1)
    results = cluster.generate(PROMPTS, max_new_tokens=80, stop_tokens=())
    first = next(results)
    for ranks in (3, 2, 4, 1):
        cluster.scale(ranks)
        assert cluster.ranks == ranks
        assert len(cluster.stats().ranks) == ranks
    found = sorted([first, *results], key=lambda result: result.index)
    assert [result.tokens for result in found] == expected(folder, PROMPTS, 80)
    with pytest.raises(ClusterError, match="9 ranks need 9 bundles, and there are 8"):
        cluster.scale(9)
    assert tokens_of(cluster.generate(PROMPTS[:2], max_new_tokens=3, stop_tokens=())) == expected(folder, PROMPTS[:2], 3)


def test_sampled_tokens_depend_on_seed_and_position_alone(open_cluster: Any):
    prompts = [{"prompt": p, "seed": n, "temperature": 0.9, "top_p": 0.9} for n, p in enumerate(PROMPTS)]
    alone, _ = open_cluster(1)
    tokens = tokens_of(alone.generate(prompts, max_new_tokens=20, stop_tokens=()))
    one_by_one = [alone.submit(prompt, max_new_tokens=20, stop_tokens=()).result(60).tokens for prompt in prompts]
    assert one_by_one == tokens
    cluster, backend = open_cluster(3)
    backend.at(2, 14, "crash")
    assert tokens_of(cluster.generate(prompts, max_new_tokens=20, stop_tokens=())) == tokens
    assert tokens_of(cluster.generate(prompts, max_new_tokens=20, seed=5, stop_tokens=())) == tokens
    other = [{**prompt, "seed": 77} for prompt in prompts]
    assert tokens_of(cluster.generate(other, max_new_tokens=20, stop_tokens=())) != tokens


def test_many_callers(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(2)
    right = expected(folder, PROMPTS, 10)
    found: list[Any] = [None] * 6

    def call(number: int) -> None:
        found[number] = tokens_of(cluster.generate(PROMPTS, max_new_tokens=10, stop_tokens=()))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [right] * 6


def test_cancel(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(2)
    long = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    other = cluster.submit(PROMPTS[1], max_new_tokens=20, stop_tokens=())
    assert other.result(60).tokens == expected(folder, PROMPTS[1:2], 20)[0]
    long.cancel()
    result = long.result(60)
    assert result.reason == "cancelled"
    assert result.tokens == expected(folder, PROMPTS[:1], 400)[0][: len(result.tokens)]
    long.cancel()
    iterator = cluster.generate(PROMPTS * 3, max_new_tokens=200, stop_tokens=())
    next(iterator)
    iterator.close()
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=3, stop_tokens=())) == expected(folder, PROMPTS, 3)


def test_the_queue_is_bounded(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(1, max_queue=2)
    running = [cluster.submit(PROMPTS[0], max_new_tokens=300, stop_tokens=()) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests wait or run already"):
        cluster.submit(PROMPTS[0])
    waiting = cluster.generate(PROMPTS, max_new_tokens=4, stop_tokens=())
    for generation in running:
        generation.cancel()
    assert tokens_of(waiting) == expected(folder, PROMPTS, 4)
    with pytest.raises(ConfigError):  # takes no room
        cluster.submit([])
    assert cluster.submit(PROMPTS[0], max_new_tokens=2).result(60).reason in ("length", "stop")


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ([], {}, "an empty prompt; at least one token is needed"),
        ([1] * 600, {}, "the prompt has 600 tokens and max_new_tokens is 128, but the model's context holds 512"),
        ([5, 10**6], {}, "the prompt has token 1000000; allowed: 0 to 319"),
        ([5, -1], {}, "the prompt has token -1"),
        ([5], {"max_new_tokens": 10**9}, "max_new_tokens is 1000000000"),
        ("text", {}, "the checkpoint has no tokenizer; give prompts as token ids"),
        (b"\xff\xfe", {}, "allowed: text, or a list of token ids"),
        (bytearray(b"ab"), {}, "allowed: text, or a list of token ids"),
        (3.5, {}, "allowed: text, or a list of token ids"),
        ({"text": "x"}, {}, 'needs "prompt"'),
        ({"prompt": [5], "temprature": 1}, {}, "'temprature': no such setting; allowed: max_new_tokens, min_tokens"),
        ({"prompt": [5], "temperature": -1}, {}, "temperature=-1.0; allowed"),
        ([5], {"stop": ["x"]}, "stop: the checkpoint has no tokenizer; use stop_tokens"),
    ],
)
def test_bad_prompts_are_results_and_the_others_go_on(
    open_cluster: Any, folder: Path, prompt: Any, settings: dict[str, Any], said: str
):
    cluster, _ = open_cluster(1)
    with pytest.raises(ConfigError) as caught:
        cluster.submit(prompt, **settings)
    assert said in str(caught.value)
    good = {"prompt": PROMPTS[0], "max_new_tokens": 3, "stop": (), "stop_tokens": ()}
    results = sorted(cluster.generate([good, prompt, good], **settings), key=lambda result: result.index)
    assert [result.reason for result in results] == ["length", "error", "length"]
    assert said in str(results[1].error)
    assert results[0].tokens == results[2].tokens == expected(folder, PROMPTS[:1], 3)[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; allowed: at least 1"),
        ({"max_new_tokens": "many"}, "Expected `int`, got `str`"),
        ({"frequency": 1}, "'frequency': no such setting"),
        ({"top_p": 2}, "top_p=2.0; allowed"),
        ({"stop": ["a", ""]}, "at least one character"),
    ],
)
def test_bad_settings_are_errors_at_once(open_cluster: Any, settings: dict[str, Any], said: str):
    cluster, _ = open_cluster(1)
    with pytest.raises(ConfigError, match=said):
        cluster.generate(PROMPTS, **settings)
    with pytest.raises(ConfigError, match=said):
        cluster.submit(PROMPTS[0], **settings)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"slots": "banana"}, ConfigError, "banana"),
        ({"ranks": 0}, ConfigError, "ranks=0; allowed: an int, at least 1"),
        ({"policy": "belady"}, ConfigError, "belady"),
        ({"strategy": "PILE"}, ConfigError, "allowed: PACK, SPREAD, STRICT_PACK, STRICT_SPREAD"),
        ({"deadline_s": 0}, ConfigError, "deadline_s=0"),
        ({"kv_tokens": -3}, ConfigError, "kv_tokens=-3"),
        ({"ranks": 9}, ClusterError, "9 ranks need 9 bundles"),
        ({"dtype": "float8"}, ClusterError, "failed while loading: ConfigError: dtype='float8'"),
        (
            {"host_store": "tape"},
            ClusterError,
            "rank 0 .node fake, worker 1. failed while loading: ConfigError: host_store='tape'",
        ),
        ({"kv_tokens": 10**12}, ClusterError, "failed while loading: DoesNotFitError: "),
    ],
)
def test_starts_that_fail(open_cluster: Any, settings: dict[str, Any], error: type[Exception], said: str):
    backend = FakeBackend()
    with pytest.raises(error, match=said):
        open_cluster(**({"ranks": 1, "backend": backend} | settings))
    assert all(worker.dead for worker in backend.workers.values())


def test_ranks_that_can_not_reach_each_other(open_cluster: Any):
    backend = FakeBackend()
    backend.unreachable |= {0, 1}
    with pytest.raises(ClusterError, match=r"could not form a group, 5 times in a row.*no rank is there.*firewalls"):
        open_cluster(2, backend)


def test_a_model_that_is_not_there(cache_dir: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nothing"):
        Cluster(tmp_path / "nothing", ranks=1, backend=FakeBackend(), cache_dir=cache_dir)


def test_a_worker_that_does_not_come_up(open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    backend = FakeBackend()
    backend.refuse[1] = ["the node is on fire"]
    with pytest.raises(ClusterError, match="rank 1 could not be started: the node is on fire"):
        open_cluster(2, backend)
    assert backend.closed
    # Later it is tried again, however often that fails.
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(2)
    backend.refuse[1] = ["still"] * 40
    backend.at(1, 3, "crash")
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, stop_tokens=())) == expected(folder, PROMPTS, 12)
    serve_again(cluster, 2)
    assert not backend.refuse[1]


def test_scaling_tells_of_a_place_that_has_never_served(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(1)
    backend.refuse[1] = ["still"] * 5
    with pytest.raises(ClusterError, match=r"ranks \[1\] did not come up"):
        cluster.scale(2)
    assert cluster.stats().missing == ("rank 1 was given up: rank 1 could not be started: still",)
    cluster.scale(2)  # asking again tries again
    assert cluster.ranks == 2
    assert cluster.stats().missing == ()


@pytest.mark.parametrize("kind", [ConfigError, RankMismatchError])
def test_what_time_does_not_cure_ends_a_place(open_cluster: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]):
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(2)

    def refuse(*_: Any, **__: Any) -> Any:
        raise kind("never, says the test")

    monkeypatch.setattr("cluster.rank.rank_loop.load_alone", refuse)
    backend.at(1, 3, "crash")
    cluster.submit(PROMPTS[0], max_new_tokens=12, stop_tokens=()).result(60)
    until(cluster, lambda: 1 in cluster._supervisor.pool._given_up)
    (line,) = cluster.stats().missing
    assert "rank 1 was given up" in line
    assert "never, says the test" in line


def test_a_waiting_place_is_tried_at_once_when_it_is_asked_for(
    open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", Pace(first_s=3600.0, most_s=3600.0))
    cluster, backend = open_cluster(2)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=5, stop_tokens=())) == expected(folder, PROMPTS, 5)
    backend.refuse[1] = ["the disk is full"]
    backend.at(1, 3, "crash")
    cluster.submit(PROMPTS[0], max_new_tokens=12, stop_tokens=()).result(60)
    until(cluster, lambda: cluster._supervisor.pool._places[1].next_s is not None)
    (line,) = cluster.stats().missing
    assert line.startswith("rank 1 could not be started: the disk is full; it is tried again in 3")
    cluster.scale(2)
    assert cluster.ranks == 2


def test_a_place_that_waits_when_ray_is_lost_waits_no_more(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", Pace(first_s=3600.0, most_s=3600.0))
    cluster, backend = open_cluster(2)
    places = cluster._supervisor.pool._places
    backend.at(1, 1, "crash")  # before it has brought anything
    cluster.submit(PROMPTS[0], max_new_tokens=12, stop_tokens=()).result(60)
    until(cluster, lambda: places[1].next_s is not None)
    backend.lose("the Ray has ended, says the test")
    until(cluster, lambda: len(backend.reopened) == 1)
    assert places[1].next_s is None  # or it would be said when it is tried again
    serve_again(cluster, 2)


def test_a_fleet_that_is_lost_is_reopened_and_no_caller_notices(
    open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Under requests, while it is reopened already, when idle; and a backend that fails to come back is asked again."""
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(2)
    for number in range(2):
        going = [cluster.submit(prompt, max_new_tokens=40, stop_tokens=()) for prompt in PROMPTS]
        for generation in going:
            next(generation._portions())
        backend.refuse_reopening = ["not yet"] * 3
        backend.lose("the Ray has ended, says the test")
        assert [generation.result(60).tokens for generation in going] == expected(folder, PROMPTS, 40)
        until(cluster, lambda number=number: len(backend.reopened) > number)
        serve_again(cluster, 2)
    backend.lose("the Ray has ended, says the test")
    until(cluster, lambda: len(backend.reopened) == 3)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=5, stop_tokens=())) == expected(folder, PROMPTS, 5)
    assert backend.reopened == [2, 2, 2]
    told = [record.message for record in caplog.records if "All ranks end with it" in record.message]
    assert [message.partition(". ")[0] for message in told] == ["the Ray has ended, says the test"] * 3
    assert not [record for record in caplog.records if "bug" in record.message]


def test_a_fleet_is_lost_while_ranks_load_and_while_scaling(open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    load = rank_loop.load_alone
    cluster, backend = open_cluster(1)
    loading, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any, **settings: Any) -> Any:
        loading.set()
        assert go_on.wait(60)
        return load(*arguments, **settings)

    monkeypatch.setattr("cluster.rank.rank_loop.load_alone", held)
    scaling = threading.Thread(target=cluster.scale, args=(3,))
    scaling.start()
    assert loading.wait(60)
    backend.lose("the Ray has ended, says the test")
    until(cluster, lambda: len(backend.reopened) == 1)
    backend.lose("again")
    until(cluster, lambda: len(backend.reopened) == 2)
    go_on.set()
    scaling.join(60)
    assert not scaling.is_alive()
    assert cluster.ranks == 3
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=5, stop_tokens=())) == expected(folder, PROMPTS, 5)


def test_a_place_is_reserved_again_if_ray_is_lost_meanwhile(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    cluster, backend = open_cluster(1)
    resize = backend.resize
    asked: list[int] = []

    async def lost_meanwhile(ranks: int, group_of: Sequence[int]) -> None:
        asked.append(ranks)
        if asked == [2]:
            monkeypatch.setattr(backend, "resize", resize)
            backend.lose("the Ray has ended, says the test")
            await cluster._supervisor._changes.wait_for(lambda: len(backend.reopened) == 1)
            raise ClusterError("Ray did not answer")
        await resize(ranks, group_of)

    monkeypatch.setattr(backend, "resize", lost_meanwhile)
    cluster.scale(2)
    assert backend.reopened == [1]
    assert cluster.ranks == backend.bundles == 2


def test_closing_while_a_fleet_is_lost(open_cluster: Any):
    cluster, backend = open_cluster(2)
    going = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    next(going._portions())
    backend.refuse_reopening = ["never"] * 1000
    backend.lose("the Ray has ended, says the test")
    until(cluster, lambda: len(backend.refuse_reopening) < 1000)
    assert cluster.stats().missing == ("the Ray has ended, says the test; waiting for it to come back",)
    cluster.close()
    with pytest.raises(ClusterError, match="the cluster was closed"):
        going.result(10)


def test_ranks_that_stay_away_end_the_cluster_if_asked_to(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(1, give_up_after_s=0.01)
    going = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    backend.refuse_reopening = ["never"] * 100_000
    backend.lose("the Ray has ended, says the test")
    with pytest.raises(ClusterError, match=r"the Ray has ended, says the test; it wasn't back within 0.01 s"):
        going.result(60)


def test_a_fleet_that_is_lost_during_the_start_ends_it(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    backend = FakeBackend()
    start_worker = backend.start_worker

    async def lost(bundle: int) -> Any:
        backend.lose("the Ray has ended, says the test")
        return await start_worker(bundle)

    monkeypatch.setattr(backend, "start_worker", lost)
    with pytest.raises(ClusterError, match="the Ray has ended, says the test"):
        open_cluster(1, backend)


def test_ranks_that_can_not_meet_for_a_while_meet_later(open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """More often than ends a start: a network may be down for a moment."""
    monkeypatch.setattr("cluster.driver.worker_group._PACE", AT_ONCE)
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(2)
    backend.refuse_forming = ["the network is down"] * (2 * MOST_FAILURES)
    backend.at(1, 3, "crash")
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, stop_tokens=())) == expected(folder, PROMPTS, 12)
    assert not backend.refuse_forming


def test_callers_are_told_when_no_rank_serves(
    open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("cluster.driver.gap_log._GAP_S", 0.001)
    monkeypatch.setattr("cluster.driver.gap_log._GAP_AGAIN_S", 0.05)
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", Pace(first_s=3600.0, most_s=3600.0))
    cluster, backend = open_cluster(1)
    backend.refuse[0] = ["the disk is full"]
    going = cluster.submit(PROMPTS[0], max_new_tokens=200, stop_tokens=())
    next(going._portions())
    backend.at(0, 1, "crash")
    until(cluster, lambda: cluster._supervisor.pool._places[0].next_s is not None)

    def told() -> list[str]:
        return [record.message for record in caplog.records if "no rank has served" in record.message]

    while not any(
        "1 requests wait: rank 0 could not be started: the disk is full; it is tried again in 3" in m for m in told()
    ):
        cluster.stats()
    assert not going.done
    cluster.scale(1)
    assert going.result(60).tokens == expected(folder, PROMPTS[:1], 200)[0]
    assert any("1 ranks serve again after" in record.message for record in caplog.records)


def test_when_nobody_is_left(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    """With ``give_up_after_s``, the last bundle's end is the cluster's."""
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    cluster, backend = open_cluster(1, give_up_after_s=0.001)
    backend.refuse[0] = ["no more"] * 1000
    backend.at(0, 7, "crash")
    with pytest.raises(ClusterError, match="no more"):
        list(cluster.generate(PROMPTS, max_new_tokens=50))
    with pytest.raises(ClusterError, match="no more"):
        cluster.submit(PROMPTS[0])
    cluster.close()
    with pytest.raises(ClusterError):
        cluster.submit(PROMPTS[0])


def test_close_ends_everything(open_cluster: Any):
    cluster, backend = open_cluster(2)
    going = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    cluster.close()
    cluster.close()
    with pytest.raises(ClusterError, match="the cluster was closed"):
        going.result(60)
    assert backend.closed
    assert all(worker.dead for worker in backend.workers.values())


def test_an_idle_cluster_sleeps(open_cluster: Any, folder: Path):
    """Once all have said that they sleep, no exchange is made until a request comes; to any rank, and however often."""
    cluster, backend = open_cluster(3)
    for _ in range(5):
        assert tokens_of(cluster.generate(PROMPTS[:1], max_new_tokens=3, stop_tokens=())) == expected(folder, PROMPTS[:1], 3)
        cluster.stats()  # answered by sleepers too
        loops = [worker.loop for worker in backend.workers.values()]
        for loop in loops:
            with loop._news:
                loop._news.wait_for(lambda loop=loop: loop._asleep, PATIENCE_S)
        assert all(loop._asleep for loop in loops)
        before = [worker._exchanges for worker in backend.workers.values()]
        cluster.stats()
        assert [worker._exchanges for worker in backend.workers.values()] == before


def test_an_idle_cluster_without_requests_is_left_alone(open_cluster: Any):
    cluster, _ = open_cluster(2)
    supervisor = cluster._supervisor

    async def give_up() -> int:
        asking = asyncio.create_task(supervisor.reports())
        while not supervisor._reports:
            await asyncio.sleep(0)
        awaited = len(supervisor._reports)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return awaited

    assert cluster._thread.call(give_up()) == 2
    assert len(cluster.stats().ranks) == 2  # a later question is answered after all earlier ones
    assert not supervisor._reports


def test_a_roll_call_that_is_broken_off_leaves_nothing_behind(open_cluster: Any):
    cluster, backend = open_cluster(2)
    backend.workers[0]._running.clear()

    def asked() -> int:
        return sum("FakeWorker.command" in repr(task.get_coro()) for task in asyncio.all_tasks())

    async def break_off() -> int:
        supervisor = cluster._supervisor
        calling = asyncio.create_task(supervisor.workers.check_health(list(supervisor.workers), PATIENCE_S))
        while not asked():
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        await asyncio.sleep(0)  # what was cancelled with it ends
        return asked()

    assert cluster._thread.call(break_off()) == 0
    backend.workers[0].thaw()


def test_a_newcomer_that_can_not_join_does_not_end_the_others(
    open_cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cluster.driver.worker_pool._PACE", AT_ONCE)
    monkeypatch.setattr("cluster.driver.workers.Deadlines.form_s", 0.5)
    cluster, backend = open_cluster(2)
    backend.unreachable.add(2)
    results = cluster.generate(PROMPTS, max_new_tokens=30, stop_tokens=())
    with pytest.raises(ClusterError, match=r"ranks \[2\] did not come up"):
        cluster.scale(3)
    assert tokens_of(results) == expected(folder, PROMPTS, 30)
    assert cluster.ranks == 2
    backend.unreachable.clear()
    cluster.scale(3)
    assert cluster.ranks == 3


def test_a_group_that_always_breaks_says_so(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    from epslots.errors import ExchangeError
    from epslots.generation.engine import Engine

    cluster, _ = open_cluster(2)

    def step(self: Engine) -> Any:
        raise ExchangeError("always, says the test")

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(ClusterError, match=r"the group broke 5 times without a token: .*always, says the test"):
        cluster.submit(PROMPTS[0]).result(60)


def test_numbers_that_no_message_carries_are_refused(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(1)
    good = cluster.submit(PROMPTS[0], max_new_tokens=3, stop_tokens=())
    assert cluster.submit(PROMPTS[0], max_new_tokens=3, stop_tokens=(), top_k=2**64).result(60) == good.result(60)
    with pytest.raises(ConfigError, match="seed=18446744073709551616; allowed"):
        cluster.submit(PROMPTS[0], seed=2**64)
    with pytest.raises(ConfigError, match="stop_tokens has token 18446744073709551616; allowed: 0 to 319"):
        cluster.submit(PROMPTS[0], stop_tokens=[2**64])
    assert good.result(60).tokens == expected(folder, PROMPTS[:1], 3)[0]


def test_a_bug_of_the_supervisors_is_everybodys_error(open_cluster: Any, monkeypatch: pytest.MonkeyPatch):
    cluster, _ = open_cluster(1)
    monkeypatch.setattr("cluster.driver.scheduler.Scheduler.assign", lambda *_: 1 / 0)
    generation = cluster.submit(PROMPTS[0])
    with pytest.raises(ClusterError, match="a bug: ZeroDivisionError"):
        generation.result(60)


def test_a_prompt_longer_than_the_cache(open_cluster: Any):
    cluster, _ = open_cluster(1, kv_tokens=64)
    with pytest.raises(ConfigError, match=r"the prompt has 50 tokens and max_new_tokens is 30, but a rank's cache holds \d+;"):
        cluster.submit([1] * 50, max_new_tokens=30)


@pytest.mark.parametrize("prompts", ["def f(", b"x", {"prompt": [5]}, 3])
def test_prompts_are_a_list(open_cluster: Any, prompts: Any):
    cluster, _ = open_cluster(1)
    with pytest.raises(ConfigError, match="allowed: a list of prompts"):
        cluster.generate(prompts)


def test_whoever_waits_when_it_closes_is_told(open_cluster: Any):
    cluster, backend = open_cluster(1)
    backend.refuse[1] = ["never"] * 3
    iterator = cluster.generate(PROMPTS, max_new_tokens=400, stop_tokens=())
    going = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    found: list[Any] = []

    def scale() -> None:
        try:
            cluster.scale(2)
        except ClusterError as error:
            found.append(str(error))

    thread = threading.Thread(target=scale)
    thread.start()
    while not backend.refuse[1] or len(backend.refuse[1]) == 3:
        next(going._portions())  # until the scaling is under way
    cluster.close()
    thread.join(60)
    assert found == ["the cluster was closed"]
    going.cancel()  # nothing happens
    with pytest.raises(ClusterError, match="the cluster was closed"):
        going.result(60)
    with pytest.raises(ClusterError, match="the cluster was closed"):
        list(iterator)
    for call in (cluster.stats, cluster.placement, lambda: cluster.scale(1), lambda: cluster.submit(PROMPTS[0])):
        with pytest.raises(ClusterError, match="the cluster was closed"):
            call()


def test_a_rank_that_dies_while_the_cluster_closes(open_cluster: Any, caplog: pytest.LogCaptureFixture):
    cluster, backend = open_cluster(2)
    going = cluster.submit(PROMPTS[0], max_new_tokens=400, stop_tokens=())
    next(going._portions())
    backend.at(1, 2, "crash")
    cluster.close()
    assert not [record for record in caplog.records if "bug" in record.message]


def test_ranks_scaled_by_several_at_once(open_cluster: Any, folder: Path):
    cluster, backend = open_cluster(2)
    threads = [threading.Thread(target=cluster.scale, args=(ranks,)) for ranks in (4, 1, 3, 2)]
    for thread in threads:
        thread.start()
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=20, stop_tokens=())) == expected(folder, PROMPTS, 20)
    for thread in threads:
        thread.join(60)
    assert cluster.ranks == backend.bundles
