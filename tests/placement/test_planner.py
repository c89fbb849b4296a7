"""The planner: level loads in few moves, sound placements, and nothing that doesn't pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.bench.eplb import copies_held, eplb
from epslots.errors import ConfigError
from epslots.placement.balance import balancedness, holders, rank_loads
from epslots.placement.forecast import ExpectedLoad, Forecast
from epslots.placement.from_scratch import copies_by_load, place_afresh, slots_of
from epslots.placement.local_search import Objective, Search, spread_factor
from epslots.placement.oversubscribed import expert_times, rank_times
from epslots.placement.placement import Placement, default_placement
from epslots.placement.planner import RankHardware, propose, renumber
from epslots.planner.cost_model import Costs

GOLDEN = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])
ZIPF = {
    "58,256": (58, 256, 288, 32),
    "58,256,64": (58, 256, 320, 64),
    "94,128": (94, 128, 160, 16),
    "60,384": (60, 384, 448, 64),
}


def costs(copy_ns: int = 1) -> Costs:
    return Costs(copy_ns, copy_ns, 1, 1000, 1, 1, 1)


def hardware(ranks: int, nodes: int = 1, copy_ns: int = 1, speeds: list[int] | None = None) -> RankHardware:
    return RankHardware(np.arange(ranks) * nodes // ranks, np.array(speeds or [1000] * ranks), costs(copy_ns))


def certain(tokens_LE: np.ndarray, scale: int = 10**6) -> ExpectedLoad:
    """So much traffic that noise is nothing."""
    tokens = tokens_LE * scale
    return ExpectedLoad(tokens, np.minimum(tokens, 100), 100, 1.0, 8.0)


def start(experts: list[int], ranks: int, slots: int) -> Placement:
    return default_placement(experts, np.full((len(experts), ranks), slots))


def largest(placement: Placement, tokens_LE: np.ndarray) -> float:
    return float(rank_loads(holders(placement), tokens_LE).max())


def test_the_golden_loads():
    """EPLB gives 232, FlashLB 205, the optimum with equal split is 196.7."""
    found = propose(start([8], 8, 2), certain(GOLDEN), hardware(8))
    assert not found.keep and found.placement.version == 1
    assert largest(found.placement, GOLDEN) <= 200


@pytest.mark.parametrize("shape", ZIPF)
def test_zipf_loads_are_as_level_as_with_eplb_or_more(shape: str):
    layers, experts, slots, ranks = ZIPF[shape]
    random = np.random.default_rng(1)
    loads = np.stack([random.permutation(1e6 / np.arange(1, experts + 1)) for _ in range(layers)])
    held = place_afresh(loads, loads > 0, np.full((layers, ranks), slots // ranks), np.ones(ranks))
    assert (held.sum(2) == slots // ranks).all() and held.any(1).all()
    theirs = balancedness(rank_loads(copies_held(eplb(loads, ranks, slots // ranks), ranks, experts), loads))
    assert balancedness(rank_loads(held, loads)) >= theirs


@st.composite
def situations(draw: st.DrawFn) -> tuple[Placement, ExpectedLoad, RankHardware, bool]:
    layers, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    experts = draw(st.lists(st.integers(1, 12), min_size=layers, max_size=layers))
    widest = max(experts)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    quota = np.minimum(random.integers(1, draw(st.integers(1, 8)) + 1, (layers, ranks)), np.array(experts)[:, None])
    placement = default_placement(experts, quota)
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))
    tokens = np.rint(np.exp(skew * random.standard_normal((layers, widest))) * draw(st.sampled_from([0, 3, 1000]))).astype(
        np.int64
    )
    speeds = random.integers(500, 2000, ranks).tolist() if draw(st.booleans()) else None
    machines = hardware(ranks, draw(st.integers(1, ranks)), draw(st.sampled_from([1, 10**5, 10**9])), speeds)
    sample = random.dirichlet(np.ones(widest), (4, layers)) if draw(st.booleans()) else None
    expected = ExpectedLoad(tokens, np.minimum(tokens, 50), 50, 0.8, 4.0, sample, None if sample is None else np.full(4, 0.25))
    return placement, expected, machines, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(situations())
def test_placements_are_sound_and_what_is_proposed_pays(situation: tuple[Placement, ExpectedLoad, RankHardware, bool]):
    current, expected, machines, flat = situation
    for _ in range(2):
        found = propose(current, expected, machines, flat=flat)
        found.placement.check()
        if found.keep:
            assert found.placement is current and found.copies == found.gain_ns == found.migration_ns == 0
        else:
            assert found.placement.version == current.version + 1
            assert found.gain_ns > found.migration_ns == found.copies * machines.costs.peer_fetch
            added = found.placement.wanted_LRE & ~holders(current)
            assert found.copies >= added.sum()  # more, where slots of a home are too few for all that call it home
            own = np.arange(current.home_LE.shape[1]) < current.num_experts_L[:, None]
            assert (holders(found.placement).any(1) == own).all()
        current = found.placement


def test_layers_of_different_sizes_and_ranks_of_different_slots():
    quota = np.array([[2, 5, 3], [4, 3, 4]])
    loads = np.array([[50, 10, 10, 10, 5, 5, 5], [30, 10, 10, 10, 10, 0, 0]])
    found = propose(default_placement([7, 5], quota), certain(loads), hardware(3)).placement
    assert (found.wanted_LRE.sum(2) <= quota).all()
    assert balancedness(rank_loads(holders(found), loads)) > 0.93


def test_faster_ranks_do_more():
    loads = np.full((2, 24), 100)
    machines = hardware(4, speeds=[2000, 1000, 1000, 1000])
    found = propose(start([24, 24], 4, 12), certain(loads), machines)
    share = rank_loads(holders(found.placement), loads)
    assert balancedness(share, machines.speed_R) > 0.97
    assert share[:, 0] == pytest.approx([2 * 2400 / 5] * 2, rel=0.06)


def test_copies_lie_on_different_nodes_and_nodes_are_level():
    random = np.random.default_rng(0)
    loads = random.integers(10, 1000, (8, 24))

    def apart(**settings: bool) -> float:
        """The share of replicated experts that are on both nodes; and how equally nodes are loaded."""
        held = holders(propose(start([24] * 8, 8, 4), certain(loads, 1), hardware(8, nodes=2), **settings).placement)
        by_node = held.reshape(8, 2, 4, 24).sum(2)
        node_loads = rank_loads(held, loads).reshape(8, 2, 4).sum(2)
        assert (node_loads.max(1) / node_loads.mean(1)).max() < 1.05
        return float((by_node > 0).all(1)[by_node.sum(1) > 1].mean())

    assert apart() > 0.7
    assert apart() > apart(flat=True) + 0.1


def test_nothing_is_moved_when_it_does_not_pay():
    random = np.random.default_rng(0)
    loads = random.integers(50, 150, (3, 16))
    first = propose(start([16] * 3, 4, 5), certain(loads), hardware(4)).placement
    again = propose(first, certain(loads), hardware(4))
    assert again.keep and again.placement is first
    dear = propose(start([16] * 3, 4, 5), certain(loads), hardware(4, copy_ns=2**39))
    assert dear.keep


def test_one_hot_expert_moves_few_copies():
    """A level placement, then one expert gets hotter: the answer is a few copies, not another placement."""
    random = np.random.default_rng(0)
    loads = random.integers(80, 120, (4, 64))
    first = propose(start([64] * 4, 8, 9), certain(loads), hardware(8)).placement
    hotter = loads.copy()
    hotter[:, 7] *= 8
    worth = 800 * 10**6 * 1000 // 5  # a copy costs a fifth of a rank's load
    found = propose(first, certain(hotter), hardware(8, copy_ns=worth))
    assert not found.keep and found.copies <= 4 * 8
    before = balancedness(rank_loads(holders(first), hotter))
    after = balancedness(rank_loads(holders(found.placement), hotter))
    assert after > 0.93 > before
    assert found.balance_then == pytest.approx(after) and found.balance_now == pytest.approx(before)


def test_experts_that_rise_together_are_kept_apart():
    """Two topics, each with experts of its own, all alike on average: only the sample tells which don't belong on one rank."""
    shares = np.full((2, 1, 16), 1.0)
    shares[0, 0, :8] = 3.0
    shares[1, 0, 8:] = 3.0
    shares /= shares.sum(2, keepdims=True)
    mean = np.full((1, 16), 10**6)
    expected = ExpectedLoad(mean, np.full((1, 16), 100), 100, 1.0, 8.0, shares, np.array([0.5, 0.5]))
    found = propose(start([16], 4, 4), expected, hardware(4)).placement
    by_topic = holders(found)[0][:, :8].sum(1)
    assert by_topic.tolist() == [2, 2, 2, 2]
    assert found.version == 1


