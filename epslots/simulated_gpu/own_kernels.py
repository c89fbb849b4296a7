"""Our own kernels, which are Triton's, on simulated GPUs: one launch each, with torch's results."""

from __future__ import annotations

from functools import partial

import torch

from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.unpacking import Weight
from epslots.cuda_graph.device_slots import DeviceLayer, Missing, TorchKernels
from epslots.moe.kernel_gemm import Gate, Tiles, TorchProducts, tile_rows, tiles_at_most
from epslots.moe.pair_kernels import Keys, SortedPairs, TorchPairKernels
from epslots.prefetch.usage import usage_by_torch
from epslots.simulated_gpu.launching import launch_kernel
from epslots.simulated_gpu.machine import current_machine
from epslots.simulated_gpu.tensors import memory_of


class SimulatedProducts:
    """``Products`` in one launch each."""

    def __init__(self) -> None:
        self._torch = TorchProducts()

    def list_tiles(self, ends_Q: torch.Tensor, rows: int) -> Tiles:
        size = tile_rows(rows, len(ends_Q))
        tiles = Tiles.empty(ends_Q, size, tiles_at_most(rows, len(ends_Q), size))
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


class SimulatedKernels:
    """``Kernels`` whose decision and copy are one launch each, as Triton's are."""

    def __init__(self, loader: ExpertLoader) -> None:
        self._loader, self._torch = loader, TorchKernels(loader)

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        state = [layer.slot_of_E, layer.expert_of_Q, layer.last_use_E, layer.decayed_DE, layer.step, layer.tally_3]
        writes = [*state, missing.expert_M, missing.slot_M, missing.count]
        twin = self._torch
        reads = [ids_N, layer.factors_D]
        launch_kernel("decide", twin.decide, layer, ids_N, missing, reads=reads, writes=writes)

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        pool, store = self._loader.pool, self._loader.store
        slot_range = pool.memory[pool.slot_range(layer.number)]
        store_layer = self._loader.store_layers[layer.number]

        def enter(experts_M: torch.Tensor, slots_M: torch.Tensor, count: torch.Tensor, memory: torch.Tensor) -> None:
            for expert, slot in list(zip(experts_M.tolist(), slots_M.tolist(), strict=True))[: int(count)]:
                memory[slot - layer.start].copy_(store.record(store_layer, expert))

        sizes, slot, count = current_machine().sizes, memory_of(slot_range[0]), memory_of(missing.count)

        def link_bytes() -> int:
            return int(count) * sizes.nbytes(slot)

        reads = missing.expert_M, missing.slot_M, missing.count
        launch_kernel(
            "copy_missing", enter, *reads, slot_range, reads=reads, writes=[slot_range], moves=reads, link_bytes=link_bytes
        )
