"""A simulated cluster: its rows count as a real cache's do, nothing is lost or left over, figures follow from its steps."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.driver.hand_over_costs import HandOverCosts
from cluster.rank import copy_budget
from cluster.simulation.arrivals import arrivals_of
from cluster.simulation.cache_transfers import CacheTransfers
from cluster.simulation.counted_rows import CountedRows
from cluster.simulation.figures import simulate_load
from cluster.simulation.request_simulation import RequestSimulation
from cluster.simulation.simulated_rank import SimulatedRank
from cluster.simulation.trace_counts import TraceCounts
from epslots.config import EngineConfig
from epslots.errors import ConfigError
from epslots.generation.cell_table import CellTable
from epslots.piece_sizes import BYTES_IN_FLIGHT, PIECE_BYTES
from epslots.placement.rank_speeds import USUAL
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.rank_groups import divide_ranks
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.load import Workload
from epslots.simulation.simulate import RecordedTraffic
from epslots.simulation.timing import DEVICES, HandOverTiming, hand_over_of, timing_of

LOAD = Workload(rate=60.0, requests=60, prompt_tokens=(20, 90), new_tokens=(1, 40), shared_tokens=20, shared_prompts=3)


def traffic_of(tokens: int = 120) -> RecordedTraffic:
    generator = np.random.default_rng(3)
    ids = generator.integers(-1, 8, (tokens, 2, 2)).astype(np.int16)
    return RecordedTraffic(ids, np.arange(0, tokens, 30), np.array([8, 6]))


def cluster_of(ranks: int = 8, groups: int = 4, prefill_ranks: int = 0, nodes: int = 2, **settings: object) -> GroupedCluster:
    division = divide_ranks(ranks, groups, prefill_ranks, 0)
    assert division is not None
    engine = EngineConfig(**({"kv_tokens": 600, "max_requests": 4, "max_batch_tokens": 32} | settings))  # type: ignore[arg-type]
    return GroupedCluster(
        division=division,
        nodes=nodes,
        quota_L=np.array([3, 3]),
        timing=timing_of(DEVICES["h100"], 10**7, 4096, layer_ns=400_000, token_ns=1000),
        hand_over=hand_over_of(DEVICES["h100"]),
        expert_bytes=10**7,
        kv_token_bytes=10**5,
        policy=POLICIES[DEFAULT_POLICY],
        engine=engine,
        depth=12.0,
    )


def served(cluster: GroupedCluster, load: Workload = LOAD) -> RequestSimulation:
    traffic = traffic_of()
    simulation = RequestSimulation(cluster, traffic)
    simulation.run(arrivals_of(load, traffic.starts))
    simulation.check()
    wanted = [arrival.request.max_new_tokens for arrival in arrivals_of(load, traffic.starts)]
    assert [one.tokens for one in simulation.times.values()] == wanted, "every request gets all of its tokens"
    return simulation


@pytest.mark.parametrize("seed", range(4))
def test_rows_count_their_cells(seed: int):
    """As a real cache's table does, which knows every cell by its number."""
    chance, cells, most = random.Random(seed), 300, 6
    rows, table = CountedRows(cells, most), CellTable(cells, most, cells, None, torch.device("cpu"))
    live = []
    for _ in range(400):
        assert rows.free_tokens == table.free
        do = chance.choice(["open", "extend", "extend", "copy", "cut", "close"])
        if do == "open" and rows.free_rows:
            live.append(rows.open())
        elif live:
            row = chance.choice(live)
            length = chance.randint(0, row.length)
            if do == "extend" and (tokens := min(chance.randint(1, 30), rows.free_tokens)):
                rows.extend(row, tokens)
                table.take(np.array([row.number]), tokens)
            elif do == "copy" and rows.free_rows:
                live.append(rows.copy(row, length))
                table.copy(row.number, live[-1].number, length)
            elif do == "cut":
                rows.cut(row, length)
                table.cut(row.number, length)
            elif do == "close":
                live.remove(row)
                rows.close(row)
                table.release(row.number)
        rows.check()


