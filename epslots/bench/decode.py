"""Decoding from few slots, captured and on the usual path, against transformers resident and accelerate's CPU offload.

Random weights have no routing that could be learned, so synthetic routers of known skew (``SkewedRouter``) replace the
model's, the same for all candidates. All decode random tokens, given or drawn: greedy decoding of random weights soon repeats
itself, and with it its routing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import epslots
from epslots.bench.models import quick_checkpoint, random_config, release, use_sums
from epslots.bench.report import BenchReport, Candidates, alternate, median, synchronise
from epslots.cache.host_store import HostStore
from epslots.cuda_graph.device_slots import DeviceSlots, Missing
from epslots.cuda_graph.lent_slots import kernels_for
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import Sampling
from epslots.runtime import runtime_of

SHARES = ("25%", "50%", "75%", "100%")
BATCHES = (1, 4)
PROMPT = 32
# Zipf's exponent of the experts' popularity in each layer. Which ones are popular differs from layer to layer.
SKEW = 1.0
TIMED_RECORDS = 8  # copied at a time
LINK_ROUNDS = 20
RESIDENT = "transformers, resident"
CAPTURED = "engine, captured"


def shape_for(device: torch.device, layers: int = 48) -> Qwen3MoeConfig:
    """The model's shape: Qwen3-30B-A3B's (57 GiB in bf16) on a GPU.

    On the CPU one a thousand times smaller, to try the code.
    """
    if device.type == "cuda":
        return random_config(layers=layers, hidden=2048, experts=128, top_k=8, width=768, vocab=151_936, heads=16)
    return random_config(layers=4, hidden=256, experts=32, top_k=4, width=128)


def bench_decode(
    report: BenchReport, cache_dir: Path, device: torch.device, *, rounds: int = 3, new_tokens: int = 48, layers: int = 48
) -> None:
    """Tokens a second of batch 1 and 4 in bf16, and the speed of copies into slots. That is compared with the link's ceiling.

    Args:
        layers: of the model on a GPU. All layers are alike, so fewer give the same ratios in less time.
    """
    config = shape_for(device, layers)
    report.result["model"] = {"layers": config.num_hidden_layers, "experts": config.num_experts, "skew": SKEW}
    store: HostStore | None = None
    rows: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    with quick_checkpoint(config, device) as folder, torch.no_grad():
        for share in SHARES:
            model = epslots.load(folder, slots=share, device=device, cache_dir=cache_dir)
            store = runtime_of(model).store  # a store in memory lives as long as one model holds it
            skew_routers(model)
            for batch in BATCHES:
                tokens = random_tokens(config, batch, PROMPT + new_tokens, device)
                rows += _own_rows(share, model, tokens, rounds)
            if share == SHARES[0]:
                links = _link_rows(model, device)
            del model
            release()
        del store
        plain = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
        skew_routers(plain)
        rows += _plain_rows(RESIDENT, plain, device, rounds, new_tokens)
        del plain
        release()
        offloaded = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        skew_routers(offloaded)  # before the weights are offloaded
        cpu_offload(offloaded, execution_device=device)
        rows += _plain_rows("accelerate, CPU offload", offloaded, device, 1, max(2, new_tokens // 12))
    resident = {row["batch"]: row["tokens/s"] for row in rows if row["what"] == RESIDENT}
    report.table("decoding", [row | {"of resident": row["tokens/s"] / resident[row["batch"]]} for row in rows])
    report.table("host to device", links)


class SkewedRouter(nn.Module):
    """Stands for a Qwen3-MoE router: chooses like a random router, with some experts more popular.

    A token's logits are the router's own, brought to a standard deviation of 1, plus the logarithm of each expert's
    popularity, which falls with its rank by Zipf's law.
    """

    def __init__(self, router: Any, layer: int, skew: float = SKEW) -> None:
        super().__init__()
        self.weight, self.top_k, self.norm = router.weight, router.top_k, router.norm_topk_prob
        ranks = torch.randperm(router.num_experts, generator=torch.Generator().manual_seed(layer))
        popularity_E = -skew * torch.log1p(ranks.float())
        self.popularity_E: torch.Tensor
        self.register_buffer("popularity_E", popularity_E.to(router.weight.device), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, E], weights [T, K] and ids [T, K], like the router's own."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = nn.functional.linear(hidden_TH, self.weight).float()
        logits_TE = logits_TE / logits_TE.std(-1, keepdim=True).clamp(min=1e-6) + self.popularity_E
        weights_TK, ids_TK = torch.topk(torch.softmax(logits_TE, -1), self.top_k, dim=-1)
        if self.norm:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(hidden_states.dtype), ids_TK


def skew_routers(model: PreTrainedModel) -> None:
    """Replace every router of a Qwen3-MoE by a ``SkewedRouter``."""
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate = SkewedRouter(layer.mlp.gate, number)


def random_tokens(config: Qwen3MoeConfig, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Token ids, int64 [batch, length]; the same for the same shape."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator).to(device)


def _own_rows(share: str, model: PreTrainedModel, tokens: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """An engine's rows from slots, captured and on the usual path; hits and bytes of prompts and output together."""
    batchers = {
        what: RowBatcher(
            model, kv_tokens=tokens.numel(), max_requests=len(tokens), capture=what == CAPTURED, prefix_cache=False
        )
        for what in (CAPTURED, "engine, usual path")
    }
    rows = []
    for what, batcher in batchers.items():
        run = _by_batcher(batcher, tokens)
        run()
        how = "replayed" if batcher.stats().replayed_steps else "step by step"
        before = use_sums(model)
        rate = _tokens_per_s(run, tokens, rounds)
        used = use_sums(model, since=before)
        measured = {
            "tokens/s": rate,
            "hit rate": used["hits"] / max(1, used["uses"]),
            "MB/token": used["bytes_fetched"] / (rounds * _new_tokens(tokens)) / 1e6,
        }
        rows.append({"what": what, "slots": share, "batch": len(tokens), **measured, "how": how})
        batcher.close()
    return rows


