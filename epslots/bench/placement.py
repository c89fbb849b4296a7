"""The planner against EPLB's rules. Scored on loads known in advance, and on the window after the planned one.

Legend of shape suffixes: W windows, L layers, R ranks, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from epslots.arrays import IntArray
from epslots.bench.eplb import copies_held, eplb
from epslots.bench.models import load_fp32
from epslots.bench.report import BenchReport
from epslots.bench.workloads import mixed_windows, pairs_of_passages, passages_of_kinds, record_routing, switching_windows
from epslots.example import example_model
from epslots.placement.balance import balancedness, holders, rank_loads
from epslots.placement.forecast import ExpectedLoad
from epslots.placement.from_scratch import place_afresh
from epslots.placement.planner import RankHardware, propose
from epslots.progress import counting
from epslots.simulation.placement_replay import Planner, expected_of_all, replay, replay_costs, start_placement
from epslots.simulation.traffic import SyntheticTraffic, generate

GOLDEN = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])
ZIPF = ((58, 256, 288, 32), (58, 256, 320, 64), (94, 128, 160, 16), (60, 384, 448, 64))
LARGE = (60, 384, 2048, 1024)

# Generated traffic, ranks and slots.
GENERATED: dict[str, tuple[SyntheticTraffic, int, int]] = {
    f"{kind}, 64 experts top-6": (SyntheticTraffic(kind=kind), 8, 9) for kind in ("still", "switch", "drift", "flash", "all")
} | {
    "switch, 128 experts top-1": (
        SyntheticTraffic(kind="switch", layers=24, experts=128, top_k=1, skew=1.0, prompts=40),
        8,
        17,
    ),
    "all, large windows": (SyntheticTraffic(kind="all", prompts=400, tokens=100, whim=0.4), 8, 9),
    "all, 8 prompts a window": (SyntheticTraffic(kind="all", prompts=8, tokens=100), 8, 9),
}


PASSAGES_AT_ONCE = 16


def bench_placement(
    report: BenchReport, cache_dir: Path, *, rounds: int = 15, sequences: int = 240, windows: int = 48
) -> None:
    """Golden and Zipf loads, with up to 1,024 ranks; then the next window of real and of generated traffic."""
    report.table("loads known in advance", known_loads(rounds))
    model = load_fp32(example_model(), cache_dir)
    kinds = {
        kind: pairs_of_passages(record_routing(model, passages, PASSAGES_AT_ONCE))
        for kind, passages in passages_of_kinds(sequences).items()
    }
    real = {
        "texts of one kind at a time, 20 a window": switching_windows(kinds, windows, 20, 8),
        "texts of one kind at a time, 60 a window": switching_windows(kinds, windows, 60, 8),
        "kinds switch every 4 windows": switching_windows(kinds, windows, 20, 4),
        "all kinds mixed, 20 a window": mixed_windows(kinds, windows, 20),
    }
    with counting("next windows", len(real) + len(GENERATED)) as advance:
        rows = []
        for name, loads_WLE in real.items():
            rows.append({"traffic": f"real: {name}"} | next_window(loads_WLE, 4, 9))
            advance(1)
        report.table("next window, real routing of the example model", rows)
        rows = []
        for name, (traffic, ranks, slots) in GENERATED.items():
            rows.append({"traffic": name} | next_window(generate(traffic), ranks, slots))
            advance(1)
    report.table("next window, generated traffic", rows)


def known_loads(rounds: int) -> list[dict[str, Any]]:
    """Balance, and milliseconds of the best round, on the very loads that were planned for."""
    sure = ExpectedLoad(GOLDEN * 10**6, np.full_like(GOLDEN, 100), 100, 1.0, 8.0)
    start = start_placement(1, 8, 8, 2)
    hardware = RankHardware(np.zeros(8, np.int64), np.full(8, 1000), replay_costs(sure.tokens_LE[None], 8, 0.0))
    ours = rank_loads(holders(propose(start, sure, hardware).placement), GOLDEN).max()
    theirs = rank_loads(copies_held(eplb(GOLDEN, 8, 2), 8, 8), GOLDEN).max()
    rows: list[dict[str, Any]] = [_row("golden: largest load", float(ours), float(theirs))]
    for layers, experts, slots, ranks in (*ZIPF, LARGE):
        random = np.random.default_rng(0)
        loads_LE = np.stack([random.permutation(1e6 / np.arange(1, experts + 1)) for _ in range(layers)])
        quota_LR, speed_R = np.full((layers, ranks), slots // ranks), np.ones(ranks)
        held_LRE, ours_ms = _best_of(partial(place_afresh, loads_LE, loads_LE > 0, quota_LR, speed_R), rounds)
        planned, theirs_ms = _best_of(partial(eplb, loads_LE, ranks, slots // ranks), rounds)
        level = (
            balancedness(rank_loads(held_LRE, loads_LE)),
            balancedness(rank_loads(copies_held(planned, ranks, experts), loads_LE)),
        )
        rows.append(
            _row(f"Zipf: {layers} layers, {experts} experts, {slots} copies, {ranks} ranks", *level, ours_ms, theirs_ms)
        )
    return rows


def _row(loads: str, ours: float, theirs: float, ours_ms: float = 0.0, theirs_ms: float = 0.0) -> dict[str, Any]:
    return {"loads": loads, "ours": ours, "EPLB": theirs, "ours, ms": ours_ms, "EPLB's rules in numpy, ms": theirs_ms}


def _best_of(run: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    seconds = []
    result = None
    for _ in range(rounds):
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    return result, 1000 * min(seconds)


def next_window(loads_WLE: IntArray, ranks: int, slots: int) -> dict[str, Any]:
    """Scores of both planners over the windows; and of one plan that knows the future, as a bound.

    "one plan of all" is ours, made once from all windows, the scored ones included, and never changed.

    Args:
        loads_WLE: tokens of each window.
        slots: of each rank and layer.
    """
    layers, experts = loads_WLE.shape[1:]
    start = start_placement(layers, experts, ranks, slots)
    hardware = RankHardware(np.zeros(ranks, np.int64), np.full(ranks, 1000), replay_costs(loads_WLE, ranks))
    free = RankHardware(hardware.node_R, hardware.speed_R, replay_costs(loads_WLE, ranks, 0.0))
    planners: dict[str, Any] = {
        "ours": Planner(start, hardware),
        "EPLB": lambda tokens_LE: copies_held(eplb(tokens_LE, ranks, slots), ranks, experts),
    }
    ours, theirs = (replay(loads_WLE, start, planner, time.perf_counter) for planner in planners.values())
    fixed = holders(propose(start, expected_of_all(loads_WLE), free).placement)
    one_plan = [balancedness(rank_loads(fixed, window_LE)) for window_LE in loads_WLE[1:]]
    return {
        "imbalance, ours": _imbalance(ours.balance),
        "EPLB": _imbalance(theirs.balance),
        "ours / EPLB": _imbalance(ours.balance) / _imbalance(theirs.balance),
        "one plan of all": _imbalance(one_plan),
        "split live, ours": _imbalance(ours.balance_live),
        "split live, EPLB": _imbalance(theirs.balance_live),
        "moved, ours / EPLB": sum(ours.copies) / sum(theirs.copies),
        "ms a window, ours": 1000 * float(np.median(ours.seconds)),
    }


def _imbalance(balance: list[float]) -> float:
    return 1 - float(np.mean(balance))
