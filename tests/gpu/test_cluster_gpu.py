"""A cluster on GPUs: one rank for each that there is. Not run until a machine with one is at hand."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.api import Cluster
from tests.support.thread_cluster import PROMPTS, expected, tokens_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]


def test_ranks_on_gpus_and_one_killed(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    right = expected(folder, PROMPTS, 40)
    with Cluster(folder, slots=3, device="cuda", dtype="float32", kv_tokens=2048, cache_dir=cache_dir) as cluster:
        assert cluster.ranks == torch.cuda.device_count()
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=40, stop_tokens=())) == right
        going = [cluster.submit(prompt, max_new_tokens=40, stop_tokens=()) for prompt in PROMPTS]
        (pid,) = re.findall(r"pid (\d+)", cluster.placement().ranks[-1])
        os.kill(int(pid), signal.SIGKILL)
        assert [generation.result(120).tokens for generation in going] == right
