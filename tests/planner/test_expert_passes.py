"""The plan of one layer: every needed expert once, nothing needed given up early, within the window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.planner.evictions import plan_evictions
from epslots.planner.expert_passes import PAIRS_PER_READ, plan_passes


def tables(experts: int, residents: list[int], quota: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each expert, and the expert in each slot of a window that begins with ``start``."""
    slot_of_E, expert_Q = np.full(experts, -1), np.full(quota, -1)
    for place, expert in enumerate(residents):
        expert_Q[place] = expert
        if expert >= 0:
            slot_of_E[expert] = start + place
    return slot_of_E, expert_Q


def plan(counts: list[int], residents: list[int], quota: int, scores: list[int] | None = None):
    """Plan with ``residents`` in slots 0, 1, ... of a window of ``quota``; -1 leaves a slot empty."""
    slot_of_E, expert_Q = tables(len(counts), residents, quota)
    score_E = np.array(scores if scores is not None else [0] * len(counts), np.int64)
    needed_E = np.array(counts) > 0
    change = plan_evictions((slot_of_E >= 0)[None], needed_E[None], np.array([quota]), score_E)
    passes = plan_passes(np.array(counts), slot_of_E, expert_Q, score_E, change.evicted_RE[0], slot_of_E < 0)
    after_Q = expert_Q.copy()
    for expert_pass in passes:
        after_Q[expert_pass.fetch_slots] = expert_pass.fetch_experts
    assert sorted(after_Q[after_Q >= 0]) == np.flatnonzero(change.after_RE[0]).tolist(), "passes lead to what was decided"
    return passes, expert_Q


def test_nothing_needed_needs_no_pass():
    assert plan([0, 0, 0], [0], 2)[0] == ()


def test_hits_alone_are_one_pass_without_fetches():
    (expert_pass,), _ = plan([2, 0, 1, 0], [2, 0, 3], 3)
    assert expert_pass.experts.tolist() == [0, 2]
    assert expert_pass.slots.tolist() == [1, 0]
    assert len(expert_pass.fetch_experts) == 0


def test_empty_slots_go_first_then_the_lowest_score():
    (expert_pass,), _ = plan([1, 0, 0, 0, 1, 1], [1, 2, -1, 3], 4, scores=[9, 5, 2, 7, 9, 9])
    assert expert_pass.fetch_experts.tolist() == [0, 4, 5]
    assert expert_pass.fetch_slots.tolist() == [2, 1, 0]
    assert expert_pass.evicted.tolist() == [-1, 2, 1]


def test_one_slot_runs_one_expert_a_pass():
    passes, _ = plan([1, 2, 3], [2], 1)
    assert [w.experts.tolist() for w in passes] == [[2], [0], [1]]
    assert [w.evicted.tolist() for w in passes] == [[], [2], [0]]


def test_after_several_passes_the_highest_scores_are_resident():
    scores = [10, 1, 2, 3, 4, 5, 6, 99]
    passes, expert_Q = plan([1] * 8, [0, 1], 4, scores)
    for expert_pass in passes:
        expert_Q[expert_pass.fetch_slots] = expert_pass.fetch_experts
    assert {0, 7} <= set(expert_Q.tolist())
    assert 0 not in np.concatenate([w.evicted for w in passes]).tolist()


@st.composite
def situations(draw: st.DrawFn):
    experts = draw(st.integers(1, 24))
    quota = draw(st.integers(1, experts))
    counts = draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))
    residents = draw(st.permutations(range(experts)))[: draw(st.integers(0, quota))]
    holes = draw(st.permutations([*residents, *[-1] * (quota - len(residents))]))
    scores = draw(st.lists(st.integers(0, 5), min_size=experts, max_size=experts))
    return counts, list(holes), quota, scores


