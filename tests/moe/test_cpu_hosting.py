"""Misses that the host's CPU computes: the same answers, nothing fetched and nothing evicted for them, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import epslots
from epslots.errors import ConfigError
from epslots.group.rank_group import group_of
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.cpu_hosting import ALWAYS, OFTEN, fetched_bytes, hosting
from tests.support.equality import assert_equal, compare, greedy, load
from tests.support.grouped_ranks import ALL_COSTS, TOKENS_TRAVEL, Grouped
from tests.support.remembered import Reference

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize("slots", [1, "50%"])
def test_experts_on_the_cpu_save_fetches(slots: int | str, checkpoint: Checkpoints, cache_dir: Path):
    """With three slots: tests/equality, with each layout."""
    folder = checkpoint("qwen3_moe")
    plain, model = load(folder, cache_dir, slots=slots), hosting(load(folder, cache_dir, slots=slots), OFTEN, concurrent=False)
    reference = zoo.reference(folder)
    prompt = zoo.random_ids(1, 9, seed=2)
    for candidate in (plain, model):
        assert_equal(candidate, reference)
        assert greedy(candidate, prompt, 24) == greedy(reference, prompt, 24)
        runtime_of(candidate).check_integrity()
    assert fetched_bytes(model) < fetched_bytes(plain)


def test_experts_always_cheaper_on_the_cpu_leave_slots_alone(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = hosting(load(folder, cache_dir, slots=3), ALWAYS, concurrent=False)
    assert_equal(model, Reference(folder))
    stats = epslots.stats(model)
    assert fetched_bytes(model) == 0 and stats.misses == sum(layer.cpu_misses for layer in stats.layers) > 0
    assert all(layer.cpu_s > 0 for layer in stats.layers)
    assert all((runner.cache.resident_E == False).all() for runner in runtime_of(model).runners)  # noqa: E712


@pytest.mark.parametrize(
    ("base", "slots"), [*((costs, [3, 5]) for costs in ALL_COSTS), ("tokens travel", [1, 1]), ("copies travel", [2, 7, 3, 1])]
)
def test_many_ranks(base: str, slots: list[int], checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    costs = msgspec.structs.replace(ALL_COSTS[base], host_expert=max(1, ALL_COSTS[base].host_fetch // 3), host_pair=1)
    hosted = Grouped(folder, cache_dir, slots=slots, costs=costs, host_compute="on")
    plain = Grouped(folder, cache_dir, slots=slots, costs=costs, host_compute="off")
    reference = zoo.reference(folder)
    compare(hosted, reference)
    compare(plain, reference)
    assert sum(map(fetched_bytes, hosted.models)) < sum(map(fetched_bytes, plain.models))


@pytest.mark.parametrize(("name", "make"), [("deepseek_v3", zoo.make_fp8), ("gpt_oss", zoo.make_mxfp4)])
def test_packed_records(name: str, make: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path):
    folder = make(checkpoint(name), tmp_path / "quantised")
    model, reference = load(folder, cache_dir, slot_format="packed"), zoo.reference_dequantised(folder)
    assert_equal(model, reference)
    layer = runtime_of(model).layers[0]
    stats = epslots.stats(model)
    assert layer.layout.nbytes * 2 < layer.weights.nbytes
    assert fetched_bytes(model) == stats.misses * layer.layout.nbytes
    assert_equal(hosting(model, OFTEN, concurrent=False), reference)
    runtime_of(model).check_integrity()


def test_measured_costs_decide(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir, host_compute="on")
    shares = [runner.planner.cpu_share for runner in runtime_of(model).runners]
    assert all(share is not None and share.costs.computes_on_host for share in shares)
    assert_equal(model, Reference(folder))
    plain = load(folder, cache_dir)
    assert not any(runner.planner.cpu_share for runner in runtime_of(plain).runners), "a CPU computes from slots by default"


def test_given_costs_decide(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir, host_compute="on", costs=ALWAYS)
    assert_equal(model, Reference(folder))
    assert fetched_bytes(model) == 0
    with pytest.raises(ConfigError, match="costs don't say what it costs"):
        load(folder, cache_dir, host_compute="on", costs=TOKENS_TRAVEL)


def test_measured_by_many_ranks(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=[3, 3], costs=None, host_compute="on")
    assert all(group_of(model).costs[0].computes_on_host for model in grouped.models)
    compare(grouped, Reference(folder))
    other = Grouped(folder, cache_dir, slots=[3, 3], costs=None)
    assert not any(group_of(model).costs[0].computes_on_host for model in other.models)


def test_what_is_no_setting(checkpoint: Checkpoints, cache_dir: Path):
    with pytest.raises(ConfigError, match="host_compute='maybe': allowed: auto, on, off"):
        load(checkpoint("qwen3_moe"), cache_dir, host_compute="maybe")
