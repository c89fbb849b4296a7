"""Attention of a step over pages in which requests compute their prompts: each request's queries meet its own keys alone.

transformers packs a step into one sequence, and computes one product over the queries and the keys of all requests, of which a
mask leaves each query its own. For R prompts that is R times the multiplications, and a mask of all queries by all keys. Here
each chunk of a prompt has a product of its own, and all requests that decode share one (``paged_decoding.py``).

Suffixes: T queries and S keys of all requests, H heads, G heads of keys, D size of a head; R requests that decode, L keys of
the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from epslots.generation.single_queries import attend


class _Chunk(NamedTuple):
    """A request's queries and keys in the packed step.

    Attributes:
        mask: bool [1, 1, queries, keys], False where a query doesn't see a key; None: a query sees all keys up to its own.
    """

    queries: slice
    keys: slice
    mask: torch.Tensor | None


class _DecodingRows(NamedTuple):
    """The requests that decode.

    Attributes:
        query_R: places of their queries.
        key_RL: places of their keys, aligned at the last; before the first one, that one again.
        mask_R11L: False there; None if all have equally many.
    """

    query_R: torch.Tensor
    key_RL: torch.Tensor
    mask_R11L: torch.Tensor | None


class PromptReads:
    """What the layers of one kind of attention read in such a step.

    Args:
        queries, keys: of each request, in the order of the step; keys end with the queries' own.
        window: keys that a query sees, its own included; None = all before it.
        room: keys that may be gathered for the requests that decode; more are read request by request.
    """

    def __init__(
        self, queries: Sequence[int], keys: Sequence[int], window: int | None, room: int, device: torch.device
    ) -> None:
        decoding = [number for number, count in enumerate(queries) if count == 1]
        if len(decoding) * max((keys[number] for number in decoding), default=0) > room:
            decoding = []
        self._chunks: list[_Chunk] = []
        places: list[tuple[int, int, int]] = []
        first_query = first_key = 0
        for number, (query_count, key_count) in enumerate(zip(queries, keys, strict=True)):
            end_query, end_key = first_query + query_count, first_key + key_count
            if number in decoding:
                places.append((first_query, first_key, end_key))
            else:
                mask = _mask(query_count, key_count, window, device)
                self._chunks.append(_Chunk(slice(first_query, end_query), slice(first_key, end_key), mask))
            first_query, first_key = end_query, end_key
        self._decoding = _rows_of(places, device) if places else None

    def attend(
        self, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[1, T, H, D] for queries [1, H, T, D], and keys and values [1, G, S, D]."""
        kwargs.pop("is_causal", None)
        found = query.new_empty(1, query.shape[2], query.shape[1], values.shape[3])
        for queries, own, mask in self._chunks:
            given = query[:, :, queries], keys[:, :, own], values[:, :, own]
            found[:, queries], _ = attend(module, *given, mask, is_causal=mask is None, **kwargs)
        if self._decoding is not None:
            query_R, key_RL, mask_R11L = self._decoding
            key_RGLD, value_RGLD = (states[0][:, key_RL].transpose(0, 1) for states in (keys, values))
            query_RH1D = query[0][:, query_R].transpose(0, 1).unsqueeze(2)
            found_R1HD, _ = attend(module, query_RH1D, key_RGLD, value_RGLD, mask_R11L, **kwargs)
            found[0, query_R] = found_R1HD[:, 0]
        return found


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    if queries == keys and (window is None or keys <= window):
        return None
    last_Q1, key_K = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    seen_QK = key_K <= last_Q1
    if window is not None:
        seen_QK &= key_K > last_Q1 - window
    return seen_QK[None, None]


def _rows_of(places: Sequence[tuple[int, int, int]], device: torch.device) -> _DecodingRows:
    query_R, first_R, end_R = torch.tensor(places).to(device).t()
    longest = max(end - first for _, first, end in places)
    place_RL = end_R[:, None] - torch.arange(longest, 0, -1, device=device)
    equal = all(end - first == longest for _, first, end in places)
    mask_R11L = None if equal else (place_RL >= first_R[:, None])[:, None, None]
    return _DecodingRows(query_R, torch.maximum(place_RL, first_R[:, None]), mask_R11L)
