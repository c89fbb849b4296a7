"""How long simulating takes, and what it says of a cluster of 1,024 ranks. The example model's routing over kinds of text."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from epslots.bench.quotas import record_texts
from epslots.bench.report import BenchReport, median
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.progress import counting
from epslots.simulation.simulate import GROUP_SIZE, Outcome, RecordedTraffic, SimulatedCluster, simulate
from epslots.simulation.timing import DEFAULT_DEVICE, DEVICES, timing_of

EXPERT_BYTES, ROW_BYTES = 9_437_184, 4096  # Qwen3-30B-A3B in bf16: 3 x 2048 x 768, and a hidden state of 2048
LAYER_NS, TOKEN_NS = 40_000, 50
RANKS_OF_A_NODE = 8
SIZES = (1, 8, 64, 1024)
CURVE = (1, 4, 16, 64, 256)
SLOTS = 8  # a quarter of the experts
# So many simulated steps are timed; the figure is for a thousand.
TIMED_STEPS = 50


def bench_simulate(report: BenchReport, cache_dir: Path, *, rounds: int = 3, passages: int = 12) -> None:
    """Seconds for each 1,000 simulated steps; then the batch-size curve of one node, with a controller and without."""
    trace, _ = record_texts(cache_dir, passages)
    traffic = RecordedTraffic(trace.expert_ids, trace.starts, trace.num_experts)
    layers = len(trace.num_experts)
    timing = timing_of(DEVICES[DEFAULT_DEVICE], EXPERT_BYTES, ROW_BYTES, LAYER_NS, TOKEN_NS)
    node = SimulatedCluster(RANKS_OF_A_NODE, 1, np.full(layers, SLOTS), timing, EXPERT_BYTES, POLICIES[DEFAULT_POLICY])
    report.result["settings"] = {
        "machine": DEFAULT_DEVICE,
        "expert_bytes": EXPERT_BYTES,
        "layers": layers,
        "slots of a layer on a rank": SLOTS,
        "group_size": GROUP_SIZE,
    }
    speeds, curve = [], []
    with counting("simulated steps", rounds * len(SIZES) * TIMED_STEPS + 2 * len(CURVE) * 300) as advance:
        for ranks in SIZES:
            cluster = replace(node, ranks=ranks, nodes=-(-ranks // RANKS_OF_A_NODE))
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                simulate(traffic, cluster, 8, TIMED_STEPS)
                seconds.append((time.perf_counter() - began) * 1000 / TIMED_STEPS)
                advance(TIMED_STEPS)
            groups = len(cluster.groups())
            per_layer = median(seconds) / (groups * layers)
            speeds.append(
                {"ranks": ranks, "groups": groups, "s per 1,000 steps": median(seconds), "ms per group and layer": per_layer}
            )
        for batch in CURVE:
            for window_steps in (0, 50):
                outcome = simulate(traffic, replace(node, window_steps=window_steps), batch, 200, 100)
                curve.append(
                    {"placement": "decided as traffic goes on" if window_steps else "dealt by slots", **_row(outcome)}
                )
                advance(300)
    report.table("seconds of simulation, 8 sequences a rank", speeds)
    report.table("8 ranks of one node: what a batch's size does", curve)


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
