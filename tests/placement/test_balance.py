"""Loads of ranks under a placement, split equally and as well as can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.placement.balance import balancedness, holders, live_loads, rank_loads
from epslots.placement.placement import Placement, default_placement


def table(*rows: str) -> np.ndarray:
    """One layer's holders, a string of 0 and 1 for each rank."""
    return np.array([[[letter == "1" for letter in row] for row in rows]])


def test_an_expert_is_held_where_it_is_wanted_or_else_at_home():
    placement = default_placement([3, 2], np.full((2, 2), 2))
    wanted = np.zeros((2, 2, 3), bool)
    wanted[0, :, 1] = True
    homes = np.array([[0, 1, 1], [1, 0, -1]])
    found = holders(Placement(1, placement.num_experts_L, homes, wanted, placement.quota_LR))
    assert found[0].astype(int).tolist() == [[1, 1, 0], [0, 1, 1]]
    assert found[1].astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]  # the third expert isn't there in this layer


def test_pairs_are_split_equally_over_copies():
    holds = table("110", "011", "010")
    assert rank_loads(holds, np.array([[5, 9, 2]])).tolist() == [[8.0, 5.0, 3.0]]
    assert rank_loads(holds * np.array([2, 1, 1])[:, None], np.array([[5, 8, 2]])).tolist() == [[9.0, 4.0, 2.0]]
    assert rank_loads(table("10", "00"), np.array([[4, 7]])).tolist() == [[4.0, 0.0]]


def test_a_live_split_fills_the_least_loaded_holder_first():
    # Expert 1 is on all ranks: 12 pairs level loads 6, 2, 0 to 20/3 each.
    assert live_loads(table("110", "011", "010"), np.array([[6, 12, 2]]))[0] == pytest.approx([20 / 3] * 3)
    # With 1 pair the third rank alone takes it.
    assert live_loads(table("110", "011", "010"), np.array([[6, 1, 2]]))[0] == pytest.approx([6, 2, 1])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_live_split_is_the_best_there_is(data: st.DataObject):
    """By Hall's condition for fractions: no set of ranks must do more than all experts that no rank outside of it holds."""
    ranks, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    bits = data.draw(st.lists(st.integers(1, 2**ranks - 1), min_size=experts, max_size=experts))
    loads = np.array([data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))])
    holds = np.array([[[bool(bit >> rank & 1) for bit in bits] for rank in range(ranks)]])
    found = live_loads(holds, loads)
    assert found.sum() == pytest.approx(loads.sum())
    least = max(
        sum(load for load, bit in zip(loads[0].tolist(), bits, strict=True) if bit & ~mask == 0) / mask.bit_count()
        for mask in range(1, 2**ranks)
    )
    assert found.max() == pytest.approx(least, rel=0.02, abs=0.05)
    assert found.max() <= rank_loads(holds, loads).max() * (1 + 1e-9) + 1e-9


def test_balancedness_is_the_mean_over_layers_of_mean_to_largest():
    assert balancedness(np.array([[2.0, 2.0], [1.0, 3.0]])) == pytest.approx((1 + 2 / 3) / 2)
    assert balancedness(np.array([[0.0, 0.0], [1.0, 3.0]])) == pytest.approx((1 + 2 / 3) / 2)
    assert balancedness(np.array([[10.0, 20.0]]), np.array([1000, 2000])) == pytest.approx(1.0)
