"""Prefetching: while one MoE layer runs, the experts that the next one will need are predicted and fetched.

    Prefetcher      from one layer: asks the predictor about the next one
    PrefetchTarget  the next layer: whether a prediction is of use, and the fetches themselves

``MoELayer`` calls ``Prefetcher.predict`` with its tokens, and ``Prefetcher.fetch`` when all ranks' predictions are there. The
planner chooses the experts (prefetch_policy.py).

Legend of shape suffixes: T tokens, K experts per token, R ranks, E experts of the next layer, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from epslots.arrays import BoolArray, IntArray
from epslots.cache.slot_pool import SlotPool
from epslots.errors import CorruptExpertError
from epslots.moe.expert_cache import ExpertCache
from epslots.planner.layer_planner import LayerPlanner


class UsagePredictor(Protocol):
    """Predicts from one layer's tokens which experts the next layer will use. No host synchronisation."""

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """How likely some token will choose each of the next layer's experts, int32 [E], 0 to 255; None = unknown."""
        ...

    def skip(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Take note of a step's rows without a prediction; the next step's tokens follow them."""
        ...

    def set_previous_rows(self, row_T: torch.Tensor | None) -> None:
        """Set which row precedes each row of this thread's steps to come, until the next call.

        Args:
            row_T: int64 on the device: 0 = none, a sequence begins; i > 0 = row i - 1 of the same step; -i = the i-th row from
                the end of the step before. None = the predictor guesses.
        """
        ...

    def keep_rows_at(self, row_T: torch.Tensor | None, rows: int = 0) -> None:
        """Keep this thread's rows in place from now on, where captured steps find them. Row t of a step is at ``row_T[t]``.

        Args:
            row_T: int64 on the device, below ``rows``; repeated rows are alike. The row kept there precedes row t. None = no
                longer.
            rows: places.
        """
        ...

    def ids(self, layer: int, hidden_TH: torch.Tensor, k: int) -> torch.Tensor:
        """The experts that each token will most likely choose in the next layer, likeliest first: int64 [T, k]."""
        ...


@dataclass(frozen=True)
class PrefetchConfig:
    """A model's use of predictions.

    Attributes:
        settings: in words; the same on all ranks of a group.
        bytes_per_step: bytes that a rank may fetch in a step before it prefetches nothing more; None = no bound.
    """

    settings: str = "nothing is fetched ahead"
    bytes_per_step: int | None = None


class _PredictedIds(threading.local):
    """Each thread's own."""

    ids_TK: torch.Tensor | None = None


class PrefetchTarget:
    """A layer as the target of predictions by the layer before.

    Args:
        cache: the layer's slots.
        scores: the eviction policy's scores of its experts.
        planner: the layer's.

    Attributes:
        predicted: its ``ids_TK`` are the experts that this thread is to execute in the layer's next step instead of those that
            the router chooses; None = the router's.
    """

    def __init__(self, cache: ExpertCache, scores: Callable[[], IntArray], planner: LayerPlanner) -> None:
        self.cache = cache
        self.planner = planner
        self.predicted = _PredictedIds()
        self._scores = scores

    def plan_by(self, planner: LayerPlanner) -> None:
        """Take the layer's plans from another planner from now on."""
        self.planner = planner

    def fetch(self, usage_RE: IntArray, busy_R: BoolArray) -> None:
        """Begin to fetch the experts that these predictions are worth.

        Args:
            usage_RE: how likely each rank's tokens will use each expert, in 256ths.
            busy_R: whether each rank's link has something to do.
        """
        planner = self.planner
        if planner.alone:
            planner.refresh(self.cache.slot_of_E)
        found = planner.prefetch(usage_RE, self._scores, busy_R)
        if found is None:
            return
        mine = found.experts if planner.alone else found.experts[found.ranks == planner.rank]
        if len(mine):
            try:
                self.cache.prefetch(mine, found.evicted_RE[planner.rank])
            except CorruptExpertError:
                # Alone, it is an error when the expert is needed. In a group all others count on the fetch.
                if not planner.alone:
                    raise

    def take_predicted(self, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that this thread is to execute, [T, K]: predicted ones with the router's weights, largest first."""
        ids_TK = self.predicted.ids_TK
        if ids_TK is None:
            return index_TK, weights_TK
        self.predicted.ids_TK = None
        if ids_TK.shape != index_TK.shape:
            return index_TK, weights_TK
        return ids_TK, weights_TK.sort(dim=-1, descending=True).values


class Prefetcher:
    """Predicts from one layer for the next.

    Args:
        index: the number of the layer whose tokens are seen.
        target: the next layer.
        approximate: whether the next layer executes the predicted experts instead of those that its router will choose.
        fetches: whether predicted experts are fetched.
    """

    def __init__(
        self,
        index: int,
        target: PrefetchTarget,
        predictor: UsagePredictor,
        *,
        approximate: bool = False,
        fetches: bool = True,
    ) -> None:
        self._index = index
        self._target = target
        self._predictor = predictor
        self.approximate, self.fetches = approximate, fetches
        cache = target.cache
        self._unused_E = torch.zeros(cache.num_experts, dtype=torch.int32, device=cache.pool.device)

    def predict(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """How likely the next layer will use each expert, int32 [E] from 0 to 255. None if a prediction is of no use."""
        tokens, hidden_TH = hidden_TH.shape[0], hidden_TH.detach()  # ``no_grad`` would take longer
        if self.approximate and tokens:
            self._target.predicted.ids_TK = self._predictor.ids(self._index, hidden_TH, index_TK.shape[1])
        if not self.fetches:
            return None
        if not self._target.planner.wants_prediction:
            if tokens and not self.approximate:
                self._predictor.skip(self._index, hidden_TH)
            return None
        usage = self.usage(hidden_TH, index_TK) if tokens else None
        return self._unused_E if usage is None else usage

    def usage(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """The predictor's usage of the next layer, whether or not earlier predictions were good."""
        return self._predictor.usage(self._index, hidden_TH, index_TK)

    def fetch(self, usage_RE: IntArray, busy_R: BoolArray, held: SlotPool) -> None:
        """Begin to fetch what all ranks predict.

        Args:
            usage_RE: how likely each rank's tokens will use each expert, in 256ths.
            busy_R: whether each rank's link has something to do.
            held: the pool whose lock the caller holds.
        """
        pool = self._target.cache.pool
        # Another thread may hold that pool's lock, and wait for this one's. In a group of ranks there is no other thread.
        if pool is held:
            self._target.fetch(usage_RE, busy_R)
        elif pool.lock.acquire(blocking=not self._target.planner.alone):
            try:
                self._target.fetch(usage_RE, busy_R)
            finally:
                pool.lock.release()
