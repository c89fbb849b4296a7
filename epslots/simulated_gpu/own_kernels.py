"""Our own kernels, which are Triton's, on simulated GPUs: one launch each, with torch's results."""

from __future__ import annotations

from functools import partial

import torch

from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.unpacking import Weight
from epslots.cuda_graph.device_slots import DeviceLayer, Missing
from epslots.cuda_graph.torch_kernels import TorchKernels
from epslots.moe.kernel_gemm import Gate, Tiles, TorchProducts
from epslots.moe.pair_kernels import Keys, SortedPairs, TorchPairKernels
from epslots.prefetch.usage import usage_by_torch
from epslots.simulated_gpu.launching import LinkRead, launch_kernel
from epslots.simulated_gpu.machine import current_machine
from epslots.simulated_gpu.streams import current_stream
from epslots.simulated_gpu.tensors import memory_of
from epslots.simulated_gpu.timeline import Operation


class SimulatedProducts:
    """``Products`` in one launch each."""

    def __init__(self) -> None:
        self._torch = TorchProducts()

    def list_tiles(self, ends_Q: torch.Tensor, rows: int) -> Tiles:
        tiles = Tiles.empty(ends_Q, rows)
        writes = [tiles.slot_T, tiles.row_T, tiles.count]

        def enter(ends: torch.Tensor, *into: torch.Tensor) -> None:
            found = self._torch.list_tiles(ends, rows)
            for target, source in zip(into, (found.slot_T, found.row_T, found.count), strict=True):
                target.copy_(source)

        launch_kernel("list_tiles", enter, ends_Q, *writes, reads=[ends_Q], writes=writes)
        return tiles

    def multiply(
        self,
        rows_NI: torch.Tensor,
        weight_QIO: Weight,
        bias_QO: torch.Tensor | None,
        tiles: Tiles,
        gate: Gate | None = None,
    ) -> torch.Tensor:
        with current_machine().computing_kernel():  # the weights that it reads depend on the tiles
            used = memory_of(tiles.slot_T)[: int(memory_of(tiles.count))].unique().tolist()
        listed = tiles.ends_Q, tiles.slot_T, tiles.row_T, tiles.count
        tensors = [weight_QIO] if isinstance(weight_QIO, torch.Tensor) else weight_QIO.tensors
        reads = [rows_NI, *listed, *(tensor[slot] for tensor in tensors for slot in used)]
        arguments = rows_NI, weight_QIO, bias_QO, tiles, gate
        sizes = current_machine().sizes
        flops = 2.0 * sizes.numel(rows_NI.shape) * sizes.numel(weight_QIO.shape[2:])
        return launch_kernel("multiply", self._torch.multiply, *arguments, reads=reads, flops=flops)


