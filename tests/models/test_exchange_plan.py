"""Memory plans with kv_tokens="auto": each byte counts once, and bounds are told."""

from __future__ import annotations

import msgspec
import pytest

from epslots.config import EngineConfig
from epslots.errors import ConfigError
from epslots.models.cache_slots import in_cells
from epslots.models.known_shapes import known_model
from epslots.models.memory_plan import MemoryPlan, PlannedDevice, plan_memory
from epslots.models.memory_report import describe_cache
from epslots.models.model_shape import row_bytes
from epslots.units import parse_slots

AUTO = EngineConfig(kv_tokens="auto", max_requests=32)
GIB = 1024**3


def plan_of(slots: str, engine: EngineConfig = AUTO, memory: int = 40 * GIB) -> MemoryPlan:
    return plan_memory(known_model("qwen3-30b-a3b")[0], parse_slots(slots), PlannedDevice(memory_bytes=memory), engine=engine)


def test_ceded_slots_count_as_slots_alone():
    plan = plan_of("25%")
    sizes = plan.cache_slots
    assert sizes is not None and sizes.least_tokens >= AUTO.max_batch_tokens
    outside = [tensor for tensor in plan.shape.cache if not in_cells(tensor)]
    tables = row_bytes(outside, AUTO, 0, sizes.most_tokens)
    assert plan.kv_bytes == sizes.own_bytes + tables
    fixed = plan_of("25%", msgspec.structs.replace(AUTO, kv_tokens=sizes.most_tokens))
    assert plan.total_bytes < fixed.total_bytes - (sizes.most_levels - 1) * len(sizes.layers) * sizes.slot_bytes
    assert plan.most_kv_tokens == sizes.most_tokens and fixed.cache_slots is None


def test_the_plan_says_both_bounds():
    plan = plan_of("25%")
    sizes = plan.cache_slots
    assert sizes is not None and plan.quotas[0] == 32 and sizes.most_levels == 24
    told = describe_cache(plan)
    assert f"from {sizes.least_tokens:,} tokens to {sizes.most_tokens:,} with 8 per layer left to experts" in told


def test_slots_take_what_the_least_cache_leaves():
    plan, fixed = plan_of("auto"), plan_of("auto", EngineConfig(max_requests=32, kv_tokens=65_536))
    assert plan.fits and plan.free_bytes is not None and plan.free_bytes < plan.shape.layers[0].layout.nbytes
    assert sum(plan.quotas) > sum(fixed.quotas) and plan.most_kv_tokens > fixed.most_kv_tokens


def test_a_model_without_an_exchange_is_refused_unloaded():
    shape = msgspec.structs.replace(known_model("qwen3-30b-a3b")[0], whole_prompts=True)
    with pytest.raises(
        ConfigError, match=r"kv_tokens='auto': .* can't exchange memory, because its prompts are computed whole"
    ):
        plan_memory(shape, parse_slots("25%"), PlannedDevice(), engine=AUTO)
