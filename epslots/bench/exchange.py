"""What ranks cost each other: exchange and plan of a layer against bare collectives of counts and rows; the plan alone."""

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
from epslots.bench.report import BenchReport, alternate, median, ratio_of_rounds, spread
from epslots.group.rank_group import group_of
from epslots.placement.placement import default_homes
from epslots.planner.assignment import assign
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.runtime import runtime_of
from epslots.transport.torch_transport import TorchTransport

TOP_K = 4
EXPERTS = 32
# The same, with a faster host: 50 GB/s.
LARGE = msgspec.structs.replace(LARGE_EXPERTS, host_fetch=188_000)


def bench_exchange(report: BenchReport, cache_dir: Path, *, rounds: int = 300) -> None:
    """Two gloo ranks, every expert resident on one of them; then the plan alone, for larger groups."""
    config = random_config(layers=2, hidden=1024, experts=EXPERTS, top_k=TOP_K, width=64)
    with random_checkpoint(config, torch.float32) as folder:
        results = run_ranks(_exchange_of_a_layer, 2, str(folder), str(cache_dir), rounds)
    report.table("exchange and plan of one layer, 2 gloo ranks, us", results[0])
    report.table("the plan alone, us", plan_times(rounds))


class _NoCompute:
    """In the place of the experts' arithmetic: what is left of a layer is what it costs to have ranks."""

    def __init__(self, kernel: Any) -> None:
        self.dtype, self.hidden_size = kernel.dtype, kernel.hidden_size

    def __call__(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, slot_N: torch.Tensor) -> torch.Tensor:
        return rows_NH


def _exchange_of_a_layer(transport: TorchTransport, folder: str, cache_dir: str, rounds: int) -> list[dict[str, Any]]:
    # The way is chosen by its start-up alone.
    ways = {
        "all-to-all": msgspec.structs.replace(LARGE, gather=10**9),
        "all-gather": msgspec.structs.replace(LARGE, gather=1, pair_transfer=1),
    }
    rows = []
    for way, costs in ways.items():
        model = epslots.load(folder, slots="50%", device="cpu", cache_dir=cache_dir, group=transport, costs=costs)
        runner, group = runtime_of(model).runners[0], group_of(model)
        assert group is not None
        runner.experts.kernel = _NoCompute(runner.experts.kernel)  # type: ignore[assignment]
        for tokens in (1, 8, 64, 512):
            if way == "all-gather" and tokens > 64:
                continue  # a way for few tokens
            torch.manual_seed(transport.rank)
            hidden = torch.randn(tokens, 1024)
            index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
            weights = torch.rand(tokens, TOP_K)
            lockstep, live = group.lockstep, group.shared.layers[0].state
            # A plan enters its outcome, so it is timed on a copy.
            shared = LayerPlanner(transport.rank, LayerState(live.holds_RE.copy(), live.quota_R, live.home_E), costs)
            counts_RE = _counts(transport, index)

            def ours(layer: Any = runner, lockstep: Any = lockstep, batch: Any = (hidden, index, weights)) -> None:
                lockstep._layer = 0  # a layer by itself, without a step's header
                layer(*batch)

            def plan(shared: LayerPlanner = shared, counts: IntArray = counts_RE) -> None:
                shared.plan(counts, lambda: np.zeros(EXPERTS, np.int64))

            lockstep.begin()
            lockstep.steps = 2  # sizes are agreed from the second step on
            bare = _bare_collectives(way, shared, counts_RE, tokens)
            seconds = alternate({"ours": ours, "bare": bare, "plan": plan}, rounds, warm_up=20)
            lockstep._layer = None
            rows.append(
                {
                    "way": way,
                    "tokens per rank": tokens,
                    "layer without compute": median(seconds["ours"]) * 1e6,
                    "bare collectives": median(seconds["bare"]) * 1e6,
                    "plan": median(seconds["plan"]) * 1e6,
                    "layer / bare": ratio_of_rounds(seconds["ours"], seconds["bare"])["median"],
                }
            )
    return rows


def _counts(transport: TorchTransport, index: torch.Tensor) -> IntArray:
    mine = torch.bincount(index.flatten(), minlength=EXPERTS)
    return transport.to_host(transport.all_gather(mine)).astype(np.int64)


def _bare_collectives(way: str, shared: LayerPlanner, counts_RE: IntArray, tokens: int) -> Callable[[], object]:
    """The same counts and rows through torch.distributed, into buffers made once; without what else ranks tell each other."""
    group = dist.group.WORLD
    assert group is not None
    splits = shared.plan(counts_RE, lambda: np.zeros(EXPERTS, np.int64)).splits
    assert splits is not None
    send, receive = splits.send_DO.sum(1).tolist(), splits.receive_SC.sum(1).tolist()
    row = torch.zeros(EXPERTS + 4, dtype=torch.int32)
    rows = torch.zeros(2 * len(row), dtype=torch.int32)
    out, there = torch.zeros(sum(send), 1024), torch.zeros(sum(receive), 1024)
    block = torch.zeros(tokens * (1024 + 2 * TOP_K))
    blocks = torch.zeros(2 * len(block))
    results, result = torch.zeros(2 * tokens * TOP_K * 1024), torch.zeros(tokens * TOP_K * 1024)

    def all_to_all() -> None:
        group.all_gather_single(rows, row).wait()
        group.all_to_all_single(there, out, receive, send).wait()
        group.all_to_all_single(out, there, send, receive).wait()

    def all_gather() -> None:
        group.all_gather_single(rows, row).wait()
        group.all_gather_single(blocks, block).wait()
        group.reduce_scatter_single(result, results, dist.ReduceScatterOptions()).wait()

    return all_to_all if way == "all-to-all" else all_gather


def plan_times(rounds: int) -> list[dict[str, Any]]:
    """The plan of a layer for 8 ranks x 128 experts and 64 x 384, on Zipf(1) loads, in several states of the caches."""
    rows = []
    for ranks, experts, top_k in ((8, 128, 8), (64, 384, 8)):
        states = {
            "decode, all hit": (1, 1.0, 0.0),
            "decode, some missing": (1, 0.75, 0.0),
            "decode, batch 16, replicas": (16, 1.0, 0.25),
            "prefill 512, replicas": (512, 1.0, 0.25),
        }
        for state, (tokens, share, spare) in states.items():
            counts, holds, quota_R, homes = situation(ranks, experts, top_k, tokens, share, spare)
            score = np.arange(experts)

            def plan(
                counts: IntArray = counts,
                holds: BoolArray = holds,
                quota_R: IntArray = quota_R,
                homes: IntArray = homes,
                score: IntArray = score,
            ) -> None:
                shared = LayerPlanner(0, LayerState(holds.copy(), quota_R, homes), LARGE)
                shared.plan(counts, lambda: score)

            fetches = len(assign(counts, holds, quota_R, homes, LARGE).fetch_ranks)
            seconds = alternate({"plan": plan}, rounds, warm_up=20)["plan"]
            times = spread(seconds)
            rows.append(
                {
                    "ranks x experts": f"{ranks} x {experts}",
                    "state": state,
                    "fetches": fetches,
                    "fastest": min(seconds) * 1e6,
                    "median": times["median"] * 1e6,
                    "p25": times["p25"] * 1e6,
                    "p75": times["p75"] * 1e6,
                }
            )
    return rows


def situation(
    ranks: int, experts: int, top_k: int, tokens: int, share: float, spare: float
) -> tuple[IntArray, BoolArray, IntArray, IntArray]:
    """Zipf(1) traffic on caches that hold ``share`` of the experts once, and have ``spare`` more slots with replicas."""
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
