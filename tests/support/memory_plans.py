"""Memory plans by keywords: those of the device, and of the plan."""

from __future__ import annotations

from typing import Any

from epslots.models.memory_plan import MemoryPlan, PlannedDevice, plan_memory
from epslots.models.model_shape import ModelShape
from epslots.units import SlotsSetting


def plan_of(shape: ModelShape, setting: SlotsSetting, **settings: Any) -> MemoryPlan:
    device = {name: settings.pop(name) for name in PlannedDevice.__struct_fields__ if name in settings}
    return plan_memory(shape, setting, PlannedDevice(**device), **settings)
