"""The price of having ranks. A layer's exchange and plan over bare collectives of counts and rows; the plan alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

import epslots
from epslots.arrays import BoolArray, IntArray
from epslots.bench.models import LARGE_EXPERTS, random_checkpoint, random_config
from epslots.bench.processes import run_ranks
from epslots.bench.report import US, BenchReport, alternate, median, ratio_of_rounds, spread
from epslots.group.rank_group import group_of
from epslots.placement.placement import default_homes
from epslots.planner.assignment import assign
from epslots.planner.cost_model import Costs
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.runtime import runtime_of
from epslots.transport.torch_transport import TorchTransport, group_method

HIDDEN, EXPERTS, TOP_K = 1024, 32, 4
# Large experts with a faster host: 50 GB/s.
LARGE = msgspec.structs.replace(LARGE_EXPERTS, host_fetch=188_000)
# The start-up cost alone decides which collective is used; tokens of each rank that it is timed with.
WAYS = {
    "all-to-all": (msgspec.structs.replace(LARGE, gather=10**9), (1, 8, 64, 512)),
    "all-gather": (msgspec.structs.replace(LARGE, gather=1, pair_transfer=1), (1, 8, 64)),  # a way for few tokens
}
GROUPS = ((8, 128, 8), (64, 384, 8))  # ranks, experts, top k
# Tokens of a rank, share of experts that are held, and further slots with replicas, as a share.
STATES = {
    "decode, all hit": (1, 1.0, 0.0),
    "decode, some missing": (1, 0.75, 0.0),
    "decode, batch 16, replicas": (16, 1.0, 0.25),
    "prefill 512, replicas": (512, 1.0, 0.25),
}


def bench_exchange(report: BenchReport, cache_dir: Path, *, rounds: int = 300) -> None:
    """Two gloo ranks, every expert resident on one of them; then the plan alone, for larger groups."""
    config = random_config(layers=2, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K, width=64)
    with random_checkpoint(config, torch.float32) as folder:
        results = run_ranks(_exchange_of_a_layer, 2, str(folder), str(cache_dir), rounds)
    report.table("exchange and plan of one layer, 2 gloo ranks, us", results[0])
    report.table("the plan alone, us", plan_times(rounds))


class _NoCompute:
    """Stands for the experts' arithmetic and returns its rows: the rest of a layer is the price of having ranks."""

    def __init__(self, kernel: Any) -> None:
        self.dtype, self.hidden_size = kernel.dtype, kernel.hidden_size

    def ready_products(self, pairs: int) -> None:
        return None

    def __call__(self, rows_NH: torch.Tensor, *_: object) -> torch.Tensor:
        return rows_NH


