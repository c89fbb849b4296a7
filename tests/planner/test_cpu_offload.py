"""Which misses the host's CPU computes: cheaper than fetching, until that has cost as much; as long as a concurrent link."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import HALVING_STEPS, CpuShare, computed_on_cpu, displaces_better

FETCH = 1000


def costs(host_expert: int = 300, host_pair: int = 10, **others: int) -> Costs:
    given = {"peer_fetch": 1, "pair_transfer": 1, "pair_compute": 1, "expert_compute": 1, "exchange": 1, "gather": 1} | others
    return Costs(host_fetch=FETCH, host_expert=host_expert, host_pair=host_pair, **given)


def served(
    cost: Costs, pairs: list[int], *, ranks: list[int] | None = None, concurrent: bool = False, **arrays: list
) -> list[bool]:
    count = len(pairs)
    return computed_on_cpu(
        cost,
        np.array([0] * count if ranks is None else ranks, np.int64),
        np.array(pairs, np.int64),
        np.array(arrays.get("paid", [0] * count), np.int64),
        np.array(arrays.get("displaces", [False] * count), bool),
        concurrent=concurrent,
    ).tolist()


def test_few_tokens_are_moved_and_many_are_not():
    # 300 + 10 n on the host, 1 + n on the device: less than a fetch dearer while n < 78
    assert served(costs(), [1, 77, 78, 500]) == [True, True, False, False]


@pytest.mark.parametrize("concurrent", [False, True])
def test_nothing_is_computed_on_the_cpu_without_its_cost(concurrent: bool):
    assert served(costs(0, 0), [1, 2], concurrent=concurrent) == [False, False]
    assert served(costs(), [], concurrent=concurrent) == []


def test_a_fetch_comes_when_cpu_work_cost_as_much_as_two():
    added = 300 + 10 - 2
    share = CpuShare(1, 4, costs(), concurrent=False)
    one = np.array([1])
    on_cpu = [bool(share.choose(step, one * 0, one, one, np.array([False]))[0]) for step in range(9)]
    times = (2 * FETCH - 1) // added
    assert on_cpu == [True] * times + [False] + [True] * (8 - times)
    assert share.cpu_ns_RE.tolist() == [[0, (8 - times) * added, 0, 0]]


def test_experts_the_policy_would_not_keep_are_not_fetched():
    assert served(costs(), [1, 1], paid=[10 * FETCH] * 2, displaces=[True, False]) == [True, False]
    assert served(costs(), [500], displaces=[True]) == [False], "unless it is the cheaper way"


def test_old_costs_are_forgotten():
    share = CpuShare(2, 3, costs(), concurrent=False)
    ranks, experts, pairs = np.array([0, 1]), np.array([2, 2]), np.array([1, 9])
    share.choose(1, ranks, experts, pairs, np.zeros(2, bool))
    first = share.cpu_ns_RE.copy()
    assert (first[:, 2] == [308, 300 + 90 - 10]).all() and first.sum() == 308 + 380
    none = np.zeros(0, np.int64)
    share.choose(HALVING_STEPS, none, none, none, np.zeros(0, bool))
    assert (share.cpu_ns_RE == first // 2).all()
    share.choose(10**9, none, none, none, np.zeros(0, bool))
    assert not share.cpu_ns_RE.any()


def brute_force(cost: Costs, pairs: list[int], may: list[bool]) -> int:
    """The least time of one rank's step over all ways to divide its misses."""
    times = [cost.host_expert + n * cost.host_pair for n in pairs]
    ways = itertools.product(*[(False, True) if m else (False,) for m in may])
    return min(max(sum(t for t, h in zip(times, way, strict=True) if h), way.count(False) * FETCH) for way in ways)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200), st.booleans()), max_size=9),
    st.integers(1, 3000),
    st.integers(1, 40),
)
def test_beside_the_link_a_rank_is_done_as_soon_as_can_be(misses: list[tuple[int, int, bool]], expert: int, pair: int):
    """Against all divisions of each rank's misses, where nothing paid forces a fetch; and never worse than fetching all."""
    cost = costs(expert, pair)
    ranks, pairs, ripe = ([m[i] for m in misses] for i in range(3))
    paid = [10 * FETCH if r else 0 for r in ripe]
    on_cpu = served(cost, pairs, ranks=ranks, paid=paid, concurrent=True)
    assert not any(h and r for h, r in zip(on_cpu, ripe, strict=True))
    for rank in range(3):
        mine = [i for i in range(len(misses)) if ranks[i] == rank]
        cpu = sum(expert + pairs[i] * pair for i in mine if on_cpu[i])
        link = FETCH * sum(not on_cpu[i] for i in mine)
        assert max(cpu, link) == brute_force(cost, [pairs[i] for i in mine], [not ripe[i] for i in mine])


def test_every_rank_decides_for_itself():
    alone = served(costs(), [1, 60, 200], concurrent=True)
    both = served(costs(), [1, 200, 60, 200, 1, 60], ranks=[0, 1, 1, 0, 1, 0], concurrent=True)
    assert [both[i] for i in (0, 5, 3)] == [both[i] for i in (4, 2, 1)] == alone


def test_the_candidate_for_eviction_is_the_least_unneeded():
    holds = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0]], bool)
    needed = np.array([[1, 0, 0, 1, 1], [0, 0, 0, 1, 0], [1, 1, 0, 1, 0]], bool)
    quota, score = np.array([3, 3, 2]), np.array([1, 20, 30, 10, 25])
    ranks, experts = np.array([0, 0, 1, 2]), np.array([3, 4, 3, 3])
    # Rank 0 would give up expert 1 (20), as 0 is needed; rank 1 has room; rank 2 has nothing that could go.
    assert displaces_better(holds, needed, quota, score, ranks, experts).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("expert", "pair"), [(1, 0), (0, 1), (-1, 1), (1, 2**26), (2**40, 1)])
def test_costs_of_the_host_are_told_together_and_in_range(expert: int, pair: int):
    with pytest.raises(ValueError, match="allowed"):
        costs(expert, pair)
