"""The path of many ranks on NCCL: one rank through every collective, and two ranks on one GPU where NCCL allows that.

Nothing in here has been run yet; see RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import epslots
from epslots.group.join import join
from epslots.runtime import runtime_of
from epslots.transport.forming import form_group
from epslots.transport.torch_transport import TorchTransport
from tests.support import zoo
from tests.support.grouped_ranks import GATHER, TOKENS_TRAVEL
from tests.support.plan_strategies import random_placement
from tests.support.rank_helpers import Rank, run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_nccl(rank: Rank, folder: Path, cache_dir: Path, costs: epslots.Costs) -> torch.Tensor:
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    group = form_group(rank.store(), epoch=0, rank=rank.rank, size=rank.size, backend="nccl", deadline_s=60)
    transport = TorchTransport(group, device=torch.device("cuda", 0), deadline_s=60)
    options = {"slots": 3 + rank.rank, "device": "cuda:0", "dtype": "float32", "cache_dir": cache_dir, "progress": False}
    if rank.size > 1:
        model = epslots.load(folder, group=transport, costs=costs, **options)
    else:
        model = epslots.load(folder, **options)
        join(model, transport, settings={}, costs=costs)
    with torch.no_grad(), epslots.sync_ranks(model):
        logits = model(input_ids=zoo.random_ids(1, 9 + 20 * rank.rank, seed=1).cuda()).logits
    runtime_of(model).check_integrity()
    return logits.cpu()


@pytest.mark.parametrize("costs", [TOKENS_TRAVEL, GATHER], ids=["all-to-all", "all-gather"])
@pytest.mark.parametrize("size", [1, 2])
def test_equal_to_plain_transformers(
    size: int,
    costs: epslots.Costs,
    checkpoint: Callable[[str], Path],
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if size > 1:
        if torch.cuda.nccl.version() < (2, 30):
            pytest.skip("two ranks on one GPU need NCCL 2.30")
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    folder = checkpoint("qwen3_moe")
    reference = zoo.reference(folder)
    for rank, logits in enumerate(run_ranks(on_nccl, size, folder, cache_dir, costs, timeout=150)):
        with torch.no_grad():
            expected = reference(input_ids=zoo.random_ids(1, 9 + 20 * rank, seed=1)).logits
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def while_moving(rank: Rank, folder: Path, cache_dir: Path) -> list[torch.Tensor]:
    """A rank on its own, through all that a group does, while one placement after the other is reached."""
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    group = form_group(rank.store(), epoch=0, rank=0, size=1, backend="nccl", deadline_s=60)
    transport = TorchTransport(group, device=torch.device("cuda", 0), deadline_s=60)
    model = epslots.load(folder, slots=4, device="cuda:0", dtype="float32", cache_dir=cache_dir, progress=False)
    joined = join(model, transport, settings={}, costs=TOKENS_TRAVEL)
    generator, found = np.random.default_rng(1), []
    for seed in range(60):
        if not joined.pending_migrations:
            joined.offer(random_placement(generator, joined.placement), 3 * joined.shared.layers[0].expert_bytes)
        with torch.no_grad():
            found.append(model(input_ids=zoo.random_ids(1, 9, seed=seed).cuda()).logits.cpu())
        runtime_of(model).check_integrity()
    assert joined.placement.version > 1
    return found


def test_placements_are_reached_without_a_trace(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    reference = zoo.reference(folder)
    (found,) = run_ranks(while_moving, 1, folder, cache_dir, timeout=150)
    for seed, logits in enumerate(found):
        with torch.no_grad():
            expected = reference(input_ids=zoo.random_ids(1, 9, seed=seed)).logits
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
