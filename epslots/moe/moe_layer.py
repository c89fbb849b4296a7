"""The life of a token batch in one MoE layer: the hot path, in the order in which it happens.

transformers' experts module calls ``MoELayer`` with what its router chose (experts.py; loading.py puts it there).

    prepare    count the tokens of each expert; ranks gather each other's counts
    plan       who computes what (assignment.py), which experts stay resident (evictions.py), and which are fetched
               into which slot in which wave (expert_passes.py)
    fetch      missing experts into slots, from the host store or from a peer's slot (expert_loader.py); and behind them
    what the
               next layer is expected to need (prefetch_policy.py)
    dispatch   tokens to the ranks that compute them (token_dispatcher.py)
    execute    sort the pairs by slot; one grouped pass through the experts for each wave (slot_experts.py)
    combine    results back to their tokens; weight and sum over k, in fp32 and in fixed order

On one rank all that travels vanishes: its counts are all there are, and its pairs stay where they are. No Python loop runs
over tokens or experts. A single rank's layer that has a slot for every expert takes no plan and no host synchronisation, and
neither do ranks that each hold the whole model: they compute their own tokens. Any other step takes one, to learn from the
counts what is missing.

Legend of shape suffixes: T tokens, K experts per token, N = T * K (token, k) pairs, R ranks, E experts, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from epslots.arrays import BoolArray, IntArray
from epslots.errors import ConfigError
from epslots.moe.cpu_experts import CpuRows
from epslots.moe.prefetcher import Prefetcher, PrefetchTarget
from epslots.moe.slot_experts import Needs, SlotExperts
from epslots.moe.token_dispatcher import Dispatch, LocalDispatch, dispatch
from epslots.planner.cache_policy import Policy, learns
from epslots.planner.cpu_offload import CpuShare, displaces_better
from epslots.planner.evictions import plan_evictions
from epslots.planner.expert_passes import ExpertPass
from epslots.planner.layer_planner import LayerPlanner
from epslots.planner.reuse_distance import stack_distances
from epslots.planner.use_history import UseHistory, record_use
from epslots.telemetry import Telemetry
from epslots.transport.lockstep import LockStep

# One step in so many is asked how soon its experts are used again; each layer in its turn.
REUSE_EVERY = 16

_NOTHING = np.zeros(0, np.int64)

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
        expected: this layer, as the one before looks at it.
        ahead: the view to the layer that follows, if anything is to be predicted of it.
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
        self._policy, self._learns = policy, learns(policy)
        self.history = history
        self._telemetry = telemetry
        self._lockstep: LockStep | None = None
        self._shared: LayerPlanner | None = None
        self.expected = PrefetchTarget(experts, lambda: self.score_E)
        self.ahead: Prefetcher | None = None
        self._zero_E = np.zeros(experts.num_experts, np.int64)
        self._nothing_E = np.zeros(experts.num_experts, bool)
        self.cpu_share: CpuShare | None = None
        self._one = torch.ones(1, dtype=torch.int64, device=experts.pool.device)
        self.steps = 0

    def join(self, lockstep: LockStep, shared: LayerPlanner) -> None:
        """Compute together with other ranks from now on."""
        self._lockstep, self._shared = lockstep, shared
        self.expected.join(shared)

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
        index_TK, weights_TK = self.expected.execute_predicted(index_TK, weights_TK)
        ids_N = index_TK.reshape(-1)
        if self._identity:
            ids_N = ids_N.clamp(max=self.experts.num_experts)
        began = time.perf_counter()
        counts = self._prepare(ids_N)
        usage = None if self.ahead is None else self.ahead.predict(hidden_TH, index_TK)
        with pool.lock:
            if self._lockstep is None:
                pairs_NH = self._step_alone(hidden_TH, ids_N, counts, usage)
            else:
                pairs_NH = self._step_together(hidden_TH, ids_N, counts, usage, self._lockstep)
        self._telemetry.count(self.index, layer_s=time.perf_counter() - began)
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
            usage = None if self.ahead is None else self.ahead.nothing()
            self._step_together(self.experts.zeros(0), counts[:0], counts, usage, self._lockstep)
        self._telemetry.count(self.index, layer_s=time.perf_counter() - began)

    def _prepare(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Tokens of each expert, int64 [E + 1]; the last entry counts ids beyond the last expert."""
        counts = torch.zeros(self.experts.num_experts + 1, dtype=torch.int64, device=ids_N.device)
        return counts.scatter_add_(0, ids_N, self._one.expand(ids_N.shape[0]))

    def _step_alone(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts: torch.Tensor, usage: torch.Tensor | None
    ) -> torch.Tensor:
        """One rank's step: each pair's result, [N, H]."""
        if self.index == 0 and self.expected.budget is not None:
            self.expected.budget.renew()
        if self.experts.never_misses:
            self._telemetry.count_resident(self.index, counts)
            if usage is not None:
                self._fetch_ahead(usage.cpu().numpy()[None], self._busy_1())
            return self.experts.execute(hidden_TH, ids_N)
        busy_1 = self._busy_1()
        counts_host, usage_E = _to_host(counts, usage)  # the one host synchronisation of a step
        counts_E = counts_host[:-1]
        needs = self.experts.needs(counts_E)
        needed_E = needs.needed_E
        self._note_uses(needed_E)
        score_E, evicted_E, hosted, slots_E = self._zero_E, self._nothing_E, _NOTHING, counts_E
        if needs.missing:
            score_E = self.score_E
            resident_1E, needed_1E = self.experts.resident_E[None], needed_E[None]
            if self.cpu_share is not None:
                hosted = self._choose_hosted(resident_1E, needed_1E, counts_E, score_E)
                slots_E = counts_E.copy()
                slots_E[hosted] = 0
                needed_1E = slots_E[None] > 0
            evicted_E = plan_evictions(resident_1E, needed_1E, self.experts.quota_1, score_E).evicted_RE[0]
        passes = self.experts.passes(slots_E, score_E, evicted_E)
        on_host = self.experts.begin_on_host(hidden_TH, ids_N, hosted, counts_E)
        self._count(counts_host, needs, passes)
        begun = self.experts.fetch(passes)
        self.expected.charge(needs.missing - len(hosted))
        usage_1E = None if usage_E is None else usage_E[None]
        self._fetch_ahead(usage_1E, busy_1)
        result = self._compute(LocalDispatch(hidden_TH, ids_N), slots_E, passes, begun, on_host)
        return self.experts.finish_on_host(on_host, result)

    def _choose_hosted(self, resident_1E: BoolArray, needed_1E: BoolArray, counts_E: IntArray, score_E: IntArray) -> IntArray:
        """The missing experts that this rank, if it is alone, computes on its host."""
        assert self.cpu_share is not None
        experts = np.flatnonzero(needed_1E[0] & ~resident_1E[0])
        ranks = np.zeros_like(experts)
        displaces = displaces_better(resident_1E, needed_1E, self.experts.quota_1, score_E, ranks, experts)
        return experts[self.cpu_share.choose(self.steps, ranks, experts, counts_E[experts], displaces)]

    def _step_together(
        self,
        hidden_TH: torch.Tensor,
        ids_N: torch.Tensor,
        counts: torch.Tensor,
        usage: torch.Tensor | None,
        lockstep: LockStep,
    ) -> torch.Tensor:
        """This rank's part of all ranks' step: each of its pairs' results, [N, H]."""
        shared, experts = self._shared, self.experts
        assert shared is not None
        lockstep.take_part(self.index)
        if shared.complete:
            experts.land()
            self._telemetry.count_resident(self.index, counts)
            return experts.execute(hidden_TH, ids_N)
        lockstep.exchanging = True
        pairs_NH = self._exchange(hidden_TH, ids_N, counts, usage, lockstep, shared)
        lockstep.exchanging = False
        return pairs_NH

    def _exchange(
        self,
        hidden_TH: torch.Tensor,
        ids_N: torch.Tensor,
        counts: torch.Tensor,
        usage: torch.Tensor | None,
        lockstep: LockStep,
        shared: LayerPlanner,
    ) -> torch.Tensor:
        """``_step_together`` where experts are missing somewhere."""
        experts = self.experts
        top_k = ids_N.shape[0] // hidden_TH.shape[0] if len(hidden_TH) else 0
        began = time.perf_counter()
        all_ranks = lockstep.gather_counts(self.index, counts, top_k, shared.digest, usage, busy=experts.link_is_busy)
        counts_R, top_k = all_ranks.counts_R, all_ranks.top_k
        usage_RE = None if usage is None else all_ranks.predicted_R[:, : len(usage)].astype(np.int64)
        self._telemetry.count(self.index, wait_s=time.perf_counter() - began)
        experts.confirm()  # what was queued before the counts has arrived with them
        counts_RE = counts_R[:, :-1]
        used_E = counts_RE.sum(0) > 0
        if not used_E.any():
            return experts.zeros(len(ids_N))
        self._note_uses(used_E)
        score_E = self.score_E
        plan = shared.plan(counts_RE, score_E)
        computed_E = np.zeros(experts.num_experts, np.int64)
        computed_E[plan.experts_U] = plan.computed_U
        slots_E = computed_E
        if len(plan.hosted):
            slots_E = computed_E.copy()
            slots_E[plan.hosted] = 0
        needs = experts.needs(computed_E)
        passes = experts.passes(slots_E, score_E, plan.evicted_E, plan.copies)
        self._count(counts_R[shared.rank], needs, passes)
        agreed = lockstep.agreed
        begun = experts.fetch(passes, plan.copies, agreed=agreed)
        self._fetch_ahead(usage_RE, all_ranks.busy_R)
        tokens_R = counts_R.sum(1) // max(top_k, 1)
        rows_TH = hidden_TH.to(experts.dtype)
        arrived = dispatch(lockstep.transport, rows_TH, ids_N, plan, tokens_R, top_k, shared.costs, agreed=agreed)
        self._telemetry.count(self.index, pairs_sent=plan.sent, pairs_received=plan.received)
        lockstep.computing = True
        on_host = experts.begin_on_host(arrived.rows_MH, arrived.ids_M, plan.hosted, computed_E)
        results_MH = experts.finish_on_host(on_host, self._compute(arrived, slots_E, passes, begun, on_host))
        lockstep.computing = False
        pairs_NH = arrived.combine(results_MH)
        if plan.move is not None:
            experts.move(plan.move, agreed=agreed)
        return pairs_NH

    def _busy_1(self) -> BoolArray:
        return np.array([self.experts.link_is_busy])

    def _fetch_ahead(self, usage_RE: IntArray | None, busy_R: BoolArray) -> None:
        """Begin to fetch what the next layer is expected to use, if anything was said of it."""
        if usage_RE is not None and self.ahead is not None:
            self.ahead.fetch(usage_RE, busy_R, self.experts.pool)

    def _compute(
        self, arrived: Dispatch, counts_E: IntArray, passes: tuple[ExpertPass, ...], begun: int, on_host: CpuRows | None
    ) -> torch.Tensor:
        """The results of the pairs that are here: [M, H], pair by pair; undefined for those that slots have no part in."""
        here = None if on_host is None else int(counts_E.sum())
        return self.experts.compute(arrived.rows_MH, arrived.ids_M, counts_E, passes, begun, here)

    def _note_uses(self, used_E: BoolArray) -> None:
        self.steps += 1
        if (self.steps + self.index) % REUSE_EVERY == 0:
            distances = stack_distances(self.history.last_use, used_E, self.score_E)
            self._telemetry.count_reuse(self.index, distances)
        self._telemetry.count_uses(self.index, used_E)
        self.expected.judge(used_E)
        slots = None
        if self._learns:
            slots = self.experts.slots if self._shared is None else int(self._shared.quota_R.sum())
        record_use(self.history, used_E, self.steps, slots)

    def _count(self, counts: IntArray, needs: Needs, passes: tuple[ExpertPass, ...]) -> None:
        rounds = max(1, len(passes)) if needs.needed > self.experts.slots else 1
        hits = needs.needed - needs.missing
        self._telemetry.count_step(self.index, counts, hits=hits, misses=needs.missing, passes=rounds)


def _to_host(counts: torch.Tensor, usage: torch.Tensor | None) -> tuple[IntArray, IntArray | None]:
    """Both on the host, by one copy."""
    if usage is None:
        return counts.cpu().numpy(), None
    if counts.device.type == "cpu":
        return counts.numpy(), usage.numpy()
    both = torch.cat([counts, usage.to(counts.dtype)]).cpu().numpy()
    return both[: len(counts)], both[len(counts) :]


def combine(pairs_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight each pair's result and sum over k, in the order of k and at least in fp32: [T, H] in ``dtype``."""
    tokens, top_k = weights_TK.shape
    exact = torch.promote_types(pairs_NH.dtype, torch.float32)
    pairs_TKH = pairs_NH.view(tokens, top_k, pairs_NH.shape[-1]).to(exact)
    return (pairs_TKH * weights_TK.to(exact)[..., None]).sum(dim=1).to(dtype)
