"""``simulate_load``: the figures of a simulated cluster under a load (``simulation/load.py`` of epslots)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.simulation.arrivals import Arrival, arrivals_of
from cluster.simulation.lockstep_group import GroupTally
from cluster.simulation.request_simulation import RequestSimulation, RequestTimes
from epslots.arrays import FloatArray, IntArray
from epslots.errors import ConfigError
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.load import LoadFigures, Workload
from epslots.simulation.simulate import RecordedTraffic, TimeStats

# Requests that come before and after the measured ones: the cluster fills, and is still as full at the end.
_BEFORE, _AFTER = 0.3, 0.1
_GROWTH = 1.5  # of the requests in the cluster while the measured ones come, above which it doesn't keep up


def simulate_load(
    cluster: GroupedCluster, traffic: RecordedTraffic, workload: Workload, advance: Callable[[int], object] = int
) -> LoadFigures:
    """The figures of a cluster under a load.

    Args:
        traffic: the routing of tokens.
        advance: called with 1 for each request that arrives.

    Raises:
        ConfigError: a setting is out of range, or a request is too long for a rank's cache.
    """
    if workload.most_tokens > cluster.engine.planned_tokens:
        raise ConfigError(
            f"prompts of {workload.prompt_tokens[1]} tokens and {workload.new_tokens[1]} new ones; allowed: up to "
            f"kv_tokens={cluster.engine.planned_tokens} together, but for the last"
        )
    simulation = RequestSimulation(cluster, traffic)
    measured = range(int(_BEFORE * workload.requests), math.ceil((1 - _AFTER) * workload.requests))
    meter = _Meter(simulation, measured)
    simulation.run(meter.watch(arrivals_of(workload, traffic.starts), advance), meter.is_done)
    return meter.figures(workload.rate)


class _Meter:
    """Watches a simulation.

    Args:
        measured: numbers of the requests that count.
    """

    def __init__(self, simulation: RequestSimulation, measured: range) -> None:
        self._simulation, self._measured = simulation, measured
        self._prompt_tokens = 0
        self._marks: list[tuple[float, int, int]] = []
        """At the first measured request, and after the last: seconds, tokens so far, and requests that are there."""
        self._left: list[RequestTimes] = []

    def watch(self, arrivals: Iterable[Arrival], advance: Callable[[int], object]) -> Iterator[Arrival]:
        """The requests, counted as they come."""
        for number, arrival in enumerate(arrivals):
            if number in (self._measured.start, self._measured.stop):
                self._mark()
            self._prompt_tokens += len(arrival.request.prompt)
            advance(1)
            yield arrival
        self._mark()

    def _mark(self) -> None:
        """Note the present state; the first call drops the groups' sums until now."""
        if len(self._marks) == 2:
            return
        times = self._simulation.times.values()
        if not self._marks:
            for group in self._simulation.groups:
                group.take()
        self._marks.append((self._simulation.now_s, sum(one.tokens for one in times), sum(not one.done for one in times)))

    def is_done(self) -> bool:
        """Whether all measured requests have ended."""
        if len(self._marks) < 2:
            return False
        if not self._left:
            self._left = [one for one in self._requests() if not one.done]
        while self._left and self._left[-1].done:
            self._left.pop()
        return not self._left

    def _requests(self) -> list[RequestTimes]:
        return list(self._simulation.times.values())[self._measured.start : self._measured.stop]

    def figures(self, rate: float) -> LoadFigures:
        """The figures, once all measured requests have ended."""
        simulation, requests = self._simulation, self._requests()
        (began_s, tokens_before, there_before), (ended_s, tokens_after, there_after) = self._marks
        by_role: dict[str, list[GroupTally]] = {}
        size = len(simulation.ranks) // len(simulation.groups)
        for number, group in enumerate(simulation.groups):
            by_role.setdefault(simulation.role_of(number * size), []).append(group.take())
        gaps = [gap for tallies in by_role.values() for tally in tallies for gap in tally.gaps]
        hits, misses = simulation.expert_uses()
        moved = simulation.hand_overs.counts
        several = [one for one in requests if one.tokens > 1]
        return LoadFigures(
            rate=rate,
            requests=len(requests),
            ttft_ms=_time_stats([one.first_s - one.at_s for one in requests]),
            tpot_ms=_time_stats([(one.last_s - one.first_s) / (one.tokens - 1) for one in several]),
            gap_ms=_time_stats(_joined([gap_R for gap_R, _ in gaps]), _joined([streams_R for _, streams_R in gaps])),
            hand_over_ms=_time_stats(simulation.hand_over_s) if simulation.hand_over_s else None,
            tokens_per_s=(tokens_after - tokens_before) / (ended_s - began_s),
            reused=simulation.reused_of_prompts / max(1, self._prompt_tokens),
            hand_overs=moved.done,
            failed_hand_overs=moved.failed,
            hand_over_bytes=moved.nbytes,
            preempted=sum(rank.counters.preempted for rank in simulation.ranks),
            step_skew={role: _step_skew(tallies) for role, tallies in by_role.items()},
            step_ms={role: _mean_step_ms(tallies) for role, tallies in by_role.items()},
            hit_rate=hits / max(1, hits + misses),
            placements=0 if simulation.windows is None else simulation.windows.placements,
            kept_up=there_after <= _GROWTH * max(there_before, len(simulation.ranks)),
        )


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _step_skew(tallies: Sequence[GroupTally]) -> float:
    return sum(one.most_tokens for one in tallies) / max(1, sum(one.tokens for one in tallies))


def _mean_step_ms(tallies: Sequence[GroupTally]) -> float:
    return 1e3 * sum(one.seconds for one in tallies) / max(1, sum(one.steps for one in tallies))


def _time_stats(seconds: Sequence[float] | FloatArray, weights: IntArray | None = None) -> TimeStats:
    """Statistics of some times; of none, zeros. With ``weights``, each counts so often."""
    values = np.asarray(seconds, np.float64) * 1e3
    if not len(values):
        return TimeStats(0.0, 0.0, 0.0, 0.0)
    counts = np.ones(len(values), np.int64) if weights is None else weights
    order = np.argsort(values)
    before = np.cumsum(counts[order])
    p50, p99 = (float(values[order][np.searchsorted(before, share * before[-1])]) for share in (0.5, 0.99))
    return TimeStats(float(np.average(values, weights=counts)), p50, p99, float(values.max()))
