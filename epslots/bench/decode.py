"""Decoding by ``DecodeGraph`` against plain transformers resident, accelerate's CPU offload, and our own usual path.

The model has random weights, of which no routing can be learnt, so its routers are replaced by synthetic ones of known skew
(``SkewedRouter``), the same for all contenders. What is decoded are random tokens, the same for all: greedy decoding of random
weights soon repeats itself, and with it its routing.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import epslots
from epslots.bench.models import random_config
from epslots.bench.report import BenchReport, alternate, median
from epslots.cache.host_store import HostStore
from epslots.cuda_graph.decode_graph import DecodeGraph, kernels_for
from epslots.cuda_graph.device_slots import DeviceSlots, Missing
from epslots.progress import ProgressDisplay
from epslots.runtime import runtime_of

SHARES = ("25%", "50%", "75%", "100%")
PROMPT = 32
# Zipf's exponent of the experts' popularity in each layer. Which ones are popular differs from layer to layer.
SKEW = 1.0
# Records that the copying kernel is timed with at a time.
TIMED_RECORDS = 8


def shape_for(device: torch.device, layers: int = 48) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's shape (57 GiB in bf16) on a GPU; one a thousand times smaller on the CPU, to try the code."""
    if device.type == "cuda":
        return random_config(layers=layers, hidden=2048, experts=128, top_k=8, width=768, vocab=151_936, heads=16)
    return random_config(layers=4, hidden=256, experts=32, top_k=4, width=128)


def bench_decode(
    report: BenchReport, cache_dir: Path, device: torch.device, *, rounds: int = 3, new_tokens: int = 48, layers: int = 48
) -> None:
    """Tokens a second of batch 1 and 4, and the speed of copies into slots against the link's ceiling, all in bf16.

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
            store = runtime_of(model).store  # a store in memory lives as long as somebody holds it
            skew_routers(model)
            for batch in (1, 4):
                graph = DecodeGraph(model, batch, PROMPT + new_tokens)
                tokens = random_tokens(config, batch, PROMPT + new_tokens, device)
                what = {"slots": share, "batch": batch}
                rows.append(
                    {"what": "DecodeGraph"} | what | _timed(model, rounds, new_tokens * batch, _by_graph(graph, tokens))
                )
                rows[-1]["how"] = graph.obstacle or ("replayed" if graph.replays else "step by step, no GPU")
                rows.append(
                    {"what": "usual path"} | what | _timed(model, rounds, new_tokens * batch, _by_model(model, tokens))
                )
                del graph
            if share == SHARES[0]:
                links = _link_rows(model, device)
            del model
            _release()
        del store
        plain = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
        skew_routers(plain)
        rows += _plain_rows("transformers, resident", plain, config, device, rounds, new_tokens)
        del plain
        _release()
        offloaded = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        skew_routers(offloaded)
        cpu_offload(offloaded, execution_device=device)
        rows += _plain_rows("accelerate, CPU offload", offloaded, config, device, 1, max(2, new_tokens // 12))
    resident = {row["batch"]: row["tokens/s"] for row in rows if row["what"] == "transformers, resident"}
    report.table("decoding", [row | {"of resident": row["tokens/s"] / resident[row["batch"]]} for row in rows])
    report.table("host to device", links)


class SkewedRouter(nn.Module):
    """Stands for a Qwen3-MoE router: chooses as a random router would, if some experts were liked better.

    A token's logits are the router's own, brought to a standard deviation of 1, plus the logarithm of each expert's
    popularity, which falls with its rank as Zipf's law has it.
    """

    def __init__(self, router: Any, layer: int, skew: float = SKEW) -> None:
        super().__init__()
        self.weight, self.top_k, self.norm = router.weight, router.top_k, router.norm_topk_prob
        ranks = torch.randperm(router.num_experts, generator=torch.Generator().manual_seed(layer))
        popularity_E = -skew * torch.log1p(ranks.float())
        self.popularity_E: torch.Tensor
        self.register_buffer("popularity_E", popularity_E.to(router.weight.device), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, E], weights [T, K] and ids [T, K], as the router gives them."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = nn.functional.linear(hidden_TH, self.weight).float()
        logits_TE = logits_TE / logits_TE.std(-1, keepdim=True).clamp(min=1e-6) + self.popularity_E
        weights_TK, ids_TK = torch.topk(torch.softmax(logits_TE, -1), self.top_k, dim=-1)
        if self.norm:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(hidden_states.dtype), ids_TK


def skew_routers(model: PreTrainedModel) -> None:
    """Put a ``SkewedRouter`` in front of every experts module of a Qwen3-MoE."""
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate = SkewedRouter(layer.mlp.gate, number)


def random_tokens(config: Qwen3MoeConfig, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The same for the same shape, int64 [batch, length]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator).to(device)


@contextmanager
def quick_checkpoint(config: Qwen3MoeConfig, device: torch.device) -> Iterator[Path]:
    """A folder with a random bf16 model of ``config``, made on the device tensor by tensor; gone after the block.

    Drawing the weights of a large model takes a CPU minutes.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _unfused(Qwen3MoeForCausalLM._from_config(config)).items()}
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as name:
        folder = Path(name)
        shards: dict[str, list[str]] = {}
        for tensor in shapes:
            shards.setdefault(".".join(tensor.split(".")[:3]), []).append(tensor)
        generator = torch.Generator(device).manual_seed(0)
        index: dict[str, str] = {}
        size = 2 * sum(math.prod(shape) for shape in shapes.values())
        with ProgressDisplay()("making a random checkpoint", size) as advance:
            for number, tensors in enumerate(shards.values()):
                file = f"model-{number:05d}.safetensors"
                content = {t: _draw(t, shapes[t], generator, device) for t in tensors}
                save_file(content, folder / file, metadata={"format": "pt"})
                index |= dict.fromkeys(tensors, file)
                advance(sum(t.nbytes for t in content.values()))
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": index}), encoding="utf-8"
        )
        yield folder


