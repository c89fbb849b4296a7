"""The residents of all ranks after a step."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from epslots.placement.placement import default_homes
from epslots.planner.assignment import assign
from epslots.planner.evictions import plan_evictions
from epslots.planner.expert_passes import plan_passes
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.layer_state import LayerState
from tests.support.plan_strategies import Situation, situations


def window(holds_E: np.ndarray, quota: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The experts in random slots of a window: (slot_of_E, expert_Q)."""
    expert_Q = np.full(quota, -1)
    residents = np.flatnonzero(holds_E)
    expert_Q[random.permutation(quota)[: len(residents)]] = residents
    slot_of_E = np.full(len(holds_E), -1)
    slot_of_E[expert_Q[expert_Q >= 0]] = np.flatnonzero(expert_Q >= 0)
    return slot_of_E, expert_Q


@settings(max_examples=150)
@given(situations())
def test_every_rank_foresees_what_every_other_rank_does(situation: Situation):
    """Each rank, from its own slots, ends with just the residents that all ranks expect, by any plan."""
    found = assign(*situation.arguments)
    needed_RE = np.zeros_like(situation.holds_RE)
    needed_RE[:, found.experts_U] = found.computed_RU > 0
    spare_RE = situation.holds_RE & (situation.holds_RE.cumsum(0) > 1)
    change = plan_evictions(situation.holds_RE, needed_RE, situation.quota_R, situation.score_E, spare_RE)
    assert (change.after_RE.sum(1) <= situation.quota_R).all()
    random = np.random.default_rng(0)
    for rank, quota in enumerate(situation.quota_R.tolist()):
        slot_of_E, expert_Q = window(situation.holds_RE[rank], quota, random)
        counts_E, evicted_E = needed_RE[rank].astype(np.int64), change.evicted_RE[rank]
        passes = plan_passes(counts_E, slot_of_E, expert_Q, situation.score_E, evicted_E, slot_of_E < 0)
        computed: list[int] = []
        for number, expert_pass in enumerate(passes):
            assert expert_Q[expert_pass.fetch_slots].tolist() == expert_pass.evicted.tolist()
            gone = expert_pass.evicted[expert_pass.evicted >= 0]
            assert not set(gone) & set(np.flatnonzero(needed_RE[rank])) - set(computed), "given up before its turn"
            if len(passes) == 1:
                assert not needed_RE[rank, gone].any()
            expert_Q[expert_pass.fetch_slots] = expert_pass.fetch_experts
            assert expert_Q[expert_pass.slots].tolist() == expert_pass.experts.tolist(), number
            computed += expert_pass.experts.tolist()
        assert sorted(computed) == np.flatnonzero(needed_RE[rank]).tolist()
        assert sorted(expert_Q[expert_Q >= 0]) == np.flatnonzero(change.after_RE[rank]).tolist()
        assert set(np.flatnonzero(situation.holds_RE[rank] & ~change.after_RE[rank])) <= set(np.flatnonzero(evicted_E))


@settings(max_examples=60)
@given(situations())
def test_all_ranks_agree_and_slots_read_by_peers_stay(situation: Situation):
    layers = [
        LayerPlanner(rank, LayerState(situation.holds_RE.copy(), situation.quota_R, situation.home_E), situation.costs)
        for rank in range(len(situation.quota_R))
    ]
    plans = [layer.plan(situation.counts_RE, lambda: situation.score_E) for layer in layers]
    assert len({layer.state.digest for layer in layers}) == 1
    # Each copy that a rank expects is one that its source gives, in the same order.
    for source, plan in enumerate(plans):
        for target, wanting in enumerate(plans):
            assert (plan.copies is None) == (wanting.copies is None)
            if plan.copies is None or wanting.copies is None:
                continue
            given_experts = [e for r, e in plan.copies.sends if r == target]
            assert given_experts == [e for e, s in wanting.copies.sources.items() if s == source]
            assert not plan.evicted_E[given_experts].any()
    assert sum(int(p.computed_E.sum()) for p in plans) == int(situation.counts_RE.sum())
    for rank, plan in enumerate(plans):
        others = np.arange(len(plans)) != rank
        assert (plan.splits is None) == (plan.moved == 0)
        if plan.splits is not None:
            assert plan.sent == plan.splits.send_DO[others].sum()
            assert plan.received == plan.splits.receive_SC[others].sum()
        assert plan.moved == max(max(p.sent, p.received) for p in plans)


def test_spare_copies_go_first_then_the_lowest_score():
    holds = np.array([[True, True, True, False]])
    needed = np.array([[False, False, False, True]])
    score = np.array([1, 2, 3, 9])
    quota = np.array([3])
    assert plan_evictions(holds, needed, quota, score).evicted_RE.tolist() == [[True, False, False, False]]
    spare = np.array([[False, False, True, False]])
    assert plan_evictions(holds, needed, quota, score, spare).evicted_RE.tolist() == [[False, False, True, False]]


def test_homes_follow_slots_and_need_not_divide():
    assert default_homes(6, np.array([1, 1, 1]), 0).tolist() == [0, 0, 1, 1, 2, 2]
    assert np.bincount(default_homes(8, np.array([1, 3]), 0)).tolist() == [2, 6]
    homes = default_homes(3, np.full(7, 2), 4)
    assert len(set(homes.tolist())) == 3, "more ranks than experts: no rank twice"
    assert homes.tolist() != default_homes(3, np.full(7, 2), 5).tolist(), "other ranks in the next layer"


@settings(max_examples=60)
@given(situations())
def test_homes_that_fit_fill_no_rank_beyond_its_slots(situation: Situation):
    experts = len(situation.score_E)
    homes = default_homes(experts, situation.quota_R, 3)
    share = np.bincount(homes, minlength=len(situation.quota_R))
    total = int(situation.quota_R.sum())
    assert (np.abs(share - situation.quota_R * experts / total) < 1 + 1e-9).all()
    if total >= experts:
        assert (share <= situation.quota_R).all()
