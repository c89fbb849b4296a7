"""Speed of one expert's way from the host store into a slot, by form of record. Also of computing it on the host instead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

import epslots
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import US, BenchReport, alternate, compare, median
from epslots.cache.copy_engine import put_record
from epslots.cache.unpacking import unpack_record
from epslots.layout import LayerSpec, PackedForm, PackedLayout, PackedMatrix, RecordLayout
from epslots.models.experts import experts_modules
from epslots.moe.cpu_experts import CpuExperts
from epslots.runtime import Runtime, runtime_of

LAYERS, EXPERTS, SLOTS, TOP_K = 4, 64, 8, 4
HIDDEN, WIDTH = 1024, 768
TOKENS = (1, 4, 16, 64, 256)
# More than a cache holds of any form: records are read from memory, as misses are.
COLD_RECORDS = 16


def bench_fetch(report: BenchReport, cache_dir: Path, device: torch.device, *, rounds: int = 300) -> None:
    """Fetches of 4.5 MiB experts, each in place of another, and copies between equal buffers in turn.

    On CUDA the plain copy is from pinned memory, which is the ceiling of the link.
    """
    config = random_config(layers=LAYERS, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K, width=WIDTH)
    with random_checkpoint(config, torch.bfloat16) as folder:
        model = epslots.load(folder, slots=SLOTS, device=device, cache_dir=cache_dir)
        runtime = runtime_of(model)
        runtime.store.verify()  # a record's first fetch also checks its digest; later ones are timed
        report.table("one expert, host to slot", [_fetches(runtime, device, rounds)])
        report.table("one expert, by the form that it is stored in", _forms(device, rounds))
        report.table("a miss, fetched and computed or computed on the host", _misses(model, runtime, device, rounds))


def _fetches(runtime: Runtime, device: torch.device, rounds: int) -> dict[str, Any]:
    loader = runtime.loaders[0]
    pool = loader.pool
    size = pool.layout.nbytes
    source = torch.empty(LAYERS * EXPERTS, size, dtype=torch.uint8, pin_memory=device.type == "cuda").random_()
    target = torch.empty(LAYERS * SLOTS, size, dtype=torch.uint8, device=device)
    turn, plain_turn = itertools.count(), itertools.count()

    def fetch() -> None:
        number = next(turn)
        layer, expert = number % LAYERS, np.array([number // LAYERS % EXPERTS])
        slot = np.array([pool.slot_range(layer).start + number // LAYERS % SLOTS])
        if pool.slot_of[layer, expert[0]] < 0:
            loader.fetch(layer, expert, slot, pool.expert_of[slot].copy())

    def copy() -> None:
        number = next(plain_turn)
        record = source[number % LAYERS * EXPERTS + number // LAYERS % EXPERTS]
        target[number % (LAYERS * SLOTS)].copy_(record, non_blocking=True)

    found = compare({"fetch us": fetch, "copy us": copy}, "copy us", "fetch us", rounds, US, "of copy", device=device)
    speeds = {f"{name} GB/s": size / found[f"{name} us"] / 1e3 for name in ("fetch", "copy")}
    return {"expert MiB": size / 2**20, **found, **speeds}


def forms() -> dict[str, LayerSpec]:
    """One expert of the bench's shape, in bf16 and packed in four forms."""
    matrices = (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH))
    weights = RecordLayout.of((name, (rows, columns), "bfloat16") for name, rows, columns in matrices)

    def packed(kind: str, group: str | None, block: tuple[int, int], *, row: bool = False) -> LayerSpec:
        found = tuple(
            PackedMatrix(name, (PackedForm(kind, rows, columns, group, block, row=row),)) for name, rows, columns in matrices
        )
        record = RecordLayout.of(tensor for matrix in found for tensor in matrix.tensors)
        return LayerSpec("experts", 1, record, PackedLayout(weights, found))

    return {
        "bf16": LayerSpec("experts", 1, weights),
        "FP8 blocks": packed("e4m3", "float32", (128, 128)),
        "INT8 rows": packed("int8", None, (1, 1), row=True),
        "MXFP4": packed("e2m1", "uint8", (1, 32)),
        "INT4 of 32": packed("int4", "bfloat16", (1, 32)),
    }


def _forms(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A fetch of one expert, and the reference that unpacks it."""
    layers = forms()
    fetches, unpacks = {}, {}
    for name, layer in layers.items():
        records = torch.empty(COLD_RECORDS, layer.layout.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        # Any bytes will do, as long as they are no NaN.
        turn = itertools.cycle(records.random_(0, 100))
        slot = torch.empty(layer.layout.nbytes, dtype=torch.uint8, device=device)
        fetches[name] = lambda slot=slot, turn=turn: put_record(slot, next(turn))
        unpacks[name] = lambda layer=layer, slot=slot: unpack_record(layer, slot)
    fetched, unpacked = (alternate(each, rounds, device=device) for each in (fetches, unpacks))
    return [
        {
            "form": name,
            "record MiB": layer.layout.nbytes / 2**20,
            "of bf16": layer.layout.nbytes / layer.weights.nbytes,
            "to slot us": median(fetched[name]) * US,
            "unpacked us": median(unpacked[name]) * US,
        }
        for name, layer in layers.items()
    ]


@torch.no_grad()
def _misses(model: Any, runtime: Runtime, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A fetch and a pass through the slot, against the host's CPU on the record itself; by the expert's tokens."""
    loader, runner = runtime.loaders[0], runtime.runners[0]
    pool, kernel = loader.pool, runner.experts.kernel
    host = CpuExperts(experts_modules(model)[runtime.layers[0].name], runtime.store, 0, device)
    slot_range = pool.slot_range(0)

    def row(tokens: int) -> dict[str, Any]:
        hidden = torch.randn(tokens, HIDDEN, device=device).to(kernel.dtype)
        ends = torch.full((SLOTS,), tokens, dtype=torch.int32, device=device)
        first = torch.zeros(tokens, dtype=torch.int64, device=device)
        ids = torch.arange(EXPERTS, device=device)[:, None].expand(EXPERTS, tokens).contiguous()
        turn, host_turn = itertools.cycle(range(EXPERTS)), itertools.cycle(range(EXPERTS))

        def fetched() -> None:
            put_record(pool.memory[slot_range.start], runtime.store.record(0, next(turn)))
            kernel(hidden, ends, first)

        def on_the_host() -> None:
            expert = next(host_turn)
            host.compute(hidden, ids[expert], [expert], [tokens])

        candidates = {"fetched us": fetched, "hosted us": on_the_host}
        times = compare(candidates, "hosted us", "fetched us", rounds, US, "of fetched", device=device)
        return {"tokens": tokens, **times}

    return [row(tokens) for tokens in TOKENS]
