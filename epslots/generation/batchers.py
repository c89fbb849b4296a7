"""``batcher_for``: the batcher that serves a model, by what its layers keep."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from epslots.config import EngineConfig
from epslots.errors import UnsupportedModelError
from epslots.generation.absorbed_attention import keeps_latents
from epslots.generation.batcher import Batcher, check_servable
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.paged_invariance import invariance_obstacle
from epslots.generation.row_batcher import RowBatcher
from epslots.models.batch_invariance import is_batch_invariant

logger = logging.getLogger(__name__)


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
    kind, reason = choose_cache(model, config.cache)
    logger.info("%s: requests are kept in %s, because %s", type(model).__name__, kind, reason)
    return PagedBatcher(model, **settings) if kind == "pages" else RowBatcher(model, **settings)


def choose_cache(model: PreTrainedModel, cache: str = "auto") -> tuple[str, str]:
    """The cache that serves a model, "pages" or "rows"; and why, as the end of a sentence.

    Flash attention reads pages in place. Without it, a step that computes prompts masks one product over the queries and keys
    of all requests; steps that only decode take about as long with both (``epslots bench batch --parts caches``).

    Args:
        model: may be on the meta device.
        cache: the setting of ``EngineConfig``; "auto" = the cache that serves the model best.

    Raises:
        UnsupportedModelError: it can't be served from the pages that are asked for.
    """
    obstacle = None if cache == "rows" else paging_obstacle(model) or invariance_obstacle(model)
    if cache == "pages" and obstacle is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be served from pages: {obstacle}; allowed: cache='rows' or 'auto'"
        )
    if cache != "auto":
        return cache, "it was asked for"
    if obstacle is not None:
        return "rows", obstacle
    if is_batch_invariant(model):
        return "pages", "they can be batch-invariant; rows would be computed one at a time"
    if keeps_latents(model):
        return "rows", "they keep latents as they are, and pages would expand them"
    if is_flash_attention_requested(requested_attention_implementation=model.config._attn_implementation):
        return "pages", "flash attention reads them in place"
    return "rows", "without flash attention pages need masks over all requests"
