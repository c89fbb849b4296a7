"""The path of many ranks on NCCL: one rank through every collective, and two ranks on one GPU where NCCL allows that.

Nothing in here has been run yet; see the README.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import epslots
from epslots.ranks import join
from epslots.runtime import runtime_of
from epslots.torch_transport import TorchTransport, form_group
from tests import zoo
from tests.grouped import GATHER, TOKENS_TRAVEL
from tests.rank_helpers import Rank, run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_nccl(rank: Rank, folder: Path, cache_dir: Path, costs: epslots.Costs) -> torch.Tensor:
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    group = form_group(rank.store(), generation=0, rank=rank.rank, size=rank.size, backend="nccl", deadline_s=60)
    transport = TorchTransport(group, device=torch.device("cuda", 0), deadline_s=60)
    options = {"slots": 3 + rank.rank, "device": "cuda:0", "dtype": "float32", "cache_dir": cache_dir, "progress": False}
    if rank.size > 1:
        model = epslots.load(folder, group=transport, costs=costs, **options)
    else:
        model = epslots.load(folder, **options)
        join(model, transport, settings={}, costs=costs)
    with torch.no_grad(), epslots.keep_in_step(model):
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
