"""A simulated cluster counts what a real one of 2 groups x 2 ranks counts, for the same requests: exactly.

Compared are the requests, steps, tokens of prompts, new tokens, tokens reused and preemptions of each rank, and hand-overs.
That needs requests whose ranks don't depend on how long a step takes on this machine:

    without roles  waves: all requests of a wave are assigned together, and end before the next one
    with roles     one request after the other; and the rank that computed a prompt waits for the order to hand it over, which
                   takes no time in the simulation

Not compared: times; and what depends on them: assignments of requests that wait until another one has ended, chunks that are
balanced between ranks, and hand-overs that begin before a prompt's end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytest

import cluster.simulation.lockstep_group
import epslots.generation.engine
from cluster.api import Cluster
from cluster.driver.hand_over_costs import HandOverCosts
from cluster.driver.scheduler import Scheduler
from cluster.rank.rank_loop import RankLoop
from cluster.simulation.arrivals import Arrival
from cluster.simulation.request_simulation import RequestSimulation
from epslots.config import EngineConfig
from epslots.generation.requests import Request
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.rank_groups import divide_ranks
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.simulate import RecordedTraffic
from epslots.simulation.timing import DEVICES, hand_over_of, timing_of
from tests.support import zoo
from tests.support.fake_backend import FakeBackend
from tests.support.rank_helpers import PATIENCE_S

pytestmark = pytest.mark.usefixtures("one_load_at_a_time")

Open = Callable[..., tuple[Cluster, FakeBackend]]
Wave = list[tuple[list[int], int]]
"""Prompts, and the new tokens of each."""
COUNTED = ("steps", "prompt_tokens", "new_tokens", "reused_tokens", "preempted")
SHORT = 25


def ids(length: int, seed: int) -> list[int]:
    return zoo.random_ids(1, length, seed=seed)[0].tolist()


def simulated(prefill_ranks: int, kv_tokens: int, max_batch_tokens: int) -> RequestSimulation:
    division = divide_ranks(4, 2, prefill_ranks, 0)
    assert division is not None
    generator = np.random.default_rng(1)
    traffic = RecordedTraffic(generator.integers(0, 8, (50, 2, 2)).astype(np.int16), np.array([0]), np.array([8, 8]))
    cluster = GroupedCluster(
        division=division,
        nodes=1,
        quota_L=np.array([3, 3]),
        timing=timing_of(DEVICES["h100"], 10**6, 1000, layer_ns=1000),
        hand_over=hand_over_of(DEVICES["h100"]),
        expert_bytes=10**6,
        kv_token_bytes=1000,
        policy=POLICIES[DEFAULT_POLICY],
        engine=EngineConfig(kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens),
        window_steps=4,
    )
    return RequestSimulation(cluster, traffic)


def serve_simulated(simulation: RequestSimulation, waves: Sequence[Wave]) -> list[tuple[int, ...]]:
    """Serve the waves; returns each rank's counts."""
    for number, wave in enumerate(waves):
        requests = [Request(f"{number}.{i}", tuple(prompt), new) for i, (prompt, new) in enumerate(wave)]
        simulation.run(Arrival(simulation.now_s, request, 0) for request in requests)
        assert all(simulation.times[request.id].tokens == request.max_new_tokens for request in requests)
    simulation.check()
    return [(rank.served, *(getattr(rank.counters, name) for name in COUNTED)) for rank in simulation.ranks]


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (epslots.generation.engine, cluster.simulation.lockstep_group):
        monkeypatch.setattr(module, "balanced_chunk", lambda _: None)
    monkeypatch.setattr(HandOverCosts, "begins_early", lambda *_: False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Counter[Hashable]:
    """Requests that each real rank was given, hand-overs included. Those of a wave are assigned together."""
    found: Counter[Hashable] = Counter()
    assign, add = Scheduler.assign, RankLoop._add

    def together(scheduler: Scheduler) -> list[tuple[Hashable, Request]]:
        return assign(scheduler) if scheduler.queued >= found["wave"] else []

    def count(loop: RankLoop, request: Request) -> None:
        found[loop] += 1
        add(loop, request)

    monkeypatch.setattr(Scheduler, "assign", together)
    monkeypatch.setattr(RankLoop, "_add", count)
    return found


def serve(cluster: Cluster, served: Counter[Hashable], waves: Sequence[Wave]) -> list[tuple[int, ...]]:
    """Serve the waves; returns the counts of each rank, in the order in which the scheduler knows them."""
    for wave in waves:
        served["wave"] = len(wave)
        running = [cluster.submit(prompt, max_new_tokens=new) for prompt, new in wave]
        assert [len(one.result(PATIENCE_S).tokens) for one in running] == [new for _, new in wave]
    loads = cluster._supervisor.router._scheduler._ranks
    workers = [*loads._prompts._loads, *loads._decoding._loads]
    engines = {rank.rank: rank.engine for rank in cluster.stats().ranks}
    members = [worker for group in cluster._supervisor.groups for worker in group.members]
    by_worker = {worker: engines[number] for number, worker in enumerate(members)}
    loops: dict[Any, RankLoop] = {worker: worker.handle.loop for worker in members}  # type: ignore[union-attr]
    return [(served[loops[one]], *(getattr(by_worker[one], name) for name in COUNTED)) for one in workers]


WAVES: list[Wave] = [
    [(ids(length, length), new) for length, new in ((3, 9), (40, 5), (17, 1), (9, 20), (25, 12), (5, 3), (33, 7), (30, 16))],
    # The beginnings of two of these are in caches; and two that begin alike come together.
    [(ids(40, 40) + ids(9, 1), 6), (ids(33, 33) + ids(20, 2), 10), (ids(50, 7), 4), (ids(50, 7)[:40] + ids(9, 3), 8)],
    [(ids(2, 5), 30)],
]


def test_waves_count_alike(open_cluster: Open, served: Counter[Hashable]):
    cluster, _ = open_cluster(ranks=4, groups=2, max_batch_tokens=16)
    simulation = simulated(0, kv_tokens=512, max_batch_tokens=16)
    found = serve_simulated(simulation, WAVES)
    assert found == serve(cluster, served, WAVES)
    assert sum(reused for _, _, _, _, reused, _ in found) > 0
    assert all(steps for _, steps, *_ in found)


def test_full_caches_count_alike(open_cluster: Open, served: Counter[Hashable]):
    """Requests outgrow the cache: the last ones give up their places, and are computed again."""
    waves: list[Wave] = [[(ids(18 + seed, seed), 40) for seed in range(12)]]
    cluster, _ = open_cluster(ranks=4, groups=2, kv_tokens=96, max_batch_tokens=16)
    found = serve_simulated(simulated(0, kv_tokens=96, max_batch_tokens=16), waves)
    assert found == serve(cluster, served, waves)
    assert sum(preempted for *_, preempted in found) > 0


def test_hand_overs_count_alike(open_cluster: Open, served: Counter[Hashable], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HandOverCosts, "stays", lambda _self, to_compute, *_: to_compute <= SHORT)
    long: Wave = [(ids(60, 60), 30), (ids(45, 45), 20), (ids(60, 60) + ids(30, 9), 25), (ids(28, 28), 40)]
    waves: list[Wave] = [[request] for wave in (*WAVES, long) for request in wave]
    cluster, backend = open_cluster(ranks=4, groups=2, prefill_ranks=2, max_batch_tokens=16)
    sources = [backend.workers[bundle].loop for bundle in (0, 1)]
    has_steps = RankLoop._has_steps_to_make

    def waits_for_orders(loop: RankLoop) -> bool:
        entries = () if loop._engine is None else loop._engine.batcher._entries.values()
        decoding = [entry for entry in entries if entry.tokens and entry.reason is None and not entry.held]
        leaves = any(entry.request.max_new_tokens > HandOverCosts().least_left_tokens for entry in decoding)
        return has_steps(loop) and not (loop in sources and leaves)

    monkeypatch.setattr(RankLoop, "_has_steps_to_make", waits_for_orders)
    simulation = simulated(2, kv_tokens=512, max_batch_tokens=16)
    found = serve_simulated(simulation, waves)
    assert found == serve(cluster, served, waves)
    counts = cluster._supervisor.router.hand_overs.counts
    assert (counts.done, counts.failed) == (simulation.hand_overs.counts.done, simulation.hand_overs.counts.failed)
    assert simulation.hand_overs.counts.done > 3 and simulation.hand_overs.counts.failed == 0
