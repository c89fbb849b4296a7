"""Captured decoding while experts cede slots to the cache: a change makes graphs void, and none reads slots of before."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from epslots.generation.row_batcher import RowBatcher
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from tests.support import zoo
from tests.support.batches import expected_of, requests_of
from tests.support.simulated import load_gpu

WHOLE = bool(os.environ.get("EPSLOTS_WHOLE_ZOO"))


@pytest.mark.parametrize("capture", [True, *([False] if WHOLE else [])])
@pytest.mark.parametrize("name", ["qwen3_moe", *(["qwen3_next"] if WHOLE else [])])
def test_steps_on_a_gpu_follow_each_change_of_level(
    name: str, capture: bool, checkpoint: Callable[[str], Path], shared_stores: Path
):
    requests, chosen = requests_of(((3, 17), (9, 12))), random.Random(5)
    with simulated_gpus("h100") as gpu:
        settings = {"slots": 12, "dtype": "float32", "host_compute": "off"}
        model = load_gpu(checkpoint(name), shared_stores, kv_tokens="auto", max_requests=2, max_batch_tokens=16, **settings)
        batcher = RowBatcher(model, kv_tokens="auto", max_requests=2, max_batch_tokens=16, capture=capture)
        exchange = batcher.admission.exchange
        assert exchange is not None and (batcher._captured.obstacle is None) is capture
        for request in requests:
            batcher.add(request)
        tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        levels, steps = set(), 0
        while batcher.prepare():
            batcher.step()
            for output in batcher.outputs():
                tokens[output.id] += output.tokens
            steps += 1
            if steps % 4 == 0 and batcher._isolation is None:
                change = chosen.choice((-1, 1, 1))
                if 0 <= exchange._target + change <= exchange.sizes.most_levels:
                    exchange.change(change)
            levels.add(exchange.levels)
        assert tokens == expected_of(zoo.reference(checkpoint(name)), requests)
        assert len(levels) > 2 and (batcher.stats().replayed_steps >= steps // 5) is capture
        assert gpu.races == []
        batcher.close()
        runtime_of(model).check_integrity()
