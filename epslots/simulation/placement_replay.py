"""Placements planned window by window over recorded loads, each scored on the window that comes next.

A planner starts with the experts dealt by slots, sees one window after another and may move copies after each. Its scores are
the balance of the ranks in the next window, and the copies fetched for it. ``epslots placement replay`` and the benchmarks
call ``replay``, with ``Planner`` (ours) or another function.

Pure; the caller passes the clock. Legend of shape suffixes: W windows, L layers, R ranks, E experts.
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
from epslots.placement.planner import Proposal, RankHardware, propose
from epslots.planner.cost_model import Costs

Plan = Callable[[IntArray], IntArray]
"""From the tokens of the newest window, [L, E], to the copies that each rank should hold, [L, R, E]."""

# The cost of a copy, as a share of a rank's mean load of a window and layer: as for a window of a thousand steps of 0.2 ms a
# layer, and a fetch of 1 ms behind the demand misses.
COPY_SHARE = 0.002
# Steps of a window, if recorded loads don't say.
STEPS = 256


@dataclass(frozen=True)
class Scores:
    """A planner's results.

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
    """Our planner as a ``Plan``: a forecast and a placement, carried from window to window.

    Args:
        start: the first placement.
        hardware: of the ranks.
        steps: of a window; matters if there are fewer slots than experts.
        flat: whether to ignore nodes.
    """

    def __init__(self, start: Placement, hardware: RankHardware, steps: int = STEPS, flat: bool = False) -> None:
        self.placement = start
        self.forecast = Forecast()
        self.proposals: list[Proposal] = []
        self._hardware, self._steps, self._flat = hardware, steps, flat

    def __call__(self, tokens_LE: IntArray) -> IntArray:
        """The copies that each rank should hold after a window of these tokens, int64 [L, R, E]."""
        self.forecast.add(tokens_LE, uses_by_chance(tokens_LE, self._steps), self._steps)
        proposal = propose(self.placement, self.forecast.expected(), self._hardware, flat=self._flat)
        self.proposals.append(proposal)
        self.placement = proposal.placement
        return holders(self.placement).astype(np.int64)


# Within the bounds of ``Costs``.
_LARGEST_NS = 2**39


def replay_costs(loads_WLE: IntArray, ranks: int, copy_share: float = COPY_SHARE) -> Costs:
    """Costs under which a copy costs the given share of a rank's mean load of a window and layer."""
    mean = float(loads_WLE.sum((1, 2)).mean()) / loads_WLE.shape[1] / ranks
    pair_ns = 1000
    while pair_ns > 1 and copy_share * mean * pair_ns > _LARGEST_NS:
        pair_ns //= 10
    copy_ns = min(max(1, round(copy_share * mean * pair_ns)), _LARGEST_NS)
    return Costs(copy_ns, copy_ns, 1, pair_ns, 1, 1, 1)


def uses_by_chance(tokens_LE: IntArray, steps: int) -> IntArray:
    """Steps that use each expert, int64 [L, E], if its pairs fall on steps independently."""
    return np.rint(steps * -np.expm1(-tokens_LE / steps)).astype(np.int64)


def expected_of_all(loads_WLE: IntArray, steps: int = STEPS) -> ExpectedLoad:
    """The expected load if each of these windows is equally likely: for a placement made once, from recorded loads."""
    total_WL = loads_WLE.sum(2)
    share_WLE = np.where(total_WL[:, :, None] > 0, loads_WLE / np.maximum(total_WL, 1)[:, :, None], 1 / loads_WLE.shape[2])
    windows = len(loads_WLE)
    tokens_LE = np.rint(share_WLE.mean(0) * total_WL.mean(0)[:, None]).astype(np.int64)
    weight_W = np.full(windows, 1 / windows)
    return ExpectedLoad(tokens_LE, uses_by_chance(tokens_LE, steps), steps, 1.0, float(windows), share_WLE, weight_W)


def check_loads(loads_WLE: NDArray[Any]) -> IntArray:
    """Recorded loads, int64 [W, L, E].

    Raises:
        ConfigError: the array has another shape or type, or numbers that can't be loads.
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
    """The scores of a planner over windows.

    Args:
        loads_WLE: pairs of each expert in each window.
        start: the first placement.
        plan: the planner, see ``Plan``.
        clock: returns seconds.
        advance: called with 1 after each window.
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
