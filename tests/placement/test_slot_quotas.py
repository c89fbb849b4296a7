"""Slots are dealt where they save most, and every sum is exact."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.placement import slot_quotas
from epslots.placement.slot_quotas import convex_minorant, deal_quotas, improve_quotas, learn_quotas
from epslots.planner.reuse_distance import misses_by_slots


def expected_misses(histogram_LD: np.ndarray, num_experts_L: np.ndarray, quota_L: np.ndarray) -> float:
    """Misses per use of these layers with these slots, if the uses of the histogram come again."""
    misses = 0
    for histogram_D, experts, quota in zip(histogram_LD, num_experts_L.tolist(), quota_L.tolist(), strict=True):
        misses += int(misses_by_slots(histogram_D[: experts + 1])[min(quota, experts)])
    return misses / max(1, int(histogram_LD.sum()))


@pytest.fixture
def no_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_quotas, "PRIOR_USES", 0.0)


def random_histograms(seed: int, num_experts: list[int], falling: bool) -> np.ndarray:
    generator = np.random.default_rng(seed)
    histogram_LD = np.zeros((len(num_experts), max(num_experts) + 1), np.int64)
    for row, experts in zip(histogram_LD, num_experts, strict=True):
        row[:experts] = generator.poisson(generator.uniform(0, 40, experts))
        if falling:
            row[:experts] = np.sort(row[:experts])[::-1]
        row[experts] = generator.integers(5)
    return histogram_LD


@pytest.mark.usefixtures("no_prior")
@pytest.mark.parametrize("seed", range(20))
def test_no_other_quotas_miss_less_where_curves_are_convex(seed: int):
    experts_L = np.array([4, 6, 5])
    histogram_LD = random_histograms(seed, experts_L.tolist(), falling=True)
    for total in (3, 7, 10, 15):
        quota_L = learn_quotas(histogram_LD, experts_L, total)
        all_ways = [q for q in product(range(1, 5), range(1, 7), range(1, 6)) if sum(q) == total]
        best = min(expected_misses(histogram_LD, experts_L, np.array(q)) for q in all_ways)
        assert expected_misses(histogram_LD, experts_L, quota_L) == pytest.approx(best, abs=1e-12)
        assert quota_L.sum() == total


@pytest.mark.usefixtures("no_prior")
def test_a_cycle_gets_all_its_slots_or_few():
    # Layer 0 goes round seven experts; layer 1 gains a little from every slot.
    histogram_LD = np.array([[0, 0, 0, 0, 0, 0, 700, 0, 7], [20] * 8 + [8]])
    experts_L = np.array([8, 8])
    assert learn_quotas(histogram_LD, experts_L, 10).tolist() == [7, 3]
    by_slopes = [int(-np.diff(misses_by_slots(row))[1]) for row in histogram_LD]
    assert by_slopes[0] < by_slopes[1], "the next slot alone would have gone to the other layer"


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_the_minorant(values: list[int]):
    curve = np.array(values, float)
    minorant = convex_minorant(curve)
    assert (minorant <= curve + 1e-9).all()
    assert (np.diff(minorant, 2) >= -1e-9).all()
    # None is greater: a convex curve through any three of its points can't lie above the curve's own.
    for x in range(len(curve)):
        chords = [curve[a] + (curve[b] - curve[a]) * (x - a) / (b - a) for a in range(x) for b in range(x + 1, len(curve))]
        assert minorant[x] == pytest.approx(min([curve[x], *chords]), abs=1e-6)


def test_few_uses_are_read_in_the_light_of_all_layers(monkeypatch: pytest.MonkeyPatch):
    """Averaged over many draws, quotas learned from few uses miss less of what is to come."""
    experts_L, generator = np.array([32] * 8), np.random.default_rng(0)
    truth = np.exp(-np.arange(33) / 8 / np.exp(0.3 * generator.standard_normal((8, 1))))
    truth_LD = (1e6 * truth / truth.sum(1, keepdims=True)).astype(np.int64)
    draws = [generator.poisson(truth_LD / 1e4) for _ in range(20)]  # a hundred uses of each layer

    def missed() -> float:
        return sum(expected_misses(truth_LD, experts_L, learn_quotas(draw, experts_L, 64)) for draw in draws)

    with_prior = missed()
    monkeypatch.setattr(slot_quotas, "PRIOR_USES", 0.0)
    assert with_prior < 0.99 * missed()
    assert learn_quotas(np.zeros((8, 33), np.int64), experts_L, 64).tolist() == [8] * 8, "nothing seen: evenly"


@given(st.data())
def test_sums_and_bounds(data: st.DataObject):
    experts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    experts_L = np.array(experts)
    histogram_LD = random_histograms(data.draw(st.integers(0, 99)), experts, falling=False)
    total = data.draw(st.integers(len(experts), sum(experts)))
    quota_L = learn_quotas(histogram_LD, experts_L, total)
    assert quota_L.sum() == total and (quota_L >= 1).all() and (quota_L <= experts_L).all()
    least_L, most_L = (quota_L + 1) // 2, quota_L + [data.draw(st.integers(0, 20)) for _ in experts]
    better_L = improve_quotas(quota_L, histogram_LD, experts_L, least_L, most_L)
    assert better_L.sum() == total and (better_L >= least_L).all() and (better_L <= most_L).all()


def test_totals_that_can_not_be_dealt():
    for total in (1, 9):
        with pytest.raises(ConfigError, match="allowed: 2 to 8"):
            learn_quotas(np.zeros((2, 5), np.int64), np.array([4, 4]), total)
    with pytest.raises(ConfigError, match="must be equal"):
        deal_quotas(np.array([4, 4]), np.array([4, 3]), np.array([8, 8]))
    with pytest.raises(ConfigError, match="allowed: 2 to 16"):
        deal_quotas(np.array([4, 4]), np.array([7, 1]), np.array([8, 8]))


def test_slots_move_for_a_gain_that_is_no_chance():
    experts_L = np.array([16, 16])
    generator = np.random.default_rng(1)
    alike = np.append(np.arange(16)[::-1] * 4 + 20, 16)
    current_L, bounds = np.array([8, 8]), (np.ones(2, np.int64), experts_L)
    for _ in range(20):
        noisy = np.stack([generator.poisson(alike), generator.poisson(alike)])
        assert abs(improve_quotas(current_L, noisy, experts_L, *bounds) - current_L).max() <= 1
    unlike = np.stack([alike * 5, alike // 5])
    found = improve_quotas(current_L, unlike, experts_L, *bounds)
    assert found[0] > 12 and expected_misses(unlike, experts_L, found) < expected_misses(unlike, experts_L, current_L)


@given(st.data())
def test_dealing_to_ranks(data: st.DataObject):
    ranks, layers = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    experts_L = np.array([data.draw(st.integers(1, 9)) for _ in range(layers)])
    # Margins of some table within the bounds, so that there is a solution.
    table = np.array([[data.draw(st.integers(1, int(e))) for _ in range(ranks)] for e in experts_L])
    current_LR = None
    if data.draw(st.booleans()):
        current_LR = np.array([[data.draw(st.integers(1, int(e))) for _ in range(ranks)] for e in experts_L])
    dealt_LR = deal_quotas(table.sum(1), table.sum(0), experts_L, current_LR)
    assert (dealt_LR >= 1).all() and (dealt_LR <= experts_L[:, None]).all()
    assert dealt_LR.sum(0).tolist() == table.sum(0).tolist()
    assert dealt_LR.sum(1).tolist() == table.sum(1).tolist()


def test_dealing_is_even():
    dealt_LR = deal_quotas(np.array([17, 31, 16]), np.array([16, 16, 16, 16]), np.array([20, 20, 20]))
    assert (dealt_LR.max(1) - dealt_LR.min(1) <= 1).all()
    uneven_LR = deal_quotas(np.array([18, 30]), np.array([8, 16, 24]), np.array([20, 20]))
    assert uneven_LR.tolist() == [[3, 6, 9], [5, 10, 15]]


def test_dealing_anew_changes_little():
    experts_L, total_R = np.array([32] * 6), np.array([48] * 4)
    quota_L = np.array([32] * 6)
    current_LR = deal_quotas(quota_L, total_R, experts_L)
    changed_L = quota_L + np.array([3, -3, 0, 0, 5, -5])
    dealt_LR = deal_quotas(changed_L, total_R, experts_L, current_LR)
    assert dealt_LR.sum(1).tolist() == changed_L.tolist()
    assert abs(dealt_LR - current_LR).sum() == 16, "eight slots change their layer, each once"
    assert dealt_LR.sum(0).tolist() == total_R.tolist()


def test_a_slot_leaves_where_there_are_most():
    dealt_LR = deal_quotas(np.array([15, 17]), np.array([16, 16]), np.array([20, 20]), np.array([[7, 9], [9, 7]]))
    assert dealt_LR.tolist() == [[7, 8], [9, 8]]


def test_ranks_keep_their_memory_where_layers_lack_their_slots():
    # Layer 0 wants two slots on each rank, so layer 1 has too few for rank 0.
    dealt_LR = deal_quotas(np.array([4, 2]), np.array([4, 2]), np.array([2, 10]))
    assert dealt_LR.sum(0).tolist() == [4, 2]
    assert (dealt_LR >= 1).all() and dealt_LR[0].max() <= 2
