"""Replaying a trace counts what the model counted, and no policy beats the optimum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import epslots
from epslots.eviction import POLICIES
from epslots.replay import belady, replay
from tests import zoo


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
    replayed = replay(trace.expert_ids, trace.num_experts, slots, POLICIES[policy])
    layers = epslots.stats(model).layers
    assert replayed.hits.tolist() == [layer.hits for layer in layers]
    assert replayed.misses.tolist() == [layer.misses for layer in layers]


def random_trace(seed: int, steps: int = 30, experts: int = 6, top_k: int = 2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(experts, 0.5))
    rows = [generator.choice(experts, top_k, replace=False, p=(weights + 0.01) / (weights + 0.01).sum()) for _ in range(steps)]
    return np.array(rows, np.int16)[:, None, :]


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_beats_the_optimum(seed: int):
    ids, experts = random_trace(seed), np.array([6])
    for slots in (2, 3, 5):
        best = belady(ids, experts, slots).hit_rate
        assert all(replay(ids, experts, slots, policy).hit_rate <= best for policy in POLICIES.values())


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
    assert int(belady(ids, np.array([4]), slots).hits[0]) == most


def test_all_slots_miss_each_expert_once():
    ids = random_trace(0)
    for result in (belady(ids, np.array([6]), 6), replay(ids, np.array([6]), 6, POLICIES["lru"])):
        assert int(result.misses[0]) == len(np.unique(ids))