def test_with_few_slots_homes_level_misses_and_hot_experts_stay():
    loads = np.array([[400] + [100] * 3 + [40] * 12])  # by compute alone the first's home would get less of the others
    uses = np.array([[50] * 4 + [20] * 12])
    dear = Costs(10**5, 10**5, 1, 1000, 1, 1, 1)
    expected = ExpectedLoad(loads, uses, 50, 1.0, 8.0)
    current = replace(start([16], 4, 3), home_LE=np.array([[0] * 8 + [1] * 4 + [2] * 2 + [3] * 2]))
    machines = RankHardware(np.zeros(4, np.int64), np.full(4, 1000), dear)
    found = current
    for _ in range(4):
        found = propose(found, expected, machines).placement
    own = np.ones((1, 16), bool)
    times = expert_times(loads, uses, 50, dear)
    before, after = (rank_times(p.home_LE, own, times, np.ones(4)) for p in (current, found))
    assert balancedness(before) < 0.75 and balancedness(after) > 0.9
    assert np.bincount(found.home_LE[0, 4:]).tolist() == [3, 3, 3, 3]
    assert (found.wanted_LRE[0].sum(1) <= 2).all() and found.wanted_LRE[0, :, 4:].sum() == 0
    assert found.wanted_LRE[0, :, :4].any(0).sum() >= 3


