"""The life of a token batch in one MoE layer. transformers' experts module calls ``MoELayer`` with its router's choice.

    prepare    count the tokens of each expert; predict the next layer's experts (prefetcher.py)
    gather     all ranks' counts and predictions, on the host: the step's one synchronisation (peers.py)
    plan       decide who computes what, what is fetched and what evicted (planner/layer_planner.py); order this rank's
               fetches and passes (expert_cache.py)
    fetch      missing experts into slots, from the host store or a peer's slot; behind them the next layer's (prefetcher.py)
    dispatch   tokens to the ranks that compute them (token_dispatcher.py)
    execute    sort the pairs by slot; one grouped product for each pass (expert_compute.py); results back to their tokens
    migrate    behind the step's demand, fetches for the placement's sake (expert_cache.py)
    combine    weight and sum over k, in fp32 and in fixed order

All layers go this way, on one rank and on many. A batch has no counts where no expert can be missing on any rank, or where the
device decides about slots: then ranks exchange nothing, the plan is ``NOTHING_PLANNED``, and the host waits for nothing.

Glossary: a *pair* is one (token, k). A *slot* holds one expert's weights on the device; *residents* are the experts in slots.
A rank *hits* a resident expert and *misses* another; some residents are *evicted* for fetches. A *pass* is one grouped product
over part of the layer's experts. A *migration* is a fetch for the placement's sake.

Legend of shape suffixes: T tokens, K experts per token, N = T * K pairs, M pairs computed here, R ranks, E experts, H hidden
size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import torch

from epslots.arrays import BoolArray, IntArray
from epslots.errors import ConfigError
from epslots.moe.expert_cache import ExpertCache
from epslots.moe.expert_compute import ExpertCompute
from epslots.moe.peers import NOTHING_GATHERED, Alone, Peers, gather_alone
from epslots.moe.prefetcher import Prefetcher, PrefetchTarget
from epslots.moe.token_dispatcher import Dispatch, LocalDispatch, dispatch
from epslots.moe.token_room import TokenRoom
from epslots.planner.cache_policy import Policy, learns
from epslots.planner.cpu_offload import CpuShare
from epslots.planner.layer_planner import FetchBudgets, LayerPlanner
from epslots.planner.layer_state import LayerState
from epslots.planner.plan import NOTHING_PLANNED, RankPlan
from epslots.planner.reuse_distance import stack_distances
from epslots.planner.use_history import UseHistory, note_use, used_experts
from epslots.telemetry import Telemetry
from epslots.transport.lockstep import Gathered, LinkState

# One step in so many is sampled for stack distances; the layers take turns.
REUSE_EVERY = 16

RouteObserver = Callable[[int, torch.Tensor], None]
"""Called with (layer index, top_k_index [T, K]) for every step; must not change it."""


class Executor(Protocol):
    """Carries out a layer's plans: ``ExpertCompute``, or ``DeviceExperts`` while the slots are lent to it."""

    def begin_unplanned(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor
    ) -> None:
        """Begin a step that the host doesn't plan: count its pairs in totals on the device (``PairKernels.add_counts``).

        Its plan is ``NOTHING_PLANNED``. Where experts may be missing, the device decides about its slots here.
        """
        ...

    def fetch(self, plan: RankPlan, *, agreed: bool) -> None:
        """Begin the step's fetches. ``agreed`` as in ``Transport.exchange``."""
        ...

    def execute(self, routed: Dispatch, plan: RankPlan) -> torch.Tensor:
        """The results of the pairs that are here, [M, H]."""
        ...


class Batch(msgspec.Struct, frozen=True):
    """A rank's tokens in one layer. ``MoELayer.prepare`` fills every field.

    Attributes:
        hidden_TH, weights_TK: the hidden states, and the router's weights.
        ids_N: int64, the expert of each pair; those without weights are E.
        counts: int64 [E + 1] on the device, pairs of each expert; the last entry counts those without weights. None where
            the host needs none to plan: no expert can be missing on any rank, or the device decides.
        usage: int32 on the device, how likely the next layer uses each expert, 0 to 255; None = not predicted.
    """

    hidden_TH: torch.Tensor
    ids_N: torch.Tensor
    weights_TK: torch.Tensor
    counts: torch.Tensor | None
    usage: torch.Tensor | None


