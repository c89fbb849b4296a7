"""``batcher_for``: the batcher that serves a model, by what its layers keep."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from epslots.config import EngineConfig
from epslots.errors import UnsupportedModelError
from epslots.generation.batcher import Batcher, check_servable
from epslots.generation.cache_tensors import tensors_of
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_cache import page_sizes, paging_obstacle
from epslots.generation.paged_invariance import invariance_obstacle
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.row_support import row_support
from epslots.models.batch_invariance import is_batch_invariant
from epslots.models.model_shape import CacheTensor, row_bytes
from epslots.units import format_bytes

logger = logging.getLogger(__name__)

# Pages may take so many times the bytes of rows, because attention reads them faster.
_MORE_BYTES = 1.25


def batcher_for(model: PreTrainedModel, **settings: Any) -> Batcher:
    """The batcher for a model.

    Args:
        model: with a language-model head; only its text input is used.
        settings: fields of ``EngineConfig``; ``cache`` chooses.

    Raises:
        ConfigError: a number is less than one.
        DoesNotFitError: the cache exceeds the device's free memory.
        UnsupportedModelError: the model has no language-model head, or not the cache that is asked for.
    """
    config = EngineConfig(**settings)
    check_servable(model)
    kind, reason = choose_cache(model, config)
    logger.info("%s: requests are kept in %s, because %s", type(model).__name__, kind, reason)
    return PagedBatcher(model, **settings) if kind == "pages" else RowBatcher(model, **settings)


def choose_cache(model: PreTrainedModel, engine: EngineConfig, kept: Sequence[CacheTensor] | None = None) -> tuple[str, str]:
    """The cache that serves a model, "pages" or "rows"; and why, as the end of a sentence.

    Flash attention reads pages in place. Without it, rows are read as fast, and faster on a CPU, where a step's attention is
    one compiled call (``epslots bench batch --parts caches``). Pages keep only keys and values, of one width in all layers,
    where rows keep latents, narrow layers and windows as they are.

    Args:
        model: may be on the meta device.
        engine: ``cache`` = "auto" takes the cache that serves the model best; the other sizes say how much memory each takes.
        kept: the tensors that the model's own cache keeps of a sequence; None = those of its plan, or
            measured; empty = unknown.

    Raises:
        UnsupportedModelError: it can't be served from the pages that are asked for.
    """
    obstacle = None if engine.cache == "rows" else paging_obstacle(model) or invariance_obstacle(model)
    if engine.cache == "pages" and obstacle is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be served from pages: {obstacle}; allowed: cache='rows' or 'auto'"
        )
    if engine.cache != "auto":
        return engine.cache, "it was asked for"
    if engine.exchanges_memory:
        return "rows", "they can exchange memory with experts (kv_tokens='auto')"
    if obstacle is not None:
        return "rows", obstacle
    if is_batch_invariant(model):
        return "pages", "they can be batch-invariant; rows would be computed one at a time"
    if not is_flash_attention_requested(requested_attention_implementation=model.config._attn_implementation):
        return "rows", "without flash attention pages aren't read faster"
    kept = tensors_of(model) if kept is None else kept
    pages = page_sizes(model).nbytes(engine.planned_tokens, engine.max_requests, engine.max_batch_tokens)
    rows = row_bytes(kept, engine, engine.step_tokens(row_support(model).whole_prompts))
    if kept and pages > _MORE_BYTES * rows:
        return "rows", f"they take {format_bytes(rows)}, and pages would take {format_bytes(pages)}"
    return "pages", "flash attention reads them in place"
