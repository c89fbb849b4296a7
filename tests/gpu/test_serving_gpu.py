"""Packed records unpacked on a GPU, and experts computed by the host for one: the very bits of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epslots.bench.fetch import forms
from epslots.cache.unpacking import SlotWriter, record_views
from epslots.moe.cpu_experts import CpuExperts
from tests.support.experts_layer import Layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("form", ["bf16", "FP8", "MXFP4"])
def test_unpacked_on_a_stream_of_copies_as_on_the_cpu(form: str):
    layer = forms()[form]
    record = torch.empty(layer.record.nbytes, dtype=torch.uint8, pin_memory=True).random_(0, 100)
    expected = torch.zeros(layer.layout.nbytes, dtype=torch.uint8)
    slot = torch.zeros(layer.layout.nbytes, dtype=torch.uint8, device="cuda")
    write = SlotWriter(layer)
    write(expected, record)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        write(slot, record)
    stream.synchronize()
    mine, theirs = record_views(slot.cpu(), layer.layout), record_views(expected, layer.layout)
    assert all(torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)
    assert write.same(slot, record)


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
