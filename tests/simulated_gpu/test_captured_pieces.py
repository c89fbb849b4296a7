"""Steps captured in pieces, on simulated GPUs: ranks of a group, and ranks alone whose slots the device can't decide about."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import epslots
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.requests import Request
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from tests.support import zoo
from tests.support.equality import SERVED
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.simulated import serve
from tests.support.simulated_ranks import SimulatedRanks, nccl_stand_in
from tests.simulated_gpu.test_captured_decoding import ASK_IN_PAGES, UNCAPTURED, request

CHOSEN = ["qwen3_moe", "gpt_oss", "qwen3_next", "gemma4"]
MODELS = SERVED if os.environ.get("EPSLOTS_WHOLE_ZOO") else CHOSEN
# Of each rank: the second computes prompts while the first decodes, and is idle in the end.
REQUESTS = [
    [request(0, 8), request(1, 14, temperature=0.8, top_p=0.9, seed=1), request(2, 11)],
    [request(3, 5), request(4, 7, prompt=30, temperature=1.0, top_k=5, seed=2)],
]
ALL = [one for rank in REQUESTS for one in rank]


@pytest.fixture(autouse=True)
def nccl_environment() -> Iterator[None]:
    with nccl_stand_in():
        yield


@pytest.mark.parametrize("slots", ["25%", "50%", "100%"])
@pytest.mark.parametrize("cache", ["rows", "pages"])
@pytest.mark.parametrize("name", MODELS)
def test_a_groups_replays_give_the_usual_tokens(
    name: str, cache: str, slots: str, checkpoint: Callable[[str], Path], shared_stores: Path
):
    """As the engine of one rank on the CPU. Afterwards tables and slots agree, and padding rows count nowhere."""
    usual = epslots.load(
        checkpoint(name), cache_dir=shared_stores, device="cpu", progress=False, slots=slots, dtype="float32", host_compute="off"
    )
    if cache == "pages" and paging_obstacle(usual) is not None:
        pytest.skip("its requests can't be kept in pages")
    expected = serve(usual, ALL, cache=cache)
    with simulated_gpus("h100", count=2) as gpu:
        ranks = SimulatedRanks(
            checkpoint(name),
            shared_stores,
            costs=TOKENS_TRAVEL,
            engine={"cache": cache, "max_requests": 4},
            slots=slots,
            host_compute="off",
        )
        gpu.reset()
        assert ranks.serve(REQUESTS) == expected
        assert gpu.races == []
        for engine in ranks.engines:
            stats = engine.batcher.stats()
            print(stats.replayed_steps, stats.capture_obstacle, stats.steps)
            assert (stats.replayed_steps > 0) is (stats.capture_obstacle is None), stats.capture_obstacle
            runtime_of(engine.model).check_integrity()
        ranks.close()
