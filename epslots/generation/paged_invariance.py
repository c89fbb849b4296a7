"""Attention of requests in pages whose results don't depend on the batch: the last part of ``batch_invariant=True``.

transformers' paged attention runs one softmax over the keys of all requests: a request's sums have other zeros between them,
and other bits, with other batch mates. ``PackedAttention`` computes a query's result from the query and the keys and values
that it attends to alone, by blocks of ``KEYS`` positions counted from the sequence's start, added one after the other in fp32.
All products have one shape, and an absent or masked block adds zeros, which changes no bit. (Fixed sizes of splits, not a
fixed number of them: "Defeating Nondeterminism in LLM Inference" by Thinking Machines Lab, SGLang's deterministic mode.)

Suffixes: I blocks of queries, B queries of one, N blocks of keys, L = N * KEYS keys, G heads of keys, R heads of queries that
share one, M = R * B rows of a product, T and S tokens of all requests, D and E sizes of a head's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from epslots.arrays import IntArray
from epslots.device_copy import to_device
from epslots.errors import ConfigError, UnsupportedModelError
from epslots.models.batch_invariance import is_batch_invariant, unknown_functions

IMPLEMENTATION = "epslots_batch_invariant"
KEYS = 64
# Rows of a product: queries times the heads that share their keys.
ROWS = 16
# Numbers of keys that are gathered at a time, at most; but a single block of queries always gathers all of its keys.
_GATHERED_NUMBERS = 2**22


def invariance_obstacle(model: PreTrainedModel) -> str | None:
    """Why a batch-invariant model's requests can't share a batch, as a sentence's end; None if they can.

    Alone, a request's forward passes have the same shapes each time, and so the same bits.
    """
    if not is_batch_invariant(model):
        return None
    if unknown := unknown_functions(model):
        return f"it calls {', '.join(unknown)}, whose results may depend on the batch"
    if is_flash_attention_requested(requested_attention_implementation=model.config._attn_implementation):
        return "flash attention's results may depend on the batch (allowed: sdpa, eager)"
    return None


@dataclass(frozen=True)
class Span:
    """A request's tokens in a packed batch.

    Attributes:
        queries: tokens of this step.
        end: position after the last of them.
    """

    queries: int
    end: int


class PackedAttention:
    """The attention of one batcher's model, as long as the batcher is open.

    Args:
        processor: transformers' batch processor, opened for a model with this attention (``open_processor``).
    """

    def __init__(self, processor: Any) -> None:
        assert processor.inputs_and_outputs.attention_mask is None
        processor.cache.epslots_attention = self
        self._spans: Sequence[Span] = ()
        self._parts: dict[tuple[int | None, int, int], list[_QueryBlocks]] = {}

    def prepare(self, spans: Sequence[Span]) -> None:
        """Set the requests of the next forward passes, in the batch's order."""
        self._spans = spans
        self._parts.clear()

    def __call__(
        self,
        query_HTD: torch.Tensor,
        key_GSD: torch.Tensor,
        value_GSE: torch.Tensor,
        *,
        window: int | None,
        scale: float,
        sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Each query's attention, [T, heads, E] in its dtype.

        Args:
            query_HTD: queries of all requests.
            key_GSD: keys of all requests, one after another: of the past and of this step.
            value_GSE: their values.
            window: positions that a query sees, itself included; None for all before it.
            scale: of the scores.
            sink_H: scores of attention sinks, whose values are zero.
        """
        heads, tokens, size = query_HTD.shape
        groups = key_GSD.shape[0]
        queries = max(1, ROWS * groups // heads)
        wide = torch.promote_types(query_HTD.dtype, torch.float32)
        query_GRTD = query_HTD.to(wide).view(groups, heads // groups, tokens, size)
        sink_GR = None if sink_H is None else sink_H.to(wide).view(groups, -1)
        result_THE = query_HTD.new_empty(tokens, heads, value_GSE.shape[2])
        numbers = groups * max(size, value_GSE.shape[2])
        for part in self._parts_for(window, queries, numbers, query_HTD.device):
            part_IBHE = part.attend(query_GRTD, key_GSD, value_GSE, scale, sink_GR)
            result_THE[part.query_IB[part.valid_IB]] = part_IBHE[part.valid_IB].to(result_THE.dtype)
        return result_THE

    def _parts_for(self, window: int | None, queries: int, numbers: int, device: torch.device) -> list[_QueryBlocks]:
        """The batch in parts that fit into memory; the same for all layers of a kind."""
        kind = window, queries, numbers
        if kind not in self._parts:
            max_blocks = max(1, _GATHERED_NUMBERS // (numbers * KEYS))
            blocks = _query_blocks(self._spans, window, queries)
            self._parts[kind] = [_QueryBlocks(rows, queries, window, device) for rows in _cut(blocks, max_blocks)]
        return self._parts[kind]


# Columns of a block of queries: the place of its first query in the batch, the number of its queries, the first one's
# position; the position of the request's first key, the distance from a key's position to its place; the first block of keys,
# and their number.
_FIRST, _COUNT, _POSITION, _OLDEST, _SHIFT, _BLOCK, _BLOCKS = range(7)


def _query_blocks(spans: Sequence[Span], window: int | None, queries: int) -> IntArray:
    """Blocks of up to ``queries`` queries of one request, int64 [I, 7]."""
    rows, places, keys = [], 0, 0
    for span in spans:
        start = span.end - span.queries
        oldest = 0 if window is None else max(0, start - window + 1)
        for first in range(0, span.queries, queries):
            count = min(queries, span.queries - first)
            position = start + first
            block = 0 if window is None else max(0, position - window + 1) // KEYS
            last = (position + count - 1) // KEYS
            rows.append((places + first, count, position, oldest, keys - oldest, block, last - block + 1))
        places += span.queries
        keys += span.end - oldest
    return np.array(rows, np.int64).reshape(-1, 7)


def _cut(rows_I7: IntArray, max_blocks: int) -> Iterator[IntArray]:
    """Parts of the rows with at most ``max_blocks`` blocks of keys together; rows with few blocks of keys come first."""
    rows_I7 = rows_I7[np.argsort(rows_I7[:, _BLOCKS], kind="stable")]
    start = 0
    while start < len(rows_I7):
        end = start + 1
        while end < len(rows_I7) and (end + 1 - start) * rows_I7[end, _BLOCKS] <= max_blocks:
            end += 1
        yield rows_I7[start:end]
        start = end


class _QueryBlocks:
    """Some blocks of queries, with the places of their keys.

    Attributes:
        query_IB: places of the queries in the batch; the last is repeated where a block isn't full.
        valid_IB: whether each is no repetition.
    """

    def __init__(self, rows_I7: IntArray, queries: int, window: int | None, device: torch.device) -> None:
        # At least two, because a batched product of one matrix may take the kernel of a plain one.
        self._blocks = max(2, int(rows_I7[:, _BLOCKS].max()))
        columns = to_device(rows_I7, device).t()[:, :, None]
        first, count, position, oldest, shift, block, _ = columns
        turn_B = torch.arange(queries, device=device)
        self.valid_IB = turn_B < count
        self.query_IB = first + torch.minimum(turn_B, count - 1)
        position_IL = block * KEYS + torch.arange(self._blocks * KEYS, device=device)
        present_IL = (position_IL >= oldest) & (position_IL < position + count)
        self._place_IL = torch.where(present_IL, position_IL + shift, 0)
        self._absent_IL1 = ~present_IL[..., None]
        query_IB1, key_I1L = (position + turn_B)[..., None], position_IL[:, None]
        hidden_IBL = ~present_IL[:, None] | (key_I1L > query_IB1)
        if window is not None:
            hidden_IBL |= key_I1L <= query_IB1 - window
        self._hidden_IN1BK = hidden_IBL.unflatten(2, (self._blocks, KEYS)).transpose(1, 2).unsqueeze(2)

    def attend(
        self,
        query_GRTD: torch.Tensor,
        key_GSD: torch.Tensor,
        value_GSE: torch.Tensor,
        scale: float,
        sink_GR: torch.Tensor | None,
    ) -> torch.Tensor:
        """The queries' attention, [I, B, heads, E]."""
        groups, shared, _, size = query_GRTD.shape
        items, queries = self.query_IB.shape
        lead, rows = (groups, items, self._blocks), shared * queries
        query_GIMD = query_GRTD[:, :, self.query_IB].transpose(1, 2).reshape(groups, items, 1, rows, size)
        key_GINKD, value_GINKE = (self._blocks_of(states, query_GRTD.dtype) for states in (key_GSD, value_GSE))
        score = torch.bmm(
            query_GIMD.expand(*lead, rows, size).reshape(-1, rows, size), key_GINKD.flatten(0, 2).transpose(1, 2)
        )
        score = (score * scale).view(*lead, shared, queries, KEYS)
        score.masked_fill_(self._hidden_IN1BK, -torch.inf)
        top = score.amax(dim=(2, -1), keepdim=True)
        if sink_GR is not None:
            sink = sink_GR[:, None, None, :, None, None]
            top = torch.maximum(top, sink)
        weight = torch.exp(score - top)
        total = _sum_blocks(_sum_keys(weight))
        if sink_GR is not None:
            total = total + torch.exp(sink - top)[:, :, 0, ..., 0]
        part = torch.bmm(weight.view(-1, rows, KEYS), value_GINKE.flatten(0, 2))
        result = _sum_blocks(part.view(*lead, shared, queries, -1)) / total[..., None]
        return result.permute(1, 3, 0, 2, 4).flatten(2, 3)

    def _blocks_of(self, states_GSD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Keys or values of each block [G, I, N, KEYS, D]; zeros at absent places, which hold other requests' keys."""
        chosen = states_GSD[:, self._place_IL].to(dtype)
        chosen.masked_fill_(self._absent_IL1, 0)
        return chosen.unflatten(2, (self._blocks, KEYS))


def _sum_keys(weight: torch.Tensor) -> torch.Tensor:
    """The sum over the keys of a block, the last dimension, by halves: torch's own sum promises no order."""
    while (half := weight.shape[-1] // 2) > 0:
        weight = weight[..., :half] + weight[..., half:]
    return weight[..., 0]


def _sum_blocks(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the blocks of keys, dimension 2, in their order: zeros before and behind change no bit of it."""
    first, *others = parts.unbind(2)
    total = first.clone()
    for part in others:
        total += part
    return total


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for packed batches; other callers are refused."""
    cache = kwargs.get("cache")
    if cache is None:
        raise ConfigError(
            "a batch-invariant model can't be called while an Engine serves requests with it; close the engine's batcher first"
        )
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} attends with {name}, which isn't batch-invariant here")
    layer: Any = module.layer_idx
    keys, values = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    result_THE = cache.epslots_attention(
        query[0],
        keys[0],
        values[0],
        window=getattr(cache.layer_to_allocator[layer], "sliding_window", None),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sink_H=getattr(module, "sinks", None),
    )
    return result_THE[None], None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
