"""The same promises on a GPU: run where there is one (``python -m pytest tests/gpu``), skipped where there is none.

fp32 matrix products are compared with TF32 off. Nothing in here has been run yet; see RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import epslots
from epslots.runtime import runtime_of
from tests.support import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("host_store", ["memory", "file"])
@pytest.mark.parametrize("slots", [1, "25%", "100%"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "nemotron_h"])
def test_equal_to_plain_transformers(
    name: str, slots: int | str, host_store: str, checkpoint: Callable[[str], Path], cache_dir: Path
):
    folder = checkpoint(name)
    reference = zoo.reference(folder).to("cuda")
    model = epslots.load(folder, slots=slots, device="cuda", dtype="float32", host_store=host_store, cache_dir=cache_dir)
    ids = zoo.random_ids(2, 40, seed=1).to("cuda")
    with torch.no_grad():
        expected, actual = reference(ids).logits, model(ids).logits
    assert (expected - actual).abs().max() <= 1e-4 * expected.abs().max()
    runtime = runtime_of(model)
    assert runtime.store.pinned == (host_store == "memory")
    runtime.check_integrity()


def test_the_pool_takes_its_bytes_once(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(checkpoint("qwen3_moe"), slots=2, device="cuda", cache_dir=cache_dir)
    ids = zoo.random_ids(2, 40).to("cuda")
    model(ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(20):
        model(zoo.random_ids(2, 40, seed=seed).to("cuda"))
    assert torch.cuda.memory_allocated() == before


def test_a_resident_layer_never_waits_for_the_host(checkpoint: Callable[[str], Path], cache_dir: Path):
    """With a slot for every expert, a layer's step issues no synchronising call at all."""
    model = epslots.load(checkpoint("qwen3_moe"), slots="100%", device="cuda", dtype="bfloat16", cache_dir=cache_dir)
    module = next(m for m in model.modules() if hasattr(m, "epslots_runner"))
    hidden = torch.randn(4, zoo.HIDDEN, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, 16, (4, 4), device="cuda")
    weights = torch.rand(4, 4, device="cuda", dtype=torch.bfloat16)
    module(hidden, index, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(hidden, index, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
