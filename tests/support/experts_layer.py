"""One MoE layer of a checkpoint, its experts on the CPU and in slots."""

from __future__ import annotations

from pathlib import Path

import torch

from epslots.cache.host_store import HostStore, Manifest
from epslots.cache.node_store import open_node_store
from epslots.cache.slot_pool import SlotPool
from epslots.cache.unpacking import SlotWriter
from epslots.models.expert_reader import ExpertReader, pack_layers
from epslots.models.experts import experts_modules
from epslots.models.opening import load_dense, open_model
from epslots.moe.cpu_experts import CpuExperts
from epslots.moe.grouped_gemm import GroupedGemm
from epslots.progress import ProgressDisplay

CPU = torch.device("cpu")


TOP_K = 2


class Layer:
    """The first MoE layer of a checkpoint: its module, its experts in a store, and all of them in slots."""

    def __init__(self, folder: Path, cache_dir: Path, dtype: torch.dtype = torch.float32) -> None:
        opened = open_model(folder, dtype)
        checkpoint = opened.checkpoint
        layers = pack_layers(checkpoint, opened.skeleton, opened.layers)
        model = load_dense(opened, device=CPU, show_progress=False)
        self.store: HostStore = open_node_store(
            Manifest("k3y", "model", layers),
            lambda: ExpertReader(checkpoint, model, layers),
            kind="file",
            cache_dir=cache_dir,
            start_progress=ProgressDisplay(shown=False),
        )
        self.spec, self.name, self.dtype = layers[0], layers[0].name, dtype
        self.module = experts_modules(model)[self.name]
        self.host = CpuExperts(self.module, self.store, 0, CPU)

    def random_rows(self, tokens: int, experts: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T, H], and the experts [T * TOP_K] that their pairs go to."""
        random = torch.Generator().manual_seed(seed)
        rows = torch.randn(tokens, self.host.hidden_size, generator=random).to(self.dtype)
        experts = experts or self.spec.num_experts
        return rows, torch.randint(0, experts, (tokens * TOP_K,), generator=random)

    def compute(self, rows: torch.Tensor, ids: torch.Tensor, experts: list[int]) -> torch.Tensor:
        return self.host.compute(rows, ids, experts, [int((ids == e).sum()) for e in experts])

    def from_slots(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Every pair's result by the slots' own kernel."""
        pool = SlotPool([self.spec], [self.spec.num_experts], CPU)
        for expert in range(self.spec.num_experts):
            SlotWriter(self.spec)(pool.memory[expert], self.store.record(0, expert))
        key, order = torch.sort(ids, stable=True)
        ends = torch.searchsorted(key, torch.arange(self.spec.num_experts), right=True, out_int32=True)
        result = GroupedGemm(self.module, pool.weights(0))(rows[order // TOP_K], ends, key)
        return torch.empty_like(result).index_copy_(0, order, result)
