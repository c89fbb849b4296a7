"""The life of a token batch in one MoE layer: the hot path, in the order in which it happens.

transformers' experts module calls ``MoELayer`` with what its router chose (experts.py; loading.py puts it there).

    prepare    count the tokens of each expert; ranks gather each other's counts
    plan       who computes what (assignment.py), which experts stay resident (residency.py), and which are fetched
               into which slot in which wave (waves.py)
    fetch      missing experts into slots, from the host store or from a peer's slot (fetch.py)
    dispatch   tokens to the ranks that compute them (exchange.py)
    execute    sort the pairs by slot; one grouped pass through the experts for each wave (slot_experts.py)
    combine    results back to their tokens; weight and sum over k, in fp32 and in fixed order

On one rank all that travels vanishes: its counts are all there are, and its pairs stay where they are. No Python loop runs
over tokens or experts. A single rank's layer that has a slot for every expert takes no plan and no host synchronisation; any
other takes one, to learn from the counts what is missing.

Legend of shape suffixes: T tokens, K experts per token, N = T * K (token, k) pairs, R ranks, E experts, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from epslots.errors import ConfigError
from epslots.eviction import IntArray, Policy, UseHistory, record_use
from epslots.exchange import Dispatched, Stay, dispatch
from epslots.lockstep import LockStep
from epslots.moves import Room
from epslots.residency import BoolArray, settle
from epslots.reuse import stack_distances
from epslots.shared_layer import Copies, SharedLayer
from epslots.slot_experts import SlotExperts
from epslots.telemetry import Telemetry
from epslots.waves import NO_WAVE, Wave

# One step in so many is asked how soon its experts are used again; each layer in its turn.
REUSE_EVERY = 16

RouteObserver = Callable[[int, torch.Tensor], None]
"""Called with (layer index, top_k_index [T, K]) for every step; must not change it."""


class MoELayer:
    """Runs one experts module from slots.

    Args:
        index: the layer's number among the model's MoE layers.
        experts: computes with this rank's slots.
        identity: whether ids >= E stand for experts that return their input.
        history: the layer's row of past uses, on whichever rank; changed in place.

    Attributes:
        steps: steps that ``history`` counts. Among several ranks both are the same on all.
    """

    def __init__(
        self,
        *,
        index: int,
        experts: SlotExperts,
        identity: bool,
        policy: Policy,
        history: UseHistory,
        telemetry: Telemetry,
    ) -> None:
        self.index = index
        self.experts = experts
        self.observer: RouteObserver | None = None
        self._identity = identity
        self._policy = policy
        self.history = history
        self._telemetry = telemetry
        self._lockstep: LockStep | None = None
        self._shared: SharedLayer | None = None
        self._room: Callable[[], Room | None] = lambda: None
        self._one = torch.ones(1, dtype=torch.int64, device=experts.pool.device)
        self.steps = 0

    def join(self, lockstep: LockStep, shared: SharedLayer, room: Callable[[], Room | None]) -> None:
        """Compute together with other ranks from now on.

        Args:
            room: what ``SharedLayer.decide`` is given, in each step.
        """
        self._lockstep, self._shared, self._room = lockstep, shared, room

    @property
    def score_E(self) -> IntArray:
        """The eviction policy's scores as they are now."""
        return self._policy(self.history)

    def __call__(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' weighted sum for each token, [T, H] in ``hidden_TH``'s dtype.

        Args:
            hidden_TH: float, on the pool's device.
            index_TK: int64, the router's choice; never altered.
            weights_TK: float, the router's weights.
        """
        pool = self.experts.pool
        if hidden_TH.device != pool.device:
            raise ConfigError(
                f"the model was loaded for {pool.device} and is given tensors on {hidden_TH.device}; load it with "
                f"device={str(hidden_TH.device)!r} instead of moving it"
            )
        if self.observer is not None:
            self.observer(self.index, index_TK)
        if self._lockstep is None:
            if not index_TK.numel():
                return torch.zeros_like(hidden_TH)
        else:
            self._lockstep.arrive(self.index)
        ids_N = index_TK.reshape(-1)
        if self._identity:
            ids_N = ids_N.clamp(max=self.experts.num_experts)
        began = time.perf_counter()
        counts = self._prepare(ids_N)
        with pool.lock:
            if self._lockstep is None:
                pairs_NH = self._step_alone(hidden_TH, ids_N, counts)
            else:
                pairs_NH = self._step_together(hidden_TH, ids_N, counts, self._lockstep)
        self._telemetry.count_time(self.index, time.perf_counter() - began)
        if self._identity:
            weightless_N = ids_N >= self.experts.num_experts
            pairs_NH = torch.where(weightless_N[:, None], hidden_TH.repeat_interleave(index_TK.shape[1], 0), pairs_NH)
        return combine(pairs_NH, weights_TK, hidden_TH.dtype)

    def idle(self) -> None:
        """Take part in a step of all ranks without a token."""
        assert self._lockstep is not None
        began = time.perf_counter()
        counts = torch.zeros(self.experts.num_experts + 1, dtype=torch.int64, device=self.experts.pool.device)
        with self.experts.pool.lock:
            self._step_together(self.experts.zeros(0), counts[:0], counts, self._lockstep)
        self._telemetry.count_time(self.index, time.perf_counter() - began)

    def _prepare(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Tokens of each expert, int64 [E + 1]; the last entry counts ids beyond the last expert."""
        counts = torch.zeros(self.experts.num_experts + 1, dtype=torch.int64, device=ids_N.device)
        return counts.scatter_add_(0, ids_N, self._one.expand(ids_N.shape[0]))

    def _step_alone(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """One rank's step: each pair's result, [N, H]."""
        if self.experts.never_misses:
            self._telemetry.count_resident(self.index, counts)
            return self.experts.execute(hidden_TH, ids_N)
        counts_host = counts.cpu().numpy()  # the one host synchronisation of a step
        counts_E = counts_host[:-1]
        needed_E = counts_E > 0
        self._note_uses(needed_E)
        waves: tuple[Wave, ...] = ()
        missing = needed_E & ~self.experts.resident_E
        if missing.any():
            score_E = self.score_E
            change = settle(self.experts.resident_E[None], needed_E[None], self.experts.quota_1, score_E)
            waves = self.experts.waves(needed_E, score_E, change.evicted_RE[0])
        self._count(counts_host, needed_E, missing, waves)
        self._fetch(waves)
        return self._compute(Stay(hidden_TH, ids_N), counts_E, waves)

    def _step_together(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts: torch.Tensor, lockstep: LockStep
    ) -> torch.Tensor:
        """This rank's part of all ranks' step: each of its pairs' results, [N, H]."""
        shared, experts = self._shared, self.experts
        assert shared is not None
        top_k = ids_N.shape[0] // hidden_TH.shape[0] if len(hidden_TH) else 0
        began = time.perf_counter()
        counts_R, top_k = lockstep.gather_counts(self.index, counts, top_k, shared.digest)
        self._telemetry.count_wait(self.index, time.perf_counter() - began)
        experts.confirm()  # what was queued before the counts has arrived with them
        counts_RE = counts_R[:, :-1]
        used_E = counts_RE.sum(0) > 0
        if not used_E.any():
            return experts.zeros(len(ids_N))
        self._note_uses(used_E)
        score_E = self.score_E
        plan = shared.plan(counts_RE, score_E, self._room())
        computed_E = np.zeros(experts.num_experts, np.int64)
        computed_E[plan.experts_U] = plan.computed_U
        needed_E = computed_E > 0
        missing = needed_E & ~experts.resident_E
        waves: tuple[Wave, ...] = ()
        if missing.any():
            waves = experts.waves(needed_E, score_E, plan.evicted_E)
        self._count(counts_R[shared.rank], needed_E, missing, waves)
        agreed = lockstep.agreed
        self._fetch(waves, plan.copies, agreed=agreed)
        tokens_R = counts_R.sum(1) // max(top_k, 1)
        rows_TH = hidden_TH.to(experts.dtype)
        arrived = dispatch(lockstep.transport, rows_TH, ids_N, plan, tokens_R, top_k, shared.costs, agreed=agreed)
        self._telemetry.count_exchange(self.index, sent=plan.sent, received=plan.received)
        pairs_NH = arrived.give_back(self._compute(arrived, computed_E, waves))
        if plan.move is not None:
            experts.move(plan.move, agreed=agreed)
        return pairs_NH

    def _fetch(self, waves: tuple[Wave, ...], copies: Copies | None = None, *, agreed: bool = True) -> None:
        """Bring in what a single wave misses, and give peers their copies. Several waves fetch as they go."""
        if len(waves) == 1 or copies is not None:
            self.experts.fetch(waves[0] if len(waves) == 1 else NO_WAVE, copies, agreed=agreed)

    def _compute(self, arrived: Dispatched, counts_E: IntArray, waves: tuple[Wave, ...]) -> torch.Tensor:
        """The results of the pairs that are here: [M, H], pair by pair."""
        if len(waves) > 1:
            return self.experts.execute_waves(arrived.rows_MH, arrived.ids_M, counts_E, waves)
        return self.experts.execute(arrived.rows_MH, arrived.ids_M)

    def _note_uses(self, used_E: BoolArray) -> None:
        self.steps += 1
        if (self.steps + self.index) % REUSE_EVERY == 0:
            distances = stack_distances(self.history.last_use, used_E, self.score_E)
            self._telemetry.count_reuse(self.index, distances)
        self._telemetry.count_uses(self.index, used_E)
        record_use(self.history, used_E, self.steps)

    def _count(self, counts: IntArray, needed_E: BoolArray, missing_E: BoolArray, waves: tuple[Wave, ...]) -> None:
        misses = int(np.count_nonzero(missing_E))
        hits = int(np.count_nonzero(needed_E)) - misses
        self._telemetry.count_step(self.index, counts, hits=hits, misses=misses, waves=max(1, len(waves)))


def combine(pairs_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight each pair's result and sum over k, in the order of k and at least in fp32: [T, H] in ``dtype``."""
    tokens, top_k = weights_TK.shape
    exact = torch.promote_types(pairs_NH.dtype, torch.float32)
    pairs_TKH = pairs_NH.view(tokens, top_k, pairs_NH.shape[-1]).to(exact)
    return (pairs_TKH * weights_TK.to(exact)[..., None]).sum(dim=1).to(dtype)