class SimulatedPairKernels:
    """``PairKernels`` in one launch each."""

    def __init__(self, experts: int, device: torch.device) -> None:
        self._torch = TorchPairKernels(experts, torch.device("cpu"))

    def count(self, ids_N: torch.Tensor) -> torch.Tensor:
        return launch_kernel("count_pairs", self._torch.count, ids_N, reads=[ids_N])

    def add_counts(
        self, ids_N: torch.Tensor, tokens_X: torch.Tensor, uses: torch.Tensor, real: torch.Tensor | None = None
    ) -> None:
        reads = [ids_N] if real is None else [ids_N, real]
        arguments = ids_N, tokens_X, uses, real
        launch_kernel("add_counts", self._torch.add_counts, *arguments, reads=reads, writes=[tokens_X, uses])

    def sort(self, ids_N: torch.Tensor, key_E: torch.Tensor, keys: Keys, top_k: int, *, absent: bool) -> SortedPairs:
        sort = partial(self._torch.sort, top_k=top_k, absent=absent)
        return launch_kernel("sort_pairs", sort, ids_N, key_E, keys, reads=[ids_N, key_E])

    def weighted_sum(self, results_NH: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        arguments = results_NH, weights_TK
        return launch_kernel("weighted_sum", self._torch.weighted_sum, *arguments, dtype, reads=arguments)


def simulated_usage(score_TE: torch.Tensor, top_k: int, experts: int) -> torch.Tensor:
    """``UsageKernel`` in one launch."""
    return launch_kernel("usage", usage_by_torch, score_TE, top_k, experts, reads=[score_TE])


class _TorchKernelsThere(TorchKernels):
    """``TorchKernels`` as part of a kernel, on a device's memory."""

    def _copy(self, layer: DeviceLayer, expert: int, slot: int) -> None:
        record = self._loader.store.record(self._loader.store_layers[layer.number], expert)
        memory_of(self._loader.pool.memory)[slot].copy_(record)


class SimulatedKernels:
    """``Kernels`` in one launch each, as Triton's are.

    A decision finds as many prefetches arrived as the clock says, and what it drops is nonsense in its slot.
    """

    chunks = TorchKernels.chunks

    def __init__(self, loader: ExpertLoader) -> None:
        self._loader, self._torch = loader, _TorchKernelsThere(loader)
        self._copies: dict[int, Operation] = {}  # by layer: prefetches under way

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        state = [layer.slot_of_E, layer.expert_of_Q, layer.last_use_E, layer.decayed_DE, layer.step, layer.tally_3]
        writes = [*state, layer.left, missing.expert_M, missing.slot_M, missing.count]
        reads = [ids_N, layer.factors_D, layer.ahead.expert_F, layer.ahead.slot_F, layer.ahead.count]
        launch_kernel("decide", self._decide, layer, ids_N, missing, reads=reads, writes=writes)

    def _decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        copy, machine = self._copies.pop(layer.number, None), current_machine()
        if copy is None or machine.capture is not None:
            self._torch.decide(layer, ids_N, missing)
            return
        ahead, pool = layer.ahead, self._loader.pool
        here = machine.timeline.last(current_stream(pool.device).stream_id)
        now_s = max(machine.now_s, 0.0 if here is None else machine.timeline.end_of(here))
        each_s = machine.sizes.nbytes(memory_of(pool.memory[0])) / machine.spec.link_rate
        end_s = machine.timeline.end_of(copy)
        assert copy.start_s is not None
        count, passed_s = int(ahead.count), max(0.0, now_s - copy.start_s)
        if now_s < end_s:
            done = torch.arange(1, len(ahead.arrived_F) + 1) * each_s <= passed_s
            ahead.arrived_F.copy_(done.long() * self.chunks)
        self._torch.decide(layer, ids_N, missing)
        dropped = ahead.dropped_F[:count].bool()
        pool_memory = memory_of(pool.memory)
        pool_memory[ahead.slot_F[:count][dropped]] = 0xFF
        if now_s < end_s and dropped.any():
            begins_s = torch.arange(count) * each_s
            left_s = (begins_s + each_s - begins_s.clamp(min=passed_s)).clamp(min=0)[~dropped].sum()
            machine.timeline.end_sooner(copy, min(end_s, max(now_s, copy.start_s) + float(left_s)))

    def choose(self, layer: DeviceLayer, usage_E: torch.Tensor, running: torch.Tensor) -> None:
        ahead = layer.ahead
        lists = [ahead.expert_F, ahead.slot_F, ahead.count, ahead.expected_E, ahead.verdict_3, ahead.fetched]
        writes = [layer.slot_of_E, layer.expert_of_Q, layer.tally_3, layer.left, *lists]
        reads = [usage_E, running, layer.last_use_E, layer.decayed_DE, layer.step, layer.factors_D]
        launch_kernel("choose", self._torch.choose, layer, usage_E, running, reads=reads, writes=writes)

    def copy_ahead(self, layer: DeviceLayer) -> None:
        """Copies run beside the next layer's decision, which reads ``arrived_F`` and writes ``dropped_F`` meanwhile."""
        ahead, pool = layer.ahead, self._loader.pool
        slot_range = pool.memory[pool.slot_range(layer.number)]
        sizes, slot, count = current_machine().sizes, memory_of(slot_range[0]), memory_of(ahead.count)

        def link_bytes() -> int:
            return int(count) * sizes.nbytes(slot)

        def begun(operation: Operation) -> None:
            self._copies[layer.number] = operation

        reads = [ahead.expert_F, ahead.slot_F, ahead.count]
        launch_kernel(
            "copy_ahead",
            self._torch.copy_ahead,
            layer,
            reads=reads,
            writes=[slot_range],
            moves=reads,
            link=LinkRead(link_bytes, begun),
        )

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        pool = self._loader.pool
        slot_range = pool.memory[pool.slot_range(layer.number)]
        sizes, slot, count = current_machine().sizes, memory_of(slot_range[0]), memory_of(missing.count)

        def link_bytes() -> int:
            return int(count) * sizes.nbytes(slot)

        reads = missing.expert_M, missing.slot_M, missing.count
        arguments = self._torch.copy, layer, missing
        link = LinkRead(link_bytes)
        launch_kernel("copy_missing", *arguments, reads=reads, writes=[slot_range], moves=reads, link=link)
