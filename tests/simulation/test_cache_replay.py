"""Replaying a trace counts what the model counted, and no policy beats the optimum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import epslots
from epslots.bench.eviction import Question, judge, summary
from epslots.bench.workloads import PATTERNS
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.simulation.cache_replay import belady, replay, reuse_histogram, steps_of
from epslots.simulation.lanes import deal_once, read_on
from tests.support import zoo


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_a_replay_counts_what_the_model_counted(policy: str, slots: int, checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(
        checkpoint("qwen3_moe"), slots=slots, policy=policy, device="cpu", cache_dir=cache_dir, progress=False
    )
    with epslots.record_trace(model) as recorder, torch.no_grad():
        for token in zoo.random_ids(1, 40)[0]:
            model(token.view(1, 1))
    trace = recorder.trace()
    # Caches that are compared don't touch each other.
    quota_CL = np.array([[5] * 3, [slots] * 3, [16] * 3])
    replayed = replay(trace.expert_ids, trace.num_experts, quota_CL, POLICIES[policy])
    layers = epslots.stats(model).layers
    assert replayed.hits_CL[1].tolist() == [layer.hits for layer in layers]
    assert replayed.misses_CL[1].tolist() == [layer.misses for layer in layers]


def random_trace(seed: int, steps: int = 30, experts: int = 6, top_k: int = 2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(experts, 0.5))
    rows = [generator.choice(experts, top_k, replace=False, p=(weights + 0.01) / (weights + 0.01).sum()) for _ in range(steps)]
    return np.array(rows, np.int16)[:, None, :]


SIX = np.array([6])


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_beats_the_optimum(seed: int):
    quota_CL = np.array([[1], [2], [3], [5]])  # a step uses two: the first runs in passes
    ids = random_trace(seed)
    best = belady(ids, SIX, quota_CL)
    for policy in POLICIES.values():
        replayed = replay(ids, SIX, quota_CL, policy)
        assert (replayed.hits_CL <= best.hits_CL).all()
        assert (replayed.hits_CL + replayed.misses_CL == best.hits_CL + best.misses_CL).all()


@pytest.mark.parametrize("seed", range(5))
def test_belady_is_the_optimum(seed: int):
    """Against every possible sequence of evictions of a small trace."""
    ids = random_trace(seed, steps=7, experts=4, top_k=1)
    slots, most = 2, 0
    for choices in product(range(slots), repeat=len(ids)):
        held, hits = [-1] * slots, 0
        for (wanted,), choice in zip(ids[:, 0].tolist(), choices, strict=True):
            if wanted in held:
                hits += 1
            else:
                held[choice] = wanted
        most = max(most, hits)
    assert int(belady(ids, np.array([4]), np.array([[slots]])).hits_CL[0, 0]) == most


@pytest.mark.parametrize("seed", range(5))
def test_belady_is_the_optimum_of_steps_with_several_experts(seed: int):
    """Against every choice of what else stays beside a step's experts."""
    ids, slots = random_trace(seed, steps=7, experts=5, top_k=2), 3
    best = {frozenset[int](): 0}
    for wanted in map(frozenset, ids[:, 0].tolist()):
        following: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            for others in combinations(held - wanted, min(slots - len(wanted), len(held - wanted))):
                after = wanted.union(others)
                following[after] = max(following.get(after, 0), hits + len(wanted & held))
        best = following
    assert int(belady(ids, np.array([5]), np.array([[slots]])).hits_CL[0, 0]) == max(best.values())


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_caches_that_are_compared_learn_apart(policy: str):
    ids, quotas = random_trace(4, steps=200), [1, 2, 4]
    together = replay(ids, SIX, np.array(quotas)[:, None], POLICIES[policy]).hits_CL[:, 0].tolist()
    alone = [int(replay(ids, SIX, np.array([[quota]]), POLICIES[policy]).hits_CL[0, 0]) for quota in quotas]
    assert together == alone


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (64, 1)])
def test_the_default_policy_is_no_worse_than_lru_and_lfu(pattern: str, experts: int, top_k: int):
    """As a share of the optimum's hits. It learns as it goes, and blends: that costs a little where one row is right."""
    ids = PATTERNS[pattern](np.random.default_rng(7), experts, top_k, 1500)[:, None]
    quota_CL, experts_L = np.array([[experts // 4], [experts // 2]]), np.array([experts])
    best_C = belady(ids, experts_L, quota_CL).hits_CL.sum(1)
    share = {name: replay(ids, experts_L, quota_CL, POLICIES[name]).hits_CL.sum(1) / best_C for name in POLICIES}
    gain_C = share[DEFAULT_POLICY] - np.maximum(share["lru"], share["lfu"])
    assert (gain_C > -0.015).all(), gain_C
    if pattern in ("in turn", "phases"):
        assert gain_C.max() > 0.05, gain_C


def test_the_benchmark_compares_with_the_better_of_lru_and_lfu():
    ids = PATTERNS["topics"](np.random.default_rng(0), 32, 4, 300)[:, None]
    rows = judge(Question("made up", "topics", 1, ids, np.array([32])), lambda steps: None)
    assert [row["slots"] for row in rows] == ["12.5%", "25.0%", "50.0%"]
    assert rows[0]["no choice"] and rows[0]["lru"] == 100, "a step fills all four slots"
    replayed = replay(ids, np.array([32]), np.array([[8]]), POLICIES["lfu"])
    best = belady(ids, np.array([32]), np.array([[8]]))
    assert rows[1]["lfu"] == pytest.approx(100 * replayed.hits_CL.sum() / best.hits_CL.sum())
    assert rows[1]["Belady"] == pytest.approx(100 * best.hits_CL.sum() / 1200)
    other = {**rows[1], "kind": "text", "lru": 60.0, "lfu": 50.0, "lrfu": 59.0, "adaptive": 62.0}
    found = {(row["kind"], row["policy"]): row for row in summary([rows[1], other])}
    assert found["text", "adaptive"]["mean"] == found["text", "adaptive"]["worst"] == 2.0
    assert found["text", "lrfu"]["below by over 0.1"] == 1 and found["all", "lrfu"]["settings"] == 2


def test_all_slots_miss_each_expert_once():
    ids, quota_CL = random_trace(0), np.array([[6], [99]])
    for result in (belady(ids, SIX, quota_CL), replay(ids, SIX, quota_CL, POLICIES["lru"])):
        assert result.misses_CL[:, 0].tolist() == [len(np.unique(ids))] * 2


def test_the_histogram_is_of_all_uses():
    ids, done = random_trace(3, steps=600), list[int]()
    histogram_LD = reuse_histogram(ids, SIX, advance=done.append)
    assert histogram_LD.sum() == ids.size and sum(done) == 600
    lru = replay(ids, SIX, np.array([[2], [4]]), POLICIES["lru"])
    assert [histogram_LD[0, :2].sum(), histogram_LD[0, :4].sum()] == lru.hits_CL[:, 0].tolist()


def test_a_batch_uses_an_expert_once_a_step():
    ids = np.array([[[0, 1]], [[2, 3]], [[0, 1]], [[0, 5]], [[4, -1]]], np.int16)  # sequences of three and two tokens
    row_SB = deal_once(np.array([0, 3]), 5, lanes=2)
    assert row_SB.tolist() == [[0, 3], [1, 4], [2, -1]]
    ids_TLN = steps_of(ids, row_SB)
    assert ids_TLN[:, 0].tolist() == [[0, 1, 0, 5], [2, 3, 4, -1], [0, 1, -1, -1]]
    replayed = replay(ids_TLN, SIX, np.array([[6]]), POLICIES["lru"])
    assert (replayed.hits_CL.sum(), replayed.misses_CL.sum()) == (2, 6)
    assert replayed.hit_rates == [0.25]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 40))
def test_lanes(lengths: list[int], lanes: int, steps: int):
    tokens = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    once_SB = deal_once(starts, tokens, lanes)
    assert sorted(once_SB[once_SB >= 0].tolist()) == list(range(tokens)), "each token once"
    round_SB = np.stack(list(islice(read_on(starts, tokens, lanes), steps)))
    assert round_SB.shape == (steps, lanes) and round_SB.min() >= 0 and round_SB.max() < tokens
    for lane_S in (*once_SB.T, *round_SB.T):
        for now, then in pairwise(lane_S[lane_S >= 0].tolist()):
            assert then == now + 1 if now + 1 not in (*starts, tokens) else then in starts, "a sequence stays in its lane"


def test_sequences_go_to_free_lanes_in_their_order():
    starts = np.array([0, 2, 4, 6, 8])
    row_SB = np.stack(list(islice(read_on(starts, 10, 2), 12)))
    drawn = [row for rows in row_SB.tolist() for row in rows if row in starts]
    assert drawn == [0, 4, 6, 8, 0, 2, 4, 6, 8, 0, 2, 4], "the second lane entered sequence 1 amid it"
