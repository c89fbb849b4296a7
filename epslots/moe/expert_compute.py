"""The arithmetic of one layer's experts on one rank: rows and expert ids in, results out.

Rows are sorted by the slot of their expert, so one grouped product goes through all experts of a pass. A row's *key* is its
expert's slot, in a step of several passes plus (pass * Q).

Legend of shape suffixes: T rows given, N = T * K (row, k) pairs, E experts, Q slots of the layer, H hidden size.
"""

from __future__ import annotations

import importlib.util
import time

import numpy as np
import torch

from epslots.device_copy import to_device
from epslots.moe import resident_loops
from epslots.moe.cpu_experts import CpuExperts, CpuRows
from epslots.moe.expert_cache import ExpertCache
from epslots.moe.grouped_gemm import GroupedGemm
from epslots.moe.pair_kernels import Keys, PairKernels, SortedPairs, TorchPairKernels
from epslots.moe.pair_loops import pair_kernels_for_cpu, scatter_rows
from epslots.moe.token_dispatcher import Dispatch
from epslots.planner.plan import RankPlan
from epslots.telemetry import Telemetry
from epslots.transport.host_wait import HostWait


class ExpertCompute:
    """Computes with one layer's slots, and on the CPU.

    Args:
        index: the layer's number among the model's MoE layers.
        cache: the slots.
        kernel: computes rows sorted by slot.
        cpu: computes experts on the CPU; None = plans have none there.
        identity: whether ids >= E stand for experts that return their input.

    Attributes:
        pairs: counts, sorts and sums pairs.
    """

    def __init__(
        self,
        index: int,
        cache: ExpertCache,
        kernel: GroupedGemm,
        telemetry: Telemetry,
        *,
        cpu: CpuExperts | None = None,
        identity: bool = False,
    ) -> None:
        self.cache = cache
        self.kernel = kernel
        self.cpu = cpu
        self.identity = identity
        self.dtype = kernel.dtype
        self._index = index
        self._telemetry = telemetry
        self._slot_of_device_E = cache.pool.slot_of_device[cache.pool_layer][: cache.num_experts]
        self.pairs = pair_kernels_for(cache.num_experts, cache.pool.device)
        # Read by captured steps, which are made anew when the layer's slots change: so it stays where it is until then.
        self._keys = Keys.between(cache.slot_range.start, cache.slot_range.stop, cache.pool.device)

    def use_slot_range(self) -> None:
        """Follow a change of the layer's slots."""
        self.cache.use_slot_range()
        self.kernel.use(self.cache.pool.weights(self.cache.pool_layer))
        self._keys = Keys.between(self.cache.slot_range.start, self.cache.slot_range.stop, self.cache.pool.device)

    def no_tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of a layer's call for no token: hidden states [0, H], ids and weights [0, 1]."""
        device, hidden_size = self.cache.pool.device, self.kernel.hidden_size
        hidden_TH = torch.zeros(0, hidden_size, dtype=self.dtype, device=device)
        return hidden_TH, torch.zeros(0, 1, dtype=torch.int64, device=device), torch.zeros(0, 1, device=device)

    def wait_by(self, host_wait: HostWait) -> None:
        """Let the host wait for rows as a group's transport does, from now on."""
        if self.cpu is not None:
            self.cpu.wait_by(host_wait)

    def begin_unplanned(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor
    ) -> None:
        """Add the pairs of a step to totals on the device (``PairKernels.add_counts``): all experts are in slots."""
        self.pairs.add_counts(ids_N, tokens_X, uses)

    def fetch(self, plan: RankPlan, *, agreed: bool) -> None:
        """Begin the plan's fetches (``ExpertCache.fetch``)."""
        self.cache.fetch(plan, agreed=agreed)

    def execute(self, routed: Dispatch, plan: RankPlan) -> torch.Tensor:
        """Execute a plan: experts on the CPU beside those in slots.

        Args:
            routed: the M pairs that this rank computes.

        Returns:
            [M, H] in the weights' dtype, pair by pair; undefined for ids without weights.
        """
        rows_MH, ids_M, cpu_rows = routed.rows_MH, routed.ids_M, None
        if len(plan.cpu_experts):  # their rows set out for the CPU before anything is queued that they needn't wait for
            assert self.cpu is not None
            pairs = plan.computed_E[plan.cpu_experts].tolist()
            cpu_rows = self.cpu.begin(rows_MH, ids_M, plan.cpu_experts.tolist(), pairs)
        if len(plan.passes) > 1:
            results_MH = self._execute_passes(rows_MH, ids_M, plan)
        else:
            if plan.passes:
                self.cache.begin_pass(plan, 0)
            in_slots = None if cpu_rows is None else int(plan.slots_E.sum())
            results_MH = self.execute_resident(rows_MH, ids_M, in_slots)
        if cpu_rows is not None:
            self._finish_on_cpu(cpu_rows, results_MH)
        return results_MH

    def _finish_on_cpu(self, cpu_rows: CpuRows, results_MH: torch.Tensor) -> None:
        assert self.cpu is not None
        began = time.perf_counter()
        self.cpu.finish(cpu_rows, results_MH)
        self._telemetry.count(self._index, cpu_misses=len(cpu_rows.experts), cpu_s=time.perf_counter() - began)

    def execute_resident(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, in_slots: int | None = None) -> torch.Tensor:
        """All pairs in one pass.

        Args:
            ids_N: int64, the expert of each pair; N is a multiple of T.
            in_slots: pairs whose expert is in a slot, if these aren't all; the results of the others are undefined.

        Returns:
            [N, H] in the weights' dtype, pair by pair.
        """
        if not ids_N.numel():
            return torch.zeros(0, self.kernel.hidden_size, dtype=self.dtype, device=ids_N.device)
        self.cache.pool.publish(self.cache.pool_layer)
        absent = self.identity or in_slots is not None
        products = None if absent else self.kernel.ready_products(ids_N.shape[0])
        if products is not None and resident_loops.fits(hidden_TH, ids_N, self._slot_of_device_E, self.dtype):
            return resident_loops.execute(hidden_TH, ids_N, self._slot_of_device_E, self._keys, *products)
        found, rows_NH = self._sort(hidden_TH, ids_N, self._slot_of_device_E, self._keys, absent=absent)
        if in_slots is not None:
            result_NH = torch.empty(len(ids_N), self.kernel.hidden_size, dtype=self.dtype, device=ids_N.device)
            computed_NH = self.kernel(rows_NH[:in_slots], found.ends_Q, found.key_N[:in_slots], self._keys.first)
            return result_NH.index_copy_(0, found.pair_N[:in_slots], computed_NH)
        return _unsort(self.kernel(rows_NH, found.ends_Q, found.key_N, self._keys.first), found.pair_N)

    def _execute_passes(self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, plan: RankPlan) -> torch.Tensor:
        """Pass after pass: sorted by key, the pairs of each pass lie together. Returns [N, H], pair by pair."""
        slots, passes, first_slot = self.cache.slots, plan.passes, self.cache.slot_range.start
        keys_end = first_slot + len(passes) * slots
        key_host = np.full(self.cache.num_experts + 1, keys_end, np.int64)
        for number, one in enumerate(passes):
            key_host[one.experts] = number * slots + one.slots
        keys = Keys.between(first_slot, keys_end, ids_N.device)
        found, rows_NH = self._sort(hidden_TH, ids_N, to_device(key_host, ids_N.device), keys)
        result_NH = torch.empty_like(rows_NH)
        start = 0
        for number, one in enumerate(passes):
            self.cache.begin_pass(plan, number)
            rows = slice(start, start + int(plan.slots_E[one.experts].sum()))
            first = number * slots
            ends_Q = found.ends_Q[first : first + slots] - start
            result_NH[rows] = self.kernel(rows_NH[rows], ends_Q, found.key_N[rows], first_slot + first)
            start = rows.stop
        return _unsort(result_NH, found.pair_N)

    def _sort(
        self, hidden_TH: torch.Tensor, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, *, absent: bool = False
    ) -> tuple[SortedPairs, torch.Tensor]:
        """The pairs sorted by their expert's key (``PairKernels.sort``), and the sorted rows' hidden states [N, H]."""
        found = self.pairs.sort(ids_N, key_E, keys, ids_N.shape[0] // hidden_TH.shape[0], absent=absent)
        return found, hidden_TH.index_select(0, found.token_N)


def _unsort(result_NH: torch.Tensor, order_N: torch.Tensor) -> torch.Tensor:
    """Results in the order of the pairs."""
    if result_NH.is_cpu:
        return scatter_rows(result_NH, order_N)
    return torch.empty_like(result_NH).index_copy_(0, order_N, result_NH)


def pair_kernels_for(experts: int, device: torch.device) -> PairKernels:
    """The kernels for a layer of so many experts on a device: Triton's on a GPU, if it is installed."""
    if device.type == "cpu":
        return pair_kernels_for_cpu(experts)
    if importlib.util.find_spec("triton") is None:
        return TorchPairKernels(experts, device)
    from epslots.moe.pair_triton import TritonPairKernels  # optional, and used only on GPUs

    return TritonPairKernels(experts, device)
