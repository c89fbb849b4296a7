"""The sizes of transformers' paged cache: how many pages there are, and the bytes that its opening allocates. Pure.

``generation/paged_cache.py`` opens one, and finds the sizes of a model. A *page* holds some tokens' keys and values of one
layer; a *block* the pages of all layers of one kind of attention; a *sector* is the smallest unit that every kind can divide
into its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from epslots.layout import align

# Allocations of transformers' ``PagedAttentionCache`` and ``ContinuousBatchingIOs`` beside pages.
_SECTOR_ALIGNMENT = 128
_SPARE_SECTORS = 2  # for padding
_SMALL_INPUTS = 7  # int32, a number each for a step's tokens
_INPUT_ALIGNMENT = 32
_INT32, _INT64 = 4, 8


def cache_blocks(kv_tokens: int, page_tokens: int, layers: Sequence[int]) -> int:
    """Blocks (pages of all layers) of a cache in which one request of ``kv_tokens`` fits.

    Each kind of attention takes whole sectors. So beside the tokens there must be room for every kind but one to leave a
    sector half empty.

    Args:
        kv_tokens: tokens to hold at least.
        page_tokens: tokens of a page.
        layers: the number of layers of each kind of attention.
    """
    return -(-kv_tokens // page_tokens) + -(-(len(layers) - 1) * math.lcm(*layers) // sum(layers))


class PageSizes(msgspec.Struct, frozen=True):
    """The sizes of one model's paged cache.

    Attributes:
        layers: the number of layers of each kind of attention.
        layer_bytes: of one token's keys and values in one layer.
        page_tokens: tokens of a page.
        mask_bytes: of a number in attention masks; 0 = attention needs none.
        mask_rows: queries whose mask is in memory at a time; None = those of a whole step, for each kind of attention.
        request_pages: pages of a request that attention reads in place, at most; 0 = none.
    """

    layers: tuple[int, ...]
    layer_bytes: int
    page_tokens: int
    mask_bytes: int
    mask_rows: int | None = None
    request_pages: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(self.layers) * self.layer_bytes

    def nbytes(self, kv_tokens: int, max_requests: int, max_batch_tokens: int) -> int:
        """Bytes that opening the cache allocates: its pages, and a step's inputs, indices and masks."""
        kinds = len(self.layers)
        page_bytes = self.page_tokens * self.layer_bytes
        sector_bytes = math.lcm(*(count * page_bytes for count in self.layers), _SECTOR_ALIGNMENT)
        blocks = cache_blocks(kv_tokens, self.page_tokens, self.layers)
        sectors = max(1, -(-blocks * sum(self.layers) * page_bytes // sector_bytes))
        # The kind with the fewest layers gets the most tokens out of a sector.
        reads = sectors * sector_bytes // (min(self.layers) * self.layer_bytes) + max_batch_tokens
        inputs = _INT32 * (_SMALL_INPUTS * align(max_batch_tokens + 1, _INPUT_ALIGNMENT) + max_batch_tokens + 1)
        tables = _INT32 * min(max_requests, max_batch_tokens) * self.request_pages
        indices = _INT64 * (max_batch_tokens + reads)
        rows = kinds * max_batch_tokens if self.mask_rows is None else min(self.mask_rows, max_batch_tokens)
        masks = self.mask_bytes * rows * reads
        return (sectors + _SPARE_SECTORS) * sector_bytes + inputs + kinds * (tables + indices) + masks
