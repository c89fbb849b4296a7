"""Eviction policies are pure functions of past uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.planner.cache_policy import POLICIES, Policy, adaptive, learns, resolve_policy
from epslots.planner.evictions import plan_evictions
from epslots.planner.use_history import COMPARE_EVERY, SHIFTS, SNAPSHOT_EVERY, USE, UseHistory, note_use

STILL = len(SHIFTS)


def after(steps: Sequence[set[int]], experts: int = 4, slots: int | None = None) -> UseHistory:
    history = UseHistory.empty(1, experts).layer(0, experts)
    for number, used in enumerate(steps, start=1):
        note_use(history, np.array([e in used for e in range(experts)]), number, slots)
    return history


def order(policy: str, steps: list[set[int]]) -> list[int]:
    """Experts as the policy would evict them."""
    return np.argsort(POLICIES[policy](after(steps)), kind="stable").tolist()


def test_lru_gives_up_the_longest_unused():
    assert order("lru", [{0, 1}, {2}, {0}, {3}]) == [1, 2, 0, 3]


def test_lfu_keeps_the_often_used_over_the_recently_used():
    assert order("lfu", [{0}, {0}, {0}, {1}, {2}]) == [3, 1, 2, 0]


def test_lfu_forgets():
    steps = [{0}] * 20 + [{1}] * 400
    assert order("lfu", steps)[-1] == 1
    assert after([{0}] + [set()] * 3000).frequent[0] < USE // 100


def test_lrfu_lets_a_burst_overtake_old_use_before_lfu_does():
    steps = [{0}] * 30 + [set()] * 40 + [{1}] * 10
    assert order("lfu", steps)[-1] == 0
    assert order("lrfu", steps)[-1] == 1


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 3)), max_size=40), st.sampled_from([None, 1, 2, 3, 4]))
def test_histories_are_integers_that_stay_bounded(steps: list[set[int]], slots: int | None):
    history = after(steps, slots=slots)
    for row, shift in enumerate((*SHIFTS, SHIFTS[-1])):
        assert (history.decayed[row] >= 0).all() and (history.decayed[row] <= USE << shift + 1).all()
    assert (history.follows >= 0).all() and (history.follows <= 1 << 14).all()
    assert (history.weights >= 0).all() and 240 <= history.weights.sum() <= 256
    for policy in POLICIES.values():
        scores = policy(history)
        assert scores.dtype == np.int64
        assert (scores >= 0).all() and (scores < 1 << 62).all()


def test_scores_stay_within_bits_when_all_is_always_used():
    history = after([{0, 1, 2, 3}] * 4000 + [{0}] * 40, slots=1)
    assert (adaptive(history) >= 0).all() and (adaptive(history) < 1 << 62).all()
    assert adaptive(history).argmax() == 0


def drawn(shares: list[float], steps: int, seed: int = 0) -> list[set[int]]:
    """Steps of one expert each."""
    generator = np.random.default_rng(seed)
    return [{int(expert)} for expert in generator.choice(len(shares), steps, p=np.array(shares) / sum(shares))]


def test_weights_go_to_the_decay_rates_that_hit():
    steady = after(drawn([8, 8, 8, 4, 2, 2, 1, 1], 3000), 8, slots=3)
    assert steady.weights[SHIFTS.index(9) :].sum() > steady.weights[: SHIFTS.index(4)].sum()
    # Each expert for a while and then never again, as others are: what counts is what was just used.
    generator = np.random.default_rng(1)
    walk = [{(step // 40 + int(generator.integers(2))) % 16} for step in range(3000)]
    assert after(walk, 16, slots=3).weights[: SHIFTS.index(7)].sum() > 240


def test_experts_used_in_turn_keep_the_resident_ones():
    history = after([{step % 8} for step in range(SNAPSHOT_EVERY - 10)], 8, slots=4)
    assert history.weights.argmax() == STILL
    still = history.decayed[STILL].copy()
    for step in range(SNAPSHOT_EVERY - 9, SNAPSHOT_EVERY + 10):
        note_use(history, np.arange(8) == step % 8, step, 4)
        assert np.array_equal(history.decayed[STILL], still) == (step < SNAPSHOT_EVERY)


def test_what_follows_the_experts_just_used_is_kept():
    # 1 is used after 0, and 3 after 2; both as often. (4 to 7 make a step of one expert a small one.)
    generator = np.random.default_rng(0)
    steps = [{first + later} for first in (2 * generator.integers(2, size=200)).tolist() for later in (0, 1)]
    right: dict[int | None, int] = {None: 0, 2: 0}
    for now, other in ((0, 2), (2, 0)):
        for slots in right:
            scores = adaptive(after([*steps, {other}, {other + 1}, {now}], 8, slots))
            right[slots] += int(scores[now + 1] > max(scores[other], scores[other + 1]))
    assert right[2] == 2 and right[None] < 2, "without learning, it is the same expert both times"


def test_what_follows_nothing_is_not_believed():
    """Where each step is drawn apart, the last one tells nothing, and the policy learns that too."""
    history = after(drawn([1.0] * 16, 40 * COMPARE_EVERY), 16, slots=4)
    assert history.hits[-1] < 0
    scores = adaptive(history)
    history.follows[:] = 0
    assert np.array_equal(adaptive(history), scores)
    history.hits[-1] = 0
    history.follows[:, 5] = 1 << 12
    assert not np.array_equal(adaptive(history), scores)


def in_passes(popular: Callable[[int], list[float]], steps: int = 1500) -> UseHistory:
    """After steps of 4 of 16 experts, by shares that follow from the step's number, with 3 slots."""
    generator = np.random.default_rng(0)
    log_shares = np.log([popular(step) for step in range(steps)])
    order_TE = np.argsort(-log_shares - generator.gumbel(size=log_shares.shape))
    return after([set(chosen) for chosen in order_TE[:, :4].tolist()], 16, slots=3)


