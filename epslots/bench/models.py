"""Models of the benches: the shipped example, random checkpoints of a given shape, and their counters."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import epslots
from epslots.planner.cost_model import Costs
from epslots.progress import ProgressDisplay

# An expert and a hidden state of Qwen3-30B-A3B in bf16: 3 x 2048 x 768 weights, and 2048 values.
LARGE_EXPERT_BYTES, LARGE_ROW_BYTES = 9_437_184, 4096
# Costs of ranks with such experts, over 8 GB/s to the host and 200 GB/s between ranks, in nanoseconds.
LARGE_EXPERTS = Costs(
    host_fetch=1_180_000,
    peer_fetch=47_000,
    pair_transfer=20,
    pair_compute=30,
    expert_compute=3_000,
    exchange=30_000,
    gather=20_000,
)
PROMPTS = (
    "def read_json(path):\n",
    "import os\nimport sys\n\nclass Parser:\n    def __init__(self, ",
    '"""Utilities for dates and times."""\n\nfrom datetime import ',
    "    for name, value in self.items():\n        if value is None:\n",
)


def load_fp32(folder: Path, cache_dir: str | Path, *, slots: int | str = "100%", **settings: Any) -> PreTrainedModel:
    """A model in fp32 on the CPU, where batches don't change its tokens, with further keywords of ``epslots.load``."""
    fixed: dict[str, Any] = {"device": "cpu", "dtype": "float32", "progress": False, "cache_dir": cache_dir}
    return epslots.load(folder, slots=slots, **fixed, **settings)


def release() -> None:
    """Free what models that nothing holds any more have left: modules and their hooks refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def use_sums(model: PreTrainedModel, since: Mapping[str, float] | None = None) -> dict[str, float]:
    """A model's counters, summed over layers, less those of ``since``; "uses" are hits and misses together."""
    layers = epslots.stats(model).layers
    names = ("hits", "misses", "late", "prefetches", "taken_back", "stall_s", "host_bytes", "disk_bytes", "bytes_fetched")
    found = {name: float(sum(getattr(layer, name) for layer in layers)) for name in names}
    found["uses"] = found["hits"] + found["misses"]
    return found if since is None else {name: value - since[name] for name, value in found.items()}


def random_config(
    *, layers: int, hidden: int, experts: int, top_k: int, width: int, vocab: int = 4096, heads: int = 16
) -> Qwen3MoeConfig:
    """A Qwen3-MoE of the given shape: every layer has experts."""
    return Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=hidden // heads,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=8192,
        architectures=["Qwen3MoeForCausalLM"],
    )


@contextlib.contextmanager
def random_checkpoint(config: PreTrainedConfig, dtype: torch.dtype, *, embedding: float | None = None) -> Iterator[Path]:
    """A folder with a random model of ``config``, stored as its architecture's checkpoints are; deleted after the block.

    Args:
        embedding: standard deviation of the embeddings. With transformers' own, 0.02, attention's output, which hardly
            differs from token to token, drowns them, and soon all tokens are routed alike.
    """
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if embedding is not None:
            model.get_input_embeddings().weight.data.normal_(0, embedding)
        model.save_pretrained(folder)
        del model
        yield Path(folder)


@contextlib.contextmanager
def quick_checkpoint(config: Qwen3MoeConfig, device: torch.device) -> Iterator[Path]:
    """A checkpoint in bf16, made on the device tensor by tensor. A CPU takes minutes to draw the weights of a large model."""
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
    """The state dict in the layout of published checkpoints: one tensor for each matrix of each expert."""
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
