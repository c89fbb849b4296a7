"""``CacheImage``s of requests in pages: keys and values, layer by layer, of all tokens or of a window's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from epslots.errors import RankMismatchError
from epslots.generation.cache_image import CacheImage, TensorPlace
from epslots.generation.cache_layout import CacheLayout, KeptTensor, sequence_digest


def image_of_pages(cache: PagedAttentionCache, request_id: str, tokens: Sequence[int]) -> CacheImage:
    """The image of a request's pages, which hold these tokens. It is true until the request's next step."""
    kept, places = _kept(cache, request_id, len(tokens))
    return CacheImage(CacheLayout("pages", len(tokens), sequence_digest(tokens), kept), places)


def room_in_pages(cache: PagedAttentionCache, request_id: str, layout: CacheLayout) -> CacheImage:
    """The image of pages that were allocated to a request for a layout's tokens, to write into.

    Raises:
        RankMismatchError: the layout is that of another model, or of other settings.
    """
    kept, places = _kept(cache, request_id, layout.tokens)
    if layout.kind != "pages" or layout.tensors != kept:
        raise RankMismatchError(
            f"a request's cache of {len(layout.tensors)} tensors in {layout.kind} isn't of this rank's {len(kept)} in pages"
        )
    complete: Callable[[], None] = lambda: None  # noqa: E731
    return CacheImage(layout, places, on_complete=complete)


def _kept(cache: PagedAttentionCache, request_id: str, tokens: int) -> tuple[tuple[KeptTensor, ...], list[TensorPlace]]:
    """The tensors of a request's pages, and their places: of a window, its last tokens."""
    kept, places = [], []
    for allocator in cache.cache_allocators.values():
        # All tokens but those that a next one doesn't read, in the order of their positions.
        numbers = allocator.get_read_indices(request_id, tokens, 0)
        index = torch.tensor(numbers, dtype=torch.int64, device=cache.device)
        for layer in allocator.layer_indices:
            for name, memory in zip(("keys", "values"), allocator._kv_token_views[layer], strict=True):
                dtype = str(memory.dtype).removeprefix("torch.")
                kept.append(KeptTensor(f"{layer}.{name}", dtype, len(numbers), tuple(memory.shape[1:])))
                places.append(TensorPlace(memory, index))
    return tuple(kept), places
