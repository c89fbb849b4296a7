"""``with_cache``: the cache that an engine will use of a model that isn't loaded yet, for the memory plan."""

from __future__ import annotations

import msgspec
from transformers import PreTrainedModel

from epslots.config import EngineConfig
from epslots.generation.batchers import choose_cache
from epslots.generation.captured_decoding import model_obstacle
from epslots.generation.paged_cache import page_sizes
from epslots.generation.paged_decoding import pages_obstacle
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
        return msgspec.structs.replace(shape, capture_obstacle="it has no language-model head")
    kind, _ = choose_cache(skeleton, engine, shape.cache)
    if kind == "pages":
        obstacle = model_obstacle(skeleton, pages_obstacle(skeleton))
        return msgspec.structs.replace(shape, pages=page_sizes(skeleton), capture_obstacle=obstacle)
    support = row_support(skeleton)
    obstacle = model_obstacle(skeleton, support.capture_obstacle(shape.cache))
    return msgspec.structs.replace(shape, whole_prompts=support.whole_prompts, capture_obstacle=obstacle)
