"""``CacheImage``s of requests in pages: keys and values, layer by layer, of all tokens or of a window's last ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from epslots.errors import RankMismatchError
from epslots.generation.cache_image import CacheImage, Places, TensorPlace
from epslots.generation.cache_layout import CacheLayout, KeptTensor, sequence_digest


def image_of_pages(
    cache: PagedAttentionCache, request_id: str, tokens: Sequence[int], computed: Callable[[], int | None] | None = None
) -> CacheImage:
    """The image of a request's pages, which hold these tokens. It is true until the request's next step.

    Args:
        computed: of a prompt that is being computed: how many of the tokens they hold; None = a step has to be repeated first.
    """

    def look() -> tuple[int, Places] | None:
        assert computed is not None
        return None if (now := computed()) is None else (now, _places(cache, request_id, now)[1])

    names, places = _places(cache, request_id, len(tokens) if computed is None else computed() or 0)
    kept = _kept(names, places, len(tokens))
    layout = CacheLayout("pages", len(tokens), sequence_digest(tokens), kept)
    return CacheImage(layout, places, look=None if computed is None else look)


def room_in_pages(cache: PagedAttentionCache, request_id: str, layout: CacheLayout) -> CacheImage:
    """The image of pages that were allocated to a request for a layout's tokens, to write into.

    Raises:
        RankMismatchError: the layout is that of another model, or of other settings.
    """
    names, places = _places(cache, request_id, layout.tokens)
    kept = _kept(names, places, layout.tokens)
    if layout.kind != "pages" or layout.tensors != kept:
        raise RankMismatchError(
            f"a request's cache of {len(layout.tensors)} tensors in {layout.kind} isn't of this rank's {len(kept)} in pages"
        )
    complete: Callable[[], None] = lambda: None  # noqa: E731
    return CacheImage(layout, places, on_complete=complete)


def _kept(names: Sequence[str], places: Places, tokens: int) -> tuple[KeptTensor, ...]:
    return tuple(place.kept(name, tokens) for name, place in zip(names, places, strict=True))


def _places(cache: PagedAttentionCache, request_id: str, tokens: int) -> tuple[list[str], list[TensorPlace]]:
    """The tensors of a request's pages by name, and their places: of a window, its last tokens."""
    names, places = [], []
    for allocator in cache.cache_allocators.values():
        # All tokens but those that a next one doesn't read, in the order of their positions.
        numbers = allocator.get_read_indices(request_id, tokens, 0)
        index = torch.tensor(numbers, dtype=torch.int64, device=cache.device)
        window = getattr(allocator, "sliding_window", None)
        for layer in allocator.layer_indices:
            for name, memory in zip(("keys", "values"), allocator._kv_token_views[layer], strict=True):
                names.append(f"{layer}.{name}")
                places.append(TensorPlace(memory, index, None if window is None else window - 1))
    return names, places