def test_in_passes_the_rows_are_weighed_as_well():
    steady = in_passes(lambda step: [1.5**-expert for expert in range(16)])
    moving = in_passes(lambda step: [1.5 ** -((expert - step // 10) % 16) for expert in range(16)])
    slow, fast = slice(SHIFTS.index(7), None), slice(0, SHIFTS.index(5) + 1)
    assert steady.hits[:-1].all() and moving.hits[:-1].all()
    assert steady.weights[slow].sum() > 200 > 50 > steady.weights[fast].sum()
    assert moving.weights[fast].sum() > 200 > 50 > moving.weights[slow].sum()


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 8), max_size=6), max_size=60), st.integers(1, 8))
def test_a_rows_cache_is_what_its_scores_would_make_of_one(steps: list[set[int]], slots: int):
    """And never more than the slots, where a step uses more than there are."""
    history = UseHistory.empty(1, 9).layer(0, 9)
    holds_DE = np.zeros((STILL + 1, 9), bool)
    hits = 0
    for number, used in enumerate(steps, start=1):
        used_E = np.isin(np.arange(9), list(used))
        hits += int((holds_DE[0] & used_E).sum()) << 9
        hits -= int(history.hits[0]) >> 9
        note_use(history, used_E, number, slots)
        assert history.hits[0] == hits
        if len(used) <= slots:
            for row in range(STILL + 1):
                score_E = (history.decayed[row] << 32) + history.last_use
                holds_DE[row] = plan_evictions(holds_DE[[row]], used_E[None].copy(), np.array([slots]), score_E).after_RE[0]
            assert np.array_equal(history.holds, holds_DE)
        else:
            assert (history.holds.sum(1) == slots).all() and not (history.holds & ~(holds_DE | used_E)).any()
            holds_DE = history.holds.copy()


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 7), max_size=3), max_size=60), st.integers(1, 8))
def test_a_row_of_more_layers_learns_what_a_single_one_does(steps: list[set[int]], slots: int):
    alone = after(steps, 8, slots)
    several = UseHistory.empty(3, 11)
    row = several.layer(1, 8)
    for number, used in enumerate(steps, start=1):
        note_use(row, np.array([e in used for e in range(8)]), number, slots)
    for field in fields(UseHistory):
        assert np.array_equal(getattr(row, field.name), getattr(alone, field.name)), field.name
    untouched, whole = UseHistory.empty(3, 11), several
    for layer in (0, 2):
        for field in fields(UseHistory):
            assert np.array_equal(getattr(whole, field.name)[layer], getattr(untouched, field.name)[layer])


def test_a_newcomer_goes_on_as_those_it_joins():
    steps = drawn([4, 3, 2, 1, 1, 1, 1, 1], 300)
    eldest, newcomer = after(steps, 8, slots=3), after(drawn([1] * 8, 50, seed=5), 8, slots=3)
    content = eldest.pack()
    for history in (eldest, newcomer):
        history.unpack(content)
    assert not eldest.follows.any()
    for number, used in enumerate(drawn([1] * 8, 200, seed=9), start=301):
        for history in (eldest, newcomer):
            note_use(history, np.array([e in used for e in range(8)]), number, 3)
        assert np.array_equal(adaptive(eldest), adaptive(newcomer))
    assert eldest.follows.any() and eldest.pack() == newcomer.pack() != content
    with pytest.raises(ConfigError, match=r"a history of 3 bytes; allowed for 8 experts: \d+"):
        newcomer.unpack(b"abc")


def test_only_policies_of_their_own_or_the_users_learn():
    assert not any(learns(POLICIES[name]) for name in ("lru", "lfu", "lrfu"))
    assert learns(adaptive) and learns(lambda history: history.last_use)


def test_a_policy_is_a_name_or_a_function():
    assert resolve_policy("lru") is POLICIES["lru"]
    mine = POLICIES["lfu"]
    assert resolve_policy(mine) is mine
    with pytest.raises(ConfigError, match="policy='fifo': allowed: lru, lfu, lrfu, adaptive, or a function"):
        resolve_policy("fifo")


def test_scores_stay_within_bits_over_prompts_and_single_tokens():
    """A step of many experts, whose followers are few, once promised these more than a use each."""
    generator = np.random.default_rng(1)
    history = UseHistory.empty(1, 256).layer(0, 256)
    step = 0
    for _ in range(12):
        for uses in (64, *[8] * 40):
            step += 1
            used_E = np.zeros(256, bool)
            used_E[generator.permutation(256 if uses == 64 else 12)[:uses]] = True
            note_use(history, used_E, step, 128)
            assert (POLICIES["adaptive"](history) >= 0).all()


@pytest.mark.parametrize(
    "policy",
    [lambda history: history.last_use * 1.0, lambda history: history.last_use[:2], lambda history: history.decayed[0, ::-1]],
)
def test_a_policy_of_ones_own_is_tried_before_it_is_used(policy: Policy):
    with pytest.raises(ConfigError, match="allowed: contiguous int64"):
        resolve_policy(policy)
