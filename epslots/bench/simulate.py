"""Speed of the simulator up to 1,024 ranks, and a curve over batch sizes. Routing of the example model over kinds of text."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from epslots.bench.models import LARGE_EXPERT_BYTES, LARGE_ROW_BYTES
from epslots.bench.quotas import record_texts
from epslots.bench.report import BenchReport, alternate, median
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.progress import counting
from epslots.simulation.simulate import GROUP_SIZE, Outcome, RecordedTraffic, SimulatedCluster, simulate
from epslots.simulation.timing import DEFAULT_DEVICE, DEVICES, timing_of

LAYER_NS, TOKEN_NS = 40_000, 50
RANKS_OF_A_NODE = 8
SIZES = (1, 8, 64, 1024)
CURVE = (1, 4, 16, 64, 256)
# Steps of a window of the controller; 0 = none.
PLACEMENTS = {"dealt by slots": 0, "decided as traffic goes on": 50}
SLOTS = 8  # a quarter of the experts
TIMED_STEPS = 50  # simulated steps that are timed; the figure is for a thousand
CURVE_STEPS, CURVE_WARM_UP = 200, 100


def bench_simulate(report: BenchReport, cache_dir: Path, *, rounds: int = 3, passages: int = 12) -> None:
    """Seconds for each 1,000 simulated steps; then the curve over batch sizes of one node, with a controller and without."""
    trace, _ = record_texts(cache_dir, passages)
    traffic = RecordedTraffic(trace.expert_ids, trace.starts, trace.num_experts)
    layers = len(trace.num_experts)
    timing = timing_of(DEVICES[DEFAULT_DEVICE], LARGE_EXPERT_BYTES, LARGE_ROW_BYTES, LAYER_NS, TOKEN_NS)
    quota_L = np.full(layers, SLOTS)
    node = SimulatedCluster(RANKS_OF_A_NODE, 1, quota_L, timing, LARGE_EXPERT_BYTES, POLICIES[DEFAULT_POLICY])
    report.result["settings"] = {
        "machine": DEFAULT_DEVICE,
        "expert_bytes": LARGE_EXPERT_BYTES,
        "layers": layers,
        "slots of a layer on a rank": SLOTS,
        "group_size": GROUP_SIZE,
    }
    curve_steps = 2 * len(CURVE) * (CURVE_STEPS + CURVE_WARM_UP)
    with counting("simulated steps", rounds * len(SIZES) * TIMED_STEPS + curve_steps) as advance:
        speeds = []
        for ranks in SIZES:
            cluster = replace(node, ranks=ranks, nodes=-(-ranks // RANKS_OF_A_NODE))
            speeds.append(_speed(traffic, cluster, rounds))
            advance(rounds * TIMED_STEPS)
        curve = []
        for batch, (what, window_steps) in product(CURVE, PLACEMENTS.items()):
            outcome = simulate(traffic, replace(node, window_steps=window_steps), batch, CURVE_STEPS, CURVE_WARM_UP)
            curve.append({"placement": what, **_row(outcome)})
            advance(CURVE_STEPS + CURVE_WARM_UP)
    report.table("seconds of simulation, 8 sequences a rank", speeds)
    report.table("8 ranks of one node: what a batch's size does", curve)


def _speed(traffic: RecordedTraffic, cluster: SimulatedCluster, rounds: int) -> dict[str, Any]:
    seconds = alternate({"simulate": lambda: simulate(traffic, cluster, 8, TIMED_STEPS)}, rounds, warm_up=0)["simulate"]
    per_thousand = median(seconds) * 1000 / TIMED_STEPS
    groups = len(cluster.groups())
    ms = per_thousand / (groups * len(cluster.quota_L))
    return {"ranks": cluster.ranks, "groups": groups, "s per 1,000 steps": per_thousand, "ms per group and layer": ms}


def _row(outcome: Outcome) -> dict[str, Any]:
    fetched = {name: size / (outcome.ranks * outcome.steps) / 1e6 for name, size in outcome.bytes_by_source.items()}
    return {
        "sequences of a rank": outcome.batch,
        "P50 ms": outcome.step_ms.p50,
        "P99 ms": outcome.step_ms.p99,
        "tokens/s": outcome.tokens_per_s,
        "balance": outcome.balance,
        "hit rate": outcome.hit_rate,
        "MB from host": fetched["host"],
        "from peers": fetched["peers"],
        "for placements": fetched["host_for_placements"] + fetched["peers_for_placements"],
        "placements": outcome.placements,
    }
