"""``bench gpu``: tokens a second from slots, against plain transformers and accelerate's offload; and their parts.

All use one random checkpoint of Qwen3-30B-A3B's experts with skewed routers. Tokens are drawn at random: greedy decoding of
random weights soon repeats itself, and with it its routing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from epslots.bench.decode import random_tokens, skew_routers
from epslots.bench.engines import Decoding, open_engine, random_prompt
from epslots.bench.gpu_kit import GpuKit
from epslots.bench.models import LARGE_EXPERTS, quick_checkpoint, use_sums
from epslots.bench.report import MS, US, Tables, median, synchronise
from epslots.generation.requests import Request
from epslots.generation.sampling import Sampling
from epslots.runtime import runtime_of

SHARES = (1.0, 0.5, 0.25, 0.75)
BATCHES = (1, 8)
PROMPT, WARM_UP, OFFLOADED_STEPS = 64, 8, 3
KERNEL_TOKENS = (1, 8, 64, 512)
_RECORDS = 16  # fetched at a time


def measure_decoding(kit: GpuKit) -> None:
    """Every step that uses the large checkpoint, which is made first."""
    kit.step("decoding", 120 if kit.on_gpu else 5, lambda: _all(kit))


def _all(kit: GpuKit) -> Tables:
    where = kit.device if kit.sizes.drawn_on_device else torch.device("cpu")
    with quick_checkpoint(kit.sizes.model, where) as folder, torch.no_grad():
        for share in SHARES:
            kit.step(f"decoding, {share:.0%} slots", 40 if kit.on_gpu else 1, partial(_own, kit, folder, share))
        kit.facts.pop("store", None)
        kit.step("decoding, transformers", 30 if kit.on_gpu else 1, lambda: _plain(kit, folder))
        kit.step("decoding, accelerate", 60 if kit.on_gpu else 1, lambda: _offloaded(kit, folder))
    resident = {row["batch"]: row["ms a step"] for row in _rows(kit) if row["what"] == "transformers"}
    for row in _rows(kit):
        row["of transformers"] = resident[row["batch"]] / row["ms a step"] if row["batch"] in resident else None
    return {"model": [{"layers": kit.sizes.model.num_hidden_layers, "experts": kit.sizes.model.num_experts}]}


def _rows(kit: GpuKit) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = kit.facts.setdefault("decoding", [])
    return found


def _own(kit: GpuKit, folder: Path, share: float) -> Tables:
    model = kit.load(
        folder,
        slots=f"{100 * share:g}%",
        device=kit.device,
        dtype="bfloat16",
        cache_dir=kit.cache_dir,
        costs=LARGE_EXPERTS,  # without those of the host's CPU: it computes nothing
        kv_tokens=4096,
        max_requests=max(BATCHES),
        progress=False,
    )
    kit.facts.setdefault("store", runtime_of(model).store)  # in memory it lives as long as it is held
    skew_routers(model)
    rows = [_own_row(kit, model, share, batch) for batch in BATCHES]
    _rows(kit).extend(rows)
    tables: Tables = {f"decoding, {share:.0%} slots": rows}
    if share == 1:
        tables["one layer's experts, all resident"] = _kernel_rows(kit, model)
    elif share == SHARES[1]:
        tables["fetches"] = _fetch_rows(kit, model)
    return tables


def _own_row(kit: GpuKit, model: PreTrainedModel, share: float, batch: int) -> dict[str, Any]:
    engine = open_engine(model)
    steps = kit.sizes.steps
    requests = [
        Request(str(n), random_prompt(model, PROMPT, n), 2 * (WARM_UP + steps), sampling=Sampling(temperature=1.0, seed=n))
        for n in range(batch)
    ]
    decoding = Decoding(engine, requests)
    for _ in range(WARM_UP):
        decoding.step()
    before, seconds = use_sums(model), []
    for _ in range(steps):
        synchronise(kit.device)
        began = time.perf_counter()
        decoding.step()
        synchronise(kit.device)
        seconds.append(time.perf_counter() - began)
    uses = use_sums(model, since=before)
    engine.batcher.close()
    return {
        "what": f"epslots, {share:.0%} slots",
        "share": share,
        "batch": batch,
        "ms a step": median(seconds) * MS,
        "tokens/s": batch / median(seconds),
        "hit rate": uses["hits"] / max(1.0, uses["uses"]),
        "MB a step": uses["bytes_fetched"] / steps / 1e6,
    }


def _plain(kit: GpuKit, folder: Path) -> Tables:
    model = kit.plain(folder, kit.device)
    skew_routers(model)
    rows = [_plain_row("transformers", kit, model, batch, kit.sizes.steps) for batch in BATCHES]
    _rows(kit).extend(rows)
    return {"decoding, transformers, all on the device": rows}


def _offloaded(kit: GpuKit, folder: Path) -> Tables:
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    skew_routers(model)  # before the weights are offloaded
    cpu_offload(model, execution_device=kit.device)
    rows = [_plain_row("accelerate, CPU offload", kit, model, BATCHES[0], OFFLOADED_STEPS)]
    _rows(kit).extend(rows)
    return {"decoding, accelerate's CPU offload": rows}


def _plain_row(what: str, kit: GpuKit, model: PreTrainedModel, batch: int, steps: int) -> dict[str, Any]:
    warm_up = min(WARM_UP, steps)
    tokens = random_tokens(kit.sizes.model, batch, PROMPT + warm_up + steps, kit.device)
    cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
    seconds = []
    for position in range(PROMPT, tokens.shape[1]):
        synchronise(kit.device)
        began = time.perf_counter()
        model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        synchronise(kit.device)
        seconds.append(time.perf_counter() - began)
    step_s = median(seconds[warm_up:])
    return {"what": what, "share": None, "batch": batch, "ms a step": step_s * MS, "tokens/s": batch / step_s} | {
        "hit rate": None,
        "MB a step": None,
    }


def _kernel_rows(kit: GpuKit, model: PreTrainedModel) -> list[dict[str, Any]]:
    """One layer's experts on rows of random routing: the weights that they read by second, and their products."""
    config, runner = kit.sizes.model, runtime_of(model).runners[0]
    expert_bytes = runtime_of(model).layers[0].layout.nbytes
    rows = []
    for tokens in KERNEL_TOKENS:
        hidden = torch.randn(tokens, config.hidden_size, device=kit.device).to(torch.bfloat16)
        index = torch.rand(tokens, config.num_experts).topk(config.num_experts_per_tok).indices
        ids = index.view(-1).to(kit.device)
        seconds = _median_seconds(kit, partial(runner.experts.execute_resident, hidden, ids))
        used = len(index.unique())
        flops = 2.0 * index.numel() * expert_bytes / 2
        rows.append(
            {
                "tokens": tokens,
                "experts": used,
                "us": seconds * US,
                "weights GB/s": used * expert_bytes / seconds / 1e9,
                "TFLOPS": flops / seconds / 1e12,
                "of its limit": _limit_seconds(kit, used * expert_bytes, flops) / seconds if kit.on_gpu else None,
            }
        )
    return rows


