"""Captured decoding on a simulated GPU: the uncaptured tokens from a graph that no value of the host goes into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import epslots
from epslots.cuda_graph.decode_graph import DecodeGraph
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.loading import simulated_kernels
from tests.support import zoo
from tests.support.simulated import greedy_on, kernels_of, load_gpu

NEW_TOKENS = 10


@pytest.mark.parametrize(("name", "slots"), [("qwen3_moe", 8), ("mixtral", 4), ("deepseek_v3", "100%")])
def test_replays_give_the_usual_tokens(name: str, slots: Any, checkpoint: Callable[[str], Path], shared_stores: Path):
    """Slots are decided and misses copied by the graph; afterwards tables, slots and counters agree."""
    folder, ids = checkpoint(name), zoo.random_ids(1, 9, seed=1)
    settings: dict[str, Any] = {"slots": slots, "dtype": "bfloat16", "host_compute": "off"}
    usual = epslots.load(folder, cache_dir=shared_stores, device="cpu", progress=False, **settings)
    with simulated_gpus("h100") as gpu, simulated_kernels():
        model = load_gpu(folder, shared_stores, **settings)
        graph = DecodeGraph(model, 1, 24)
        assert graph.obstacle is None
        gpu.reset()
        assert graph.generate(ids.to("cuda"), NEW_TOKENS).tolist() == greedy_on(usual, ids, NEW_TOKENS)
        assert (
            graph.replays == NEW_TOKENS - 3
        )  # the first token is the prompt's, the first step warms up, the next is captured
        assert gpu.races == []
        runtime_of(model).check_integrity()


def test_a_replayed_step_waits_and_uploads_nothing(checkpoint: Callable[[str], Path], shared_stores: Path):
    with simulated_gpus("h100") as gpu, simulated_kernels():
        model = load_gpu(checkpoint("qwen3_moe"), shared_stores, slots=8, dtype="bfloat16")
        graph = DecodeGraph(model, 1, 24)
        token = graph.prefill(zoo.random_ids(1, 9, seed=1).to("cuda")).argmax(-1)
        with graph:
            for _ in range(3):
                token = graph.step(token).argmax(-1)
            gpu.reset()
            began = gpu.now_s
            for _ in range(4):
                token = graph.step(token).argmax(-1)
            host_s = gpu.now_s - began
            assert not gpu.syncs and not gpu.copies
            assert kernels_of(gpu)["epslots"] <= 4 * (19 * 3 + 2) + 4 * 3 + 4 * 5  # the last: a step without a miss is counted
        assert host_s / 4 < 50e-6, "one call for the whole step"
