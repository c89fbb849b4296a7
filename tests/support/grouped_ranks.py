"""Models of several ranks in one process: loaded one after another, joined by threads over the fake transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import epslots
from epslots.group.join import start_rank
from epslots.group.rank_group import group_of
from epslots.planner.cost_model import Costs
from epslots.progress import ProgressDisplay
from epslots.runtime import Runtime, runtime_of
from epslots.transport.local_transport import LocalHub, LocalTransport
from tests.support.rank_helpers import PATIENCE_S, run_threads

# Costs by which tokens travel rather than experts, experts rather than tokens, and everything stays where it is.
TOKENS_TRAVEL = Costs(10**9, 10**9, 1, 1, 1, 1, 10**6)
GATHER = Costs(10**9, 10**9, 1, 1, 1, 10**6, 1)
COPIES_TRAVEL = Costs(1000, 10, 10_000, 1, 1, 1, 10**6)
NOTHING_TRAVELS = Costs(1, 10**9, 10**6, 1, 1, 10**9, 10**9)
WORK_SPREADS = Costs(10, 1, 1, 1000, 1, 1, 10**6)
ALL_COSTS = {
    "tokens travel": TOKENS_TRAVEL,
    "gather": GATHER,
    "copies travel": COPIES_TRAVEL,
    "nothing travels": NOTHING_TRAVELS,
    "work spreads": WORK_SPREADS,
}


class Grouped:
    """Ranks that are one model.

    Args:
        slots: of each rank.
    """

    def __init__(
        self,
        folder: Path,
        cache_dir: Path,
        slots: Sequence[int | str],
        costs: Costs | None = TOKENS_TRAVEL,
        **settings: Any,
    ) -> None:
        settings = {"device": "cpu", "dtype": "float32", "progress": False} | settings
        self.models = [epslots.load(folder, slots=s, cache_dir=cache_dir, **settings) for s in slots]
        self.hub = LocalHub(len(slots), deadline_s=PATIENCE_S)
        self.form(costs)

    def form(self, costs: Costs | None = TOKENS_TRAVEL) -> None:
        """Form a group on the hub as it is now."""
        silent = ProgressDisplay(False)

        def one(transport: LocalTransport) -> None:
            start_rank(self.models[transport.rank], transport, settings={}, costs=costs, display=silent)

        run_threads(one, len(self.models), hub=self.hub)

    def run(self, work: Callable[[int, PreTrainedModel], Any], timeout: float = PATIENCE_S) -> list[Any]:
        """``work(rank, model)`` on every rank, each keeping in step with those that do more; what each returned."""

        def one(transport: LocalTransport) -> Any:
            model = self.models[transport.rank]
            with torch.no_grad(), epslots.sync_ranks(model):
                return work(transport.rank, model)

        return run_threads(one, len(self.models), hub=self.hub, timeout=timeout)

    def runtime(self, rank: int) -> Runtime:
        return runtime_of(self.models[rank])

    def check(self) -> None:
        """Tables, slots and records agree on every rank, and all ranks agree about them."""
        groups = [group_of(model) for model in self.models]
        for rank, model in enumerate(self.models):
            runtime = runtime_of(model)
            runtime.check_integrity()
            for index, runner in enumerate(runtime.runners):
                resident_E = runner.cache.resident_E
                for group in groups:
                    assert group is not None
                    assert (group.shared.layers[index].state.holds_RE[rank] == resident_E).all(), f"rank {rank}, layer {index}"
