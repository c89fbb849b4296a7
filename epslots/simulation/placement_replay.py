"""Placement window by window over recorded loads: plan on what was seen, then score it on the window that comes next.

Every planner begins with the experts dealt by slots, sees one window after another and may move copies after each. What
counts is the next window: how level the ranks are in it, and how many copies had to be fetched for that.

Pure but for the clock it is given. Legend of shape suffixes: W windows, L layers, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.errors import ConfigError
from epslots.placement.balance import balancedness, holders, live_loads, rank_loads
from epslots.placement.forecast import ExpectedLoad, Forecast
from epslots.placement.placement import Placement, check_size, default_placement
from epslots.placement.planner import Proposal, RankShape, propose
from epslots.planner.cost_model import Costs

Plan = Callable[[IntArray], IntArray]
"""Takes the tokens of the newest window, [L, E]; answers with the copies that each rank should hold, [L, R, E]."""

# What fetching a copy is reckoned to cost, as a share of a rank's mean load of a window and layer: with a window of a thousand
# steps of 0.2 ms a layer, and a fetch of 1 ms behind the demand misses.
COPY_SHARE = 0.002
# Steps of a window, where recorded loads don't tell.
STEPS = 256


@dataclass(frozen=True)
class Scores:
    """What a planner achieved.

    Attributes:
        balance: mean / largest rank load of each window after the first, averaged over layers, for the placement planned
            before it; an expert's pairs split equally over its copies.
        balance_live: the same, split as well as can be.
        copies: fetched after each window but the last.
        seconds: of planning, after each window but the last.
    """

    balance: list[float]
    balance_live: list[float]
    copies: list[int]
    seconds: list[float]


class Planner:
    """Ours: the forecast and the placement, carried from window to window.

    Args:
        start: the placement to begin with.
        fleet: the ranks.
        steps: of a window; matters where slots don't suffice for all experts.
        flat: pay no attention to nodes.
    """

    def __init__(self, start: Placement, fleet: RankShape, steps: int = STEPS, flat: bool = False) -> None:
        self.placement = start
        self.forecast = Forecast()
        self.proposals: list[Proposal] = []
        self._fleet, self._steps, self._flat = fleet, steps, flat

    def __call__(self, tokens_LE: IntArray) -> IntArray:
        """Take a window, and say which copies each rank should hold, int64 [L, R, E]."""
        self.forecast.add(tokens_LE, uses_by_chance(tokens_LE, self._steps), self._steps)
        proposal = propose(self.placement, self.forecast.expected(), self._fleet, flat=self._flat)
        self.proposals.append(proposal)
        self.placement = proposal.placement
        return holders(self.placement).astype(np.int64)


_MOST_NS = 2**39


def replay_costs(loads_WLE: IntArray, ranks: int, copy_share: float = COPY_SHARE) -> Costs:
    """Costs by which a copy is as dear as the given share of a rank's mean load of a window and layer."""
    mean = float(loads_WLE.sum((1, 2)).mean()) / loads_WLE.shape[1] / ranks
    pair_ns = 1000
    while pair_ns > 1 and copy_share * mean * pair_ns > _MOST_NS:
        pair_ns //= 10
    copy_ns = min(max(1, round(copy_share * mean * pair_ns)), _MOST_NS)
    return Costs(copy_ns, copy_ns, 1, pair_ns, 1, 1, 1)


def uses_by_chance(tokens_LE: IntArray, steps: int) -> IntArray:
    """Steps in which an expert is used at all, int64 [L, E], if its pairs fall on steps independently."""
    return np.rint(steps * -np.expm1(-tokens_LE / steps)).astype(np.int64)


def expected_of_all(loads_WLE: IntArray, steps: int = STEPS) -> ExpectedLoad:
    """What to expect if any of these windows may come, each as likely: for a placement made once, from a record."""
    total_WL = loads_WLE.sum(2)
    share_WLE = np.where(total_WL[:, :, None] > 0, loads_WLE / np.maximum(total_WL, 1)[:, :, None], 1 / loads_WLE.shape[2])
    windows = len(loads_WLE)
    tokens_LE = np.rint(share_WLE.mean(0) * total_WL.mean(0)[:, None]).astype(np.int64)
    weight_W = np.full(windows, 1 / windows)
    return ExpectedLoad(tokens_LE, uses_by_chance(tokens_LE, steps), steps, 1.0, float(windows), share_WLE, weight_W)


def check_loads(loads_WLE: NDArray[Any]) -> IntArray:
    """Recorded loads, int64 [W, L, E].

    Raises:
        ConfigError: they are none.
    """
    if loads_WLE.ndim != 3 or not np.issubdtype(loads_WLE.dtype, np.integer) or not loads_WLE.size:
        raise ConfigError(f"loads is {loads_WLE.dtype}{list(loads_WLE.shape)}; it must be int64 [windows, layers, experts]")
    check_size(loads_WLE.shape[1], 1, loads_WLE.shape[2])
    if int(loads_WLE.min()) < 0 or int(loads_WLE.max()) > 2**40:
        raise ConfigError(f"loads from {int(loads_WLE.min())} to {int(loads_WLE.max())}: allowed: 0 to 2**40")
    return loads_WLE.astype(np.int64)


def start_placement(layers: int, experts: int, ranks: int, slots: int) -> Placement:
    """The experts dealt by slots."""
    if min(slots, ranks) < 1:
        raise ConfigError(f"{ranks} ranks x {slots} slots: allowed: 1 or more of each")
    return default_placement([experts] * layers, np.full((layers, ranks), min(slots, experts)))


def replay(
    loads_WLE: IntArray,
    start: Placement,
    plan: Plan,
    clock: Callable[[], float],
    advance: Callable[[int], object] = lambda windows: None,
) -> Scores:
    """Run a planner over windows.

    Args:
        plan: see ``Plan``.
        clock: seconds.
        advance: told of each window done.
    """
    scores = Scores([], [], [], [])
    held_LRE = holders(start)
    for tokens_LE, next_LE in pairwise(loads_WLE):
        began = clock()
        copies_LRE = plan(tokens_LE)
        scores.seconds.append(clock() - began)
        scores.copies.append(int(((copies_LRE > 0) & ~held_LRE).sum()))
        held_LRE = copies_LRE > 0
        scores.balance.append(balancedness(rank_loads(copies_LRE, next_LE)))
        scores.balance_live.append(balancedness(live_loads(held_LRE, next_LE)))
        advance(1)
    return scores
