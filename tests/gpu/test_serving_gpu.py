"""Packed records unpacked on a GPU, and experts computed by the host for one: the very bits of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epslots.bench.fetch import forms
from epslots.cache.unpacking import unpack_record
from epslots.moe.cpu_experts import CpuExperts
from tests.support.experts_layer import Layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("form", list(forms())[1:])
def test_packed_records_unpack_on_a_gpu_as_on_the_cpu(form: str):
    layer = forms()[form]
    record = torch.empty(layer.layout.nbytes, dtype=torch.uint8).random_(0, 100)
    mine, theirs = unpack_record(layer, record.to("cuda")), unpack_record(layer, record)
    assert all(torch.equal(mine[name].cpu().view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "muse_spark"])
def test_hosted_experts_for_rows_on_a_gpu(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    layer = Layer(checkpoint(name), cache_dir)
    rows, ids = layer.random_rows(17)
    hosted = sorted(set(ids.tolist()))[::2]
    pairs = [int((ids == expert).sum()) for expert in hosted]
    device = torch.device("cuda")
    host = CpuExperts(layer.module.to(device), layer.store, 0, device)
    with torch.no_grad():
        found = host.compute(rows.to(device), ids.to(device), hosted, pairs)
        layer.module.to("cpu")
        assert torch.equal(found.cpu(), layer.compute(rows, ids, hosted))
