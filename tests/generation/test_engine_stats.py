"""An engine's counters, as a message and as sums over ranks."""

from __future__ import annotations

from dataclasses import fields

import msgspec
import pytest
from msgspec.structs import replace

from epslots.generation.engine_stats import EngineCounters, EngineStats, Usage, sum_engines

REASONS = ["capture_obstacle", "whole_obstacle"]


def stats(**numbers: int) -> EngineStats:
    names = [name for name in EngineStats.__struct_fields__ if name not in REASONS]
    return EngineStats(**{name: numbers.get(name, 0) for name in names})


def test_each_counter_is_in_the_record():
    names = [*(field.name for field in fields(EngineCounters)), *Usage._fields, "waiting", *REASONS]
    assert sorted(names) == sorted(EngineStats.__struct_fields__)


def test_sums_over_ranks():
    ranks = [stats(steps=7, new_tokens=3, kv_used=10, kv_tokens=100), stats(steps=5, new_tokens=4, kv_used=50, kv_tokens=100)]
    total = sum_engines(ranks)
    assert total == stats(steps=7, new_tokens=7, kv_used=60, kv_tokens=200)
    assert total.kv_usage == pytest.approx(0.3)
    assert sum_engines([]) == stats()
    for name in REASONS:
        reason = replace(stats(), **{name: "a reason"})
        assert sum_engines([stats(), reason, replace(reason, **{name: "another"})]) == reason
    assert sum_engines([]).kv_usage == 0


def test_step_skew_is_the_longest_over_the_mean():
    """Of all steps together: 10 and 2 tokens, then 4 and 4."""
    total = sum_engines([stats(step_tokens=14, longest_tokens=14), stats(step_tokens=6, longest_tokens=14)])
    assert total.step_skew == (10 + 4) / (6 + 4)
    assert sum_engines([]).step_skew == 0


def test_numbers_survive_json():
    given = stats(steps=7, preempted=2, waiting=1)
    assert msgspec.json.decode(msgspec.json.encode(given), type=EngineStats) == given
