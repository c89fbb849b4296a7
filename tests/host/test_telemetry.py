"""Counters say what happened: against a cache simulated by hand, resident or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import epslots
from epslots.cli.tables import stats_table
from epslots.layout import LayerSpec, RecordLayout
from epslots.telemetry import COUNTERS, LayerStats, Stats, Telemetry, sum_over_ranks
from tests.support import zoo


def test_counters_agree_with_the_routing(checkpoint: Callable[[str], Path], cache_dir: Path):
    """LRU with five slots, one token a step: hits, misses and evictions replayed from what the router chose."""
    folder = checkpoint("qwen3_moe")
    model = epslots.load(folder, slots=5, policy="lru", device="cpu", cache_dir=cache_dir, progress=False)
    with epslots.record_trace(model) as recorder, torch.no_grad():
        for token in zoo.random_ids(1, 30)[0]:
            model(token.view(1, 1))
    ids = recorder.trace().expert_ids
    stats = epslots.stats(model)
    for layer, counted in enumerate(stats.layers):
        cache: list[int] = []  # least recently used first
        hits = misses = evictions = 0
        for wanted in ids[:, layer].tolist():
            missing = [e for e in wanted if e not in cache]
            hits, misses = hits + len(wanted) - len(missing), misses + len(missing)
            # LRU over whole steps; of one step's experts the lower id counts as older.
            cache = [e for e in cache if e not in wanted]
            room = 5 - len(wanted)
            evictions += max(0, len(cache) - room)
            cache = cache[max(0, len(cache) - room) :] + sorted(wanted)
        assert (counted.hits, counted.misses, counted.evictions) == (hits, misses, evictions)
        assert sum(counted.tokens_per_expert) == ids[:, layer].size
        assert counted.tokens_per_expert[ids[3, layer, 0]] == (ids[:, layer] == ids[3, layer, 0]).sum()
        assert counted.steps == counted.passes == 30
        assert counted.bytes_fetched == misses * epslots.runtime.runtime_of(model).layers[0].layout.nbytes
        assert counted.stall_s > 0
    assert stats.misses == sum(layer.misses for layer in stats.layers) > 0


def test_zero_miss_steps_have_no_miss_in_any_layer(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Against the layers' own counters, step by step. Every token comes twice; a prompt is one step in several passes."""
    model = epslots.load(checkpoint("qwen3_moe"), slots=6, device="cpu", cache_dir=cache_dir, progress=False)
    ids, last, without = zoo.random_ids(1, 60)[0], epslots.stats(model), 0
    assert last.zero_miss_share == 1.0
    with torch.no_grad():
        for step, tokens in enumerate([ids[:20], *ids[20:].repeat_interleave(2).split(1)], start=1):
            model(tokens[None])
            now = epslots.stats(model)
            without += now.misses == last.misses
            assert (now.steps, now.zero_miss_steps) == (step, without)
            last = now
    assert 40 <= without < 81
    assert last.zero_miss_share == without / 81


def test_a_layer_of_any_place_makes_a_step_miss():
    """Once, however many layers miss; resident layers never do."""
    layer = LayerSpec("layer", 4, RecordLayout.of([("scale", (2,), "float32")]))
    telemetry = Telemetry([layer] * 4, [4, 2, 2, 4], torch.device("cpu"))
    for misses in ((0, 0), (0, 1), (2, 1), (0, 0), (1, 0)):
        telemetry.count_resident(0)
        for number, missed in enumerate(misses, start=1):
            telemetry.count_planned(number, hits=1, misses=missed, passes=1)
        telemetry.count_resident(3)
    assert (telemetry.snapshot().steps, telemetry.snapshot().zero_miss_steps) == (5, 2)


def test_a_resident_layer_counts_the_same(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder = checkpoint("longcat_flash")
    ids = zoo.random_ids(2, 20)
    counted = []
    for slots in (2, "100%"):
        model = epslots.load(folder, slots=slots, device="cpu", cache_dir=cache_dir, progress=False)
        model(ids)
        counted.append(epslots.stats(model))
    bounded, resident = counted
    for few, all_ in zip(bounded.layers, resident.layers, strict=True):
        assert few.tokens_per_expert == all_.tokens_per_expert
        assert few.hits + few.misses == all_.hits
        assert all_.misses == all_.evictions == 0
        assert few.passes > few.steps == all_.steps == all_.passes == 1
    assert resident.hit_rate == 1.0
    assert resident.stall_s == 0


def test_the_table_shows_every_layer(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(checkpoint("mixtral"), slots=2, device="cpu", cache_dir=cache_dir, progress=False)
    unused = stats_table(epslots.stats(model))
    assert unused.row_count == 3
    assert set(unused.columns[3].cells) == {"-"}, "no use, no hit rate"
    model(zoo.random_ids())
    table = stats_table(epslots.stats(model))
    assert table.row_count == 3
    assert all(cell.endswith("%") for cell in table.columns[3].cells)
    assert "emulated" not in str(table.caption)
    assert "missed in no layer: 0 of 1 (0.0%)" in str(table.caption)
    assert "emulated: 8GB/s" in str(stats_table(epslots.stats(model), link="8GB/s").caption)


def layer_stats(number: int, kind: type[LayerStats] = LayerStats) -> LayerStats:
    """Counters that all differ, from each other and from those of another number."""
    counters = {name: 10 * place + number for place, name in enumerate(kind.__struct_fields__)}
    return kind(**counters | {"layer": "layer", "num_experts": 2, "tokens_per_expert": (number, 2 * number)})  # type: ignore[arg-type]


class MoreStats(LayerStats, frozen=True):
    """As if somebody had added a counter."""

    new: int


def test_every_counter_is_summed_over_ranks():
    ranks = [Stats((layer_stats(number, MoreStats),)) for number in (1, 3, 2)]
    (total,) = sum_over_ranks(ranks).layers
    both = sum_over_ranks([Stats((), steps=10, zero_miss_steps=7), Stats((), steps=10, zero_miss_steps=3)])
    assert (both.steps, both.zero_miss_steps, both.zero_miss_share) == (20, 10, 0.5)
    for name in MoreStats.__struct_fields__:
        each = [getattr(rank.layers[0], name) for rank in ranks]
        expected: Any = sum(each) if name not in ("layer", "num_experts", "tokens_per_expert") else None
        if name in ("steps", "passes"):
            expected = each[1]  # ranks make their steps together
        elif name == "tokens_per_expert":
            expected = (6, 12)
        elif expected is None:
            expected = each[0]
        assert getattr(total, name) == expected, name


def test_every_counter_is_counted_and_shown():
    """By its name as a field alone: there is no second list to forget it in."""
    telemetry = Telemetry([LayerSpec("layer", 4, RecordLayout.of([("scale", (2,), "float32")]))], [2], torch.device("cpu"))
    for place, name in enumerate(COUNTERS, start=1):
        telemetry.count(0, **{name: place})
        telemetry.count(0, **{name: place})
    (shown,) = telemetry.snapshot().layers
    assert {name: getattr(shown, name) for name in COUNTERS} == {
        name: 2 * place for place, name in enumerate(COUNTERS, start=1)
    }
    assert len(COUNTERS) == len(LayerStats.__struct_fields__) - 4
    assert msgspec.json.decode(msgspec.json.encode(shown), type=LayerStats) == shown
    with pytest.raises(KeyError):
        telemetry.count(0, mises=1)
