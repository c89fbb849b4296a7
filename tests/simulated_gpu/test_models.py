"""Whole models on a simulated GPU: plain transformers' tokens, no mixed devices, and no race.

One architecture for each way to store and call experts, and some for their caches; with ``EPSLOTS_WHOLE_ZOO=1`` all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import epslots
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.sampling import Sampling
from epslots.planner.cost_model import Costs
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from tests.support import zoo
from tests.support.equality import LAYOUTS, SERVED, TOLERANCE
from tests.support.simulated import greedy_on, load_gpu, serve

MODELS = SERVED if os.environ.get("EPSLOTS_WHOLE_ZOO") else [*LAYOUTS, "deepseek_v3", "gemma4"]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_plain_transformers(name: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """A prompt in passes with a quarter of the slots, then some tokens."""
    folder, ids = checkpoint(name), zoo.random_ids(2, 12, seed=1)
    expected = greedy_on(zoo.reference(folder), ids, 3)
    with simulated_gpus() as gpu:
        model = load_gpu(folder, shared_stores)
        gpu.reset()
        assert greedy_on(model, ids, 3) == expected
        assert gpu.races == []
        runtime_of(model).check_integrity()


@pytest.mark.parametrize("gpu_name", ["a100", "b200"])
def test_kinds_of_gpu_compute_the_same(gpu_name: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    folder, ids = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=1)
    settings: dict[str, Any] = {"slots": "50%", "dtype": "bfloat16"}
    on_cpu = epslots.load(folder, cache_dir=shared_stores, device="cpu", progress=False, **settings)
    with simulated_gpus(gpu_name) as gpu:
        model = load_gpu(folder, shared_stores, **settings)
        gpu.reset()
        assert greedy_on(model, ids, 4) == greedy_on(on_cpu, ids, 4)
        assert gpu.races == []


REQUESTS = [
    Request(
        str(number),
        tuple(zoo.random_ids(1, 9 + number, seed=number)[0].tolist()),
        max_new_tokens=8,
        sampling=Sampling(temperature=0.8, top_p=0.9, seed=number) if number % 2 else Sampling(),
    )
    for number in range(4)
]


@pytest.mark.parametrize(("name", "cache"), [("qwen3_moe", "pages"), ("qwen3_moe", "rows"), ("deepseek_v3", "pages")])
def test_an_engine_serves_without_a_race(name: str, cache: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """transformers' continuous batching computes on a stream of its own: nothing else would order it with ours."""
    settings: dict[str, Any] = {"slots": "50%", "dtype": "float32", "cache_dir": shared_stores}
    expected = serve(epslots.load(checkpoint(name), device="cpu", progress=False, **settings), REQUESTS, cache=cache)
    with simulated_gpus() as gpu:
        model = load_gpu(checkpoint(name), shared_stores, **settings)
        gpu.reset()
        assert serve(model, REQUESTS, cache=cache) == expected
        assert gpu.races == []


def test_records_from_the_disk_cross_without_a_race(checkpoint: Callable[[str], Path], cache_dir: Path):
    """A cell of pinned RAM is read into again only when the copy from it has ended."""
    folder, ids = checkpoint("qwen3_moe"), zoo.random_ids(2, 12, seed=1)
    expected = greedy_on(zoo.reference(folder), ids, 5)
    with simulated_gpus() as gpu:
        model = load_gpu(folder, cache_dir, host_memory="150KB")
        gpu.reset()
        assert greedy_on(model, ids, 5) == expected
        assert gpu.races == []
        runtime_of(model).check_integrity()
        assert epslots.stats(model).total("disk_bytes") > 0


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "on the host"])
def test_packed_records_and_experts_on_the_host(kind: str, checkpoint: Callable[[str], Path], tmp_path: Path):
    """A kernel computes from packed slots, without waiting for the host; or rows cross instead of records."""
    base = checkpoint({"fp8": "deepseek_v3", "mxfp4": "gpt_oss"}.get(kind, "qwen3_moe"))
    folder = {"fp8": zoo.make_fp8, "mxfp4": zoo.make_mxfp4}.get(kind, lambda source, _: source)(base, tmp_path / "packed")
    ids = zoo.random_ids(1, 12, seed=1)
    reference = zoo.reference(folder) if kind == "on the host" else zoo.reference_dequantised(folder)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    settings: dict[str, Any] = {"host_compute": "on" if kind == "on the host" else "off", "slots": "50%"}
    if kind == "on the host":
        settings["costs"] = Costs(10**6, 1, 1, 1, 10, 1, 1, host_expert=10, host_pair=1)
    with simulated_gpus() as gpu:
        model = load_gpu(folder, tmp_path / "store", **settings)
        gpu.reset()
        with torch.no_grad():
            actual = model(input_ids=ids.to("cuda")).logits.cpu()
        assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert gpu.races == []
        assert (sum(layer.cpu_misses for layer in epslots.stats(model).layers) > 0) is (kind == "on the host")
        assert all((layer.packed is None) is (kind == "on the host") for layer in runtime_of(model).layers)
        assert not any(runner.experts.kernel.waits_for_host for runner in runtime_of(model).runners)
        runtime_of(model).check_integrity()


def test_a_quantised_checkpoint_decodes_captured(checkpoint: Callable[[str], Path], tmp_path: Path):
    """Its records stay as they are stored, and come from the host store by a kernel like any others."""
    folder = zoo.make_mxfp4(checkpoint("gpt_oss"), tmp_path / "packed")
    settings: dict[str, Any] = {"slots": "50%", "dtype": "float32", "host_compute": "off", "cache_dir": tmp_path}
    expected = serve(epslots.load(folder, device="cpu", progress=False, **settings), REQUESTS[:1], cache="rows")
    with simulated_gpus() as gpu:
        model = load_gpu(folder, tmp_path, **settings)
        assert all(layer.packed is not None for layer in runtime_of(model).layers)
        engine = Engine(model, kv_tokens=512, cache="rows")
        engine.batcher.add(REQUESTS[0])
        assert [token for output in engine.run() for token in output.tokens] == expected[REQUESTS[0].id]
        assert engine.batcher.stats().replayed_steps > 3 and gpu.races == []
        runtime_of(model).check_integrity()
        engine.batcher.close()
