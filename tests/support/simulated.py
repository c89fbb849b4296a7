"""Models, engines and counts on simulated GPUs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.sampling import Sampling
from epslots.simulated_gpu.loading import load_simulated
from epslots.simulated_gpu.machine import SimulatedMachine
from tests.support import zoo


def load_gpu(folder: Path, store_dir: Path, **settings: Any) -> PreTrainedModel:
    """A model on the simulated GPU: a quarter of the experts in slots, in fp32."""
    return load_simulated(folder, **{"slots": "25%", "dtype": "float32", "cache_dir": store_dir} | settings)


def request(number: int, new_tokens: int, prompt: int = 7, **sampling: Any) -> Request:
    """A request with random tokens of its own, named by its number."""
    ids = tuple(zoo.random_ids(1, prompt + number, seed=number)[0].tolist())
    return Request(str(number), ids, max_new_tokens=new_tokens, sampling=Sampling(**sampling))


def greedy_on(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy tokens on the model's device."""
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), **settings).tolist()


def serve(model: PreTrainedModel, requests: list[Request], **settings: Any) -> dict[str, list[int]]:
    """The tokens of each request from an engine."""
    engine, tokens = Engine(model, kv_tokens=512, **settings), {}
    for request in requests:
        engine.batcher.add(request)
    for output in engine.run():
        tokens.setdefault(output.id, []).extend(output.tokens)
    engine.batcher.close()
    return tokens


@torch.no_grad()
def decode(gpu: SimulatedMachine, model: PreTrainedModel, steps: int, warm_up: int = 4) -> None:
    """Make decode steps; the machine has counted the last ``steps`` of them alone."""
    output = model(zoo.random_ids(1, 9, seed=1).to(model.device), use_cache=True)
    cache = output.past_key_values
    for step in range(warm_up + steps):
        if step == warm_up:
            gpu.reset()
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)


def kernels_of(gpu: SimulatedMachine) -> Counter[str]:
    """Kernels by owner."""
    found: Counter[str] = Counter()
    for (owner, _), count in gpu.kernels.items():
        found[owner] += count
    return found


def kernels_by_line(gpu: SimulatedMachine) -> Counter[str]:
    """Kernels of our own code, by name and source line; those of replayed graphs stand at the replay."""
    operations = [one for one in gpu.timeline.operations if one.engine.startswith("SM") and one.owner == "epslots"]
    return Counter(f"{one.name} {one.site}" for one in operations)


def waits_of(gpu: SimulatedMachine) -> Counter[str]:
    """Host synchronisations of our own code, by source file."""
    found: Counter[str] = Counter()
    for (_, line), count in gpu.syncs.items():
        if "epslots/" in line:
            found[line.rpartition(":")[0].rpartition("/")[2]] += count
    return found