def _limit_seconds(kit: GpuKit, nbytes: float, flops: float) -> float:
    """By the measured rates of this GPU: the longer of the two."""
    spec = kit.facts.get("spec")
    return 0.0 if spec is None else max(nbytes / spec.memory_rate, flops / spec.flops)


def _fetch_rows(kit: GpuKit, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Experts from the host store into slots, in place of others, against one copy of as many bytes of pinned memory."""
    loader = runtime_of(model).loaders[0]
    pool, count = loader.pool, min(_RECORDS, loader.pool.quotas[0] // 2)
    nbytes = count * loader.store.record(loader.store_layers[0], 0).nbytes
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=kit.on_gpu)
    target = torch.empty(nbytes, dtype=torch.uint8, device=kit.device)
    loader.wait_all()
    slots = np.arange(pool.slot_range(0).start, pool.slot_range(0).start + count)

    def fetch() -> None:
        absent = np.flatnonzero(pool.slot_of[0] < 0)[:count]
        loader.fetch(0, absent, slots, pool.expert_of[slots].copy())
        loader.wait_all()

    ways: dict[str, Callable[[], object]] = {
        "experts into slots": fetch,
        "one copy of pinned memory": lambda: target.copy_(source, non_blocking=True),
    }
    seconds = {name: _median_seconds(kit, run) for name, run in ways.items()}
    best = seconds["one copy of pinned memory"]
    return [
        {"what": name, "MB": nbytes / 1e6, "GB/s": nbytes / taken / 1e9, "of a copy": best / taken}
        for name, taken in seconds.items()
    ]


def _median_seconds(kit: GpuKit, run: Callable[[], object]) -> float:
    found = []
    for number in range(kit.sizes.repeats + 1):
        synchronise(kit.device)
        began = time.perf_counter()
        run()
        synchronise(kit.device)
        if number:
            found.append(time.perf_counter() - began)
    return median(found)
