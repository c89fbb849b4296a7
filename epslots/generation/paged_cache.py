"""transformers' paged KV cache: the models that it can serve, its size, and its opening.

transformers keeps the keys and values of all running requests in *pages* of one tensor, and its scheduler puts the next tokens
of any requests into one batch ("continuous batching"). Two of its assumptions don't hold everywhere:

- Every layer's keys and values have the shape [heads, head size] of the configuration. Latent attention (MLA) has keys wider
  than values; gemma4's layers differ in both numbers. ``flatten_rows`` keeps such layers in rows of one width.
- The process has no other use for torch's random numbers: opening a cache seeds them. ``open_processor`` puts them back.

``repeatable_step.py`` removes the third: that a forward pass that began ends well.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads
from transformers.utils.generic import is_flash_attention_requested

from epslots.config import EngineConfig
from epslots.errors import DoesNotFitError
from epslots.generation.attention_switch import AttentionSwitch
from epslots.generation.page_scheduler import SCHEDULER
from epslots.generation.paged_invariance import IMPLEMENTATION
from epslots.generation.positions import depends_on_length
from epslots.models.batch_invariance import is_batch_invariant
from epslots.models.experts_interface import mixes_tokens
from epslots.models.page_sizes import PageSizes, cache_blocks

# Tokens of one page. A request holds whole pages, so small ones waste little; flash attention's kernel needs 256.
PAGE_TOKENS = 16
FLASH_PAGE_TOKENS = 256
# Queries of a prompt that attend at a time where requests are read one by one (``paged_prompts.py``): with a mask in memory.
MASK_ROWS = 256
# Pages of a request that flash attention's kernel reads in place, at most: transformers' default.
FLASH_REQUEST_PAGES = 32


def paging_obstacle(model: PreTrainedModel) -> str | None:
    """Why the model's requests can't be kept in pages, as a sentence's end; None if they can.

    Decided without a forward pass of the model: by its configuration, its class, and the angles of its rotary embeddings.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if model._is_stateful:
        return "some of its layers keep a recurrent state"
    if not model._supports_attention_backend:
        return "its attention isn't routed through transformers' attention interface"
    try:
        group_layers_by_attn_type(config)
    except ValueError as error:
        return f"transformers keeps no pages for its layers ({error})"
    # The names of layer types hide the layers that share a cache in gemma3n.
    kept = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kept:
        return f"its layers keep more than keys and values ({', '.join(sorted(kind.__name__ for kind in kept))})"
    if mixes_tokens(model):
        return "its tokens choose experts for one another"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "paged attention has no soft cap"
    if not config.is_heterogeneous:
        heads, kept_heads = config.num_attention_heads, find_num_key_value_heads(config)
        groups = {module.num_key_value_groups for module in _attentions(model) if hasattr(module, "num_key_value_groups")}
        if groups - {heads // kept_heads}:
            return "its attention repeats keys and values before it would page them"
    if depends_on_length(model):
        return "its rotary embedding depends on the longest sequence of a batch"
    return _implementation_obstacle(model)


def _implementation_obstacle(model: PreTrainedModel) -> str | None:
    implementation = model.config._attn_implementation
    if implementation == "sdpa" or is_flash_attention_requested(requested_attention_implementation=implementation):
        return None
    if implementation not in ("eager", "paged|eager"):
        return f"its attention implementation is {implementation!r} (allowed: sdpa, eager, flash)"
    # "paged|eager" computes masks, scales and sinks, and leaves out everything else that a model's own eager attention does.
    if model._supports_sdpa or any(hasattr(module, "sinks") for module in model.modules()):
        return None
    return "its eager attention may do what paged attention doesn't"


def _attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's modules that fill a cache."""
    return [module for module in model.get_decoder().modules() if hasattr(module, "layer_idx")]


def attention_of_pages(model: PreTrainedModel) -> AttentionSwitch:
    """The attention of the modules that fill a cache."""
    return AttentionSwitch(model, _attentions(model))


def reads_by_request(model: PreTrainedModel) -> bool:
    """Whether a request's queries meet only its own keys (``paged_decoding.py``), without transformers' masks."""
    return attention_of_pages(model).implementations == {"sdpa"}


def page_sizes(model: PreTrainedModel) -> PageSizes:
    """The sizes of the paged cache that ``open_processor`` opens for a model, which may be on the meta device."""
    config, width = model.config.get_text_config(), row_width(model)
    flash, groups = is_flash_attention_requested(config), group_layers_by_attn_type(config)
    numbers = find_num_key_value_heads(config) * find_head_dim(config) if width is None else width
    item = model.dtype.itemsize
    return PageSizes(
        layers=tuple(map(len, groups.values())),
        layer_bytes=2 * numbers * item,
        page_tokens=FLASH_PAGE_TOKENS if flash else PAGE_TOKENS,
        mask_bytes=0 if flash or is_batch_invariant(model) else item,
        mask_rows=MASK_ROWS if reads_by_request(model) else None,
        request_pages=FLASH_REQUEST_PAGES if flash and width is None and groups.keys() == {FULL_ATTENTION} else 0,
    )


def open_processor(model: PreTrainedModel, engine: EngineConfig) -> tuple[Any, Any]:
    """Open a paged cache for the model, with a ``PageScheduler``, and no thread.

    A batch-invariant model's attention is replaced by ``paged_invariance.py``'s, which takes no masks.

    Args:
        model: served from the cache.
        engine: the size of the cache and of a step.

    Returns:
        transformers' manager, which takes requests and returns tokens, and its batch processor, which advances them.

    Raises:
        DoesNotFitError: cache and batches exceed the device's free memory.
    """
    config, kv_tokens = model.config.get_text_config(), engine.planned_tokens
    sizes, flash, width = page_sizes(model), is_flash_attention_requested(config), row_width(model)
    implementation = model.config._attn_implementation
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=sizes.page_tokens,
            num_blocks=cache_blocks(kv_tokens, sizes.page_tokens, sizes.layers),
            max_batch_tokens=engine.max_batch_tokens,
            max_requests_per_batch=engine.max_requests,
            allow_block_sharing=engine.prefix_cache,
            scheduler_type=SCHEDULER,
            # 0 = none: reading pages in place needs the shape that the configuration states.
            max_blocks_per_request=None if flash and width is None else 0,
            # A step is over when it returns; its MoE layers talk to the host and to other ranks, which no graph can hold.
            use_async_batching=False,
            use_cuda_graph=False,
            # True would load kernels from the hub.
            auto_switch_to_flash=False,
            # True would set an environment variable.
            disable_nccl_graph_mixing=False,
            seed=0,
        ),
    )
    try:
        cuda = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), contextlib.ExitStack() as meanwhile:
            if is_batch_invariant(model):
                model.set_attn_implementation(IMPLEMENTATION)
            elif reads_by_request(model):  # transformers would allocate masks
                meanwhile.enter_context(attention_of_pages(model).to(IMPLEMENTATION))
            processor = _processor(manager, None if width is None else rows_config(config, width))
    except MemoryError as error:
        model.set_attn_implementation(implementation)
        raise DoesNotFitError(
            f"a KV cache of {kv_tokens} tokens and batches of {engine.max_batch_tokens} don't fit on {model.device}: {error} "
            f"(bytes)"
        ) from error
    return manager, processor


