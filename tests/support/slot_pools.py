"""Slot pools with a store whose every byte tells which expert it is of."""

from __future__ import annotations

import contextlib

import torch

from epslots.cache.copy_engine import SynchronousEngine
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.slot_pool import SlotPool
from epslots.errors import CorruptExpertError
from epslots.layout import LayerSpec, RecordLayout
from epslots.telemetry import Telemetry

LAYOUT = RecordLayout.of([("gate_up_proj", (4, 8), "float32"), ("down_proj", (8, 2), "float32"), ("bias", (3,), "bfloat16")])
CPU = torch.device("cpu")


class FakeStore:
    """Records whose every byte tells which expert they are; some may be marked corrupt."""

    pinned = False

    def __init__(self) -> None:
        self.corrupt: set[tuple[int, int]] = set()

    def record(self, layer: int, expert: int) -> torch.Tensor:
        if (layer, expert) in self.corrupt:
            raise CorruptExpertError(f"layer {layer}", expert, "a test")
        canary = torch.tensor([layer, expert, 255 - expert, layer ^ expert], dtype=torch.uint8)
        return canary.repeat(LAYOUT.nbytes // 4)

    request = record

    def lend(self, layer: int, expert: int) -> contextlib.AbstractContextManager[torch.Tensor]:
        return contextlib.nullcontext(self.record(layer, expert))


def make(quotas: list[int], experts: int, own_slots: int = 0) -> tuple[SlotPool, ExpertLoader, FakeStore, Telemetry]:
    layers = [LayerSpec(f"layer {i}", experts, LAYOUT) for i in range(len(quotas))]
    pool, store = SlotPool(layers, quotas, CPU, own_slots=own_slots), FakeStore()
    telemetry = Telemetry(layers, quotas, CPU)
    return pool, ExpertLoader(pool, store, SynchronousEngine(), tuple(range(len(quotas))), telemetry), store, telemetry  # type: ignore[arg-type]
