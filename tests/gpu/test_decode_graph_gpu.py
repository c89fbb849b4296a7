"""Decoding by CUDA graphs: run where there is a GPU (``python -m pytest tests/gpu``), skipped where there is none.

In bf16, as grouped matrix multiplication asks for values of the host in other types. Nothing in here has been run yet; see
RESULTS.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.cuda_graph.decode_graph import DecodeGraph, kernels_for
from epslots.cuda_graph.device_slots import DeviceSlots, Missing, TorchKernels
from epslots.errors import ConfigError
from epslots.runtime import runtime_of
from tests.support import zoo

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
# bf16 has 8 bits of mantissa, and attention sums in another order over a static cache.
TOLERANCE = 3e-2


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": 6, "device": "cuda", "dtype": "bfloat16", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, host_store="memory", **settings)


@pytest.mark.parametrize("slots", [6, "100%"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_replayed_steps_equal_plain_transformers(
    name: str, slots: int | str, checkpoint: Callable[[str], Path], cache_dir: Path
):
    folder = checkpoint(name)
    model = load(folder, cache_dir, slots=slots)
    reference = zoo.reference(folder).to("cuda", torch.bfloat16)
    graph = DecodeGraph(model, 1, 60)
    assert graph.obstacle is None
    ids = zoo.random_ids(1, 50, seed=1).cuda()
    with torch.no_grad():
        expected = reference(ids).logits
        for begin in (10, 40):  # the longer prompt takes more passes than any step before it
            found = [graph.prefill(ids[:, :begin]).clone()]
            with graph:
                found += [graph.step(ids[:, position]).clone() for position in range(begin, 50)]
            runtime_of(model).check_integrity()
            difference = torch.stack(found, 1) - expected[:, begin - 1 :]
            assert difference.abs().max() <= TOLERANCE * expected.abs().max()
    assert graph.replays == 38 + 10
    used = [layer for layer in epslots.stats(model).layers if layer.steps]
    assert all(layer.steps == 41 + 11 and (layer.misses > 0) == (slots == 6) for layer in used)


def test_a_graph_gives_what_its_steps_give(checkpoint: Callable[[str], Path], tmp_path: Path):
    """Captured or not, the same kernels: the same tokens, hits and misses, to the last."""
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=2).cuda()
    found = []
    for capture in (True, False):
        model = load(folder, tmp_path / str(capture))
        tokens = DecodeGraph(model, 1, 80, capture=capture).generate(prompt, 70).tolist()
        layers = epslots.stats(model).layers
        found.append(
            (tokens, [(layer.steps, layer.hits, layer.misses, layer.evictions, layer.host_bytes) for layer in layers])
        )
        runtime_of(model).check_integrity()
    assert found[0] == found[1]


def test_a_replayed_step_never_waits_for_the_host(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    graph = DecodeGraph(model, 1, 40)
    token = graph.prefill(zoo.random_ids(1, 9, seed=2).cuda()).argmax(-1)
    with graph:
        for _ in range(3):
            graph.step(token)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                graph.step(token)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_pool_and_the_graph_take_their_memory_once(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    graph = DecodeGraph(model, 1, 80)
    token = graph.prefill(zoo.random_ids(1, 9, seed=2).cuda()).argmax(-1)
    with graph:
        for _ in range(3):
            graph.step(token)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(50):
            graph.step(token)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


def test_triton_decides_as_torch_does(checkpoint: Callable[[str], Path], cache_dir: Path):
    """On the GPU itself, from the same state and for the same ids: tables, histories, counts and what is missing."""
    runtime = runtime_of(load(checkpoint("qwen3_moe"), cache_dir))
    (loader,) = runtime.loaders
    loader.wait_all()
    generator = torch.Generator().manual_seed(1)
    pool, states = loader.pool, []
    for kernels in (TorchKernels(loader), kernels_for(loader)):
        generator.manual_seed(1)
        slots = DeviceSlots(loader, kernels, 4)
        slots.enter([runner.history for runner in runtime.runners], [0] * len(runtime.runners))
        pool.slot_of_device.fill_(-1)
        pool.expert_of_device.fill_(-1)
        missing = Missing(*(torch.zeros(n, dtype=torch.int64, device="cuda") for n in (4, 4, 1)))
        state = []
        for _ in range(60):
            ids = torch.randint(0, pool.layers[0].num_experts + 1, (4,), generator=generator).cuda()
            layer = slots.layers[0]
            kernels.decide(layer, ids, missing)
            count = int(missing.count)
            state += [missing.expert_M[:count].tolist(), missing.slot_M[:count].tolist()]
        tensors = (
            layer.slot_of_E,
            layer.expert_of_Q,
            layer.last_use_E,
            layer.decayed_DE,
            layer.step,
            layer.tally_3,
        )
        states.append((state, [tensor.tolist() for tensor in tensors]))
    assert states[0] == states[1]


def test_a_store_that_is_not_pinned_takes_the_usual_path(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=2).cuda()
    model = epslots.load(
        folder, slots=6, device="cuda", dtype="bfloat16", host_store="file", cache_dir=cache_dir, progress=False
    )
    graph = DecodeGraph(model, 1, 40)
    assert graph.obstacle is not None and "isn't pinned" in graph.obstacle
    graph.generate(prompt, 20)
    assert graph.replays == 0
    runtime_of(model).check_integrity()


def test_a_window_that_would_move_on_is_refused(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("gpt_oss"), cache_dir)
    with pytest.raises(ConfigError, match="attend to a window of 16 tokens"):
        DecodeGraph(model, 1, 17)
    DecodeGraph(model, 1, 16).generate(zoo.random_ids(1, 5, seed=2).cuda(), 10)
    DecodeGraph(model, 1, 30, capture=False).generate(zoo.random_ids(1, 5, seed=2).cuda(), 20)