def _processor(manager: Any, rows: PretrainedConfig | None) -> Any:
    """The manager's batch processor; over a cache of flat rows if their configuration is given."""
    if rows is None:
        return manager._create_batch_processor()
    model, manager.model = manager.model, _ModelStub(manager.model, rows)
    try:
        processor = manager._create_batch_processor()
    finally:
        manager.model = model
    flatten_rows(processor.cache)
    return processor


class _ModelStub:
    """Stands in for a model while its cache is made: the same but for the configuration.

    The model's own configuration stays as it is: with MLA, rotary embeddings read their head size from it, some in every
    forward pass.
    """

    def __init__(self, model: PreTrainedModel, config: PretrainedConfig) -> None:
        self.config = config
        self.device = model.device
        self.dtype = model.dtype
        self._supports_logits_to_keep = model._supports_logits_to_keep


def row_width(model: PreTrainedModel) -> int | None:
    """Numbers in the widest row of keys or values of one token in any layer.

    None where all layers keep the heads and the head size of the configuration.
    """
    config = model.config.get_text_config()
    widths = set()
    for module in _attentions(model):
        projections = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
        widths |= {projection.out_features for projection in projections if isinstance(projection, torch.nn.Linear)}
    if config.is_heterogeneous:
        return max(widths)
    if hasattr(config, "qk_nope_head_dim"):
        return int(config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim))
    return None if widths <= {find_num_key_value_heads(config) * find_head_dim(config)} else max(widths)


def rows_config(config: PretrainedConfig, width: int) -> PretrainedConfig:
    """A copy of a text configuration whose keys and values are one head of ``width``."""
    rows = copy.deepcopy(config)
    rows.per_layer_config = None
    rows.num_key_value_heads = 1
    rows.head_dim = width
    return rows


def flatten_rows(cache: PagedAttentionCache) -> None:
    """Let a cache of one wide head take keys and values of any narrower shape.

    Only this cache changes. Its results have the shape, per token, of its arguments.
    """
    paged_update = cache.update

    def update(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = cache.layer_to_allocator[layer_idx].head_dim
        keys, values = paged_update(_to_rows(key_states, width), _to_rows(value_states, width), layer_idx, kwargs)
        return _from_rows(keys, key_states), _from_rows(values, value_states)

    cache.update = update


def _to_rows(states: torch.Tensor, width: int) -> torch.Tensor:
    """[1, heads, T, size] to [1, 1, T, width], padded with zeros."""
    rows = states.transpose(1, 2).flatten(2)
    return F.pad(rows, (0, width - rows.shape[-1])).unsqueeze(1)


def _from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[1, 1, S, width] to [1, heads, S, size]; ``like`` has these heads and this size."""
    heads, size = like.shape[1], like.shape[3]
    return rows[0, 0, :, : heads * size].view(1, -1, heads, size).transpose(1, 2)
