"""The baseline plays by EPLB's published rules."""

from __future__ import annotations

import numpy as np
import pytest

from epslots.bench.eplb import copies_held, eplb
from epslots.errors import ConfigError
from epslots.placement.balance import balancedness, rank_loads

# The example of EPLB's README: 2 layers of 12 experts on 8 GPUs of 2 nodes, 16 replicas, 4 groups.
README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
ANSWER = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_its_own_example():
    """Hierarchical; nodes, ranks and copies as published (the order of slots within a rank is free)."""
    found = eplb(README, 8, 2, groups=4, nodes=2)
    for layer in range(2):
        ours = sorted(tuple(sorted(pair)) for pair in found[layer].reshape(8, 2).tolist())
        assert ours == sorted(tuple(sorted(pair)) for pair in np.reshape(ANSWER[layer], (8, 2)).tolist())


def test_the_golden_loads_give_232():
    golden = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])
    assert rank_loads(copies_held(eplb(golden, 8, 2), 8, 8), golden).max() == 232


def test_every_expert_has_a_slot_and_the_hottest_most():
    loads = np.random.default_rng(0).integers(1, 1000, (3, 20))
    loads[:, 4] = 9000
    found = eplb(loads, 4, 8)
    held = copies_held(found, 4, 20)
    assert found.shape == (3, 32) and (held.sum((1, 2)) == 32).all() and (held.sum(1) >= 1).all()
    assert (held.sum(1).argmax(1) == 4).all()
    assert balancedness(rank_loads(held, loads)) > 0.9


def test_what_it_cannot_do_is_said():
    with pytest.raises(ConfigError, match="fewer than 12 experts"):
        eplb(README, 2, 5)
    with pytest.raises(ConfigError, match="divide"):
        eplb(README, 8, 2, groups=8, nodes=2)
