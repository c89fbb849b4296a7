"""The plan of one step over all ranks: every pair once, sources that hold, never dearer than the simplest plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from epslots.planner.assignment import Assign, assign, own_only
from epslots.planner.assignment_candidates import place_misses
from epslots.planner.assignment_kernels import HOME, WORTHWHILE
from epslots.planner.cost_model import Costs, gathers, layer_time, layer_times
from tests.support.plan_strategies import COSTS, Situation, holds, situations

home_only = Assign(HOME)  # the simplest plan: tokens go home, home fetches


def layer_cost(costs: Costs, *arrays: np.ndarray) -> int:
    """The cost by which plans are compared: the step's time, and the mean rank's fetches."""
    return sum(layer_times(*(np.ascontiguousarray(array, np.int64) for array in arrays), astuple(costs)[:6]))


@settings(max_examples=60)
@given(situations(), st.booleans())
def test_a_plan_computes_every_pair_once_and_keeps_its_word(situation: Situation, pays: bool):
    found = assign(*situation.arguments, *([situation.remote_ns_RE] if pays else []))
    counts_RU = situation.counts_RE[:, found.experts_U]
    assert found.experts_U.tolist() == np.flatnonzero(situation.counts_RE.any(0)).tolist()
    assert (found.computed_RU >= 0).all()
    assert found.computed_RU.sum(0).tolist() == counts_RU.sum(0).tolist()
    # A rank that computes an expert holds it or fetches it, once.
    missing = (found.computed_RU > 0) & ~situation.holds_RE[:, found.experts_U]
    fetches = list(zip(found.fetch_ranks.tolist(), found.fetch_experts.tolist(), strict=True))
    columns = {e: u for u, e in enumerate(found.experts_U.tolist())}
    assert sorted((r, columns[e]) for r, e in fetches) == [tuple(x) for x in np.argwhere(missing).tolist()]
    assert fetches == sorted(fetches)
    needed_R = (found.computed_RU > 0).sum(1)
    for (rank, expert), source in zip(fetches, found.fetch_sources.tolist(), strict=True):
        if source >= 0:
            assert source != rank and situation.holds_RE[source, expert]
            assert needed_R[rank] <= situation.quota_R[rank] and needed_R[source] <= situation.quota_R[source]
            gives_up = missing[source].any()
            assert found.computed_RU[source, columns[expert]] > 0 or not gives_up
    assert found.cost_ns == layer_cost(situation.costs, counts_RU, found.computed_RU, found.fetch_ranks, found.fetch_sources)


@settings(max_examples=150)
@given(situations())
def test_a_plan_is_never_dearer_than_the_simple_ones(situation: Situation):
    found = assign(*situation.arguments)
    assert found.cost_ns <= home_only(*situation.arguments).cost_ns
    assert found.cost_ns * (WORTHWHILE - 1) <= own_only(*situation.arguments).cost_ns * WORTHWHILE


@settings(max_examples=60)
@given(situations())
def test_copies_cost_no_more_than_was_paid_for_remote_work(situation: Situation):
    found = assign(*situation.arguments, situation.remote_ns_RE)
    paid = int(situation.remote_ns_RE[found.fetch_ranks, found.fetch_experts].sum())
    assert found.cost_ns - paid <= home_only(*situation.arguments).cost_ns


@pytest.mark.parametrize("pairs", [10**4, 10**6, 2 * 10**7])
@pytest.mark.parametrize("cost", [1, 10**3, 2**26 - 1])
def test_no_number_is_too_large(pairs: int, cost: int):
    """Replicated, hot and dear: sums and products stay whole."""
    costs = Costs(2**40 - 1, 2**39, cost, cost, 2**39, 2**39, 2**39)
    counts = np.array([[pairs, 3 * pairs], [pairs, 0], [7, pairs // 3]])
    table = holds(3, 2, (0, 0), (1, 0), (2, 0), (0, 1), (2, 1))
    found = assign(counts, table, np.full(3, 2), np.array([0, 1]), costs)
    assert (found.computed_RU >= 0).all() and found.computed_RU.sum(0).tolist() == counts.sum(0).tolist()
    assert found.cost_ns > 0


@given(situations())
def test_the_same_arguments_give_the_same_plan(situation: Situation):
    first, again = assign(*situation.arguments), assign(*(np.copy(a) for a in situation.arguments[:-1]), situation.costs)
    for name in ("experts_U", "computed_RU", "fetch_ranks", "fetch_experts", "fetch_sources"):
        assert getattr(first, name).tolist() == getattr(again, name).tolist()
        assert np.issubdtype(getattr(first, name).dtype, np.integer)


def test_one_rank_computes_everything():
    found = assign(np.array([[3, 0, 1]]), holds(1, 3, (0, 2)), np.array([2]), np.zeros(3, int), COSTS)
    assert found.computed_RU.tolist() == [[3, 1]]
    assert found.fetch_experts.tolist() == [0] and found.fetch_sources.tolist() == [-1]


def test_nobody_has_tokens():
    found = assign(np.zeros((2, 4), int), holds(2, 4), np.array([1, 1]), np.array([0, 0, 1, 1]), COSTS)
    assert not len(found.experts_U) and found.cost_ns == 0


def test_tokens_go_to_the_rank_that_holds():
    counts = np.array([[0, 4], [0, 0]])
    found = assign(counts, holds(2, 2, (1, 1)), np.array([1, 1]), np.array([0, 0]), COSTS)
    assert found.computed_RU.tolist() == [[0], [4]] and not len(found.fetch_ranks)


def test_an_expert_nobody_holds_is_fetched_at_home():
    found = assign(np.array([[0, 4], [0, 0]]), holds(2, 2), np.array([1, 1]), np.array([0, 1]), COSTS)
    assert (found.fetch_ranks.tolist(), found.fetch_experts.tolist()) == ([1], [1])


def test_replicas_share_their_tokens_and_own_tokens_stay():
    counts = np.array([[600], [200], [400]])
    found = assign(counts, holds(3, 1, (0, 0), (1, 0), (2, 0)), np.ones(3, int), np.zeros(1, int), COSTS)
    assert np.ptp(found.computed_RU) <= COSTS.expert_compute / COSTS.pair_compute
    few = np.array([[3], [1], [0]])
    found = assign(few, holds(3, 1, (0, 0), (1, 0)), np.ones(3, int), np.zeros(1, int), COSTS)
    assert found.computed_RU.tolist() == few.tolist(), "all stays: an equal split would save too little"


def test_a_swamped_rank_sheds_to_one_that_copies_from_it():
    """Expert 0 is hot and rank 0 alone holds it; rank 2 is idle and has an empty slot."""
    counts = np.array([[4000, 10], [4000, 10], [4000, 10]])
    table = holds(3, 2, (0, 0), (1, 1))
    found = assign(counts, table, np.array([1, 1, 1]), np.array([0, 1]), COSTS)
    assert set(zip(found.fetch_ranks.tolist(), found.fetch_sources.tolist(), strict=True)) == {(2, 0)}
    assert found.fetch_experts.tolist() == [0]
    assert 4000 <= found.computed_RU[2, 0] <= 8000
    assert found.cost_ns < 0.7 * home_only(counts, table, np.array([1, 1, 1]), np.array([0, 1]), COSTS).cost_ns


def test_a_large_batch_brings_a_copy_to_its_tokens():
    """Sending 30,000 pairs there and back costs 6 ms, a copy from the peer 0.2 ms."""
    found = assign(np.array([[30_000], [0]]), holds(2, 1, (1, 0)), np.ones(2, int), np.array([1]), COSTS)
    assert found.computed_RU[0, 0] > 10_000
    assert (found.fetch_ranks.tolist(), found.fetch_sources.tolist()) == ([0], [1])


def test_a_copy_comes_when_remote_work_cost_as_much():
    """Rank 0 sends one pair a step to rank 1 for an expert: alone not worth a copy, but it adds up."""
    counts, quota, home = np.array([[1, 0], [0, 0]]), np.array([1, 2]), np.array([1, 1])
    remote_ns_RE = np.array([[3 * COSTS.peer_fetch, 0], [0, 0]])
    idle = holds(2, 2, (1, 0), (1, 1))
    assert not len(assign(counts, idle, quota, home, COSTS, remote_ns_RE // 4).fetch_ranks)
    found = assign(counts, idle, quota, home, COSTS, remote_ns_RE)
    assert (found.fetch_ranks.tolist(), found.fetch_experts.tolist(), found.fetch_sources.tolist()) == ([0], [0], [1])
    # The only copy of another expert isn't given up for it.
    assert not len(assign(counts, holds(2, 2, (1, 0), (0, 1)), quota, home, COSTS, remote_ns_RE).fetch_ranks)


@pytest.mark.parametrize(("host", "peer", "source"), [(2_000_000, 200_000, 1), (200_000, 2_000_000, -1)])
def test_a_copy_comes_from_where_it_is_cheaper(host: int, peer: int, source: int):
    costs = Costs(host, peer, 100, 500, 10_000, 20_000, 15_000)
    found = assign(np.array([[30_000], [0]]), holds(2, 1, (1, 0)), np.ones(2, int), np.array([1]), costs)
    assert found.fetch_sources.tolist() == [source]


def test_misses_spread_when_home_has_too_many():
    place = place_misses(
        np.array([5, 9, 1, 1]), np.zeros(4, int), np.zeros(4, int), np.full(4, 8), np.zeros(4, int), fetch_ns=100
    )
    assert sorted(place.tolist()) == [0, 1, 2, 3]
    assert place[1] == 0, "the one with most tokens chooses first"


def test_empty_slots_are_filled_before_anything_is_given_up():
    place = place_misses(np.array([1, 1]), np.array([0, 0]), np.array([0, 2]), np.array([4, 4]), np.zeros(2, int), 100)
    assert place.tolist() == [1, 0], "one at the empty slots, and no rank more than its share"


def test_a_busy_rank_fetches_only_when_the_others_are_taken():
    load = np.array([10_000, 0])
    place = place_misses(np.array([1]), np.array([0]), np.array([1, 1]), np.array([1, 1]), load, fetch_ns=100)
    assert place.tolist() == [1]


def test_a_layer_takes_its_slowest_rank_and_slowest_exchange():
    """Rank 0 hands 5 pairs on to rank 1, which copies an expert from it, and fetches one from the host."""
    costs = Costs(host_fetch=1000, peer_fetch=100, pair_transfer=7, pair_compute=3, expert_compute=20, exchange=50, gather=1)
    counts, computed = np.array([[6, 0], [1, 4]]), np.array([[1, 0], [6, 4]])
    fetches = np.array([1, 1]), np.array([0, -1])
    busy = max(100 + 1 * 3 + 20, 100 + 1000 + 10 * 3 + 2 * 20)
    assert layer_time(costs, counts, computed, *fetches) == busy + 2 * (5 * 7 + 50)
    assert layer_cost(costs, counts, computed, *fetches) == busy + 2 * (5 * 7 + 50) + (3 * 100 + 1000 - 100) // 2
    assert layer_time(costs, counts, counts, np.zeros(0, int), np.zeros(0, int)) == max(6 * 3 + 20, 5 * 3 + 2 * 20)


def test_small_exchanges_gather_and_large_ones_do_not():
    assert gathers(COSTS, most_tokens=1, moved=4, ranks=2, top_k=4)
    assert not gathers(COSTS, most_tokens=4096, moved=8192, ranks=8, top_k=8)


@pytest.mark.parametrize("wrong", [0, -5, 2**50, 1.5, None])
def test_costs_are_positive_integers(wrong: object):
    with pytest.raises(ValueError, match="host_fetch="):
        Costs(wrong, 1, 1, 1, 1, 1, 1)  # type: ignore[arg-type]
