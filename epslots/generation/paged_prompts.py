"""Attention of a step over pages in which requests compute their prompts: each request's queries meet only its own keys.

transformers packs a step into one sequence, and computes one product over the queries and the keys of all requests, of which a
mask leaves each query its own. For R prompts that is R times the multiplications, and a mask of all queries by all keys. Here
each chunk of a prompt has a product of its own, and all requests that decode share one (``paged_decoding.py``).

Suffixes: T queries and S keys of all requests, H heads, G heads of keys, D size of a head; R requests that decode, L keys of
the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from epslots.generation.single_queries import attend


class _Chunk(NamedTuple):
    """A request's queries and keys in the packed step, or a part of these.

    Attributes:
        past: keys before the first query's own. None: there are none, each query sees all up to its own, and needs no mask.
    """

    queries: slice
    keys: slice
    past: int | None


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
    """The reads of the layers of one kind of attention in such a step.

    Args:
        queries, keys: of each request, in the order of the step; keys end with the queries' own.
        window: keys that a query sees, its own included; None = all before it.
        room: keys that may be gathered for the requests that decode; more are read request by request.
        mask: memory for masks: of so many queries as attend at a time, and all keys of a request.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int], window: int | None, room: int, mask: torch.Tensor) -> None:
        self._window, self._mask, most = window, mask.view(-1), len(mask)
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
                self._chunks += _parts(slice(first_query, end_query), slice(first_key, end_key), window, most)
            first_query, first_key = end_query, end_key
        self._decoding = _rows_of(places, mask.device) if places else None

    def _mask_of(self, queries: int, past: int) -> torch.Tensor:
        """The addend of scores, [1, 1, queries, past + queries]: minus infinity where a query doesn't see a key."""
        keys = past + queries
        mask_QK = self._mask[: queries * keys].view(queries, keys)
        mask_QK.fill_(-torch.inf).triu_(past + 1)
        if self._window is not None:
            last_Q1 = torch.arange(past, keys, device=mask_QK.device)[:, None]
            mask_QK.masked_fill_(torch.arange(keys, device=mask_QK.device) <= last_Q1 - self._window, -torch.inf)
        return mask_QK[None, None]

    def attend(
        self, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[1, T, H, D] for queries [1, H, T, D], and keys and values [1, G, S, D]."""
        kwargs.pop("is_causal", None)
        found = query.new_empty(1, query.shape[2], query.shape[1], values.shape[3])
        for queries, own, past in self._chunks:
            given = query[:, :, queries], keys[:, :, own], values[:, :, own]
            mask = None if past is None else self._mask_of(queries.stop - queries.start, past).to(query.dtype)
            found[:, queries], _ = attend(module, *given, mask, is_causal=mask is None, **kwargs)
        if self._decoding is not None:
            query_R, key_RL, mask_R11L = self._decoding
            key_RGLD, value_RGLD = (states[0][:, key_RL].transpose(0, 1) for states in (keys, values))
            query_RH1D = query[0][:, query_R].transpose(0, 1).unsqueeze(2)
            found_R1HD, _ = attend(module, query_RH1D, key_RGLD, value_RGLD, mask_R11L, **kwargs)
            found[0, query_R] = found_R1HD[:, 0]
        return found


def _parts(queries: slice, keys: slice, window: int | None, most: int) -> Iterator[_Chunk]:
    """A whole prompt that needs no mask, at once; otherwise ``most`` queries at a time, with keys up to the last one's own."""
    count, behind = queries.stop - queries.start, keys.stop - queries.stop
    if keys.stop - keys.start == count and (window is None or count <= window):
        yield _Chunk(queries, keys, None)
        return
    for first in range(queries.start, queries.stop, most):
        end = min(first + most, queries.stop)
        yield _Chunk(slice(first, end), slice(keys.start, end + behind), first + behind - keys.start)


def _rows_of(places: Sequence[tuple[int, int, int]], device: torch.device) -> _DecodingRows:
    query_R, first_R, end_R = torch.tensor(places).to(device).t()
    longest = max(end - first for _, first, end in places)
    place_RL = end_R[:, None] - torch.arange(longest, 0, -1, device=device)
    equal = all(end - first == longest for _, first, end in places)
    mask_R11L = None if equal else (place_RL >= first_R[:, None])[:, None, None]
    return _DecodingRows(query_R, torch.maximum(place_RL, first_R[:, None]), mask_R11L)