def test_a_trace_is_read_in_a_circle():
    traffic = traffic_of(tokens=7)
    counts = TraceCounts(traffic, ranks=3)
    ids = traffic.expert_ids.astype(int)

    def naive(rows: list[int]) -> np.ndarray:
        found = np.zeros((2, 8), int)
        for row in rows:
            for layer, most in enumerate(traffic.num_experts_L):
                for expert in ids[row % 7, layer]:
                    found[layer, expert] += 0 <= expert < most
        return found

    assert (counts.of_stretches([(5, 18), (0, 3)]) == naive([*range(5, 23), *range(3)])).all()
    single = counts.of_tokens(np.array([1, 6, 6]), np.array([0, 2, 2]))
    assert (single[:, 0] == naive([1])).all() and not single[:, 1].any() and (single[:, 2] == naive([6, 6])).all()


@pytest.mark.parametrize("prefill_ranks", [0, 4])
def test_steps_together_are_steps_one_by_one(prefill_ranks: int, monkeypatch: pytest.MonkeyPatch):
    """Ranks that only decode are asked for the next step when something happens to them: that changes nothing."""
    cluster, load = cluster_of(prefill_ranks=prefill_ranks), replace(LOAD, rate=600.0)
    quick = served(cluster, load)
    monkeypatch.setattr(SimulatedRank, "coasts", lambda _: 0)
    slow = served(cluster, load)
    assert [vars(one) for one in quick.times.values()] == [vars(one) for one in slow.times.values()]
    assert [vars(one.counters) for one in quick.ranks] == [vars(one.counters) for one in slow.ranks]
    gaps = [[sum(streams_R.sum() for _, streams_R in group.take().gaps) for group in one.groups] for one in (quick, slow)]
    assert gaps[0] == gaps[1]
    assert quick.hand_overs.counts == slow.hand_overs.counts


def test_hand_overs_fail_and_go_on_where_they_were():
    """Caches that hold few requests: targets have no room, sources give up held ones; no token is lost."""
    simulation = served(
        cluster_of(ranks=4, groups=2, prefill_ranks=2, kv_tokens=140, max_requests=3), replace(LOAD, rate=400.0)
    )
    counts = simulation.hand_overs.counts
    assert counts.done > 0
    assert sum(rank.counters.preempted for rank in simulation.ranks) > 0
    assert counts.nbytes % 10**5 == 0 and counts.nbytes > 0


def test_hand_overs_begin_before_prompts_end(monkeypatch: pytest.MonkeyPatch):
    """Where a cache takes long to copy: most of it is there when the prompt is done, and texts stand still for less."""
    cluster = replace(cluster_of(ranks=4, groups=2, prefill_ranks=2, kv_tokens=2000), kv_token_bytes=3 * 10**5)
    load = replace(LOAD, rate=4.0, requests=30, prompt_tokens=(400, 600), new_tokens=(20, 40))
    early = served(cluster, load)
    counts = early.hand_overs.counts
    assert counts.early > counts.done / 2 and counts.failed == 0
    monkeypatch.setattr(HandOverCosts, "begins_early", lambda *_: False)
    late = served(cluster, load)
    assert late.hand_overs.counts.early == 0
    assert np.median(early.hand_over_s) < 0.4 * np.median(late.hand_over_s)


