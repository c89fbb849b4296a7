"""Attention of a step over pages in which every request decodes: each query meets only its own request's keys.

transformers packs a step into one sequence. Its attention is one product over the queries and the keys of all requests, of
which a mask leaves each query its own, and without flash attention each head gets a copy of the keys. For R requests that is R
times the multiplications. Where all of them have one token, their keys are read as R rows here, aligned at their last tokens:
the shape that ``generate`` has for a batch. A step with prompts is ``paged_prompts.py``'s.

Suffixes: R requests, S positions of the longest, H heads, G heads of keys, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from epslots.arrays import IntArray
from epslots.device_copy import to_device
from epslots.generation.paged_cache import MASK_ROWS, attention_of_pages, reads_by_request
from epslots.generation.paged_prompts import PromptReads
from epslots.generation.single_queries import attend

IMPLEMENTATION = "epslots_paged_decoding"


class Reads(NamedTuple):
    """The reads of the cache by the layers of one kind of attention in a step.

    Attributes:
        cells: int64 [R * S]; zeros, which stand for empty keys, before the first position of a shorter request.
        mask_R11S: False there; None if all are equally long.
    """

    cells: torch.Tensor
    mask_R11S: torch.Tensor | None

    def attend(
        self, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """[1, R, H, D] for queries [1, H, R, D], and keys and values [1, G, R * S, D]."""
        requests = query.shape[2]
        key_RGSD, value_RGSD = (states[0].unflatten(1, (requests, -1)).transpose(0, 1) for states in (keys, values))
        query_RH1D = query[0].transpose(0, 1).unsqueeze(2)
        found_R1HD, _ = attend(module, query_RH1D, key_RGSD, value_RGSD, self.mask_R11S, **kwargs)
        return found_R1HD.transpose(0, 1)


class PagedDecoding:
    """The attention of one batcher's model.

    Args:
        model: with transformers' "sdpa" attention; with another one, nothing changes.
        processor: transformers' batch processor.

    Attributes:
        obstacle: why the model's steps take the usual path, as a sentence's end: its attention is another one. None if not.
        lengths: of each kind of attention in the order of the cache's allocators, the tokens that each request of the prepared
            batch reads, int64 [R]; empty if the batch has prompts, or the rows would take more room than the cache.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self._batch, self._cache = processor.inputs_and_outputs, processor.cache
        self._switch = attention_of_pages(model)
        self.obstacle = pages_obstacle(model)
        self.lengths: list[IntArray] = []
        self._with_prompts: list[PromptReads] = []
        tokens, reads = self._batch.write_index_storage.shape[1], self._room
        rows = 0 if self.obstacle is not None else min(MASK_ROWS, tokens)
        self._mask = torch.empty(rows, reads, dtype=model.dtype, device=self._batch.device)
        self._prepare_packed = self._batch.prepare_batch_tensors
        self._batch.prepare_batch_tensors = self._prepare

    def _prepare(self, requests_in_batch: Sequence[FutureRequestState], **sizes: Any) -> None:
        """Prepare a batch as transformers does."""
        self.lengths, self._with_prompts = [], []
        if self.obstacle is not None:
            self._prepare_packed(requests_in_batch=requests_in_batch, **sizes)
            return
        queries = [future.query_length for future in requests_in_batch]
        self.lengths = self._lengths(requests_in_batch)
        if max(queries) > 1 or not sizes["max_kv_read"] or len(queries) * max(map(max, self.lengths)) > self._room:
            kinds = zip(self._cache.cache_allocators.values(), self.lengths, strict=True)
            self._with_prompts = [
                PromptReads(queries, keys.tolist(), getattr(kind, "sliding_window", None), self._room, self._mask)
                for kind, keys in kinds
            ]
            self.lengths = []
        self._prepare_packed(requests_in_batch=requests_in_batch, **sizes)

    @property
    def _room(self) -> int:
        """Keys that may be gathered: packed reads have room for all tokens of the cache."""
        return int(self._batch.read_index_storage.shape[1])

    def _lengths(self, requests: Sequence[FutureRequestState]) -> list[IntArray]:
        """Tokens that each request reads, by kind of attention."""
        return [
            np.array([kind.get_seqlen_k(one.state.position_offset, one.query_length) for one in requests], np.int64)
            for kind in self._cache.cache_allocators.values()
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the model computes the prepared batch. Not for several threads at once."""
        if self._with_prompts:
            with self.reading(self._with_prompts):
                yield
            return
        if not self.lengths:
            yield
            return
        inputs = self._batch.get_model_kwargs
        reads = [_aligned_here(*each) for each in zip(self._batch.read_index_storage, self.lengths, strict=True)]
        self._batch.get_model_kwargs = lambda use_padding=False: (
            inputs(use_padding) | {"read_index": [read.cells for read in reads]}
        )
        try:
            with self.reading(reads):
                yield
        finally:
            self._batch.get_model_kwargs = inputs

    @contextmanager
    def reading(self, reads: Sequence[Reads | PromptReads]) -> Iterator[None]:
        """Within the context, the model's attention reads so, by kind of attention; its arguments have the cells."""
        self._cache.epslots_reads = reads
        try:
            with self._switch.to(IMPLEMENTATION):
                yield
        finally:
            del self._cache.epslots_reads


def pages_obstacle(model: PreTrainedModel) -> str | None:
    """Why steps that only decode can't read pages by rows, as a sentence's end; None if they can.

    Args:
        model: may be on the meta device.
    """
    return None if reads_by_request(model) else "its pages are read by another attention than torch's"


@contextmanager
def in_turn(batch: Any) -> Iterator[None]:
    """Within the context, transformers' own stream comes after what is queued on the current one, and before what follows.

    It computes there, and nothing else would order its reads of the batch's indices, our uploads, and fetches into slots.
    """
    if batch.compute_stream is None:
        yield
        return
    here = torch.cuda.current_stream(batch.device)
    batch.compute_stream.wait_stream(here)
    try:
        yield
    finally:
        here.wait_stream(batch.compute_stream)


def _aligned_here(index: torch.Tensor, length_R: IntArray) -> Reads:
    """``aligned`` for lengths on the host."""
    longest = int(length_R.max())
    if int(length_R.min()) == longest:
        return Reads(index[: len(length_R) * longest], None)
    end_R, lengths = to_device(np.stack([length_R.cumsum(), length_R]), index.device)
    return aligned(index, end_R, lengths, longest)


def aligned(index: torch.Tensor, end_R: torch.Tensor, length_R: torch.Tensor, span: int) -> Reads:
    """The reads of requests whose positions stand one after another in ``index``, aligned at their last positions.

    Args:
        index: int64, cells.
        end_R: int64, where each request's positions end.
        length_R: int64, their numbers.
        span: S, at least the longest.
    """
    back_S = torch.arange(span, 0, -1, device=index.device)
    present_RS = back_S <= length_R[:, None]
    place_RS = (end_R[:, None] - back_S).clamp_(min=0)
    return Reads(index[place_RS].mul_(present_RS).flatten(), present_RS[:, None, None])


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for such steps: [1, T, H, D] for T queries [1, H, T, D]; masks aren't used."""
    layer = module.layer_idx
    keys, values = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    reads: Reads | PromptReads = cache.epslots_reads[cache.layer_to_allocator[layer].index]
    return reads.attend(module, query, keys, values, **kwargs), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
