"""Captured decoding: run where there is a GPU (``python -m pytest tests/gpu``), skipped where there is none.

Nothing in here has been run yet; see RESULTS.md.
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
from epslots.cuda_graph.device_slots import DeviceSlots, Missing
from epslots.cuda_graph.lent_slots import kernels_for
from epslots.cuda_graph.torch_kernels import TorchKernels
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import Sampling
from epslots.runtime import runtime_of
from tests.support import zoo

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": 8, "device": "cuda", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, host_store="memory", **settings)


def requests(new_tokens: int = 60) -> list[Request]:
    return [
        Request(str(n), tuple(zoo.random_ids(1, 9 + n, seed=n)[0].tolist()), new_tokens - 9 * n, sampling=sampling)
        for n, sampling in enumerate([Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=1)])
    ]


def run(batcher: RowBatcher, steps: int = 10_000) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while steps and batcher.prepare():
        batcher.step()
        steps -= 1
        for output in batcher.outputs():
            assert output.error is None
            tokens.setdefault(output.id, []).extend(output.tokens)
    return tokens


def check_replays(model: PreTrainedModel, *, in_pieces: bool) -> None:
    """The same tokens captured and not, in the expected way."""
    found = []
    for capture in (False, True):
        batcher = RowBatcher(model, kv_tokens=256, max_requests=2, capture=capture)
        for one in requests():
            batcher.add(one)
        found.append(run(batcher))
        assert (batcher.stats().replayed_steps > 40) is capture, batcher._captured.obstacle
        assert (batcher.stats().whole_obstacle is not None) is (capture and in_pieces)
        runtime_of(model).check_integrity()
        batcher.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("slots", [8, "100%"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_replays_give_the_uncaptured_tokens(name: str, slots: int | str, checkpoint: Callable[[str], Path], cache_dir: Path):
    check_replays(load(checkpoint(name), cache_dir, slots=slots), in_pieces=False)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_pieces_give_the_uncaptured_tokens(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    """Captured in pieces, since the GPU can't read a store on disk; in sizes of two requests and of one."""
    settings: dict[str, Any] = {"slots": 8, "device": "cuda", "dtype": "float32", "progress": False}
    check_replays(epslots.load(checkpoint(name), cache_dir=cache_dir, host_memory="150KB", **settings), in_pieces=True)


def test_replays_wait_for_their_tokens_alone(checkpoint: Callable[[str], Path], cache_dir: Path):
    """And they take no memory."""
    model = load(checkpoint("qwen3_moe"), cache_dir, dtype="bfloat16")
    batcher = RowBatcher(model, kv_tokens=256, max_requests=2)
    batcher.add(requests()[0])
    run(batcher, steps=5)
    torch.cuda.synchronize()
    before, waits = torch.cuda.memory_allocated(), []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(20):
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
                run(batcher, steps=1)
            waits.append(len(caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1] * 20
    assert torch.cuda.memory_allocated() == before
    batcher.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_our_grouped_product_equals_torchs(dtype: str):
    """The kernels for GPUs without a fast one of torch's run on all of them."""
    from epslots.moe.grouped_kernel import TritonProducts
    from epslots.moe.kernel_gemm import Gate, TorchProducts

    torch.backends.cuda.matmul.allow_tf32 = False
    kind, random = getattr(torch, dtype), torch.Generator().manual_seed(0)
    tolerance = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 2e-6}[dtype]
    for counts in ([1, 0, 7], [0, 300, 70, 0, 5], [1] * 8 + [0] * 120):
        rows = torch.randn(sum(counts), 256, generator=random).to(kind)
        weight = (torch.randn(len(counts), 384, 256, generator=random) / 16).to(kind).transpose(1, 2)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        for gate in (None, Gate("silu"), Gate("gelu"), Gate("gelu_tanh")):
            reference, ours = TorchProducts(), TritonProducts()
            expected = reference.multiply(rows, weight, None, reference.list_tiles(ends, len(rows)), gate).float()
            on_gpu = rows.cuda(), weight.cuda(), None, ours.list_tiles(ends.cuda(), len(rows)), gate
            found = ours.multiply(*on_gpu).float().cpu()
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_our_pair_kernels_equal_torchs():
    from epslots.moe.pair_kernels import Keys, TorchPairKernels
    from epslots.moe.pair_triton import TritonPairKernels

    cpu, gpu, random = torch.device("cpu"), torch.device("cuda"), torch.Generator().manual_seed(0)
    for pairs in (8, 512, 16_384, 65_536):
        ids = torch.randint(0, 128, (pairs,), generator=random)
        found = []
        for kernels, device in ((TorchPairKernels(128, cpu), cpu), (TritonPairKernels(128, gpu), gpu)):
            there, slots = ids.to(device), torch.arange(128, device=device)
            order = kernels.sort(there, slots, Keys.between(0, 128, device), 8, absent=False)
            found.append([kernels.count(there).tolist(), *(one.tolist() for one in order)])
        assert found[0] == found[1]


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
        tensors = (layer.slot_of_E, layer.expert_of_Q, layer.last_use_E, layer.decayed_DE, layer.step, layer.tally_3)
        states.append((state, [tensor.tolist() for tensor in tensors]))
    assert states[0] == states[1]


def test_a_store_that_is_not_pinned_takes_the_usual_path(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(checkpoint("qwen3_moe"), slots=8, device="cuda", host_store="file", cache_dir=cache_dir)
    batcher = RowBatcher(model, kv_tokens=256, max_requests=2)
    obstacle = batcher._captured.obstacle
    assert obstacle is not None and "isn't pinned" in obstacle
    batcher.add(requests(20)[0])
    assert len(run(batcher)["0"]) == 20 and batcher.stats().replayed_steps == 0
    batcher.close()