@pytest.mark.parametrize("most", [1, 4])
def test_sources_read_and_targets_write_between_steps(monkeypatch: pytest.MonkeyPatch, most: int):
    """Over a link that takes no time: as many pieces before a step, of the source or the target, as its time allows."""
    monkeypatch.setattr(copy_budget, "BYTES_IN_FLIGHT", most * PIECE_BYTES)
    cluster = cluster_of(ranks=4, groups=2, prefill_ranks=2, kv_tokens=2000)
    free_link, traffic = HandOverTiming(0.0, 1e18, 1e18, 1e18), traffic_of()
    simulation = RequestSimulation(replace(cluster, kv_token_bytes=PIECE_BYTES // 25, hand_over=free_link), traffic)
    calls: dict[str, list[tuple[int, int]]] = {"_read": [], "_write": []}
    """By a hand-over's number and its group's steps; of a group without work, which makes none, not all."""

    def note(name: str, end: str) -> None:
        do = getattr(CacheTransfers, name)

        def noted(transfers: CacheTransfers, one: Any) -> None:
            group = simulation.groups[getattr(one, end) // 2]
            if group._tokens_R.any():
                calls[name].append((one.number, group.steps))
            before = one.in_flight
            do(transfers, one)
            assert one.in_flight <= BYTES_IN_FLIGHT // PIECE_BYTES
            assert before - one.in_flight <= most, "of a write"

        monkeypatch.setattr(CacheTransfers, name, noted)

    note("_read", "source")
    note("_write", "target")
    load = replace(LOAD, rate=200.0, requests=30, prompt_tokens=(200, 300), new_tokens=(30, 40))
    simulation.run(arrivals_of(load, traffic.starts))
    simulation.check()
    assert simulation.hand_overs.counts.done > 10
    for found in calls.values():
        assert len(found) == len(set(found)) > 60 / most
    pieces = -(-200 // 25) / most
    written = Counter(number for number, _ in calls["_write"])
    assert np.median([*written.values()]) >= pieces, "but for the first ones, whose targets had no texts to go on with"
    assert np.median(simulation.hand_over_s) > pieces * min(group.take().seconds / group.steps for group in simulation.groups)


def test_a_controller_places_experts():
    """The cluster's own, by its own messages: groups migrate, and follow what it publishes."""
    simulation = served(replace(cluster_of(), window_steps=8), replace(LOAD, requests=120))
    assert simulation.windows is not None and simulation.windows.placements > 0
    versions = [group.experts.model.placement.version for group in simulation.groups]
    assert max(versions) > 0
    controllers = simulation.windows._controllers.by_group.values()
    assert all(one._windows > 0 and not one._refused for one in controllers)


def test_slower_ranks_get_fewer_requests():
    """As the controller learns from the time of their work: the speeds are those that they have."""
    timing = timing_of(DEVICES["cpu"], 10**7, 4096, layer_ns=400_000, token_ns=1000)
    cluster = replace(
        cluster_of(ranks=4, groups=2, max_requests=16), timing=timing, window_steps=8, speeds=(1.0, 1.0, 1.0, 0.25)
    )
    load = replace(LOAD, rate=5.0, requests=40, new_tokens=(20, 30))
    learned, blind = served(cluster, load), served(replace(cluster, window_steps=0), load)
    assert learned.windows is not None
    level, apart = learned.windows._speeds
    assert level == (USUAL, USUAL)
    assert apart[0] / apart[1] == pytest.approx(4, rel=0.01)
    assert learned.ranks[3].served < 0.8 * learned.ranks[2].served
    assert blind.ranks[3].served > 0.8 * blind.ranks[2].served


def test_figures_tell_a_load_that_is_too_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HandOverCosts, "stays", lambda *_: False)
    cluster, traffic = cluster_of(prefill_ranks=2), traffic_of()
    load = replace(LOAD, new_tokens=(20, 40), requests=100)
    light, heavy = (simulate_load(cluster, traffic, replace(load, rate=rate)) for rate in (20.0, 4000.0))
    assert light.kept_up and not heavy.kept_up
    assert heavy.ttft_ms.p50 > 10 * light.ttft_ms.p50 > 0
    assert light.tpot_ms.p50 <= light.tpot_ms.p99 <= light.tpot_ms.max
    assert light.hand_overs > 80 and light.hand_over_ms is not None and light.hand_over_ms.p50 >= 20.0, "its messages alone"
    assert light.hand_over_bytes > 0 and 0 < light.reused < 1
    assert light.step_skew.keys() == {"prefill", "decode"} and min(light.step_skew.values()) >= 1
    assert light.tokens_per_s == pytest.approx(20 * 30, rel=0.4), "what comes in goes out"


def test_a_single_request_has_figures():
    load = replace(LOAD, requests=1, new_tokens=(1, 1))
    found = simulate_load(cluster_of(), traffic_of(), load)
    assert found.requests == 1 and found.ttft_ms.p50 > 0 and found.tpot_ms.p50 == 0 and found.kept_up


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate=0.0; allowed: requests a second, more than 0"),
        ({"prompt_tokens": (9, 5)}, "prompt_tokens=9-5; allowed: from 1"),
        ({"shared_tokens": 21}, "shared_tokens=21; allowed: 0 to the shortest prompt's 20"),
        ({"prompt_tokens": (20, 590)}, "prompts of 590 tokens and 40 new ones; allowed: up to kv_tokens=600 together"),
    ],
)
def test_impossible_loads_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        simulate_load(cluster_of(), traffic_of(), replace(LOAD, **change))  # type: ignore[arg-type]