def _unfused(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as published checkpoints have it: one tensor for each matrix of each expert."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if not path.endswith("experts"):
            found[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            if last == "gate_up_proj":
                gate, up = tensor[expert].chunk(2)
                found |= {f"{path}.{expert}.gate_proj.weight": gate, f"{path}.{expert}.up_proj.weight": up}
            else:
                found[f"{path}.{expert}.{last}.weight"] = tensor[expert]
    return found


def _draw(name: str, shape: torch.Size, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    return drawn.cpu()


def _by_graph(graph: DecodeGraph, tokens: torch.Tensor) -> Callable[[], float]:
    def run() -> float:
        graph.prefill(tokens[:, :PROMPT])
        with graph:
            _synchronise(tokens.device)
            began = time.perf_counter()
            for position in range(PROMPT, tokens.shape[1]):
                graph.step(tokens[:, position])
            _synchronise(tokens.device)
            return time.perf_counter() - began

    return run


def _by_model(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], float]:
    """The forward pass alone, which is faster than ``generate``."""

    def run() -> float:
        cache = model(tokens[:, :PROMPT], use_cache=True).past_key_values
        _synchronise(tokens.device)
        began = time.perf_counter()
        for position in range(PROMPT, tokens.shape[1]):
            model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        _synchronise(tokens.device)
        return time.perf_counter() - began

    return run


def _timed(model: PreTrainedModel, rounds: int, tokens: int, run: Callable[[], float]) -> dict[str, Any]:
    """Median over the rounds after one that warms up; hits and bytes of prompts and output together."""
    run()
    before = epslots.stats(model)
    rate = median([tokens / run() for _ in range(rounds)])
    after = epslots.stats(model)
    hits, misses = after.hits - before.hits, after.misses - before.misses
    fetched = (after.bytes_fetched - before.bytes_fetched) / (rounds * tokens)
    return {"tokens/s": rate, "hit rate": hits / max(1, hits + misses), "MB/token": fetched / 1e6, "how": "step by step"}


def _plain_rows(
    what: str, model: PreTrainedModel, config: Qwen3MoeConfig, device: torch.device, rounds: int, new_tokens: int
) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 4):
        run = _by_model(model, random_tokens(config, batch, PROMPT + new_tokens, device))
        run()
        rate = median([new_tokens * batch / run() for _ in range(rounds)])
        rows.append(
            {"what": what, "slots": "", "batch": batch, "tokens/s": rate, "hit rate": None, "MB/token": None, "how": ""}
        )
    return rows


def _link_rows(model: PreTrainedModel, device: torch.device, rounds: int = 20) -> list[dict[str, Any]]:
    """Records into slots by the device's kernel and by plain copies, against one large copy of pinned memory: GB/s."""
    loader = runtime_of(model).movers[0]
    pool = loader.pool
    count = min(TIMED_RECORDS, pool.quotas[0])
    loader.wait_all()
    pool.vacate(0, pool.expert_of[pool.window(0)].copy())
    pool.publish(0)
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

    candidates: dict[str, Callable[[], object]] = {
        "one copy of pinned memory": lambda: target.copy_(source, non_blocking=True),
        "a copy for each record": one_by_one,
        "the device's kernel": lambda: kernels.copy(layer, missing),
    }
    seconds = alternate(candidates, rounds, device=device)
    speeds = {what: source.nbytes / median(taken) / 1e9 for what, taken in seconds.items()}
    ceiling = speeds["one copy of pinned memory"]
    return [{"what": w, "records": count, "GB/s": speed, "of ceiling": speed / ceiling} for w, speed in speeds.items()]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
