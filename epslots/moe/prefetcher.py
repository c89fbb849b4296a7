"""From one MoE layer to the next: what it will need is predicted from the hidden state at hand, and fetched meanwhile.

    Prefetcher       the view from a layer to the one that follows: asks the predictor
    PrefetchTarget    the layer that is looked at: decides whether to ask (prefetch_policy.py), chooses what to fetch, and
    begins to

Legend of shape suffixes: T tokens, K experts per token, R ranks, E experts of the layer that is looked at, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from epslots.arrays import BoolArray, IntArray
from epslots.cache.slot_pool import SlotPool
from epslots.errors import CorruptExpertError
from epslots.moe.slot_experts import SlotExperts
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.prefetch_policy import PrefetchBudget, Prefetches, PrefetchPolicy


class UsagePredictor(Protocol):
    """Tells from one layer what the next will need. No host synchronisation."""

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """How likely some token will choose each of the next layer's experts, int32 [E], 0 to 255; None = no telling."""
        ...

    def skip(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Nobody asks in this step; the next one's tokens follow these."""
        ...

    def set_previous_rows(self, row_T: torch.Tensor | None) -> None:
        """Whose row precedes each row of the steps to come, until the next call: as ``Predictor.set_previous_rows``."""
        ...

    def ids(self, layer: int, hidden_TH: torch.Tensor, k: int) -> torch.Tensor:
        """The experts that each token will most likely choose in the next layer, likeliest first: int64 [T, k]."""
        ...


@dataclass(frozen=True)
class PrefetchConfig:
    """What a model does with predictions.

    Attributes:
        settings: in words; the same on all ranks of a group.
        bytes_per_step: what a rank may fetch in a step before nothing more is fetched ahead; None = no bound.
    """

    settings: str = "nothing is fetched ahead"
    bytes_per_step: int | None = None


class _Own(threading.local):
    """Each thread's own."""

    ids: torch.Tensor | None = None


class PrefetchTarget:
    """One layer, looked at from the one before.

    Args:
        experts: the layer's own.
        score: the eviction policy's scores as they are.

    Attributes:
        budget: what this rank, if it is alone, may fetch in a step before nothing more is fetched ahead; one for all layers.
        own: whose ``ids``, [T, K], is what this thread is to execute in the layer's next step instead of what its router
            chooses; None = nothing.
    """

    def __init__(self, experts: SlotExperts, score: Callable[[], IntArray]) -> None:
        self.experts = experts
        self._score = score
        self._shared: LayerPlanner | None = None
        self._prefetch_policy = PrefetchPolicy()
        self._home_E = np.zeros(experts.num_experts, np.int64)
        self._steps = 0
        self.budget: PrefetchBudget | None = None
        self.own = _Own()

    def join(self, shared: LayerPlanner) -> None:
        """Decide as all ranks do from now on."""
        self._shared, self._prefetch_policy, self._steps = shared, shared.prefetch_policy, 0

    @property
    def in_group(self) -> bool:
        """Whether all ranks of a group decide alike."""
        return self._shared is not None

    @property
    def asked(self) -> bool:
        """Whether a prediction of the layer's next step is of use; the same on all ranks."""
        if not self._prefetch_policy.due(self._steps + 1):
            return False
        held_E = self.experts.resident_E if self._shared is None else self._shared.holds_RE.any(0)
        return not held_E.all()

    def judge(self, used_E: BoolArray) -> None:
        """A step has come, and uses these experts on whichever rank."""
        self._steps += 1
        self._prefetch_policy.judge(used_E)

    def fetch(self, usage_RE: IntArray, busy_R: BoolArray) -> None:
        """Begin to fetch what these predictions say. Arguments as ``PrefetchPolicy.plan``."""
        found = self._choose(usage_RE, busy_R)
        if found is not None:
            rank = 0 if self._shared is None else self._shared.rank
            mine = found.experts[found.ranks == rank]
            if len(mine):
                # Alone, a corrupt record is an error when its expert is needed. In a group all others count on the fetch.
                with nullcontext() if self.in_group else suppress(CorruptExpertError):
                    self.experts.prefetch(mine, found.evicted_RE[rank])

    def _choose(self, usage_RE: IntArray, busy_R: BoolArray) -> Prefetches | None:
        if self._shared is not None:
            return self._shared.prefetch(usage_RE, self._score(), busy_R)
        experts = self.experts
        nbytes = experts.record_bytes
        return self._prefetch_policy.plan(
            usage_RE, experts.resident_E[None], experts.quota_1, self._home_E, self._score(), busy_R, self.budget, nbytes
        )

    def charge(self, experts: int) -> None:
        """So many experts were fetched on demand."""
        if self.budget is not None:
            self.budget.spend(np.zeros(experts, np.int64), self.experts.record_bytes)

    def execute_predicted(self, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was predicted instead of what the router chose, if anything was; with the router's weights, largest first."""
        ids_TK, self.own.ids = self.own.ids, None
        if ids_TK is None or ids_TK.shape != index_TK.shape:
            return index_TK, weights_TK
        return ids_TK, weights_TK.sort(dim=-1, descending=True).values


class Prefetcher:
    """The view from one layer to the next.

    Args:
        index: the layer's number, from which is looked.
        expected: of the next.
        approximate: whether that executes what is predicted instead of what its router will choose.
        fetches: whether what is predicted is fetched meanwhile.
    """

    def __init__(
        self,
        index: int,
        expected: PrefetchTarget,
        predictor: UsagePredictor,
        *,
        approximate: bool = False,
        fetches: bool = True,
    ) -> None:
        self._index = index
        self._expected = expected
        self._predictor = predictor
        self.approximate, self._fetches = approximate, fetches
        experts = expected.experts
        self._nothing = torch.zeros(experts.num_experts, dtype=torch.int32, device=experts.pool.device)

    @torch.no_grad()
    def predict(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """What the next layer is expected to use, int32 [E] from 0 to 255; None if nobody asks."""
        if self.approximate:
            self._expected.own.ids = self._predictor.ids(self._index, hidden_TH, index_TK.shape[1])
        if not self._fetches:
            return None
        if not self._expected.asked:
            if not self.approximate:
                self._predictor.skip(self._index, hidden_TH)
            return None
        usage = self._predictor.usage(self._index, hidden_TH, index_TK)
        return self._nothing if usage is None else usage

    def nothing(self) -> torch.Tensor | None:
        """``predict`` of a rank without tokens."""
        return self._nothing if self._fetches and self._expected.asked else None

    def fetch(self, usage_RE: IntArray, busy_R: BoolArray, here: SlotPool) -> None:
        """Begin to fetch what all ranks expect.

        Args:
            busy_R: as in ``PrefetchPolicy.plan``.
            here: the pool whose lock the caller holds.
        """
        there = self._expected.experts.pool
        # Another thread may hold that pool's lock, and wait for this one's. In a group of ranks there is no other.
        if there is here:
            self._expected.fetch(usage_RE, busy_R)
        elif there.lock.acquire(blocking=self._expected.in_group):
            try:
                self._expected.fetch(usage_RE, busy_R)
            finally:
                there.lock.release()