def _exchange_of_a_layer(transport: TorchTransport, folder: str, cache_dir: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for way, (costs, batches) in WAYS.items():
        model = epslots.load(folder, slots="50%", device="cpu", cache_dir=cache_dir, group=transport, costs=costs)
        runner = runtime_of(model).runners[0]
        runner.experts.kernel = _NoCompute(runner.experts.kernel)  # type: ignore[assignment]
        for tokens in batches:
            torch.manual_seed(transport.rank)
            hidden = torch.randn(tokens, HIDDEN)
            index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
            seconds = _time_layer(transport, model, way, costs, (hidden, index, torch.rand(tokens, TOP_K)), rounds)
            rows.append(
                {
                    "way": way,
                    "tokens per rank": tokens,
                    "layer without compute": median(seconds["ours"]) * US,
                    "bare collectives": median(seconds["bare"]) * US,
                    "plan": median(seconds["plan"]) * US,
                    "layer / bare": ratio_of_rounds(seconds["ours"], seconds["bare"])["median"],
                }
            )
    return rows


def _time_layer(
    transport: TorchTransport, model: Any, way: str, costs: Costs, batch: tuple[torch.Tensor, ...], rounds: int
) -> dict[str, list[float]]:
    """Seconds of the layer on a batch (hidden, expert ids, weights), of bare collectives, and of its plan."""
    runner, group = runtime_of(model).runners[0], group_of(model)
    assert group is not None
    lockstep, live = group.lockstep, group.shared.layers[0].state
    # A plan enters its outcome, so it is timed on a copy.
    shared = LayerPlanner(transport.rank, LayerState(live.holds_RE.copy(), live.quota_R, live.home_E), costs)
    mine = torch.bincount(batch[1].flatten(), minlength=EXPERTS)
    counts_RE = transport.to_host(transport.all_gather(mine)).astype(np.int64)

    def ours() -> None:
        lockstep._layer = 0  # a layer by itself, without a step's header
        runner(*batch)

    def plan() -> None:
        shared.plan(counts_RE, lambda: np.zeros(EXPERTS, np.int64))

    lockstep.begin()
    lockstep.steps = 2  # sizes are agreed from the second step on
    bare = _bare_collectives(way, shared, counts_RE, len(batch[0]))
    seconds = alternate({"ours": ours, "bare": bare, "plan": plan}, rounds, warm_up=20)
    lockstep._layer = None
    return seconds


def _bare_collectives(way: str, shared: LayerPlanner, counts_RE: IntArray, tokens: int) -> Callable[[], object]:
    """The same counts and rows through torch.distributed, into buffers made once; without the ranks' other messages."""
    group = dist.group.WORLD
    assert group is not None
    splits = shared.plan(counts_RE, lambda: np.zeros(EXPERTS, np.int64)).splits
    assert splits is not None
    send, receive = splits.send_DO.sum(1).tolist(), splits.receive_SC.sum(1).tolist()
    row = torch.zeros(EXPERTS + 4, dtype=torch.int32)
    rows = torch.zeros(2 * len(row), dtype=torch.int32)
    out, there = torch.zeros(sum(send), HIDDEN), torch.zeros(sum(receive), HIDDEN)
    block = torch.zeros(tokens * (HIDDEN + 2 * TOP_K))
    blocks = torch.zeros(2 * len(block))
    results, result = torch.zeros(2 * tokens * TOP_K * HIDDEN), torch.zeros(tokens * TOP_K * HIDDEN)

    names = ("all_gather_single", "all_to_all_single", "reduce_scatter_single")
    gather, exchange, reduce_scatter = (group_method(group, name) for name in names)

    def all_to_all() -> None:
        gather(rows, row).wait()
        exchange(there, out, receive, send).wait()
        exchange(out, there, send, receive).wait()

    def all_gather() -> None:
        gather(rows, row).wait()
        gather(blocks, block).wait()
        reduce_scatter(result, results, dist.ReduceScatterOptions()).wait()

    return all_to_all if way == "all-to-all" else all_gather


def plan_times(rounds: int) -> list[dict[str, Any]]:
    """The plan of a layer for 8 ranks x 128 experts and 64 x 384. Loads are Zipf(1), in several states of the caches."""
    rows = []
    for ranks, experts, top_k in GROUPS:
        for state, (tokens, share, spare) in STATES.items():
            counts_RE, holds_RE, quota_R, home_E = situation(ranks, experts, top_k, tokens, share, spare)
            score_E = np.arange(experts)

            def plan(arrays: tuple[Any, ...] = (counts_RE, holds_RE, quota_R, home_E, score_E)) -> None:
                counts, holds, quotas, homes, scores = arrays
                shared = LayerPlanner(0, LayerState(holds.copy(), quotas, homes), LARGE)
                shared.plan(counts, lambda: scores)

            fetches = len(assign(counts_RE, holds_RE, quota_R, home_E, LARGE).fetch_ranks)
            seconds = alternate({"plan": plan}, rounds, warm_up=20)["plan"]
            times = {"fastest": min(seconds), **spread(seconds)}
            shape = {"ranks x experts": f"{ranks} x {experts}", "state": state, "fetches": fetches}
            rows.append(shape | {name: time * US for name, time in times.items()})
    return rows


def situation(
    ranks: int, experts: int, top_k: int, tokens: int, share: float, spare: float
) -> tuple[IntArray, BoolArray, IntArray, IntArray]:
    """Zipf(1) traffic on caches that hold ``share`` of the experts once, and have ``spare`` more slots with replicas.

    Returns:
        Counts [R, E], holders bool [R, E], slots [R] and homes [E].
    """
    random = np.random.default_rng(0)
    chance = 1 / np.arange(1, experts + 1)
    chance = random.permutation(chance / chance.sum())
    counts = np.zeros((ranks, experts), np.int64)
    for rank in range(ranks):
        # Weighted choice of top_k different experts for every token (Efraimidis and Spirakis, 2006).
        keys = random.random((tokens, experts)) ** (1 / chance)
        counts[rank] = np.bincount(np.argpartition(-keys, top_k, axis=1)[:, :top_k].ravel(), minlength=experts)
    quota_R = np.full(ranks, int(experts / ranks * (1 + spare)))
    homes = default_homes(experts, quota_R, 0)
    holds = (homes == np.arange(ranks)[:, None]) & (random.random(experts) < share)
    for rank in range(ranks):
        absent = np.flatnonzero(~holds[rank])
        free = int(quota_R[rank] - holds[rank].sum()) if spare else 0
        holds[rank, random.choice(absent, free, replace=False)] = True
    return counts, holds, quota_R, homes
