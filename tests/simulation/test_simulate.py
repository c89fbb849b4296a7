"""The simulated cluster: its clock adds up, its counts are those of caches and ranks, and it says what it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pytest

from epslots.errors import ConfigError
from epslots.placement.placement import Placement, default_placement, first_residents, pack
from epslots.planner.cache_policy import POLICIES
from epslots.planner.cost_model import Costs, layer_time
from epslots.simulation.cache_replay import replay, steps_of
from epslots.simulation.lanes import read_on
from epslots.simulation.simulate import RecordedTraffic, SimulatedCluster, simulate
from epslots.simulation.simulated_group import SimulatedGroup, far_pairs_of_a_rank
from epslots.simulation.timing import DEVICES, Timing, timing_of
from epslots.trace import Trace
from tests.support.grouped_ranks import ALL_COSTS

LRFU = POLICIES["lrfu"]
CHEAP = Costs(host_fetch=100, peer_fetch=50, pair_transfer=1, pair_compute=1000, expert_compute=100, exchange=10, gather=10)


def plain(costs: Costs) -> Timing:
    return Timing(costs, 0, 0, 0, 0, 0)


def skewed_traffic(
    seed: int = 0, sequences: int = 24, tokens: int = 50, layers: int = 2, experts: int = 12
) -> RecordedTraffic:
    """Two choices for each token, some experts far hotter than others; the last of several layers has fewer experts."""
    generator = np.random.default_rng(seed)
    logits = 1.5 * generator.standard_normal((layers, experts))
    num_experts_L = np.array([experts] * (layers - 1) + [experts - 4])
    logits[np.arange(experts) >= num_experts_L[:, None]] = -np.inf
    noisy = logits + generator.gumbel(size=(sequences * tokens, layers, experts))
    ids = np.argsort(-noisy, axis=2, kind="stable")[:, :, :2].astype(np.int16)
    return RecordedTraffic(ids, np.arange(sequences) * tokens, num_experts_L)


def cluster_of(ranks: int, slots: int, timing: Timing | None = None, layers: int = 2, **settings: object) -> SimulatedCluster:
    given = {"nodes": 1, "expert_bytes": 1, "policy": LRFU} | settings
    return SimulatedCluster(ranks=ranks, quota_L=np.full(layers, slots), timing=timing or plain(CHEAP), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_rank_is_a_cache(policy: str):
    traffic = skewed_traffic()
    outcome = simulate(traffic, cluster_of(1, 4, policy=POLICIES[policy]), batch=3, steps=60)
    row_SB = np.stack(list(islice(read_on(traffic.starts, len(traffic.expert_ids), 3), 60)))
    ids_TLN = steps_of(traffic.expert_ids, row_SB)
    replayed = replay(ids_TLN, traffic.num_experts_L, np.array([[4, 4]]), POLICIES[policy])
    assert outcome.hit_rate == replayed.hit_rates[0]
    assert outcome.bytes_by_source["host"] == replayed.misses_CL.sum()
    assert outcome.evictions == replayed.misses_CL.sum() - 8, "but for the slots that were empty"
    assert (outcome.balance, outcome.placements) == (1.0, 0)


@pytest.mark.parametrize("costs", sorted(ALL_COSTS))
def test_the_clock_is_the_planners(costs: str, monkeypatch: pytest.MonkeyPatch):
    """On one node, with nothing to be moved, a layer takes what its plan was judged by; or a gathering, if that is cheaper."""
    quota_LR = np.array([[3, 2, 4]])
    group = SimulatedGroup(default_placement([10], quota_LR), plain(ALL_COSTS[costs]), LRFU)
    shared = group.model.layers[0]
    generator = np.random.default_rng(1)
    for _ in range(50):
        tokens_R = generator.integers(0, 20, 3)
        counts_RE = np.stack([np.bincount(generator.integers(0, 10, 2 * tokens), minlength=10) for tokens in tokens_R])
        decide = shared.decide
        found = []
        monkeypatch.setattr(shared, "decide", lambda *a, d=decide, f=found: f.append(d(*a)) or f[-1])
        step_ns = group.step(counts_RE[None], tokens_R)
        monkeypatch.undo()
        if not found:
            assert not counts_RE.any()
            continue
        plan = found[0].assignment
        expected = layer_time(ALL_COSTS[costs], plan.counts_RU, plan.computed_RU, plan.fetch_ranks, plan.fetch_sources)
        gathers = 2 * ALL_COSTS[costs].gather  # the header's and the counts'
        assert step_ns <= expected + gathers
        if costs in ("tokens travel", "copies travel", "work spreads"):  # gathering costs more than all else there
            assert step_ns == expected + gathers


def test_a_slow_rank_takes_longer():
    """For the experts that it computes, and for the rest of a layer; decisions are those of usual ranks."""
    timing = msgspec.structs.replace(plain(CHEAP), layer=1000, token=10)
    counts_RE, tokens_R = np.full((2, 4), 3), np.array([6, 6])

    def run(*speeds: float) -> tuple[SimulatedGroup, int]:
        group = SimulatedGroup(default_placement([4], np.array([[4, 4]])), timing, LRFU, speed_R=np.array(speeds))
        return group, group.step(counts_RE[None], tokens_R)

    (usual, usual_ns), (slow, slow_ns) = run(1, 1), run(1, 0.5)
    fixed = CHEAP.gather
    assert slow_ns - fixed == 2 * (usual_ns - fixed)
    (before, after) = usual.take_work(), slow.take_work()
    assert after.ns[0].tolist() == [before.ns[0, 0], 2 * before.ns[0, 1]]
    assert after.pairs.tolist() == before.pairs.tolist() == [[12, 12]] and after.uses.tolist() == [[4, 4]]
    assert not slow.take_work().pairs.any()


def placement_that_wants(experts: list[int], ranks: int, quota: int, wanted: list[tuple[int, int, int]]) -> Placement:
    """Version 1: wanted (layer, rank, expert), homes where they are wanted."""
    dealt = default_placement(experts, np.full((len(experts), ranks), quota))
    wanted_LRE, home_LE = dealt.wanted_LRE.copy(), dealt.home_LE.copy()
    for layer, rank, expert in wanted:
        wanted_LRE[layer, rank, expert] = True
        home_LE[layer, expert] = rank
    placement = replace(dealt, version=1, wanted_LRE=wanted_LRE, home_LE=home_LE)
    placement.check()
    return placement


def test_moves_run_behind_and_delay_the_next_fetch():
    costs = Costs(
        host_fetch=1000, peer_fetch=10**6, pair_transfer=10**6, pair_compute=1, expert_compute=1, exchange=1, gather=1
    )
    tokens_R = np.array([1, 1])

    def step_times(moving: bool) -> list[int]:
        group = SimulatedGroup(
            default_placement([8], np.array([[4, 4]])), plain(costs), LRFU, holds_LRE=np.zeros((1, 2, 8), bool)
        )
        counts_RE = np.zeros((3, 1, 2, 8), np.int64)
        counts_RE[0, 0, :, 0] = 1  # both ranks use expert 0, then nothing new, then rank 0 needs expert 5
        counts_RE[1, 0, :, 0] = 1
        counts_RE[2, 0, 0, [0, 5]] = 1
        times = [group.step(counts_RE[0], tokens_R), group.step(counts_RE[1], tokens_R)]
        if moving:
            group.model.follow(placement_that_wants([8], 2, 4, [(0, 0, 1), (0, 0, 2)]), bytes_per_step=1)
        times += [group.step(counts_RE[1], tokens_R), group.step(counts_RE[2], tokens_R)]
        moved = int(group.take().host_migrations.sum())
        assert moved == (1 if moving else 0), "a byte a step: the third step's demand takes the fourth's room"
        return times

    still, moving = step_times(False), step_times(True)
    assert moving[:3] == still[:3], "a move costs its own step nothing"
    assert moving[3] - still[3] == 1000, "the fetch after it waits for it"


def test_other_nodes_are_farther():
    copies_travel = ALL_COSTS["copies travel"]
    traffic, near = skewed_traffic(), cluster_of(8, 6, Timing(copies_travel, 50, 700, 20, 0, 0))
    one = simulate(traffic, near, batch=1, steps=40)
    four = simulate(traffic, replace(near, nodes=4), batch=1, steps=40)
    assert one.bytes_by_source["from_other_nodes"] == 0 < four.bytes_by_source["from_other_nodes"]
    assert four.step_ms.mean > one.step_ms.mean
    assert four.bytes_by_source["from_other_nodes"] <= four.bytes_by_source["peers"]


def test_a_copy_from_another_node_takes_that_long():
    costs = ALL_COSTS["copies travel"]
    holds_LRE = np.array([[[True, True, True], [False, False, False]]])
    counts_LRE = np.array([[[4, 0, 0], [0, 4, 0]]])  # rank 1 uses expert 1, which rank 0 has

    def one_step(node_R: np.ndarray | None) -> tuple[int, int]:
        timing = Timing(costs, 0, 777, 0, 0, 0)
        placement = default_placement([3], np.array([[3, 3]]))
        group = SimulatedGroup(placement, timing, LRFU, node_R=node_R, holds_LRE=holds_LRE)
        return group.step(counts_LRE, np.array([4, 4])), int(group.take().far_fetches.sum())

    (near_ns, near), (far_ns, far) = one_step(None), one_step(np.array([0, 1]))
    assert (near, far) == (0, 1)
    assert far_ns - near_ns == 777 - costs.peer_fetch


def test_pairs_that_cross_nodes():
    counts_RU = np.array([[6, 0], [0, 2], [0, 0], [0, 4]])
    computed_RU = np.array([[0, 2], [4, 0], [2, 0], [0, 4]])
    node_R = np.array([0, 0, 1, 1])
    # Node 0 has 6 of expert 0 and computes 4: two cross to node 1, one for each of its ranks. All of expert 1 stays.
    assert far_pairs_of_a_rank(counts_RU, computed_RU, node_R) == 1
    assert far_pairs_of_a_rank(counts_RU, counts_RU, node_R) == 0


def test_all_pairs_are_computed_whatever_the_groups():
    traffic = skewed_traffic()
    for ranks, group_size, sizes in ((5, 64, [5]), (10, 4, [4, 3, 3]), (1024, 64, [64] * 16)):
        cluster = cluster_of(ranks, 3, group_size=group_size)
        assert [len(group) for group in cluster.groups()] == sizes
        assert np.concatenate(cluster.groups()).tolist() == list(range(ranks))
        steps = 2 if ranks > 100 else 7
        done: list[int] = []
        outcome = simulate(traffic, cluster, batch=2, steps=steps, warm_up=1, advance=done.append)
        assert (outcome.groups, outcome.steps, sum(done)) == (len(sizes), steps, len(sizes) * (steps + 1))
        mean_step_s = outcome.step_ms.mean / 1e3
        assert outcome.tokens_per_s == pytest.approx(ranks * 2 / mean_step_s, rel=0.3)
        assert 0 < outcome.step_ms.p50 <= outcome.step_ms.p99 <= outcome.step_ms.max


def test_the_same_again():
    traffic = skewed_traffic()
    cluster = cluster_of(4, 5, window_steps=10)
    assert simulate(traffic, cluster, 3, 50) == simulate(traffic, cluster, 3, 50)


def test_more_slots_hit_more_and_larger_batches_do_more():
    traffic = skewed_traffic(layers=2, experts=24)
    few, many = (simulate(traffic, cluster_of(2, slots), 2, 80, 20) for slots in (3, 9))
    assert few.hit_rate < many.hit_rate
    one, eight = (simulate(traffic, cluster_of(2, 9), batch, 80, 20) for batch in (1, 8))
    assert one.step_ms.p50 < eight.step_ms.p50 and one.tokens_per_s < eight.tokens_per_s


def test_a_controller_levels_the_ranks():
    """Slots are enough, and a copy is far dearer than a step: what counts is where experts are, in the long run."""
    traffic = skewed_traffic(sequences=60)
    cluster = cluster_of(4, 5, plain(msgspec.structs.replace(CHEAP, host_fetch=100_000, peer_fetch=50_000)))
    static = simulate(traffic, cluster, batch=8, steps=100, warm_up=60)
    led = simulate(traffic, replace(cluster, window_steps=20), batch=8, steps=100, warm_up=60)
    assert static.placements == 0 < led.placements
    assert led.balance > static.balance + 0.03
    assert led.step_ms.mean < static.step_ms.mean


def test_a_placement_is_followed_from_the_start():
    traffic = skewed_traffic()
    wanted = [(layer, expert % 4, expert) for layer in range(2) for expert in range(8)]
    placement = placement_that_wants([12, 8], 4, 3, wanted)
    group = SimulatedGroup(placement, plain(CHEAP), LRFU)
    assert group.model.pending_migrations == 0 and group.model.placement.version == 1
    assert (first_residents(placement) >= placement.wanted_LRE).all()
    outcome = simulate(traffic, cluster_of(4, 1, placement=placement), batch=2, steps=30)
    assert outcome.placements == 0
    assert outcome.hit_rate == simulate(traffic, cluster_of(4, 7, placement=placement), batch=2, steps=30).hit_rate


def test_what_can_not_be_simulated():
    traffic = skewed_traffic()
    other = placement_that_wants([12, 8], 3, 4, [])
    for cluster, message in (
        (cluster_of(0, 4), "ranks=0: allowed: 1 to 1024"),
        (cluster_of(2000, 4), "ranks=2000"),
        (cluster_of(4, 4, nodes=5), "nodes=5: allowed: 1 to 4"),
        (cluster_of(4, 4, group_size=0), "group_size=0"),
        (cluster_of(4, 4, placement=other), "is for 3 ranks, and groups have \\[4\\]"),
        (cluster_of(3, 4, placement=placement_that_wants([12, 9], 3, 4, [])), "layers of \\[12, 9\\] experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            simulate(traffic, cluster, 1, 1)
    with pytest.raises(ConfigError, match="batch=0"):
        simulate(traffic, cluster_of(2, 4), 0, 1)
    with pytest.raises(ConfigError, match="holds no token"):
        simulate(RecordedTraffic(traffic.expert_ids[:0], traffic.starts[:0], traffic.num_experts_L), cluster_of(2, 4), 1, 1)
    with pytest.raises(ValueError, match="far_pair=-1: allowed"):
        Timing(CHEAP, -1, 0, 0, 0, 0)


def test_data_sheets():
    timing = timing_of(DEVICES["h100"], expert_bytes=64 << 20, row_bytes=4096)
    # 64 MiB at 0.8 x 64 GB/s; and what a product of so many weights with one row takes at half of 989 TFLOP/s.
    assert timing.costs.host_fetch == round((64 << 20) / 51.2)
    assert timing.costs.pair_compute == round((64 << 20) / (989 * 0.5 * 1e3))
    for name, device in DEVICES.items():
        timing = timing_of(device, 9 << 20, 4096)
        assert timing.far_fetch > timing.costs.peer_fetch or name == "l40s"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    traffic = skewed_traffic()
    Trace(traffic.expert_ids.astype(np.int16), traffic.starts, traffic.num_experts_L).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def test_the_command(run: Run, trace: Path, tmp_path: Path):
    (tmp_path / "timing.json").write_bytes(msgspec.json.encode(plain(CHEAP)))
    options = (
        "--ranks",
        4,
        "--nodes",
        2,
        "--slots",
        "25%",
        "--batch",
        "1,4",
        "--steps",
        30,
        "--timing",
        tmp_path / "timing.json",
        "--policy",
        "lrfu",
    )
    code, out, _ = run("simulate", trace, *options, "--json")
    assert code == 0
    found = json.loads(out)
    traffic = skewed_traffic()
    cluster = SimulatedCluster(4, 2, np.array([3, 2]), plain(CHEAP), 9 << 20, LRFU)
    expected = [msgspec.to_builtins(simulate(traffic, cluster, batch, 30, 50)) for batch in (1, 4)]
    assert found["curve"] == expected
    assert found["timing"]["costs"]["host_fetch"] == 100
    code, out, _ = run("simulate", trace, *options, "--controller")
    assert code == 0 and "4 ranks on 2 nodes" in out and "tokens/s" in out and out.count("%") == 2


def test_the_command_with_a_placement(run: Run, trace: Path, tmp_path: Path):
    path = tmp_path / "level.placement"
    path.write_bytes(pack(placement_that_wants([12, 8], 2, 5, [(0, 1, 3)])))
    code, out, _ = run("simulate", trace, "--ranks", 2, "--slots", 5, "--placement", path, "--steps", 5, "--json")
    assert code == 0 and json.loads(out)["curve"][0]["ranks"] == 2
    code, _, err = run("simulate", trace, "--ranks", 4, "--slots", 5, "--placement", path, "--steps", 5)
    assert code == 2 and "the placement is for 2 ranks" in err
    code, _, err = run("simulate", trace, "--ranks", 2, "--slots", 6, "--placement", path, "--steps", 5)
    assert code == 2 and "is for [10] slots on a rank, all layers together; --slots 6 is 12" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--machine", "abacus"), "--machine 'abacus': allowed: a100"),
        (("--policy", "best"), "--policy 'best': allowed: lru"),
        (("--batch", "1,0"), "--batch '0': allowed: numbers from 1"),
        (("--batch", "1000000"), "--batch '1000000': allowed: numbers from 1, below 1,000,000"),
        (("--batch", "9" * 5000), "--batch '9999"),
        (("--timing", "nowhere.json"), "nowhere.json can't be read"),
        (("--nodes", "9"), "nodes=9: allowed: 1 to 8"),
        (("--slots", "auto"), "slots='auto': allowed here"),
    ],
)
def test_options_that_can_not_be(run: Run, trace: Path, options: tuple[str, str], message: str):
    code, out, err = run("simulate", trace, *options)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err
