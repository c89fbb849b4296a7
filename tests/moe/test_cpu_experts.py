"""Experts computed from the host store give what they would have given from a slot, and what plain transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import nn

import epslots
from epslots.group.cost_probe import largest, measure_cpu
from epslots.moe.cpu_experts import on_cpu
from epslots.planner.cost_model import HOST_COMPUTE, Costs
from tests.support import zoo
from tests.support.experts_layer import TOP_K, Layer

TOLERANCE = 2e-5
Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize(
    "name", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "olmoe_unaligned", "longcat_flash", "gemma4", "ernie4_5_moe"]
)
def test_as_plain_transformers(name: str, checkpoint: Checkpoints, cache_dir: Path):
    """With and without gates, biases, norms and transposed weights; classes that epslots brings in; rows that don't fit."""
    layer = Layer(checkpoint(name), cache_dir)
    rows, ids = layer.random_rows(17)
    hosted = sorted(set(ids.tolist()))[::2]
    plain = zoo.reference(checkpoint(name)).get_submodule(layer.name)
    every = rows.repeat_interleave(TOP_K, 0)
    with torch.no_grad():
        # longcat_flash doesn't know a single expert for a token: let there be another, of no weight.
        both = torch.stack([ids, (ids + 1) % layer.spec.num_experts], 1)
        expected = plain(every, both, torch.tensor([1.0, 0.0]).expand(len(ids), 2))
        found = layer.compute(rows, ids, hosted)
    chosen = torch.isin(ids, torch.tensor(hosted))
    assert 0 < chosen.sum() < len(ids)
    assert (found[chosen] - expected[chosen]).abs().max() <= TOLERANCE * expected.abs().max()
    assert not found[~chosen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "make"), [("deepseek_v3", zoo.make_fp8), ("gpt_oss", zoo.make_mxfp4), ("mixtral", None)])
def test_as_from_slots_bit_by_bit(
    name: str,
    make: Callable[..., Path] | None,
    dtype: torch.dtype,
    checkpoint: Checkpoints,
    tmp_path: Path,
    cache_dir: Path,
):
    """Packed records too, which are unpacked on the way."""
    folder = checkpoint(name) if make is None else make(checkpoint(name), tmp_path / "quantised")
    layer = Layer(folder, cache_dir, dtype)
    assert (layer.spec.packed is not None) == (make is not None)
    rows, ids = layer.random_rows(40)
    with torch.no_grad():
        found = layer.compute(rows, ids, list(range(layer.spec.num_experts)))
        expected = layer.from_slots(rows, ids)
    assert found.dtype == dtype
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= (TOLERANCE if dtype == torch.float32 else 2**-7) * scale
    assert (found == expected).float().mean() > 0.9, "the same arithmetic, but for the order of sums in a batch"


def test_in_whatever_order_experts_are_named(checkpoint: Checkpoints, cache_dir: Path):
    layer = Layer(checkpoint("qwen3_moe"), cache_dir)
    rows, ids = layer.random_rows(30)
    used = sorted(set(ids.tolist()))
    with torch.no_grad():
        found = layer.compute(rows, ids, used)
        assert torch.equal(found, layer.compute(rows, ids, used[::-1]))
        with torch.device("meta"):  # a user's default
            assert torch.equal(found, layer.compute(rows, ids, used))


def test_results_enter_those_of_the_step(checkpoint: Checkpoints, cache_dir: Path):
    """Others' results stay; ids beyond the last expert, and experts without a pair, are passed over."""
    layer = Layer(checkpoint("mixtral"), cache_dir)
    rows, ids = layer.random_rows(6, experts=4)
    ids[3] = layer.spec.num_experts
    result = torch.full((len(ids), layer.host.hidden_size), 7.0)
    begun = layer.host.begin(rows, ids, [2, 6], [int((ids == 2).sum()), 0])
    layer.host.finish(begun, result)
    assert torch.equal((result != 7).any(1), ids == 2)
    assert torch.equal(result[ids == 2], layer.compute(rows, ids, [2])[ids == 2])


def test_a_corrupt_record_is_not_computed_with(checkpoint: Checkpoints, cache_dir: Path):
    layer = Layer(checkpoint("mixtral"), cache_dir)
    rows, ids = layer.random_rows(6)
    layer.store.memory[layer.store.shape.offset(0, 5) + 9] ^= 1
    with pytest.raises(epslots.CorruptExpertError, match="expert 5"):
        layer.compute(rows, torch.full_like(ids, 5), [5])


def test_a_twin_on_the_cpu_shares_no_device_memory():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act_fn, self.post_expert_norm, self.absent = nn.PReLU(), nn.LayerNorm(4), None
            self.register_module("missing", None)
            self.register_buffer("limit", torch.tensor(7.0))
            self.alpha = 1.5

    def bound(self: nn.Module) -> nn.Module:
        return self

    module = Experts()
    module._apply_gate = MethodType(bound, module)
    twin = on_cpu(module)
    assert twin._apply_gate() is twin and module._apply_gate() is module
    assert twin.alpha == 1.5 and twin.missing is None and torch.equal(twin.limit, module.limit)
    mine, theirs = list(module.parameters()), list(twin.parameters())
    assert len(mine) == len(theirs) == 3
    assert all(torch.equal(a, b) and a is not b for a, b in zip(mine, theirs, strict=True))
    twin.act_fn = nn.ReLU()
    assert isinstance(module.act_fn, nn.PReLU)


def test_costs_are_measured_and_agreed_on(checkpoint: Checkpoints, cache_dir: Path):
    layer = Layer(checkpoint("mixtral"), cache_dir)
    rows, _ = layer.random_rows(64)
    expert, pair = measure_cpu(layer.host, rows, lambda: None)
    assert pair > 0 and 1000 < expert < 10**9, "nanoseconds: no expert is done in a microsecond, none takes a second"
    with_host = Costs(1, 1, 1, 1, 1, 1, 1, host_expert=expert, host_pair=pair)
    slower = Costs(2, 1, 1, 1, 1, 1, 1, host_expert=expert + 5, host_pair=pair)
    assert largest([with_host, slower]) == Costs(2, 1, 1, 1, 1, 1, 1, host_expert=expert + 5, host_pair=pair)
    without = largest([with_host, Costs(2, 1, 1, 1, 1, 1, 1)])
    assert not without.computes_on_host and all(getattr(without, name) == 0 for name in HOST_COMPUTE)