class MoELayer:
    """Runs one experts module from slots.

    It is complete as constructed: a rank alone. ``form`` makes it a layer of a group, and of each later group.

    Args:
        index: the layer's number among the model's MoE layers.
        experts: computes with this rank's slots.
        policy: scores experts; the lowest are evicted. Also an attribute.
        history: the layer's past uses on any rank; changed in place.

    Attributes:
        cache: this rank's slots of the layer.
        planner: plans the layer's steps.
        steps: steps that ``history`` counts; the same on all ranks of a group, as ``history`` is.
        complete: whether no expert can be missing, on any of the ranks.
        prefetch_target: this layer as the one before sees it.
        prefetcher: predicts for the next layer; None where nothing is predicted.
    """

    def __init__(
        self, index: int, experts: ExpertCompute, *, policy: Policy, history: UseHistory, telemetry: Telemetry
    ) -> None:
        self.index = index
        self.experts, self.cache = experts, experts.cache
        self.history, self.steps = history, 0
        self._observer: RouteObserver | None = None
        self.prefetcher: Prefetcher | None = None
        self._room: TokenRoom | None = None
        self.policy, self._learns = policy, learns(policy)
        self._telemetry = telemetry
        self._num_experts, self._device = self.cache.num_experts, self.cache.pool.device
        self._computes_now = self._device.type == "cpu"  # a GPU computes later than its host asks
        self._no_tokens = experts.no_tokens()
        self._peers: Peers = Alone()
        self.planner = plan_alone(self.cache)
        self.prefetch_target = PrefetchTarget(self.cache, self.scores, self.planner)
        self._executor: Executor = experts
        self.form(self._peers, self.planner, complete=self.cache.holds_all)

    def form(self, peers: Peers, planner: LayerPlanner, *, complete: bool) -> None:
        """Make all steps from now on with these peers, by plans of this planner. Called between steps.

        A layer outlives its groups: each epoch's group brings other ranks, other residents and other costs.

        Args:
            complete: whether no expert will ever be missing on any of the ranks: then each computes its own tokens.

        Raises:
            StoreError: a fetch that was in flight has failed; the layer is as it was.
        """
        if complete:  # from now on steps look for no fetch in flight
            self.cache.wait_for_all()
        self._peers, self.planner, self.complete = peers, planner, complete
        self._exchanges = not (peers.alone or complete)  # other ranks take part in the layer's steps
        self.prefetch_target.plan_by(planner)
        if peers.transport is not None:
            self.experts.wait_by(peers.transport.wait_until)

    def prefetch_by(self, prefetcher: Prefetcher) -> None:
        """Predict for the next layer from now on. Layers form a circle, so none is made with it."""
        self.prefetcher = prefetcher

    def divide_by(self, room: TokenRoom) -> None:
        """Divide steps that exceed the memory from now on, on all ranks alike."""
        self._room = room

    def continue_from(self, steps: int) -> None:
        """Go on from so many steps: ``history`` has been changed elsewhere, and counts them."""
        self.steps = steps

    def observe(self, observer: RouteObserver | None) -> None:
        """Show every choice of the router to ``observer`` from now on; None ends it."""
        self._observer = observer

    @property
    def observed(self) -> bool:
        """Whether ``observe`` is in force."""
        return self._observer is not None

    def lend_slots(self, executor: Executor) -> None:
        """Let ``executor`` decide about the layer's slots, compute every step and prefetch, until ``take_slots_back``."""
        assert not self.slots_are_lent, "the slots are lent already"
        self._executor = executor

    def take_slots_back(self) -> None:
        """Decide about the layer's slots by its own plans again."""
        assert self.slots_are_lent, "the slots aren't lent"
        self._executor = self.experts

    @property
    def slots_are_lent(self) -> bool:
        """Whether ``lend_slots`` is in force."""
        return self._executor is not self.experts

    def give_slot(self, taker: MoELayer, evicted: int) -> None:
        """Give a slot to a neighbouring layer of the pool.

        Args:
            evicted: this layer's expert that is evicted before; -1 = the layer has an empty slot.
        """
        self.cache.give_slot(taker.cache, evicted)
        self.use_slot_range()
        taker.use_slot_range()

    def use_slot_range(self) -> None:
        """Follow a change of the layer's slots in the pool. The plans of a group have entered it before."""
        self.experts.use_slot_range()
        if self._peers.alone:
            self.planner.state.quota_R[0] = self.cache.slots
            self.form(self._peers, self.planner, complete=self.cache.holds_all)

    def scores(self) -> IntArray:
        """The eviction policy's scores of the experts as they are now, int64 [E]."""
        return self.policy(self.history)

    def __call__(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' weighted sum for each token, [T, H] in ``hidden_TH``'s dtype.

        Args:
            hidden_TH: float, on the pool's device.
            index_TK: int64, the router's choice; never altered.
            weights_TK: float, the router's weights.
        """
        self._check_device(hidden_TH)
        if self._observer is not None and index_TK is not self._no_tokens[1]:
            self._observer(self.index, index_TK)
        if self._peers.alone and not index_TK.numel():
            return torch.zeros_like(hidden_TH)
        self._peers.arrive(self.index)
        return self._in_parts(1 if self._exchanges else self._parts(len(hidden_TH)), hidden_TH, index_TK, weights_TK)

    def _parts(self, tokens: int) -> int:
        """Steps to make of so many tokens; predicted experts are those of all rows."""
        approximate = self.prefetcher is not None and self.prefetcher.approximate
        return 1 if self._room is None or approximate else self._room.parts(tokens)

    def _in_parts(self, parts: int, *given: torch.Tensor) -> torch.Tensor:
        """A batch in parts: one step after the other; some may have no token."""
        if parts == 1:
            return self._step(*given)
        results = []
        for piece in zip(*(tensor.tensor_split(parts) for tensor in given), strict=True):
            self._peers.note(exchanging=self._exchanges)  # the others wait for all parts
            results.append(self._step(*piece))
        return torch.cat(results)

    def _step(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The phases of one step, on any number of ranks, with or without tokens. No other code runs them."""
        began = time.perf_counter()
        batch = self.prepare(hidden_TH, index_TK, weights_TK)
        with self.cache.pool.lock:
            self._peers.take_part(self.index)
            gathered = self.gather(batch)
            if gathered.parts == 1:
                plan = self.plan(batch, gathered)
                self.fetch(plan, gathered)
                routed = self.dispatch(batch, plan, gathered)
                results_MH = self.execute(routed, plan)
                results_NH = routed.send_back(results_MH)
                self.migrate(plan, gathered)
        self._telemetry.count(self.index, layer_s=time.perf_counter() - began)
        if gathered.parts > 1:  # some rank has no memory for so many tokens at once
            return self._in_parts(gathered.parts, hidden_TH, index_TK, weights_TK)
        return self.combine(results_NH, batch)

    def idle(self) -> None:
        """Take part in a step of all ranks without a token."""
        self(*self._no_tokens)

    def prepare(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> Batch:
        """Count the tokens of each expert where one may be missing, and predict those of the next layer."""
        index_TK, weights_TK = self.prefetch_target.take_predicted(index_TK, weights_TK)
        ids_N = index_TK.reshape(-1)
        if self.experts.identity:
            ids_N = ids_N.clamp(max=self._num_experts)
        lent = self.slots_are_lent
        counts = None if self.complete or lent else self.experts.pairs.count(ids_N)
        usage = None if self.prefetcher is None or lent else self.prefetcher.predict(hidden_TH, index_TK)
        return Batch(hidden_TH, ids_N, weights_TK, counts, usage)

    def gather(self, batch: Batch) -> Gathered:
        """All ranks' counts and predictions, on the host; without counts this rank's prediction, as soon as it is there."""
        if batch.counts is None:
            return NOTHING_GATHERED if batch.usage is None else gather_alone(batch.usage, busy=self.cache.link_is_busy)
        peers, began = self._peers, time.perf_counter()
        peers.note(exchanging=True)
        top_k = batch.weights_TK.shape[1] if batch.ids_N.numel() else 0
        guard = 0 if peers.alone else self.planner.state.digest
        parts = 1 if peers.alone else self._parts(len(batch.hidden_TH))
        link = LinkState(self.cache.link_is_busy, self.cache.unbegun(self.planner.own_prefetches))
        gathered = peers.gather_counts(self.index, batch.counts, top_k, guard, batch.usage, link=link, parts=parts)
        if not peers.alone:
            self._telemetry.count(self.index, wait_s=time.perf_counter() - began)
            self.cache.confirm_copies()
        return gathered

    def plan(self, batch: Batch, gathered: Gathered) -> RankPlan:
        """Plan the step for all ranks; returns this rank's part, with its passes."""
        assert (batch.counts is None) == (self.complete or self.slots_are_lent), "slots were lent or returned within a step"
        if batch.counts is None:
            self._executor.begin_unplanned(batch.hidden_TH, batch.ids_N, *self._telemetry.count_resident(self.index))
            return NOTHING_PLANNED
        planner, counts_RE = self.planner, gathered.counts_R[:, :-1]
        used_E = used_experts(counts_RE)
        if not np.count_nonzero(used_E):  # no rank has tokens
            return NOTHING_PLANNED
        self._note_uses(used_E, gathered.counts_R[planner.rank])
        if len(taken := planner.take_back(gathered.unbegun_R, used_E)):
            self.cache.take_back(taken)
        if planner.alone:
            planner.refresh(self.cache.slot_of_E)
        plan = planner.plan(counts_RE, self.scores)
        self.cache.schedule(plan)
        return plan

    def fetch(self, plan: RankPlan, gathered: Gathered) -> None:
        """Begin this step's fetches, and behind them those for the next layer."""
        self._executor.fetch(plan, agreed=self._peers.agreed)
        if gathered.arrived is None:
            self._prefetch(gathered)

    def _prefetch(self, gathered: Gathered) -> None:
        if self.prefetcher is not None and gathered.predicted_R.size:
            self.prefetcher.fetch(gathered.predicted_R, gathered.busy_R, self.cache.pool)

    def dispatch(self, batch: Batch, plan: RankPlan, gathered: Gathered) -> Dispatch:
        """Send own pairs to the ranks that compute them, and receive those that this rank computes."""
        if not plan.moved:
            return LocalDispatch(batch.hidden_TH, batch.ids_N)
        self._telemetry.count(self.index, pairs_sent=plan.sent, pairs_received=plan.received)
        transport = self._peers.transport
        assert transport is not None
        rows_TH, costs = batch.hidden_TH.to(self.experts.dtype), self.planner.costs
        return dispatch(transport, rows_TH, batch.ids_N, plan, gathered, costs, agreed=self._peers.agreed)

    def execute(self, routed: Dispatch, plan: RankPlan) -> torch.Tensor:
        """The results of the pairs that are here, [M, H]."""
        self._peers.note(exchanging=self._exchanges, computing=self._exchanges)
        began, stalled_s = time.perf_counter(), self._telemetry.counted(self.index, "stall_s")
        results_MH = self._executor.execute(routed, plan)
        if self._computes_now:  # the controller learns the rank's speed
            seconds = time.perf_counter() - began - self._telemetry.counted(self.index, "stall_s") + stalled_s
            self._telemetry.count(self.index, compute_s=seconds)
        self._peers.note(exchanging=self._exchanges)
        return results_MH

    def migrate(self, plan: RankPlan, gathered: Gathered) -> None:
        """Begin fetches that no step waits for: late ones for the next layer, and migrations. The step's last exchange."""
        # Predictions mostly arrive while the layer's kernels are queued. A prediction isn't worth a wait.
        if gathered.arrived is not None and gathered.arrived.query():
            self._prefetch(gathered)
        self.cache.migrate(plan, agreed=self._peers.agreed)
        self._peers.note(exchanging=False)

    def combine(self, results_NH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The weighted sum of each token's results, [T, H]; ids without weights return their input."""
        if self.experts.identity:
            weightless_N = batch.ids_N >= self._num_experts
            inputs_NH = batch.hidden_TH.repeat_interleave(batch.weights_TK.shape[1], 0)
            results_NH = torch.where(weightless_N[:, None], inputs_NH, results_NH)
        return self.experts.pairs.weighted_sum(results_NH, batch.weights_TK, batch.hidden_TH.dtype)

    def _check_device(self, hidden_TH: torch.Tensor) -> None:
        if hidden_TH.device != self._device:
            raise ConfigError(
                f"the model was loaded for {self._device} and is given tensors on {hidden_TH.device}; load it with "
                f"device={str(hidden_TH.device)!r} instead of moving it"
            )

    def _note_uses(self, used_E: BoolArray, counts: IntArray) -> None:
        """Enter the experts that a step uses on any rank into the history, and count them.

        Args:
            counts: int64 [E + 1], pairs of this rank's tokens; the last entry counts ids beyond the last expert.
        """
        self.steps += 1
        if (self.steps + self.index) % REUSE_EVERY == 0:
            self._telemetry.count_reuse(self.index, stack_distances(self.history.last_use, used_E, self.scores()))
        self._telemetry.count_uses(self.index, counts, used_E)
        self.planner.judge_predictions(used_E)
        slots = None
        if self._learns:
            slots = self.cache.slots if self.planner.alone else int(self.planner.state.quota_R.sum())
        note_use(self.history, used_E, self.steps, slots)


def plan_alone(cache: ExpertCache, budgets: FetchBudgets | None = None, cpu_share: CpuShare | None = None) -> LayerPlanner:
    """The planner of a layer on a rank alone, whose work has one place to go: it needs no costs.

    Args:
        cpu_share: decides which missing experts the CPU computes, by costs of its own.
    """
    state = LayerState(cache.resident_E[None], np.array([cache.slots]), np.zeros(cache.num_experts, np.int64))
    return LayerPlanner(0, state, None, expert_bytes=cache.expert_bytes, budgets=budgets, cpu_share=cpu_share)
