"""The next placement: replication and packing decided together, with few migrations, and only those that pay.

``propose`` improves the current placement move by move (``local_search.py``), as long as the time that a move saves while the
forecast holds exceeds the cost of its copies. A placement from scratch (``from_scratch.py``), with ranks renumbered so that
most copies stay, competes under the same prices. If neither pays, the placement is kept.

Layers whose experts all fit into the ranks' slots get a copy named for every slot; for others see ``oversubscribed.py``.
``replanner.py`` decides when to call ``propose``.

Pure. Legend of shape suffixes: L layers, R ranks, E experts of the largest layer, K windows, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.errors import ConfigError
from epslots.placement.balance import balancedness, holders, rank_loads
from epslots.placement.forecast import ExpectedLoad
from epslots.placement.from_scratch import holds_of, level, place_afresh, slots_of
from epslots.placement.local_search import Objective, Search
from epslots.placement.oversubscribed import expert_times, level_homes, rank_times, wanted_at_home
from epslots.placement.placement import Placement
from epslots.planner.cost_model import Costs

__all__ = ["ExpectedLoad", "Proposal", "RankHardware", "Reasons", "propose"]

NODE_WEIGHT = 0.5
# Without windows to learn from, the variance of an expert's load is taken as so many times that of independent choices.
OVERDISPERSION = 30.0
# The weight of that prior, in windows; and the factor by which the windows' covariances are shrunk.
PRIOR_WINDOWS = 2.0
SHRINKAGE = 0.3
_MOST_ENTRIES = 2**22  # entries of the tables of candidate moves, for the layers that are searched together
# The fewest windows in which a move must pay: copies outlive the forecast that they were made for.
LEAST_HORIZON = 4.0
# The least mean excess that a placement must save: less is within the noise of any forecast.
LEAST_GAIN = 0.0005
_FOCUS_ENTRIES = 2**15  # candidate moves evaluated at a time: more are slow, and hardly better
# More ranks than these are levelled for the mean load only: the search's time grows with the square of the ranks.
MOST_SEARCHED = 128
_SWAPS_OF_MANY = 16  # of each layer, with more ranks than MOST_SEARCHED
_MOST_MOVES = 48  # of each layer in one proposal


@dataclass(frozen=True)
class RankHardware:
    """The ranks' nodes, speeds and costs.

    Attributes:
        node_R: int64, the node of each rank.
        speed_R: int64, the compute speed of each rank, 1000 = usual.
        costs: nanoseconds of fetches and compute, the same for all ranks.
    """

    node_R: IntArray
    speed_R: IntArray
    costs: Costs


@dataclass(frozen=True)
class Reasons:
    """The numbers behind a proposal.

    Attributes:
        excess_now, excess_then: expected largest rank load / mean - 1, averaged over layers, uncertainty included.
        layers_changed: layers whose placement changes; 0 if the proposal moves nothing.
        horizon_windows: the windows in which moves have to pay: the forecast's, times its trust.
        price_ns: the cost of one copy.
    """

    excess_now: float
    excess_then: float
    layers_changed: int
    horizon_windows: float
    price_ns: int


@dataclass(frozen=True)
class Proposal:
    """A placement to follow from now on, or to keep.

    Attributes:
        placement: the next version; or the current placement itself.
        keep: whether the current placement stays.
        gain_ns: expected time saved over the horizon.
        migration_ns: the cost of the copies.
        copies: the number of copies to fetch.
        balance_now, balance_then: mean / largest rank load of the expected window, pairs split equally over copies.
        reasons: the numbers behind it.
    """

    placement: Placement
    keep: bool
    gain_ns: int
    migration_ns: int
    copies: int
    balance_now: float
    balance_then: float
    reasons: Reasons


def propose(
    current: Placement, expected: ExpectedLoad, hardware: RankHardware, quota_LR: IntArray | None = None, *, flat: bool = False
) -> Proposal:
    """The next placement, or the current one if no change pays.

    Args:
        current: the placement that is followed.
        expected: the load of the coming windows.
        hardware: of the ranks.
        quota_LR: slots from now on; the current ones, if not given.
        flat: whether to ignore nodes.

    Raises:
        ConfigError: shapes don't agree, or a speed is below 1.
    """
    quota_LR = current.quota_LR if quota_LR is None else quota_LR.astype(np.int64)
    _check(current, expected, hardware, quota_LR)
    task = _Task.of(current, expected, hardware, quota_LR, flat)
    home_LE, wanted_LRE, now_L, then_L = _plan_layers(task, current)
    copies = int((wanted_LRE & ~task.before_LRE).sum())
    gain_ns = int(((now_L - then_L) * task.mean_ns_L).sum() * task.horizon)
    changed_L = (wanted_LRE != current.wanted_LRE).any((1, 2)) | ((home_LE != current.home_LE) & task.own_LE).any(1)
    resized = bool((quota_LR != current.quota_LR).any())
    placement = Placement(current.version + 1, current.num_experts_L, home_LE, wanted_LRE, quota_LR)
    balance_now = balancedness(rank_loads(task.before_LRE, expected.tokens_LE), hardware.speed_R)
    pays = gain_ns > copies * task.price_ns and float((now_L - then_L).mean()) >= LEAST_GAIN
    if not (pays and changed_L.any()):
        reasons = Reasons(float(now_L.mean()), float(now_L.mean()), 0, task.horizon, task.price_ns)
        if not resized:
            return Proposal(current, True, 0, 0, 0, balance_now, balance_now, reasons)
        # Only the slots change: as many wanted copies stay as fit.
        fits_LRE = _within(current.wanted_LRE, quota_LR)
        homes_LE = _homes(current, task.home_LE.copy(), fits_LRE, task.before_LRE)
        placement = Placement(current.version + 1, current.num_experts_L, homes_LE, fits_LRE, quota_LR)
        placement.check()
        return Proposal(placement, False, 0, 0, 0, balance_now, balance_now, reasons)
    reasons = Reasons(float(now_L.mean()), float(then_L.mean()), int(changed_L.sum()), task.horizon, task.price_ns)
    placement.check()
    balance_then = balancedness(rank_loads(holders(placement), expected.tokens_LE), hardware.speed_R)
    return Proposal(placement, False, gain_ns, copies * task.price_ns, copies, balance_now, balance_then, reasons)


@dataclass(frozen=True)
class _Task:
    """The input of the layers' plans.

    Attributes:
        own_LE: bool, the experts that each layer has.
        home_LE: current homes, 0 beyond a layer's experts.
        before_LRE: copies that cost nothing: those wanted so far, or the home's.
        mean_ns_L: nanoseconds of the mean rank's compute in a window.
        price_ns: nanoseconds of one copy.
        horizon: windows in which a move must pay.
        has_wanted: whether the current placement wants any copy.
    """

    expected: ExpectedLoad
    hardware: RankHardware
    ranks: int
    own_LE: BoolArray
    home_LE: IntArray
    before_LRE: BoolArray
    quota_LR: IntArray
    speed_R: FloatArray
    node_R: IntArray
    mean_ns_L: FloatArray
    price_ns: int
    horizon: float
    has_wanted: bool

    @classmethod
    def of(cls, current: Placement, expected: ExpectedLoad, hardware: RankHardware, quota_LR: IntArray, flat: bool) -> _Task:
        own_LE = np.arange(current.home_LE.shape[1]) < current.num_experts_L[:, None]
        tokens_L = np.where(own_LE, expected.tokens_LE, 0).sum(1)
        return cls(
            expected=expected,
            hardware=hardware,
            ranks=current.ranks,
            own_LE=own_LE,
            home_LE=np.where(own_LE, current.home_LE, 0),
            before_LRE=_within(holders(current), quota_LR),
            quota_LR=quota_LR,
            speed_R=hardware.speed_R / hardware.speed_R.mean(),
            node_R=np.zeros_like(hardware.node_R) if flat else np.unique(hardware.node_R, return_inverse=True)[1],
            mean_ns_L=tokens_L * hardware.costs.pair_compute / current.ranks,
            price_ns=min(hardware.costs.host_fetch, hardware.costs.peer_fetch),
            horizon=max(expected.windows * expected.trust, LEAST_HORIZON),
            has_wanted=bool(current.wanted_LRE.any()),
        )

    def prices(self, layers: IntArray) -> FloatArray:
        """The excess that a copy must save in each of these layers."""
        prices: FloatArray = self.price_ns / (self.mean_ns_L[layers] * self.horizon)
        return prices


def _plan_layers(task: _Task, current: Placement) -> tuple[IntArray, BoolArray, FloatArray, FloatArray]:
    """Homes and wanted copies of all layers; and their excess before and after, [L]. Layers without load keep theirs."""
    home_LE, wanted_LRE = task.home_LE.copy(), current.wanted_LRE & task.before_LRE
    now_L, then_L = np.zeros(len(home_LE)), np.zeros(len(home_LE))
    fits_L, loaded_L = task.quota_LR.sum(1) >= current.num_experts_L, task.mean_ns_L > 0
    slots = int(task.quota_LR.max()) * task.ranks
    for layers in _batches(np.flatnonzero(fits_L & loaded_L), home_LE.shape[1], slots):
        wanted_LRE[layers], now_L[layers], then_L[layers] = _improve(task, layers)
    few = np.flatnonzero(~fits_L & loaded_L)
    if len(few):
        home_LE[few], wanted_LRE[few], now_L[few], then_L[few] = _plan_oversubscribed(task, few, wanted_LRE[few])
    return _homes(current, home_LE, wanted_LRE, task.before_LRE), wanted_LRE, now_L, then_L


def _check(current: Placement, expected: ExpectedLoad, hardware: RankHardware, quota_LR: IntArray) -> None:
    layers, ranks, experts = current.wanted_LRE.shape
    given = [list(a.shape) for a in (expected.tokens_LE, expected.uses_LE, hardware.node_R, hardware.speed_R, quota_LR)]
    allowed = [[layers, experts], [layers, experts], [ranks], [ranks], [layers, ranks]]
    if given != allowed:
        raise ConfigError(f"tokens, uses, nodes, speeds and slots of shapes {given}: allowed for this placement: {allowed}")
    if hardware.speed_R.min() < 1:
        raise ConfigError(f"speeds {hardware.speed_R.tolist()}: allowed: 1 or more, 1000 = usual")


def _within(holds_LRE: BoolArray, quota_LR: IntArray) -> BoolArray:
    """The copies for which there are slots, first experts first, bool [L, R, E]."""
    result: BoolArray = holds_LRE & (holds_LRE.cumsum(2) <= quota_LR[:, :, None])
    return result


def _batches(layers: IntArray, experts: int, slots: int) -> list[IntArray]:
    """The layers in batches that bound the memory of a search."""
    size = max(1, _MOST_ENTRIES // max(1, experts * experts, slots * 64))
    return [layers[start : start + size] for start in range(0, len(layers), size)]


def moments(expected: ExpectedLoad, layers: IntArray, own_LE: BoolArray, ranks: int) -> FloatArray:
    """Second moments of the expert loads of some layers, [L, E, E], layer totals scaled to the number of ranks."""
    tokens_LE = np.where(own_LE, expected.tokens_LE[layers], 0).astype(np.float64)
    total_L1 = tokens_LE.sum(1, keepdims=True)
    mean_LE = tokens_LE / total_L1
    noise_LE = PRIOR_WINDOWS * OVERDISPERSION * mean_LE / total_L1
    counted = PRIOR_WINDOWS
    cover_LEE = np.zeros((*tokens_LE.shape, tokens_LE.shape[1]))
    diagonal = np.arange(tokens_LE.shape[1])
    if expected.sample_KLE is not None and expected.weight_K is not None:
        effective = 1 / float((expected.weight_K**2).sum())
        apart_LKE = (expected.sample_KLE[:, layers] - mean_LE).swapaxes(0, 1) * own_LE[:, None]
        cover_LEE = effective * (apart_LKE * expected.weight_K[:, None]).swapaxes(1, 2) @ apart_LKE
        noise_LE = noise_LE + SHRINKAGE * cover_LEE[:, diagonal, diagonal]
        cover_LEE *= 1 - SHRINKAGE
        counted += effective - 1
    cover_LEE[:, diagonal, diagonal] += noise_LE
    result: FloatArray = ranks**2 * (cover_LEE / counted + mean_LE[:, :, None] * mean_LE[:, None])
    return result


def _improve(task: _Task, layers: IntArray) -> tuple[BoolArray, FloatArray, FloatArray]:
    """Copies of layers whose experts all fit, [L, R, E]; and their excess before and after, [L]."""
    own_LE, quota_LR, before_LRE = task.own_LE[layers], task.quota_LR[layers], task.before_LRE[layers]
    load_LE = np.where(own_LE, task.expected.tokens_LE[layers], 0).astype(np.float64)
    several = len(np.unique(task.node_R)) > 1
    objective = Objective(
        moments(task.expected, layers, own_LE, task.ranks), task.speed_R, task.node_R, NODE_WEIGHT if several else 0.0
    )
    price_L = task.prices(layers)
    room = int(quota_LR.max())
    rank_S = np.repeat(np.arange(task.ranks), room)
    usable_LS = (np.arange(room) < quota_LR[:, :, None]).reshape(len(layers), -1)
    if task.ranks > MOST_SEARCHED:
        return _level_many(task, layers, load_LE)
    fresh_LRE = place_afresh(load_LE, own_LE, quota_LR, task.speed_R)
    starts = (
        _complete(before_LRE, own_LE, quota_LR, load_LE),
        renumber(fresh_LRE, before_LRE, quota_LR, task.speed_R),
    )
    focus = max(2, _FOCUS_ENTRIES // (len(layers) * room * len(rank_S)))
    best_LRE, best_L = before_LRE, np.full(len(layers), np.inf)
    now_L = then_L = best_L
    for number, start_LRE in enumerate(starts):
        search = Search(slots_of(start_LRE, room), rank_S, usable_LS, objective, before_LRE)
        now_L = search.excess() if number == 0 else now_L
        search.improve(price_L, _MOST_MOVES, focus)
        found_L = search.excess() + price_L * search.copies()
        better_L = found_L < best_L
        best_LRE = np.where(better_L[:, None, None], search.holds_LRE[:, :, :-1], best_LRE)
        then_L = np.where(better_L, search.excess(), then_L)
        best_L = np.where(better_L, found_L, best_L)
    return best_LRE, now_L, then_L


def _plan_oversubscribed(
    task: _Task, layers: IntArray, wanted_LRE: BoolArray
) -> tuple[IntArray, BoolArray, FloatArray, FloatArray]:
    """Homes and wanted copies of layers with fewer slots than experts; and the slowest rank's time before and after.

    Times are in units of the mean rank's compute, [L].
    """
    own_LE, home_LE, before_LRE = task.own_LE[layers], task.home_LE[layers], task.before_LRE[layers]
    expected = task.expected
    uses_LE = np.where(own_LE, expected.uses_LE[layers], 0)
    time_LE = expert_times(np.where(own_LE, expected.tokens_LE[layers], 0), uses_LE, expected.steps, task.hardware.costs)
    found_LE = level_homes(home_LE, own_LE, time_LE, task.speed_R)
    found_LRE = wanted_at_home(found_LE, own_LE, uses_LE / max(1, expected.steps), task.quota_LR[layers])
    before_LR, after_LR = (rank_times(home, own_LE, time_LE, task.speed_R) for home in (home_LE, found_LE))
    saved_L = (before_LR.max(1) - after_LR.max(1)) * task.horizon
    # Another home costs a fetch at the expert's next use, whether its copy is wanted or not.
    moved_L = ((found_LE != home_LE) & own_LE).sum(1) + (found_LRE & ~before_LRE).sum((1, 2))
    pays_L = saved_L > moved_L * task.price_ns
    unit_L = task.mean_ns_L[layers]
    now_L, then_L = (time_LR.max(1) / unit_L for time_LR in (before_LR, after_LR))
    return (
        np.where(pays_L[:, None], found_LE, home_LE),
        np.where(pays_L[:, None, None], found_LRE, wanted_LRE),
        now_L,
        np.where(pays_L, then_L, now_L),
    )


def _level_many(task: _Task, layers: IntArray, load_LE: FloatArray) -> tuple[BoolArray, FloatArray, FloatArray]:
    """``_improve`` for many ranks: from scratch at first, later by a few swaps."""
    own_LE, quota_LR, before_LRE = task.own_LE[layers], task.quota_LR[layers], task.before_LRE[layers]
    if task.has_wanted:
        start_LRE = _complete(before_LRE, own_LE, quota_LR, load_LE)
        expert_LRQ = slots_of(start_LRE, int(quota_LR.max())).reshape(len(layers), task.ranks, -1)
        usable_LRQ = np.arange(expert_LRQ.shape[2]) < quota_LR[:, :, None]
        level(expert_LRQ, load_LE, task.speed_R, _SWAPS_OF_MANY, usable_LRQ)
        found_LRE = holds_of(expert_LRQ, load_LE.shape[1])
    else:
        found_LRE = place_afresh(load_LE, own_LE, quota_LR, task.speed_R)
    unit_L = load_LE.sum(1) / task.ranks
    now_L, then_L = ((rank_loads(held, load_LE) / task.speed_R).max(1) / unit_L - 1 for held in (before_LRE, found_LRE))
    pays_L = now_L - then_L > task.prices(layers) * (found_LRE & ~before_LRE).sum((1, 2))
    return np.where(pays_L[:, None, None], found_LRE, before_LRE), now_L, np.where(pays_L, then_L, now_L)


def renumber(fresh_LRE: BoolArray, before_LRE: BoolArray, quota_LR: IntArray, speed_R: FloatArray) -> BoolArray:
    """The same placement with ranks renumbered, greedily, so that many copies stay, bool [L, R, E].

    Ranks trade numbers only with ranks of as many slots and the same speed.
    """
    layers, ranks, _ = fresh_LRE.shape
    rows = np.arange(layers)
    overlap_LRR = before_LRE.astype(np.float32) @ fresh_LRE.swapaxes(1, 2).astype(np.float32)  # [L, now, fresh]
    alike_LRR = (quota_LR[:, :, None] == quota_LR[:, None]) & (speed_R[:, None] == speed_R)
    overlap_LRR = np.where(alike_LRR, overlap_LRR, -1.0)
    source_LR = np.empty((layers, ranks), np.int64)
    for _ in range(ranks):
        now_L, fresh_L = np.divmod(overlap_LRR.reshape(layers, -1).argmax(1), ranks)
        source_LR[rows, now_L] = fresh_L
        overlap_LRR[rows, now_L] = -2.0
        overlap_LRR[rows, :, fresh_L] = -2.0
    return np.take_along_axis(fresh_LRE, source_LR[:, :, None], 1)


def _complete(holds_LRE: BoolArray, own_LE: BoolArray, quota_LR: IntArray, load_LE: FloatArray) -> BoolArray:
    """The copies plus one of each absent expert, in a free slot or in place of the least loaded replica."""
    holds_LRE = holds_LRE.copy()
    for layer, expert in np.argwhere(own_LE & ~holds_LRE.any(1)).tolist():
        holds = holds_LRE[layer]
        free_R = quota_LR[layer] - holds.sum(1)
        if free_R.max() <= 0:
            copies_E = holds.sum(0)
            load_RE = np.where(holds & (copies_E > 1), load_LE[layer] / np.maximum(copies_E, 1), np.inf)
            rank, replica = np.unravel_index(int(load_RE.argmin()), load_RE.shape)
            holds[rank, replica] = False
            holds[rank, expert] = True
        else:
            holds[int(free_R.argmax()), expert] = True
    return holds_LRE


def _homes(current: Placement, home_LE: IntArray, wanted_LRE: BoolArray, before_LRE: BoolArray) -> IntArray:
    """Homes, int64 [L, E]. The given one, unless copies are wanted and none there; then a rank with one, an old one first."""
    own_LE = np.arange(wanted_LRE.shape[2]) < current.num_experts_L[:, None]
    at_home_LE = np.take_along_axis(wanted_LRE, home_LE[:, None], 1)[:, 0]
    moved_LE = wanted_LRE.any(1) & ~at_home_LE
    best_LE = (wanted_LRE.astype(np.int64) * 2 + (wanted_LRE & before_LRE)).argmax(1)
    return np.where(own_LE, np.where(moved_LE, best_LE, home_LE), current.home_LE)
