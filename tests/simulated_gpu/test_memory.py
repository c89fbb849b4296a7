"""The memory that the plan promises, against the memory that a device then counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.sampling import Sampling
from epslots.models.captured_sizes import GRAPH_BYTES, PIECE_BYTES
from epslots.models.experts import experts_modules
from epslots.models.memory_plan import moe_workspace_bytes
from epslots.moe.kernel_gemm import KernelGemm
from epslots.moe.product_choice import Product, planned_products
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from tests.support import zoo
from tests.support.simulated import greedy_on, load_gpu

REQUESTS, PROMPT = 8, 60


@pytest.mark.parametrize(("name", "cache"), [("qwen3_moe", "pages"), ("deepseek_v3", "pages"), ("deepseek_v3", "rows")])
def test_an_engine_asks_for_what_is_planned(name: str, cache: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """Its cache to the byte; and no more for a step full of prompts, and for drawing tokens, than the plan's workspace."""
    settings = {"kv_tokens": 1024, "max_requests": REQUESTS, "max_batch_tokens": 256, "cache": cache}
    with simulated_gpus() as gpu:
        model = load_gpu(checkpoint(name), shared_stores, slots="50%", dtype="bfloat16", **settings)
        plan, loaded = runtime_of(model).plan, gpu.allocated[0]
        assert loaded <= plan.shape.dense_bytes + plan.slot_bytes + plan.predictor_bytes + 2**15, "tables are small"
        engine = Engine(model)
        opened = gpu.allocated[0]
        assert opened - loaded == plan.kv_bytes
        gpu.peak[0] = opened
        for number in range(REQUESTS):
            prompt = tuple(zoo.random_ids(1, PROMPT, seed=number)[0].tolist())
            engine.batcher.add(Request(str(number), prompt, max_new_tokens=2, sampling=Sampling(temperature=0.8, top_p=0.9)))
        list(engine.run())
        assert plan.workspace_bytes // 4 < gpu.peak[0] - opened <= plan.workspace_bytes
        engine.batcher.close()


@pytest.mark.parametrize(
    ("gpu_name", "product", "cache", "attention"),
    [
        ("h100", Product.TORCH, "rows", "sdpa"),
        ("h100", Product.TORCH, "pages", "sdpa"),
        ("h100", Product.TORCH, "pages", "eager"),
        ("a100", Product.KERNEL, "rows", "sdpa"),
        ("h100", Product.BY_SLOT, "pages", "sdpa"),
    ],
)
def test_plans_know_whether_steps_are_captured(
    gpu_name: str, product: Product, cache: str, attention: str, checkpoint: Callable[[str], Path], shared_stores: Path
):
    """By the predicates that are asked afterwards: where no step can be captured, there is no room for graphs.

    Where products wait for the host, steps are captured in pieces.
    """
    loops = product is Product.BY_SLOT  # no kernel knows float64
    with simulated_gpus(gpu_name) as gpu:
        settings = {"dtype": "float64" if loops else "bfloat16", "cache": cache, "attn_implementation": attention}
        model = load_gpu(checkpoint("qwen3_moe"), shared_stores, slots="50%", kv_tokens=64, max_requests=2, **settings)
        runtime, device = runtime_of(model), torch.device("cuda:0")
        modules = experts_modules(model).values()
        assert planned_products(modules, runtime.layers, device, batch_invariant=False) == {product}
        for runner in runtime.runners:
            assert isinstance(runner.experts.kernel, KernelGemm) is (product is Product.KERNEL)
        batcher = Engine(model).batcher
        uncaptured = attention == "eager"
        assert (batcher.stats().capture_obstacle is not None) is uncaptured is (runtime.plan.captured_bytes == 0)
        assert runtime.plan.captures_in_pieces is (loops and not uncaptured)
        batcher.add(Request("a", (1, 2, 3), max_new_tokens=5))
        while batcher.prepare():
            batcher.step()
        assert (batcher._captured.whole_obstacle is not None) is runtime.plan.captures_in_pieces
        assert (batcher.stats().replayed_steps > 0) is not uncaptured
        assert gpu.races == []
        batcher.close()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("cache", ["rows", "pages"])
def test_captured_steps_take_what_is_planned(cache: str, pieces: bool, checkpoint: Callable[[str], Path], shared_stores: Path):
    """One long request, as long as which all others are read; a pass before its capture needs the same as the graph."""
    settings: dict[str, Any] = {"kv_tokens": 256, "max_requests": 4, "max_batch_tokens": 512, "cache": cache}
    settings |= {"host_memory": "150KB", "slots": "75%"} if pieces else {"slots": "100%"}
    with simulated_gpus() as gpu:
        model = load_gpu(checkpoint("qwen3_moe"), shared_stores, dtype="bfloat16", **settings)
        plan, batcher = runtime_of(model).plan, Engine(model).batcher
        for number, length in enumerate((140, 20, 20, 20)):
            prompt = tuple(zoo.random_ids(1, length, seed=number)[0].tolist())
            batcher.add(Request(str(number), prompt, max_new_tokens=9))
        peaks, sizes = [], plan.captured_sizes
        while batcher.stats().replayed_steps < 1:
            assert batcher.prepare()
            before = gpu.peak[0] = gpu.allocated[0]
            batcher.step()
            peaks.append(gpu.peak[0] - before)
        assert (4, 256) in sizes.graphs() and batcher.stats().ragged_steps == 0
        assert plan.captures_in_pieces is pieces
        each = GRAPH_BYTES + (PIECE_BYTES * len(plan.shape.layers) if pieces else 0)
        planned = plan.captured_bytes - len(sizes.graphs()) * each
        before_capture, _, replay = peaks[-3:]
        layers = moe_workspace_bytes(plan.shape, 4, 1) if pieces else 0  # which aren't captured then
        assert planned // 2 < before_capture <= planned + layers
        assert replay < planned // 10 + layers and batcher.stats().graph_bytes > 0
        batcher.close()


def test_a_long_prompt_is_computed_in_parts(checkpoint: Callable[[str], Path], shared_stores: Path):
    """``generate`` computes prompts at once, longer ones than a plan has room for: the layers divide them."""
    folder, ids = checkpoint("qwen3_moe"), zoo.random_ids(1, 300, seed=1)
    expected = greedy_on(zoo.reference(folder), ids, 2)
    settings: dict[str, Any] = {"slots": "50%", "max_batch_tokens": 32, "max_requests": 4, "prefetch": "off"}
    peaks, steps = [], []
    for share in (None, 0.7):
        with simulated_gpus() as gpu:
            model = load_gpu(folder, shared_stores, **settings)
            if share is not None:
                gpu.memory_bytes = gpu.allocated[0] + int(share * peaks[0])
            gpu.peak[0] = loaded = gpu.allocated[0]
            before = runtime_of(model).runners[0].steps
            assert greedy_on(model, ids, 2) == expected
            peaks.append(gpu.peak[0] - loaded)
            steps.append(runtime_of(model).runners[0].steps - before)
            assert gpu.races == []
    assert steps[0] == 2 < steps[1], "the prompt and one more token; divided where memory is scarce"
    assert peaks[1] <= 0.7 * peaks[0]
