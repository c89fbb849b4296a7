"""The life of a token batch in one MoE layer: the hot path, in the order in which it happens.

transformers' experts module calls ``MoELayer`` with what its router chose (experts.py; loading.py puts it there).

Legend of shape suffixes: T tokens, K experts per token, N = T * K (token, k) pairs, E experts, Q slots of the layer's window,
H hidden size. Three numbers say where an expert is: its *slot* in the whole pool, its *position* in the layer's window (slot -
window start), and in a step of several waves its *key* (wave * Q + position), by which the pairs are sorted.

    prepare    count the tokens of each expert
    plan       which experts are computed in which wave, and what is fetched for it (waves.py)
    fetch      missing experts into slots (fetch.py)
    execute    sort the pairs by wave and slot; one grouped pass through the experts for each wave
    combine    bring the results back to their tokens; weight and sum over k, in fp32 and in fixed order

No Python loop runs over tokens or experts. A layer that has a slot for every expert takes no plan and no host
synchronisation; any other takes one, to learn from the counts what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from epslots.errors import ConfigError
from epslots.eviction import IntArray, Policy, UseHistory, record_use
from epslots.fetch import Mover
from epslots.kernel import ExpertKernel
from epslots.slot_pool import SlotPool
from epslots.telemetry import Telemetry
from epslots.waves import Wave, plan_waves

RouteObserver = Callable[[int, torch.Tensor], None]
"""Called with (layer index, top_k_index [T, K]) for every step; must not change it."""


class MoELayer:
    """Runs one experts module from slots.

    Args:
        index: the layer's number among the model's MoE layers.
        pool_layer: its number within ``pool``.
        num_experts: E, experts that have weights.
        identity: whether ids >= E stand for experts that return their input.
        kernel: computes rows sorted by slot.
        history: the layer's row of past uses; changed in place.
    """

    def __init__(
        self,
        *,
        index: int,
        pool_layer: int,
        num_experts: int,
        identity: bool,
        kernel: ExpertKernel,
        pool: SlotPool,
        mover: Mover,
        policy: Policy,
        history: UseHistory,
        telemetry: Telemetry,
    ) -> None:
        self.index = index
        self.observer: RouteObserver | None = None
        self._pool_layer = pool_layer
        self._num_experts = num_experts
        self._identity = identity
        self._kernel = kernel
        self._pool = pool
        self._mover = mover
        self._policy = policy
        self._history = history
        self._telemetry = telemetry
        self._window = pool.window(pool_layer)
        self._slots = self._window.stop - self._window.start
        self._slot_of_E = pool.slot_of[pool_layer][:num_experts]
        self._expert_of_Q = pool.expert_of[self._window]
        self._slot_of_device_E = pool.slot_of_device[pool_layer][:num_experts]
        self._never_misses = pool.holds_all_of(pool_layer)
        self._one = torch.ones(1, dtype=torch.int64, device=pool.device)
        self._steps = 0

    def __call__(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' weighted sum for each token, [T, H] in ``hidden_TH``'s dtype.

        Args:
            hidden_TH: float, on the pool's device.
            index_TK: int64, the router's choice; never altered.
            weights_TK: float, the router's weights.
        """
        if hidden_TH.device != self._pool.device:
            raise ConfigError(
                f"the model was loaded for {self._pool.device} and is given tensors on {hidden_TH.device}; load it with "
                f"device={str(hidden_TH.device)!r} instead of moving it"
            )
        if self.observer is not None:
            self.observer(self.index, index_TK)
        if not index_TK.numel():
            return torch.zeros_like(hidden_TH)
        ids_N = index_TK.reshape(-1)
        if self._identity:
            ids_N = ids_N.clamp(max=self._num_experts)
        counts = self._prepare(ids_N)
        with self._pool.lock:
            pairs_NH = self._step(hidden_TH, ids_N, counts)
        return combine(pairs_NH, weights_TK, hidden_TH.dtype)

    def _step(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Plan, fetch and execute: each pair's result, [N, H]."""
        if self._never_misses:
            self._telemetry.count_resident(self.index, counts)
            return self._execute(hidden_TH, ids_N)
        counts_host = counts.cpu().numpy()  # the one host synchronisation of a step
        waves = self._plan(counts_host)
        if len(waves) > 1:
            return self._execute_waves(hidden_TH, ids_N, counts_host, waves)
        for wave in waves:
            self._fetch(wave)
        return self._execute(hidden_TH, ids_N)

    def _prepare(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Tokens of each expert, int64 [E + 1]; the last entry counts ids beyond the last expert."""
        counts = torch.zeros(self._num_experts + 1, dtype=torch.int64, device=ids_N.device)
        return counts.scatter_add_(0, ids_N, self._one.expand(ids_N.shape[0]))

    def _plan(self, counts_host: IntArray) -> tuple[Wave, ...]:
        """What to fetch and in which waves to compute; nothing if every needed expert is resident."""
        counts_E = counts_host[: self._num_experts]
        needed_E = counts_E > 0
        self._steps += 1
        record_use(self._history, needed_E, self._steps)
        uses = int(np.count_nonzero(needed_E))
        misses = int(np.count_nonzero(needed_E & (self._slot_of_E < 0)))
        waves: tuple[Wave, ...] = ()
        if misses:
            position_E = np.where(self._slot_of_E < 0, -1, self._slot_of_E - self._window.start)
            waves = plan_waves(counts_E, position_E, self._expert_of_Q, self._policy(self._history))
        self._telemetry.count_step(self.index, counts_host, hits=uses - misses, misses=misses, waves=max(1, len(waves)))
        return waves

    def _fetch(self, wave: Wave) -> None:
        """Bring a wave's missing experts into their slots."""
        if len(wave.fetch_experts):
            began = time.perf_counter()
            slots = wave.fetch_positions + self._window.start
            self._mover.fetch(self._pool_layer, wave.fetch_experts, slots, wave.evicted)
            self._telemetry.count_stall(self.index, time.perf_counter() - began)

    def _execute(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """All pairs at once: every needed expert is in a slot. Returns [N, H], pair by pair."""
        key_E = self._slot_of_device_E - self._window.start
        if self._identity:
            key_E = torch.nn.functional.pad(key_E, (0, 1), value=self._slots)
        order_N, key_N, ends_Q, rows_NH = _sort(hidden_TH, ids_N, key_E, self._slots)
        result_NH = self._kernel(rows_NH, ends_Q, key_N)
        return self._unsort(result_NH, rows_NH, order_N, key_N >= self._slots)

    def _execute_waves(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, counts_host: IntArray, waves: tuple[Wave, ...]
    ) -> torch.Tensor:
        """Wave after wave: a pair's key is (wave, slot), so that each wave is a run of the sorted pairs."""
        keys = len(waves) * self._slots
        key_host = np.full(self._num_experts + 1, keys, np.int64)
        for number, wave in enumerate(waves):
            key_host[wave.experts] = number * self._slots + wave.positions
        key_E = torch.from_numpy(key_host).to(ids_N.device)
        order_N, key_N, ends, rows_NH = _sort(hidden_TH, ids_N, key_E, keys)
        result_NH = torch.empty_like(rows_NH)
        start = 0
        for number, wave in enumerate(waves):
            self._fetch(wave)
            rows = slice(start, start + int(counts_host[wave.experts].sum()))
            first_key = number * self._slots
            result_NH[rows] = self._kernel(
                rows_NH[rows], ends[first_key : first_key + self._slots] - start, key_N[rows] - first_key
            )
            start = rows.stop
        return self._unsort(result_NH, rows_NH, order_N, key_N >= keys)

    def _unsort(
        self, result_NH: torch.Tensor, rows_NH: torch.Tensor, order_N: torch.Tensor, beyond_N: torch.Tensor
    ) -> torch.Tensor:
        """Results in the order of the pairs. Pairs of experts without weights return what went in."""
        if self._identity:
            result_NH = torch.where(beyond_N[:, None], rows_NH, result_NH)
        return torch.empty_like(result_NH).index_copy_(0, order_N, result_NH)


def _sort(
    hidden_TH: torch.Tensor, ids_N: torch.Tensor, key_E: torch.Tensor, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs by their expert's key.

    Returns:
        order_N (the pair in each sorted row), key_N (sorted), ends int32 [keys] (where each key's rows end), and the
        sorted rows' hidden states [N, H].
    """
    top_k = ids_N.shape[0] // hidden_TH.shape[0]
    key_N, order_N = torch.sort(key_E[ids_N], stable=True)
    ends = torch.searchsorted(key_N, torch.arange(keys, device=key_N.device), right=True, out_int32=True)
    return order_N, key_N, ends, hidden_TH[order_N // top_k]


def combine(pairs_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight each pair's result and sum over k, in the order of k and at least in fp32: [T, H] in ``dtype``."""
    tokens, top_k = weights_TK.shape
    exact = torch.promote_types(pairs_NH.dtype, torch.float32)
    pairs_TKH = pairs_NH.view(tokens, top_k, -1).to(exact)
    return (pairs_TKH * weights_TK.to(exact)[..., None]).sum(dim=1).to(dtype)