def test_slots_that_change_are_followed():
    loads = np.random.default_rng(0).integers(50, 150, (2, 12))
    first = propose(start([12, 12], 3, 6), certain(loads), hardware(3)).placement
    smaller = np.full((2, 3), 4)
    found = propose(first, certain(loads), hardware(3), smaller)
    assert not found.keep and np.array_equal(found.placement.quota_LR, smaller)
    assert (holders(found.placement).sum(2) <= 4).all() and holders(found.placement).any(1).all()


def test_what_does_not_fit_together_is_refused():
    current = start([8], 4, 3)
    with pytest.raises(ConfigError, match=r"\[\[1, 7\], \[1, 7\]"):
        propose(current, certain(GOLDEN[:, :7]), hardware(4))
    with pytest.raises(ConfigError, match="allowed for this placement"):
        propose(current, certain(GOLDEN), hardware(5))
    with pytest.raises(ConfigError, match="1000 = usual"):
        propose(current, certain(GOLDEN), hardware(4, speeds=[1, 1, 0, 1]))


def test_a_forecast_of_still_traffic_soon_ends_in_keeping():
    random, forecast = np.random.default_rng(0), Forecast()
    chances = random.dirichlet(np.ones(32), 3)
    current, kept, moved = start([32] * 3, 4, 9), [], []
    machines = hardware(4, copy_ns=10**6)
    for _ in range(24):
        window = random.multinomial(50_000, chances)
        forecast.add(window, np.minimum(window, 100), 100)
        found = propose(current, forecast.expected(), machines)
        current = found.placement
        kept.append(found.keep)
        moved.append(found.copies)
    assert sum(kept[12:]) >= 6 and sum(moved[12:]) <= 3 * 36 // 20
    assert balancedness(rank_loads(holders(current), chances)) > 0.95


# The parts.