def _plain_rows(what: str, model: PreTrainedModel, device: torch.device, rounds: int, new_tokens: int) -> list[dict[str, Any]]:
    rows = []
    for batch in BATCHES:
        tokens = random_tokens(model.config, batch, PROMPT + new_tokens, device)
        run = _by_model(model, tokens)
        run()
        measured = {"tokens/s": _tokens_per_s(run, tokens, rounds), "hit rate": None, "MB/token": None}
        rows.append({"what": what, "slots": "", "batch": batch, **measured, "how": ""})
    return rows


def _new_tokens(tokens: torch.Tensor) -> int:
    return len(tokens) * (tokens.shape[1] - PROMPT)


def _tokens_per_s(run: Callable[[], float], tokens: torch.Tensor, rounds: int) -> float:
    return median([_new_tokens(tokens) / run() for _ in range(rounds)])


def _by_batcher(batcher: RowBatcher, tokens: torch.Tensor) -> Callable[[], float]:
    """Seconds of decoding as many tokens after the same prompts, drawn by each request's seed."""

    def run() -> float:
        # The last token of a request is computed from, and not with.
        new_tokens = _new_tokens(tokens) // len(tokens) + 1
        for number, prompt in enumerate(tokens[:, :PROMPT].tolist()):
            batcher.add(Request(str(number), tuple(prompt), new_tokens, sampling=Sampling(temperature=1.0, seed=number)))
        started: set[str] = set()
        while len(started) < len(tokens):
            batcher.prepare()
            batcher.step()
            started |= {output.id for output in batcher.outputs()}
        synchronise(tokens.device)
        began = time.perf_counter()
        while batcher.prepare():
            batcher.step()
            batcher.outputs()
        synchronise(tokens.device)
        return time.perf_counter() - began

    return run


def _by_model(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], float]:
    """Tokens by nothing but the forward pass, which is faster than ``generate``."""

    def run() -> float:
        cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
        return _seconds(lambda token: model(token[:, None], past_key_values=cache, use_cache=True), tokens)

    return run


def _seconds(step: Callable[[torch.Tensor], object], tokens: torch.Tensor) -> float:
    synchronise(tokens.device)
    began = time.perf_counter()
    for position in range(PROMPT, tokens.shape[1]):
        step(tokens[:, position])
    synchronise(tokens.device)
    return time.perf_counter() - began


def _link_rows(model: PreTrainedModel, device: torch.device) -> list[dict[str, Any]]:
    """Records into slots by the device's kernel and by plain copies, against one large copy of pinned memory: GB/s."""
    loader = runtime_of(model).loaders[0]
    pool = loader.pool
    count = min(TIMED_RECORDS, pool.quotas[0])
    loader.wait_all()
    pool.vacate(0, pool.expert_of[pool.slot_range(0)].copy())
    kernels = kernels_for(loader)
    layer = DeviceSlots(loader, kernels, count).layers[0]
    number = torch.arange(count, device=device)
    missing = Missing(number, number, torch.tensor([count], device=device))
    source = torch.empty(count * pool.layout.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    records = [loader.store.record(loader.store_layers[0], expert) for expert in range(count)]

    def one_by_one() -> None:
        for slot, record in enumerate(records):
            pool.memory[slot].copy_(record, non_blocking=True)

    one_copy = "one copy of pinned memory"
    candidates: Candidates = {
        one_copy: lambda: target.copy_(source, non_blocking=True),
        "a copy for each record": one_by_one,
        "the device's kernel": lambda: kernels.copy(layer, missing),
    }
    seconds = alternate(candidates, LINK_ROUNDS, device=device)
    speeds = {what: source.nbytes / median(taken) / 1e9 for what, taken in seconds.items()}
    return [
        {"what": what, "records": count, "GB/s": speed, "of ceiling": speed / speeds[one_copy]}
        for what, speed in speeds.items()
    ]
