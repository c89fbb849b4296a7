"""``with_cache``: the cache that an engine will use of a model that isn't loaded yet, for the memory plan."""

from __future__ import annotations

import msgspec
from transformers import PreTrainedModel

from epslots.config import EngineConfig
from epslots.generation.batchers import choose_cache
from epslots.generation.paged_cache import page_sizes
from epslots.generation.row_support import row_support
from epslots.models.model_shape import ModelShape


def with_cache(shape: ModelShape, skeleton: PreTrainedModel, engine: EngineConfig) -> ModelShape:
    """A model's shape with the sizes of the cache that its engine will use. A model without logits has no engine.

    Args:
        skeleton: the model, on the meta device.
        engine: its settings.

    Raises:
        UnsupportedModelError: the model can't be served from that cache.
    """
    if skeleton.get_output_embeddings() is None:
        return shape
    kind, _ = choose_cache(skeleton, engine, shape.cache)
    if kind == "pages":
        return msgspec.structs.replace(shape, pages=page_sizes(skeleton))
    return msgspec.structs.replace(shape, whole_prompts=row_support(skeleton).whole_prompts)
