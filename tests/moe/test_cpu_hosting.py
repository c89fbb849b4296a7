"""Misses that the host's CPU computes: the same answers, nothing fetched and nothing evicted for them, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedModel

import epslots
from epslots.errors import ConfigError
from epslots.group.rank_group import group_of
from epslots.planner.cost_model import Costs
from epslots.planner.cpu_offload import CpuShare
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.equality import assert_equal, compare, greedy, load
from tests.support.grouped_ranks import ALL_COSTS, TOKENS_TRAVEL, Grouped

Checkpoints = Callable[[str], Path]
# A fetch costs as much as many pairs on the host; and as two experts there.
ALWAYS = Costs(10**9, 10**9, 1, 1, 1, 1, 10**6, host_expert=2, host_pair=1)
OFTEN = msgspec.structs.replace(TOKENS_TRAVEL, host_expert=4 * 10**8, host_pair=10**6)


def hosting(model: PreTrainedModel, costs: Costs, *, beside: bool) -> PreTrainedModel:
    for runner in runtime_of(model).runners:
        runner.cpu_share = CpuShare(1, runner.experts.num_experts, costs, beside=beside)
    return model


def fetched(model: PreTrainedModel) -> int:
    return sum(layer.host_bytes for layer in epslots.stats(model).layers)


@pytest.mark.parametrize("slots", [1, 3, "50%"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "longcat_flash", "ernie4_5_vl_moe"])
def test_one_rank(name: str, beside: bool, slots: int | str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    plain, model = load(folder, cache_dir, slots=slots), hosting(load(folder, cache_dir, slots=slots), OFTEN, beside=beside)
    reference = zoo.reference(folder)
    prompt = zoo.random_ids(1, 9, seed=2)
    for candidate in (plain, model):
        assert_equal(candidate, reference)
        assert greedy(candidate, prompt, 24) == greedy(reference, prompt, 24)
        runtime_of(candidate).check_integrity()
    assert fetched(model) < fetched(plain)


def test_experts_always_cheaper_on_the_cpu_leave_slots_alone(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = hosting(load(folder, cache_dir, slots=3), ALWAYS, beside=False)
    assert_equal(model, zoo.reference(folder))
    stats = epslots.stats(model)
    assert fetched(model) == 0 and stats.misses == sum(layer.hosted for layer in stats.layers) > 0
    assert all(layer.hosted_s > 0 for layer in stats.layers)
    assert all((runner.experts.resident_E == False).all() for runner in runtime_of(model).runners)  # noqa: E712


@pytest.mark.parametrize("slots", [[1, 1], [3, 5], [2, 7, 3, 1]])
@pytest.mark.parametrize("base", ALL_COSTS.values(), ids=ALL_COSTS.keys())
def test_many_ranks(base: Costs, slots: list[int], checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    costs = msgspec.structs.replace(base, host_expert=max(1, base.host_fetch // 3), host_pair=1)
    hosted = Grouped(folder, cache_dir, slots=slots, costs=costs, host_compute="on")
    plain = Grouped(folder, cache_dir, slots=slots, costs=costs, host_compute="off")
    compare(hosted, zoo.reference(folder))
    compare(plain, zoo.reference(folder))
    assert sum(map(fetched, hosted.models)) < sum(map(fetched, plain.models))


@pytest.mark.parametrize(("name", "make"), [("deepseek_v3", zoo.make_fp8), ("gpt_oss", zoo.make_mxfp4)])
def test_packed_records(name: str, make: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path):
    folder = make(checkpoint(name), tmp_path / "quantised")
    model, reference = load(folder, cache_dir, link="1000GB/s", prefetch="off"), zoo.reference_dequantised(folder)
    assert_equal(model, reference)
    layer = runtime_of(model).layers[0]
    stats = epslots.stats(model)
    assert layer.record.nbytes * 3 < layer.layout.nbytes
    assert fetched(model) == stats.misses * layer.record.nbytes
    assert_equal(hosting(model, OFTEN, beside=False), reference)
    runtime_of(model).check_integrity()


def test_measured_costs_decide(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir, host_compute="on")
    shares = [runner.cpu_share for runner in runtime_of(model).runners]
    assert all(share is not None and share.costs.computes_on_host for share in shares)
    assert_equal(model, zoo.reference(folder))
    plain = load(folder, cache_dir)
    assert not any(runner.cpu_share for runner in runtime_of(plain).runners), "a CPU computes from slots by default"


def test_given_costs_decide(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir, host_compute="on", costs=ALWAYS)
    assert_equal(model, zoo.reference(folder))
    assert fetched(model) == 0
    with pytest.raises(ConfigError, match="costs don't say what it costs"):
        load(folder, cache_dir, host_compute="on", costs=TOKENS_TRAVEL)


def test_measured_by_many_ranks(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=[3, 3], costs=None, host_compute="on")
    assert all(group_of(model).costs[0].computes_on_host for model in grouped.models)
    compare(grouped, zoo.reference(folder))
    other = Grouped(folder, cache_dir, slots=[3, 3], costs=None)
    assert not any(group_of(model).costs[0].computes_on_host for model in other.models)


def test_what_is_no_setting(checkpoint: Checkpoints, cache_dir: Path):
    with pytest.raises(ConfigError, match="host_compute='maybe': allowed: auto, on, off"):
        load(checkpoint("qwen3_moe"), cache_dir, host_compute="maybe")
