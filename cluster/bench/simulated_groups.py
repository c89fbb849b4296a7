"""SIMULATED: 1,024 ranks in 16 groups of 64 over load. Every group does all, or some compute only prompts.

Nothing here is measured but the simulation's own time. The decisions are the cluster's; steps and hand-overs take as long as
an H100's data sheet says. The routing is the example model's, over kinds of text.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from cluster.simulation.figures import simulate_load
from epslots.bench.models import LARGE_EXPERT_BYTES, LARGE_ROW_BYTES
from epslots.bench.quotas import record_texts
from epslots.bench.report import BenchReport
from epslots.config import EngineConfig
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.progress import counting
from epslots.rank_groups import RankGroups
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.load import LoadFigures, Workload
from epslots.simulation.simulate import RecordedTraffic
from epslots.simulation.timing import DEVICES, hand_over_of, timing_of

RANKS, GROUPS, RANKS_OF_A_NODE = 1024, 16, 8
PREFILL_GROUPS = (0, 4, 8)  # 0 = every group does all
RATES = (500, 1000, 2000, 3000)
SECONDS = 2.0  # of arrivals, simulated
PROMPT_TOKENS, NEW_TOKENS = (500, 3500), (32, 96)
SHARED_TOKENS, SHARED_PROMPTS = 256, 64
MACHINE, LAYERS, LAYER_NS, TOKEN_NS, KV_TOKEN_BYTES = "h100", 48, 40_000, 50, 98_304
TRACED_LAYERS = (1, 4)  # of the example model; each stands for 24 of the model's
SLOTS = 8  # a quarter of the experts
PASSAGES = 4


def bench_simulated_groups(report: BenchReport, cache_dir: Path) -> None:
    """TTFT and TPOT over load, without roles and with them."""
    trace, _ = record_texts(cache_dir, PASSAGES)
    layers = list(TRACED_LAYERS)
    traffic = RecordedTraffic(trace.expert_ids[:, layers], trace.starts, trace.num_experts[layers])
    report.result["settings"] = {
        "simulated": "nothing is measured but seconds of simulation",
        "machine": MACHINE,
        "nodes": RANKS // RANKS_OF_A_NODE,
        "layers": LAYERS,
        "traced layers": layers,
        "expert_bytes": LARGE_EXPERT_BYTES,
        "slots of a layer on a rank": SLOTS,
        "prompt tokens": list(PROMPT_TOKENS),
        "of these shared": SHARED_TOKENS,
        "new tokens": list(NEW_TOKENS),
    }
    rows = []
    with counting("simulated requests", int(sum(RATES) * SECONDS) * len(PREFILL_GROUPS)) as advance:
        for rate in RATES:
            workload = Workload(float(rate), int(rate * SECONDS), PROMPT_TOKENS, NEW_TOKENS, SHARED_TOKENS, SHARED_PROMPTS)
            for prefill_groups in PREFILL_GROUPS:
                began = time.process_time()
                found = simulate_load(_cluster(prefill_groups, len(layers)), traffic, workload, advance)
                rows.append(_row(prefill_groups, found, time.process_time() - began))
    report.table(f"simulated: {RANKS:,} ranks in {GROUPS} groups", rows)


def _cluster(prefill_groups: int, layers: int) -> GroupedCluster:
    device = DEVICES[MACHINE]
    return GroupedCluster(
        division=RankGroups(RANKS, GROUPS, prefill_groups * RANKS // GROUPS),
        nodes=RANKS // RANKS_OF_A_NODE,
        quota_L=np.full(layers, SLOTS),
        timing=timing_of(device, LARGE_EXPERT_BYTES, LARGE_ROW_BYTES, LAYER_NS, TOKEN_NS),
        hand_over=hand_over_of(device),
        expert_bytes=LARGE_EXPERT_BYTES,
        kv_token_bytes=KV_TOKEN_BYTES,
        policy=POLICIES[DEFAULT_POLICY],
        engine=EngineConfig(kv_tokens=65_536),
        depth=LAYERS / layers,
    )


def _row(prefill_groups: int, found: LoadFigures, seconds: float) -> dict[str, Any]:
    return {
        "groups for prompts": prefill_groups,
        "requests/s": found.rate,
        "TTFT P50 ms": found.ttft_ms.p50,
        "TTFT P99 ms": found.ttft_ms.p99,
        "TPOT P50 ms": found.tpot_ms.p50,
        "TPOT P99 ms": found.tpot_ms.p99,
        "gap P99 ms": found.gap_ms.p99,
        "tokens/s": found.tokens_per_s,
        "reused": found.reused,
        "hand-overs": found.hand_overs,
        "GB handed over": found.hand_over_bytes / 1e9,
        "hand-over P50 ms": 0.0 if found.hand_over_ms is None else found.hand_over_ms.p50,
        "imbalance": max(found.step_skew.values()),
        "prompts' step ms": found.step_ms.get("prefill", found.step_ms.get("mixed", 0.0)),
        "decoding step ms": found.step_ms.get("decode", found.step_ms.get("mixed", 0.0)),
        "keeps up": found.kept_up,
        "s of simulation": seconds,
    }
