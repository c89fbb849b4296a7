"""Experts of which RAM holds a few: the same tokens as plain transformers, alone and in groups, also when the disk fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots import ConfigError, StoreError
from epslots.cache.disk_store import DiskStore
from epslots.host_limits import MemoryLimit
from epslots.runtime import runtime_of
from epslots.transport.local_transport import LocalTransport
from tests.support import zoo
from tests.support.equality import assert_equal, compare, greedy, load
from tests.support.grouped_ranks import COPIES_TRAVEL, TOKENS_TRAVEL, Grouped
from tests.support.rank_helpers import run_threads
from tests.support.remembered import Reference

Checkpoints = Callable[[str], Path]


def few_cells(folder: Path, cache_dir: Path, records: int) -> str:
    """RAM for so many experts of each size, as a setting. Builds the store."""
    store = runtime_of(load(folder, cache_dir)).store
    strides = {layer.layout.stride for layer in store.manifest.layers}
    return f"{records * sum(strides)}B"


def disk_store(model: PreTrainedModel) -> DiskStore:
    store = runtime_of(model).store
    assert isinstance(store, DiskStore)
    return store


def total(model: PreTrainedModel, counter: str) -> int:
    return epslots.stats(model).total(counter)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"link": "200MB/s,20us"}),
        ("qwen3_moe", {"host_compute": "on"}),
        ("ernie4_5_vl_moe", {}),  # two sizes of record
    ],
)
def test_outputs_are_the_models_own(name: str, settings: dict[str, Any], checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    model = load(folder, cache_dir, host_memory=few_cells(folder, cache_dir, 5), **settings)
    reference, ids = Reference(folder), zoo.random_ids(1, 9, seed=2)
    assert_equal(model, reference)
    assert greedy(model, ids) == greedy(reference, ids)
    runtime_of(model).check_integrity()
    disk_store(model).check_integrity()
    assert total(model, "disk_bytes") > 0
    if "host_compute" not in settings:
        assert total(model, "prefetches") > 0, "experts are read ahead of their use"


def test_the_ranks_of_a_node_share_its_ram(checkpoint: Checkpoints, cache_dir: Path):
    """In equal parts, each for what it fetches itself."""
    folder, prompts = checkpoint("qwen3_moe"), [zoo.random_ids(1, 9 + rank, seed=rank) for rank in range(2)]
    ram = few_cells(folder, cache_dir, 10)

    def one(transport: LocalTransport) -> list[int]:
        model = load(folder, cache_dir, host_memory=ram, group=transport, costs=TOKENS_TRAVEL)
        with torch.no_grad(), epslots.sync_ranks(model):
            tokens = greedy(model, prompts[transport.rank])
        store = disk_store(model)
        store.check_integrity()
        runtime_of(model).check_integrity()
        assert store.ram_bytes == int(ram[:-1]) // 2 and total(model, "disk_bytes") > 0
        return tokens

    assert run_threads(one, 2) == [greedy(Reference(folder), ids) for ids in prompts]


def test_experts_travel_between_ranks_with_little_ram(checkpoint: Checkpoints, cache_dir: Path):
    """Copies from slot to slot, and records from the disk, in the same step."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, ["75%", "75%"], COPIES_TRAVEL, host_memory=few_cells(folder, cache_dir, 4))
    compare(grouped, Reference(folder))
    assert sum(total(model, "peer_bytes") for model in grouped.models) > 0


@torch.no_grad()
def test_a_step_that_cant_read_fails_and_can_be_repeated(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir, host_memory=few_cells(folder, cache_dir, 4))
    ids, reference = zoo.random_ids(1, 30, seed=3), Reference(folder)
    store = disk_store(model)
    path, middle = Path(store.where), store.shape.offset(1, 0)
    rest = path.read_bytes()[middle:]
    with open(path, "r+b") as file:
        file.truncate(middle)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"model\.layers\.1\..* can't be read .* the file ends at byte"):
            model(ids)
    runtime_of(model).check_integrity()
    with open(path, "ab") as file:
        file.write(rest)
    assert_equal(model, reference, input_ids=ids)


def test_too_little_ram_is_refused_with_what_is_needed(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    least = few_cells(folder, cache_dir, 4)  # top-4
    load(folder, cache_dir, host_memory=least)
    with pytest.raises(ConfigError, match=f"host_memory is .*: allowed are {int(least[:-1]):,} bytes"):
        load(folder, cache_dir, host_memory=f"{int(least[:-1]) - 1}B")


def test_a_store_larger_than_memory_is_refused(checkpoint: Checkpoints, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """First of all, before the rest is planned with what it would leave."""
    for name in ("cache.memory_store.tightest_memory_limit", "load_plan.memory_limit"):
        monkeypatch.setattr(f"epslots.{name}", lambda *_: MemoryLimit("this test", "", 1 << 20, 1 << 10))
    with pytest.raises(StoreError, match=r"no room for the host store in memory: .* use host_store='file'"):
        load(checkpoint("qwen3_moe"), cache_dir, host_store="memory")