@given(situations())
def test_each_needed_expert_is_computed_once_and_kept_so_long(situation):
    counts, residents, quota, scores = situation
    passes, expert_Q = plan(counts, residents, quota, scores)
    needed = {e for e, count in enumerate(counts) if count}
    waiting = set(needed)
    for expert_pass in passes:
        assert expert_pass.evicted.tolist() == expert_Q[expert_pass.fetch_slots].tolist()
        # What is still to be computed may leave only if this very pass fetched it, which it can't.
        assert not waiting & (set(expert_pass.evicted.tolist()) - {-1})
        assert len(set(expert_pass.fetch_slots.tolist())) == len(expert_pass.fetch_slots)
        expert_Q[expert_pass.fetch_slots] = expert_pass.fetch_experts
        assert expert_Q[expert_pass.slots].tolist() == expert_pass.experts.tolist()
        assert set(expert_pass.experts.tolist()) <= waiting
        waiting -= set(expert_pass.experts.tolist())
    assert not waiting
    held = expert_Q[expert_Q >= 0]
    assert len(set(held.tolist())) == len(held)
    fetched = sum(len(w.fetch_experts) for w in passes)
    assert fetched == len(needed - set(residents)), "each miss is fetched once, and nothing else is"
    if len(needed) <= quota:
        assert len(passes) <= 1
    rotating = max(1, quota // 4)
    assert len(passes) <= 2 + fetched // rotating


@given(situations(), st.randoms())
def test_where_an_expert_happens_to_lie_decides_nothing(situation, random):
    """The same experts resident in other positions: the same are computed, fetched and given up, pass by pass."""
    counts, residents, quota, scores = situation
    first, _ = plan(counts, residents, quota, scores)
    again, _ = plan(counts, random.sample(residents, quota), quota, scores)
    for expert_pass, other in zip(first, again, strict=True):
        assert sorted(expert_pass.experts) == sorted(other.experts)
        assert expert_pass.fetch_experts.tolist() == other.fetch_experts.tolist()
        assert sorted(expert_pass.evicted) == sorted(other.evicted)


@given(situations(), st.data())
def test_over_a_link_residents_run_first_and_small_passes_join(situation, data):
    counts, residents, quota, scores = situation
    counts_E, score_E = np.array(counts), np.array(scores, np.int64)
    start = data.draw(st.integers(0, 9))
    slot_of_E, expert_Q = tables(len(counts), residents, quota, start)
    flags = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    needed = {e for e, count in enumerate(counts) if count}
    fits = len(needed) <= quota
    # Flagged residents are in flight; flagged missing experts are there at once.
    late_E = (slot_of_E < 0) ^ np.array(flags) if fits else (slot_of_E < 0) | np.array(flags)
    worth = data.draw(st.integers(0, 12))
    change = plan_evictions((slot_of_E >= 0)[None], (counts_E > 0)[None], np.array([quota]), score_E)
    evicted_E = change.evicted_RE[0]
    passes = plan_passes(counts_E, slot_of_E, expert_Q, score_E, evicted_E, late_E, start=start, concurrent=True, worth=worth)
    order = [e for expert_pass in passes for e in expert_pass.experts.tolist()]
    assert sorted(order) == sorted(needed)
    kind = {e: (3 if slot_of_E[e] < 0 and not (fits and flags[e]) else 1 if not flags[e] else 2) for e in needed}
    assert [kind[e] for e in order if kind[e] != 2] == sorted(kind[e] for e in order if kind[e] != 2)
    assert fits or all(len(w.fetch_experts) <= max(1, quota // 2) for w in passes[1:])
    computed = 0
    for number, expert_pass in enumerate(passes):
        # An evicted expert was computed in the passes that the fetch waits for, or isn't needed.
        assert expert_pass.evicted.tolist() == expert_Q[expert_pass.fetch_slots - start].tolist()
        before = {e for w in passes[: expert_pass.after] for e in w.experts.tolist()}
        assert all(e < 0 or e not in needed or e in before for e in expert_pass.evicted.tolist())
        expert_Q[expert_pass.fetch_slots - start] = expert_pass.fetch_experts
        assert expert_Q[expert_pass.slots - start].tolist() == expert_pass.experts.tolist()
        reads = sum(1 + counts[e] // PAIRS_PER_READ for e in expert_pass.experts.tolist())
        computed += reads
        assert not fits or len(passes) == 1 or reads >= worth, "a pass that isn't worth it is joined to another"
        assert fits is False or expert_pass.after == 0
        assert number < len(passes)


def test_misses_pass_through_in_order_of_rising_score():
    passes, _ = plan([1] * 6, [], 2, scores=[5, 1, 4, 0, 3, 2])
    assert [e for w in passes for e in w.fetch_experts.tolist()] == [3, 1, 5, 4, 2, 0]


@pytest.mark.parametrize("quota", [1, 3, 8, 31])
def test_frequent_experts_survive_a_pass_over_all(quota: int):
    """A long prompt needs every expert once; what decoding lives on must still be there after it."""
    experts = 32
    scores = list(range(experts))
    hot = list(range(experts - quota, experts))
    passes, expert_Q = plan([1] * experts, hot, quota, scores)
    for expert_pass in passes:
        expert_Q[expert_pass.fetch_slots] = expert_pass.fetch_experts
    kept = len(set(hot) & set(expert_Q.tolist()))
    assert kept >= quota - max(1, quota // 4)
