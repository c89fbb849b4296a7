"""``tensors_of``: the tensors that a model's own cache keeps of a request; rows are allocated by them."""

from __future__ import annotations

from transformers import PreTrainedModel

from epslots.models.measure_shape import measure_cache
from epslots.models.model_shape import CacheTensor
from epslots.runtime import plan_of


def tensors_of(model: PreTrainedModel) -> tuple[CacheTensor, ...]:
    """The tensors that a model's own cache keeps of a sequence. Those that its memory was planned for, if it was.

    Raises:
        UnsupportedModelError: they can't be measured.
    """
    plan = plan_of(model)
    return plan.shape.cache if plan is not None and plan.shape.cache else measure_cache(model)