def test_every_change_of_the_sum_is_what_it_is_computed_to_be():
    """After any number of swaps and replacements, the sums brought up to date equal those worked out anew."""
    random = np.random.default_rng(0)
    layers, ranks, experts, room = 3, 6, 20, 5
    sample = random.dirichlet(np.ones(experts), (9, layers)) * ranks
    moments = np.einsum("kle,klf->lef", sample, sample) / 9
    field = Objective(moments, np.array([1.5, 1, 1, 1, 1, 0.5]), np.array([0, 0, 0, 1, 1, 1]), 0.7)
    held = holders(default_placement([experts] * layers, np.full((layers, ranks), room)))
    search = Search(
        slots_of(held, room), np.repeat(np.arange(ranks), room), np.ones((layers, ranks * room), bool), field, held
    )
    first = search.excess()
    moves = search.improve(np.zeros(layers), 50, 2)
    found = search.holds_LRE[:, :, :experts]
    shares = found / found.sum(1, keepdims=True)
    loads = shares @ moments @ shares.swapaxes(1, 2)
    by_rank = (np.diagonal(loads, axis1=1, axis2=2) / field.speed_R).sum(1)
    nodes = loads.reshape(layers, 2, 3, 2, 3).sum((2, 4))
    by_node = np.diagonal(nodes, axis1=1, axis2=2) / np.array([3.5, 2.5])
    total = by_rank + 0.7 * by_node.sum(1)
    level = spread_factor(ranks) * np.sqrt((total - 1.7 * ranks) / ranks)
    assert (moves > 5).all() and (search.excess() < 0.7 * first).all()
    assert search.excess() == pytest.approx(level)
    assert (found.sum(2) <= room).all() and found.any(1).all()
    lying = np.sort(search.expert_LS.reshape(layers, ranks, room), axis=2)
    assert np.array_equal(lying, np.sort(slots_of(found, room).reshape(layers, ranks, room), axis=2))


def test_the_best_move_is_found():
    """Of all swaps and replacements that a small case allows, tried one by one, the search makes the best."""
    random = np.random.default_rng(3)
    ranks, experts, room = 3, 5, 3
    for _ in range(20):
        load = random.integers(1, 50, experts) / 10.0
        load *= ranks / load.sum()
        moments = np.outer(load, load)[None]
        held = holders(default_placement([experts], np.full((1, ranks), room)))
        field = Objective(moments, np.ones(ranks), np.zeros(ranks, np.int64))
        search = Search(slots_of(held, room), np.repeat(np.arange(ranks), room), np.ones((1, ranks * room), bool), field, held)
        search.improve(np.zeros(1), 1, ranks)
        best = min(squares(table, load) for table in neighbours(held[0], room))
        assert squares(search.holds_LRE[0, :, :experts], load) == pytest.approx(min(best, squares(held[0], load)))


def squares(held: np.ndarray, load: np.ndarray) -> float:
    return float(((held @ (load / held.sum(0))) ** 2).sum())


def neighbours(held: np.ndarray, room: int) -> list[np.ndarray]:
    """Placements one move away."""
    found = []
    for rank in range(len(held)):
        for new in np.flatnonzero(~held[rank]).tolist():
            gone = [*np.flatnonzero(held[rank] & (held.sum(0) > 1)).tolist(), *([-1] if held[rank].sum() < room else [])]
            for old in gone:  # put it in the place of a copy that has others, or in a free slot
                table = held.copy()
                table[rank, new] = True
                if old >= 0:
                    table[rank, old] = False
                found.append(table)
            for other in np.flatnonzero(held[:, new]).tolist():  # swap it for one of the other rank's
                mine = [*np.flatnonzero(held[rank] & ~held[other]).tolist(), *([-1] if held[rank].sum() < room else [])]
                for old in mine:
                    table = held.copy()
                    table[rank, new], table[other, new] = True, False
                    if old >= 0:
                        table[rank, old], table[other, old] = False, True
                    found.append(table)
    return found


def test_copies_go_where_load_per_copy_is_largest():
    load = np.array([[90.0, 50.0, 10.0, 0.0]])
    own = np.array([[True, True, True, True]])
    assert copies_by_load(load, own, np.array([7]), np.array([9])).tolist() == [[3, 2, 1, 1]]
    assert copies_by_load(load, own, np.array([9]), np.array([2])).tolist() == [[2, 2, 2, 2]]


def test_ranks_are_renumbered_so_that_copies_stay():
    random = np.random.default_rng(0)
    held = random.random((2, 5, 30)) < 0.2
    order = np.array([3, 1, 4, 0, 2])
    quota = np.full((2, 5), 30)
    assert np.array_equal(renumber(held[:, order], held, quota, np.ones(5)), held)
    speeds = np.array([1.0, 1, 1, 1, 2])
    kept = renumber(held[:, order], held, quota, speeds)
    assert np.array_equal(kept[:, 4], held[:, order][:, 4])  # the fast rank has no other to trade places with


def test_the_spread_of_normal_numbers():
    random = np.random.default_rng(0)
    for ranks in (2, 8, 64):
        assert spread_factor(ranks) == pytest.approx(random.standard_normal((20_000, ranks)).max(1).mean(), rel=0.05)
    assert spread_factor(1) == 0.0
